"""The first answer is torch's: a graph is made while it answers, and takes over between two requests.

A conversion is held, where a test needs that, by the lock that another server would have while it makes the same graph.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import causal_models
import psutil
import pytest
import tiny_models
import torch
from conftest import Server
from filelock import FileLock
from safetensors.torch import load_file, save_file
from task_models import Models
from test_task_batching import near

import huggingface
from app import create_app
from config import Settings
from huggingface.cancellation import Cancellation
from huggingface.errors import Cancelled
from huggingface.loading import loader
from huggingface.loading.backend import Declined
from huggingface.loading.kept import FOLDER
from huggingface.loading.openvino import load as loading
from huggingface.loading.openvino.load import OpenVINO
from huggingface.loading.plan import look
from huggingface.manager.budget import Budget, Limit
from huggingface.manager.manager import ModelManager
from huggingface.progress import Progress
from huggingface.registry.records import LoadSettings, ModelRecord
from huggingface.registry.registry import ModelRegistry
from huggingface.types import GenerationRequest, LoadOptions

API = "/api/huggingface"
MODEL = "tiny/llama"
PROMPTS = ["The cat", "The little harbour", "One two three", "So it goes"]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.0}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the tiny models converted in this process, which takes a tenth of the time."""
    monkeypatch.setattr(loading, "CONVERTED_HERE_ASIDE", loading.CONVERTED_HERE)


@pytest.fixture
def another_process(_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have them converted as larger ones are, but as quickly as the tests run."""
    monkeypatch.setattr(loading, "CONVERTED_HERE_ASIDE", 0)
    monkeypatch.setattr(loading, "_NICE", 0)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models folder with one model whose large weights make its answers differ, and no graph."""
    model, tokenizer = causal_models.build("llama")
    folder = tmp_path / "models" / MODEL
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tmp_path / "models"


@pytest.fixture
def wanted() -> dict[str, str]:
    """What `generate` makes of each prompt."""
    model, tokenizer = causal_models.build("llama")
    texts = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        texts[prompt] = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


@pytest.fixture
def held(models: Path) -> Iterator[FileLock]:
    """The model's lock, as a server has it that makes its graph."""
    (models / MODEL / FOLDER).mkdir()
    with FileLock(models / MODEL / FOLDER / ".lock", thread_local=False) as lock:
        yield lock


@pytest.fixture
def app(models: Path, tmp_path: Path) -> Iterator[Any]:
    """An app as it is by default on a CPU, with the model registered."""
    app = start(models, tmp_path)
    yield app
    huggingface.close(app)


def start(models: Path, folder: Path, **settings: Any) -> Any:
    """An app on a models folder, its registry in `folder`."""
    registry = folder / "models.json"
    app = create_app(Settings(_env_file=None, registry=registry, models_dir=models, backend="auto", **settings))
    body = {"model_id": MODEL, "name": "llama", "model_type": "text-generation"}
    assert app.test_client().post(f"{API}/models", json=body).status_code in (200, 409)
    return app


@pytest.fixture
def manage(tmp_path: Path, models: Path) -> Iterator[Callable[..., ModelManager]]:
    """Makes managers with the models that are named."""
    made: list[ModelManager] = []

    def make(*records: ModelRecord, limit: int | None = None, **options: Any) -> ModelManager:
        registry = ModelRegistry(tmp_path / f"registry-{len(made)}.json")
        for record in records or (ModelRecord(MODEL, "llama", "text-generation"),):
            registry.add(record)
        budget = Budget({"*": Limit(bytes=limit)} if limit else None)
        made.append(ModelManager(registry, LoadOptions(models, "cpu", backend="auto"), budget=budget, **options))
        return made[-1]

    yield make
    for manager in made:
        manager.close()
        manager.statistics.close()


def generate(app: Any, prompt: str = PROMPTS[0], **fields: Any) -> Any:
    return app.test_client().post(f"{API}/generate", json={"model_id": MODEL, "prompt": prompt, **GREEDY, **fields})


def load(app: Any, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = app.test_client().post(f"{API}/models/{MODEL}/load", json=fields).json
    return answer


def answer(manager: ModelManager, prompt: str = PROMPTS[0], **fields: Any) -> tuple[str, str]:
    """What computes the model, and the text of an answer."""
    with manager.lease(MODEL, **fields) as model:
        made = list(model.generate(GenerationRequest({"do_sample": False, "max_new_tokens": 12}, prompt=prompt)))
        return model.effective["backend"], made[-1].whole or ""


def cache(app: Any) -> dict[str, Any]:
    shown: dict[str, Any] = app.test_client().get(f"{API}/cache").json
    return shown


def engine(app: Any) -> tuple[str, str | None]:
    """What computes the model, and why."""
    there = cache(app)["cached_models"][MODEL]
    return there["settings"]["backend"], there["backend_reason"]


def until(what: Callable[[], Any]) -> Any:
    """What it gives as soon as that is anything; the test's own time limit ends it else."""
    while not (found := what()):
        time.sleep(0.05)
    return found


def graphs(models: Path) -> list[str]:
    """What is kept in the model's folder besides the lock."""
    return [path.name for path in (models / MODEL / FOLDER).iterdir() if path.name != ".lock"]


# Torch answers first --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("another_process")
def test_torch_answers_while_the_graph_is_made_and_the_graph_answers_afterwards(
    app: Any, held: FileLock, models: Path, tmp_path: Path, wanted: dict[str, str]
) -> None:
    """`/cache` says so; the next server has the graph at once, and makes none."""
    assert generate(app).json["response"] == wanted[PROMPTS[0]]
    assert engine(app) == ("torch", "its graph is being made")
    shown = until(lambda: (found := cache(app)["conversions"][MODEL])["state"] == "converting" and found)
    assert shown["reason"] is None
    assert shown["bytes"] > 0
    assert shown["progress"]["phase"] == "waiting"
    before = cache(app)
    assert before["memory"]["cpu"]["bytes"] >= shown["bytes"] + before["cached_models"][MODEL]["weights_bytes"]
    loaded = load(app)
    assert (loaded["settings"]["backend"], loaded["backend_reason"]) == ("torch", "its graph is being made")
    estimate = app.test_client().get(f"{API}/models/{MODEL}/estimate").json
    assert (estimate["backend"], estimate["conversion_bytes"]) == ("torch", shown["bytes"])
    held.release()
    loaded = load(app, wait_for_graph=True)
    assert (loaded["settings"]["backend"], loaded["backend_reason"]) == ("openvino", None)
    assert engine(app) == ("openvino", None)
    assert generate(app).json["response"] == wanted[PROMPTS[0]]
    after = cache(app)
    assert after["conversions"] == {}
    assert after["memory"]["cpu"]["bytes"] < before["memory"]["cpu"]["bytes"] - shown["bytes"] // 2
    assert after["cached_models"][MODEL]["in_use"] == 0
    huggingface.close(app)
    [kept] = graphs(models)
    again = start(models, tmp_path)
    try:
        assert generate(again).json["response"] == wanted[PROMPTS[0]]
        assert engine(again) == ("openvino", None)
        assert cache(again)["conversions"] == {}
        assert graphs(models) == [kept]
    finally:
        huggingface.close(again)


def test_the_graph_takes_over_under_traffic_and_every_request_is_answered(
    app: Any, held: FileLock, wanted: dict[str, str]
) -> None:
    """From several callers at once, some of which stream: each text is that of `generate`, whole."""
    over = threading.Event()

    def call(number: int) -> int:
        made = 0
        while not over.is_set() or made % 4:
            prompt = PROMPTS[(number + made) % 4]
            answer = generate(app, prompt, stream=number % 2 == 1)
            assert answer.status_code == 200
            last = answer.data if number % 2 == 0 else answer.data.split(b"data: ")[-1]
            assert json.loads(last)["response"] == wanted[prompt], answer.data
            made += 1
        return made

    def watch() -> None:
        try:
            assert engine(app)[0] == "torch"
            held.release()
            until(lambda: engine(app)[0] == "openvino")
        finally:
            over.set()

    assert generate(app).status_code == 200
    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(call, number) for number in range(4)]
        pool.submit(watch).result()
        assert all(each.result() for each in calls)
    until(lambda: cache(app)["cached_models"][MODEL]["in_use"] == 0)


def test_the_events_of_a_load_tell_of_the_conversion_that_it_waits_for(app: Any) -> None:
    answer = app.test_client().post(
        f"{API}/models/{MODEL}/load", json={"stream": True, "wait_for_graph": True}, buffered=True
    )
    events = [json.loads(line[6:]) for line in answer.data.split(b"\n") if line.startswith(b"data: ")]
    phases = list(dict.fromkeys(event["progress"]["phase"] for event in events if "progress" in event))
    assert "convert" in phases
    assert events[-1]["settings"]["backend"] == "openvino"


def test_who_has_begun_with_torch_ends_with_torch_and_memory_comes_back_after_that(
    manage: Callable[..., ModelManager], held: FileLock, wanted: dict[str, str]
) -> None:
    """Its statistics, its settings and its time to go stay those of the model."""
    manager = manage(keep_alive=1000.0)
    with manager.lease(MODEL) as model:
        model.prepared()
        torchs = manager.budget.held(MODEL)
        held.release()
        until(lambda: manager.loaded()[MODEL] is not model)
        assert answer(manager) == ("openvino", wanted[PROMPTS[0]])
        assert manager.budget.held(f"{MODEL} before") == torchs
        assert manager.residents()[MODEL].users == 1
        made = list(model.generate(GenerationRequest({"do_sample": False, "max_new_tokens": 12}, prompt=PROMPTS[1])))
        assert made[-1].whole == wanted[PROMPTS[1]]
    until(lambda: not manager.budget.held(f"{MODEL} before"))
    until(lambda: model.status is None)
    assert manager.budget.held() == manager.budget.held(MODEL)
    assert manager.residents()[MODEL].expires_at is not None
    assert manager.statistics.shown()[MODEL]["loads"] == 1
    assert manager.unload(MODEL).was_loaded
    assert manager.budget.held() == {}


def test_a_model_that_embeds_is_taken_over_too(manage: Callable[..., ModelManager], models: Path) -> None:
    """Its vectors are those of transformers' pipeline, before and after."""
    name = tiny_models.build(models, "bert-embed")
    file = (
        models / name / "model.safetensors"
    )  # with smaller matrices its numbers do not hang on the last bit of a float
    tensors = {key: value * 0.3 if value.dim() > 1 else value for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    upstream = Models(models, lambda _: name).upstream("bert-embed", "feature-extraction", "the cat")
    manager = manage(ModelRecord(name, "embeds", "feature-extraction"))
    for computes in ("torch", "openvino"):
        with manager.lease(name) as model:
            assert (model.effective["backend"], model.backend_reason) == (
                computes,
                "its graph is being made" if computes == "torch" else None,
            )
            assert near(model.run("feature-extraction", "the cat", {}), upstream)
        manager.load(name, wait_for_graph=True)


# Who ends a conversion, and who does not ------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["auto", "openvino"])
def test_clients_that_leave_do_not_end_the_conversion(
    named: str, manage: Callable[..., ModelManager], held: FileLock, models: Path
) -> None:
    """However short their patience, the graph is there when it is made; asked for by name or not."""
    manager = manage(ModelRecord(MODEL, "llama", "text-generation", backend=named))
    seen = []
    for _ in range(2):
        with pytest.raises(Cancelled):
            manager.load(
                MODEL, wait_for_graph=True, cancellation=Cancellation(lambda: MODEL in manager.conversions.shown())
            )
        seen.append(manager.conversions.of(MODEL))
    assert seen[0] is seen[1] is not None, "the second goes on with what the first began"
    assert graphs(models) == []
    held.release()
    until(lambda: not manager.conversions.shown())
    assert manager.load(MODEL).effective["backend"] == "openvino"


def test_a_model_that_goes_by_itself_is_converted_all_the_same(
    manage: Callable[..., ModelManager], held: FileLock, wanted: dict[str, str]
) -> None:
    """Where every request lets the model go at its end, the conversion is not begun for ever."""
    manager = manage(keep_alive=0.0)
    assert answer(manager) == ("torch", wanted[PROMPTS[0]])
    until(lambda: not manager.loaded())
    first = manager.conversions.of(MODEL)
    assert answer(manager) == ("torch", wanted[PROMPTS[0]])
    assert manager.conversions.of(MODEL) is first
    held.release()
    until(lambda: not manager.conversions.shown())
    assert answer(manager) == ("openvino", wanted[PROMPTS[0]])


@pytest.mark.parametrize("how", ["unload", "clear", "remove", "other settings", "close"])
def test_what_takes_the_model_away_ends_its_conversion(
    how: str, manage: Callable[..., ModelManager], held: FileLock, models: Path
) -> None:
    """A graph that nothing will ask for is not made."""
    manager = manage()
    answer(manager)
    conversion = manager.conversions.of(MODEL)
    assert conversion is not None
    until(lambda: conversion.state == "converting")
    if how == "unload":
        manager.unload(MODEL)
    elif how == "clear":
        manager.unload_all()
    elif how == "remove":
        manager.remove(MODEL)
    elif how == "other settings":
        manager.load(MODEL, settings=LoadSettings(backend="torch"))
    else:
        manager.close()
    assert conversion.settled.done()
    assert manager.conversions.shown() == {}
    assert "conversion" not in " ".join(manager.budget.holders("cpu"))
    held.release()
    assert graphs(models) == []


def test_a_load_anew_goes_on_with_the_conversion_that_is_under_way(
    manage: Callable[..., ModelManager], held: FileLock
) -> None:
    manager = manage()
    answer(manager)
    conversion = manager.conversions.of(MODEL)
    manager.load(MODEL, force_reload=True)
    assert manager.conversions.of(MODEL) is conversion
    held.release()
    assert manager.load(MODEL, wait_for_graph=True).effective["backend"] == "openvino"


def test_a_server_that_is_killed_while_it_converts_harms_no_later_one(
    models: Path, start_server: Callable[..., Server], manage: Callable[..., ModelManager], wanted: dict[str, str]
) -> None:
    """What it had written goes, and the next one makes the graph."""
    server = start_server(LOCAL_LLM_MODELS_DIR=str(models), LOCAL_LLM_BACKEND="auto")
    server.add(MODEL, "text-generation")
    body = {"model_id": MODEL, "prompt": PROMPTS[0], **GREEDY}
    assert server.call("POST", "/generate", json=body).json()["response"] == wanted[PROMPTS[0]]
    until(lambda: psutil.Process(server.process.pid).children())
    server.stop(signal.SIGKILL)
    model, options = ModelRecord(MODEL, "llama", "text-generation"), LoadOptions(models, "cpu", backend="auto")
    lacks = OpenVINO().estimate(look(model, options, models / MODEL, LoadSettings()), options, None)
    assert isinstance(lacks, Declined)
    assert lacks.pending is not None
    name = Path(lacks.pending.key).name
    (models / MODEL / FOLDER / f".{name}.01234567.tmp").mkdir(parents=True)
    manager = manage()
    assert answer(manager) == ("torch", wanted[PROMPTS[0]])
    assert manager.load(MODEL, wait_for_graph=True).effective["backend"] == "openvino"
    assert graphs(models) == [name]
    assert answer(manager) == ("openvino", wanted[PROMPTS[0]])


def test_the_settings_of_a_load_outlast_a_takeover(manage: Callable[..., ModelManager], wanted: dict[str, str]) -> None:
    """What a load asked for over the record stays in effect when the graph computes the model."""
    manager = manage()
    assert manager.load(MODEL, settings=LoadSettings(slots=3)).effective["slots"] == 3
    effective = manager.load(MODEL, wait_for_graph=True).effective
    assert (effective["backend"], effective["slots"]) == ("openvino", 3)
    assert answer(manager) == ("openvino", wanted[PROMPTS[0]])


def test_a_conversion_that_failed_is_said_and_not_begun_at_every_load(
    manage: Callable[..., ModelManager], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch goes on; after an unload it is tried again."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho >> {tmp_path}/begun\nkill -KILL $$\n")
    program.chmod(0o755)
    real = sys.executable
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(loading, "CONVERTED_HERE_ASIDE", 0)
    manager = manage(keep_alive=0.0)
    for _ in range(3):
        answer(manager)
        until(lambda: not manager.loaded())
        until(lambda: manager.conversions.shown()[MODEL].state == "failed")
    assert (tmp_path / "begun").read_text() == "\n"
    with manager.lease(MODEL) as model:
        assert (model.effective["backend"], model.backend_reason) == ("torch", "its conversion ended with -9")
    monkeypatch.setattr(sys, "executable", real)
    monkeypatch.setattr(loading, "CONVERTED_HERE_ASIDE", loading.CONVERTED_HERE)
    manager.unload(MODEL)
    assert manager.load(MODEL, wait_for_graph=True).effective["backend"] == "openvino"
    assert len(graphs(models)) == 1


def test_a_graph_that_cannot_be_kept_takes_over_and_goes_with_the_model(
    manage: Callable[..., ModelManager], models: Path, wanted: dict[str, str]
) -> None:
    (models / MODEL / FOLDER).write_text("a file stands where the folder would be")
    manager = manage()
    assert answer(manager) == ("torch", wanted[PROMPTS[0]])
    own = manager.load(MODEL, wait_for_graph=True).setup.folder
    assert answer(manager) == ("openvino", wanted[PROMPTS[0]])
    assert own is not None
    assert (own / "graph.bin").is_file()
    manager.unload(MODEL)
    assert not own.exists()


# Memory ---------------------------------------------------------------------------------------------------------------


def test_a_conversion_that_can_never_fit_is_not_begun_and_says_why(
    manage: Callable[..., ModelManager], models: Path
) -> None:
    manager = manage(limit=300_000_000)
    assert answer(manager)[0] == "torch"
    until(lambda: manager.conversions.shown()[MODEL].state == "failed")
    reason = manager.conversions.shown()[MODEL].reason
    assert "models may have 300 MB" in (reason or "")
    assert manager.load(MODEL).backend_reason == reason
    assert answer(manager)[0] == "torch"
    assert not (models / MODEL / FOLDER).exists()


def test_a_conversion_waits_for_memory_and_begins_when_there_is_some(
    manage: Callable[..., ModelManager], held: FileLock
) -> None:
    """Nothing is taken from others for it."""
    manager = manage(limit=10**9)
    assert manager.budget.reserve_floor("another", "part", "cpu", 700_000_000)
    answer(manager)
    conversion = manager.conversions.of(MODEL)
    assert conversion is not None
    until(lambda: conversion.reason)
    assert conversion.state == "waiting"
    assert "of memory, and " in (conversion.reason or "")
    manager.budget.forget("another")
    until(lambda: conversion.state == "converting")
    held.release()
    assert manager.load(MODEL, wait_for_graph=True).effective["backend"] == "openvino"


def test_a_load_that_lacks_memory_has_that_of_a_conversion(
    manage: Callable[..., ModelManager], held: FileLock, models: Path
) -> None:
    """A model that somebody asks for comes before a graph that nobody waits for."""
    other = tiny_models.build(models, "gpt2")
    first = ModelRecord(MODEL, "llama", "text-generation", pinned=True)
    manager = manage(first, ModelRecord(other, "other", "text-generation", backend="torch"), limit=900_000_000)
    answer(manager)
    conversion = manager.conversions.of(MODEL)
    assert conversion is not None
    until(lambda: conversion.state == "converting")
    room = manager.budget.available("cpu")
    assert room is not None
    assert manager.budget.reserve_floor("another", "part", "cpu", room - 1000)
    manager.load(other)
    assert set(manager.loaded()) == {MODEL, other}
    assert conversion.reason is not None
    manager.unload(other)
    manager.budget.forget("another")
    held.release()
    assert manager.load(MODEL, wait_for_graph=True).effective["backend"] == "openvino"


def test_where_both_do_not_fit_torch_goes_first_when_nobody_uses_it(
    manage: Callable[..., ModelManager],
    held: FileLock,
    models: Path,
    wanted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model in use stays with torch, and says why; then the graph is opened, and callers wait for that."""
    monkeypatch.setattr(loading, "_CONVERTING", 0)
    model = ModelRecord(MODEL, "llama", "text-generation")
    options = LoadOptions(models, "cpu", backend="auto")
    by_torch = loader.estimate(model, options, models / MODEL)
    by_graph = loader.estimate(model, options, models / MODEL, LoadSettings(backend="openvino"))
    assert by_torch.conversion < by_graph.total
    manager = manage(limit=by_torch.total + by_graph.total - 1000, keep_alive=1000.0)
    with manager.lease(MODEL) as before:
        held.release()
        conversion = manager.conversions.of(MODEL)
        assert conversion is not None
        until(lambda: conversion.tries > 1)
        assert conversion.reason == "there is no room for both while it is in use"
        assert answer(manager) == ("torch", wanted[PROMPTS[0]])
        earliest = datetime.now(UTC)
    latest = datetime.now(UTC)
    until(lambda: not manager.conversions.shown())
    began = time.monotonic()
    expires = datetime.fromisoformat(f"{manager.residents()[MODEL].expires_at}+00:00") - timedelta(seconds=1000)
    # It is told by two clocks, which are read one after the other, and may go a little apart.
    apart = timedelta(seconds=time.monotonic() - began + 0.005)
    assert earliest - apart <= expires <= latest + apart, "it goes 1000 seconds after it was used"
    assert manager.loaded()[MODEL] is not before
    assert answer(manager) == ("openvino", wanted[PROMPTS[0]])
    assert manager.budget.held() == manager.budget.held(MODEL)


# Several servers ------------------------------------------------------------------------------------------------------


def test_a_server_uses_the_graph_that_another_one_made_meanwhile(
    manage: Callable[..., ModelManager], held: FileLock, models: Path, tmp_path: Path
) -> None:
    """It makes none of its own."""
    manager = manage()
    answer(manager)
    conversion = manager.conversions.of(MODEL)
    assert conversion is not None
    until(lambda: conversion.state == "converting")
    twin = tmp_path / "twin" / MODEL
    shutil.copytree(models / MODEL, twin, ignore=shutil.ignore_patterns(".lock"))
    model, options = ModelRecord(MODEL, "llama", "text-generation"), LoadOptions(twin.parent.parent, backend="auto")
    loader.convert(model, options, twin, LoadSettings(), Progress(), backend="openvino")
    [made] = [path for path in (twin / FOLDER).iterdir() if path.is_dir()]
    made.rename(models / MODEL / FOLDER / made.name)
    before = (models / MODEL / FOLDER / made.name / "graph.bin").stat()
    held.release()
    assert manager.load(MODEL, wait_for_graph=True).effective["backend"] == "openvino"
    after = (models / MODEL / FOLDER / made.name / "graph.bin").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert graphs(models) == [made.name]
