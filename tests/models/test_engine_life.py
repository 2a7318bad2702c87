"""An engine's life: its thread rests when nobody comes, is there for whoever does, and a broken engine is replaced."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from causal_models import build, serve
from conftest import until
from loaded_parts import noted_models, noted_parts
from task_models import on_one_thread

from huggingface.engine import engine as engine_module
from huggingface.engine.engine import Engine
from huggingface.engine.ticket import Ticket
from huggingface.errors import Cancelled, EngineFailed
from huggingface.model.loaded import LoadedModel
from huggingface.tasks.runner import TaskRunner
from huggingface.types import EngineOptions, GenerationRequest

API = "/api/huggingface"
GREEDY = {"do_sample": False, "max_new_tokens": 4}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with on_one_thread():
        yield


@pytest.fixture
def resting(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets after how many seconds an engine's thread ends."""
    return lambda seconds: monkeypatch.setattr(engine_module, "_IDLE", seconds)


@pytest.fixture
def family() -> Iterator[Callable[[str], LoadedModel]]:
    """Serves models by the names of their families; they are closed at the end."""
    served: list[LoadedModel] = []

    def make(name: str) -> LoadedModel:
        served.append(serve(name, *build(name)))
        return served[-1]

    yield make
    for loaded in served:
        loaded.close()


def threads_of(*names: str) -> list[str]:
    """The engines' threads that there are, of these models."""
    wanted = {f"engine-tiny/{name}" for name in names}
    return [thread.name for thread in threading.enumerate() if thread.name in wanted]


def text(loaded: LoadedModel, **parameters: Any) -> str:
    """What a model says to the cat."""
    return list(loaded.generate(GenerationRequest({**GREEDY, **parameters}, prompt="The cat")))[-1].whole or ""


# Rest -----------------------------------------------------------------------------------------------------------------


def test_models_that_nobody_uses_have_no_thread_and_serve_whoever_comes(resting: Any, family: Any) -> None:
    """After some idle seconds an engine's thread ends; requests of any kind begin another, and are answered as ever."""
    resting(0.1)
    models = [family("llama"), family("gpt2"), family("bloom")]
    names = ("llama", "gpt2", "bloom")
    assert threads_of(*names) == []
    first = [(text(each), each.run("text-generation", "The cat", GREEDY)) for each in models]
    features = [each.run("feature-extraction", "The cat", {}) for each in models]
    assert len(threads_of(*names)) >= 1
    for each in models:
        assert each.status.state == "running"
        assert not each.failed
    for _ in range(3):
        until(lambda: not threads_of(*names))
        assert [text(each) for each in models] == [said for said, _ in first]
        until(lambda: not threads_of(*names))
        assert [each.run("text-generation", "The cat", GREEDY) for each in models] == [told for _, told in first]
        until(lambda: not threads_of(*names))
        assert [each.run("feature-extraction", "The cat", {}) for each in models] == features


def test_a_thread_rests_only_when_nothing_is_to_be_done(resting: Any, family: Any) -> None:
    """However short the rest, whoever runs or waits keeps the thread, and there is one of it."""
    resting(0.0)
    loaded = family("llama")
    ticket = loaded.generate(GenerationRequest({**GREEDY, "max_new_tokens": 300, "min_new_tokens": 300}, prompt="The"))
    seen = set()
    while not ticket.done:
        seen.add(len(threads_of("llama")))
        time.sleep(0.001)
    assert seen <= {0, 1}  # 0: it has ended since
    assert list(ticket)[-1].usage.completion_tokens == 300


def test_no_request_is_lost_between_rest_and_work(resting: Any, family: Any) -> None:
    """With a thread that rests at once, each of very many requests that come in that moment is answered."""
    resting(0.0)
    loaded = family("llama")
    said, told = text(loaded, max_new_tokens=1), loaded.run("text-generation", "The cat", GREEDY)
    features = loaded.run("feature-extraction", "cat", {})
    engine = loaded.engine

    def ask(number: int) -> None:
        for turn in range(25):
            kind = (number + turn) % 5
            if kind == 0:
                assert text(loaded, max_new_tokens=1) == said
            elif kind == 1:
                assert loaded.run("text-generation", "The cat", GREEDY) == told
            elif kind == 2:
                assert torch.allclose(
                    torch.tensor(loaded.run("feature-extraction", "cat", {})), torch.tensor(features), atol=1e-4
                )
            elif kind == 3:
                assert text(loaded, num_beams=2)
            else:
                ticket = loaded.generate(GenerationRequest({**GREEDY, "max_new_tokens": 300}, prompt="The"))
                ticket.cancel()
                with pytest.raises(Cancelled):
                    list(ticket)
            time.sleep(0.0005 * (number % 3))

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(ask, number) for number in range(6)]:
            done.result(120)
    for number in range(2000):
        assert engine.call(lambda number=number: number) == number
    until(lambda: not threads_of("llama"))
    assert loaded.status.running == loaded.status.waiting == loaded.status.slots == loaded.status.tasks == 0
    assert loaded.status.state == "running"


def test_a_model_is_closed_while_it_rests(resting: Any, family: Any) -> None:
    """Closing needs no thread: the cache is let go, and whoever comes later is told."""
    resting(0.0)
    loaded = family("llama")
    assert text(loaded)
    engine, tasks = loaded.engine, loaded.tasks
    until(lambda: not threads_of("llama"))
    assert engine.status().kv_cache_bytes > 0
    engine.close()
    assert engine.status().kv_cache_bytes == 0
    engine.close()
    assert not engine.failed
    with pytest.raises(Cancelled):
        engine.call(lambda: None)
    with pytest.raises(Cancelled):
        loaded.run("text-generation", "The cat", GREEDY)
    with pytest.raises(Cancelled):
        tasks.submit("feature-extraction", "a", {}).future.result(0)
    engine.wake()
    assert threads_of("llama") == []


def test_closing_in_any_moment_answers_everyone(resting: Any) -> None:
    """Whether the thread works, rests or begins just then: each call has a result or is told, and no thread is left."""
    resting(0.0)
    model, tokenizer = build("gpt2")
    for number in range(150):
        engine = Engine("tiny/closing", None, TaskRunner("x", model, tokenizer, "causal-lm"), EngineOptions())

        def ask(engine: Engine = engine) -> int:
            count = 0
            while True:
                try:
                    assert engine.call(lambda: "done") == "done"
                    ticket = Ticket()
                    engine.submit_job(ticket, lambda _: None)
                    list(ticket)
                except Cancelled:
                    return count
                count += 1

        with ThreadPoolExecutor(3) as pool:
            asked: list[Future[int]] = [pool.submit(ask) for _ in range(2)]
            time.sleep(0.0002 * (number % 10))
            engine.close()
            for each in asked:
                each.result(10)
        until(lambda: not threads_of("closing"))


def test_each_of_an_engines_threads_is_made_ready_before_it_computes() -> None:
    """CUDA keeps the current device for each thread."""
    begun: list[str] = []
    model, tokenizer = build("llama")
    tasks = TaskRunner("tiny/llama", model, tokenizer, "causal-lm")
    engine = Engine(
        "tiny/begun", None, tasks, EngineOptions(), begin=lambda: begun.append(threading.current_thread().name)
    )
    assert engine.call(lambda: (threading.current_thread().name, list(begun))) == ("engine-tiny/begun", begun)
    assert begun == ["engine-tiny/begun"]
    engine.close()


# Breaking -------------------------------------------------------------------------------------------------------------


class Broken(GeneratorExit):
    """Something that nobody in the engine foresees: no error, and no panic of a library."""


@pytest.mark.parametrize("error", [Broken("a bug"), torch.AcceleratorError("CUDA error: device-side assert")])
def test_a_model_whose_engine_broke_is_loaded_anew_at_the_next_request(
    error: BaseException, app: Any, tiny: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everyone in the batch or the queue gets a 503 that says so, `/cache` shows it, and the next request is served."""
    client, model_id = app.test_client(), tiny("llama")
    fields = {"model_id": model_id, "name": "x", "model_type": "text-generation"}
    assert client.post(f"{API}/models", json=fields).status_code == 200
    generate = {"model_id": model_id, "prompt": "The cat", **GREEDY}
    pipeline = {"model_id": model_id, "task": "text-generation", "inputs": ["The cat", "A dog"], **GREEDY}
    with noted_parts() as parts:
        right = (client.post(f"{API}/generate", json=generate).get_json()["response"],)
    right += (client.post(f"{API}/pipeline", json=pipeline).get_json()["results"],)
    manager = app.extensions["local-llm"].manager
    old = manager.loaded()[model_id]
    runner = parts[model_id].runner
    forward, steps = runner.forward, []

    def breaks(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) > 20:
            raise error
        return forward(*arguments)

    monkeypatch.setattr(runner, "forward", breaks)
    long = {"max_new_tokens": 400, "min_new_tokens": 400}
    bodies = [("generate", {**generate, **long}), ("generate", {**generate, **long, "num_beams": 2})]
    bodies += [("pipeline", {**pipeline, **long})]
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(app.test_client().post, f"{API}/{path}", json=body) for path, body in bodies * 2]
        answers = [each.result(60) for each in asked]
    failed = [answer for answer in answers if answer.status_code != 200]
    assert len(failed) >= 2  # a beam search that had its turn before is done
    for answer in failed:
        assert answer.status_code == 503, answer.get_json()
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.get_json()["success"] is False
        assert model_id in answer.get_json()["error"]
        assert "loads it again" in answer.get_json()["error"]
    assert old.failed
    until(lambda: not threads_of("llama"))
    assert client.get(f"{API}/cache").get_json()["cached_models"][model_id]["engine"]["state"] == "failed"

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(app.test_client().post, f"{API}/generate", json=generate) for _ in range(4)]
        texts = {each.result(60).get_json()["response"] for each in asked}
    assert (*texts, client.post(f"{API}/pipeline", json=pipeline).get_json()["results"]) == right
    new = manager.loaded()[model_id]
    assert new is not old
    assert not new.failed
    assert client.get(f"{API}/cache").get_json()["cached_models"][model_id]["engine"]["state"] == "running"
    with pytest.raises((Cancelled, EngineFailed)):
        old.generate(GenerationRequest(GREEDY, prompt="The cat"))


def test_a_device_that_fails_in_a_task_breaks_the_engine_and_all_who_wait_are_told(
    app: Any, tiny: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, model_id = app.test_client(), tiny("distilbert-sst2")
    fields = {"model_id": model_id, "name": "x", "model_type": "sentiment-analysis"}
    assert client.post(f"{API}/models", json=fields).status_code == 200
    body = {"model_id": model_id, "task": "sentiment-analysis", "inputs": "The cat"}
    with noted_models() as read:
        right = client.post(f"{API}/pipeline", json=body).get_json()["results"]
    old = app.extensions["local-llm"].manager.loaded()[model_id]

    def fails(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(read[-1], "forward", fails)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: app.test_client().post(f"{API}/pipeline", json=body), range(4)))
    for answer in answers:
        if answer.status_code == 200:  # it came when the model had been loaded again
            assert answer.get_json()["results"] == right
        else:
            assert answer.status_code == 503, answer.get_json()
            assert "loads it again" in answer.get_json()["error"]
    assert {answer.status_code for answer in answers} != {200}
    assert client.post(f"{API}/pipeline", json=body).get_json()["results"] == right
    assert app.extensions["local-llm"].manager.loaded()[model_id] is not old
