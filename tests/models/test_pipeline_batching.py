"""`text-generation` by `/pipeline` runs in the batch, and answers as transformers' own pipeline does."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from causal_models import ALONE, build, serve
from loaded_parts import noted_parts
from task_models import CHAT, Models, on_one_thread
from test_engine import draw_parameters, draw_prompt, idle
from tiny_tokenizers import TEXT

from huggingface.cancellation import Cancellation
from huggingface.errors import Cancelled, InvalidRequest, QueueFull
from huggingface.model.loaded import LoadedModel
from huggingface.types import GenerationRequest

TASK = "text-generation"
WORDS = TEXT.split()
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PREFILLED = [*CHAT, {"role": "assistant", "content": "The cat"}]
FAMILIES = ["llama", "gpt2", "gemma3-mixed", "mistral-window"]

PLAIN: list[dict[str, Any]] = [
    {"max_new_tokens": 12},
    {"max_new_tokens": 12, "return_full_text": False},
    {"max_new_tokens": 30, "stop_sequence": ["e", "th"]},
    {"max_new_tokens": 30, "stop_sequence": "an", "return_full_text": False},
    {"max_new_tokens": 9, "min_new_tokens": 9, "skip_special_tokens": False},
    {"max_new_tokens": 20, "repetition_penalty": 1.3, "clean_up_tokenization_spaces": False},
    {"max_new_tokens": 20, "no_repeat_ngram_size": 2, "eos_token_id": [40, 41, 42, 43, 44, 45]},
    {"max_new_tokens": 6, "truncation": True},
    {"max_new_tokens": 70, "handle_long_generation": "hole"},
    {"do_sample": True, "top_k": 1, "max_new_tokens": 8},
    {},
]
TEXTS_ONLY: list[dict[str, Any]] = [
    {"max_length": 60},
    {"max_length": 60, "prefix": "Once upon a time, ", "min_length": 50},
    {"max_new_tokens": 8, "prefix": "So ", "return_full_text": False},
    {"max_new_tokens": 8, "add_special_tokens": False},
    {"max_new_tokens": 8, "add_special_tokens": True},
]
# What has the model to itself.
WHOLE: list[dict[str, Any]] = [
    {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2},
    {"max_new_tokens": 6, "guidance_scale": 2.0},
    {"max_new_tokens": 6, "do_sample": True, "top_k": 1, "num_return_sequences": 2},
]
TEXTS: list[Any] = ["The cat sat", ["The cat sat"], ["The old lighthouse", "a", "What is the capital of France?"], ""]
CHATS: list[Any] = [CHAT, PREFILLED, [CHAT, PREFILLED, [{"role": "user", "content": "Who wrote the letter?"}]]]


class Served:
    """A model as it is served, and transformers' own pipeline on another copy of it."""

    def __init__(self, name: str, **options: Any) -> None:
        (model, tokenizer), (other, _) = build(name), build(name)
        tokenizer.chat_template, tokenizer.model_max_length = TEMPLATE, 100
        self.tokenizer = tokenizer
        self.upstream = transformers.pipeline(TASK, model=other, tokenizer=copy.deepcopy(tokenizer), device="cpu")
        self.model = model
        with noted_parts() as noted:
            self.loaded: LoadedModel = serve(name, model, tokenizer, **options)
        self.batch = noted[self.loaded.model_id].batch

    def run(self, inputs: Any, parameters: dict[str, Any], *cancellation: Cancellation) -> Any:
        """The answer of the served model."""
        return self.loaded.run(TASK, inputs, {"do_sample": False, **parameters}, *cancellation)

    def expect(self, inputs: Any, parameters: dict[str, Any]) -> Any:
        """The answer of transformers."""
        return self.upstream(copy.deepcopy(inputs), **{"do_sample": False, **parameters})

    def generate(self, prompt: str, parameters: dict[str, Any]) -> str:
        """The text that `/generate` gives."""
        request = GenerationRequest({"do_sample": False, **parameters}, prompt=prompt)
        return list(self.loaded.generate(request))[-1].whole or ""


@pytest.fixture(scope="module")
def family() -> Iterator[Callable[..., Served]]:
    """Builds and serves a model by the name of its family, once for the same options."""
    built: dict[tuple[Any, ...], Served] = {}

    def make(name: str, **options: Any) -> Served:
        key = (name, *sorted(options.items()))
        if key not in built:
            built[key] = Served(name, **options)
        return built[key]

    with on_one_thread():
        yield make
    for served in built.values():
        served.loaded.close()


class Watch:
    """What an engine does meanwhile: the rows of its steps, and the calls that were done whole."""

    def __init__(self, served: Served) -> None:
        self.rows: list[int] = []
        self.whole = 0
        self._batch: Any = served.batch
        self._tasks: Any = served.loaded.tasks

    def __enter__(self) -> Watch:
        forward, submit = self._batch.forward, self._tasks.submit

        def note(rows: Any) -> Any:
            self.rows.append(len(rows))
            return forward(rows)

        def count(*arguments: Any) -> Any:
            self.whole += 1
            return submit(*arguments)

        self._batch.forward, self._tasks.submit = note, count
        return self

    def __exit__(self, *_: object) -> None:
        del self._batch.forward, self._tasks.submit


# The same answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_calls_of_all_shapes_at_once_answer_as_the_pipeline_of_transformers(name: str, family: Any) -> None:
    """Texts, lists, chats and lists of chats, with every parameter, and requests of `/generate` between them."""
    served = family(name)
    calls = [(inputs, parameters) for inputs in TEXTS for parameters in [*PLAIN, *TEXTS_ONLY]]
    calls.remove(("", PLAIN[-2]))  # after the padding token alone, all tokens are equally likely
    calls += [(inputs, parameters) for inputs in CHATS for parameters in PLAIN]
    calls += [(CHAT, {"max_new_tokens": 8, "continue_final_message": True}), (PREFILLED, {"max_length": 90})]
    random.Random(name).shuffle(calls)
    expected = [served.expect(*call) for call in calls]
    before = copy.deepcopy(calls)
    prompt, asked = "The committee agreed", {"max_new_tokens": 30}
    alone = served.generate(prompt, asked)
    with Watch(served) as watch, ThreadPoolExecutor(12) as pool:
        others = [pool.submit(served.generate, prompt, asked) for _ in range(4)]
        answers = list(pool.map(lambda call: served.run(*call), calls))
        others += [pool.submit(served.generate, prompt, asked) for _ in range(4)]
        assert {other.result() for other in others} == {alone}
    for call, answer, wanted in zip(calls, answers, expected, strict=True):
        assert answer == wanted, call
    assert calls == before, "the caller's inputs were changed"
    # An empty prompt begins with a token that is the padding too, and is not attended to if it does not end a text.
    assert watch.whole == sum(1 for inputs, parameters in calls if inputs == "" and "eos_token_id" in parameters)
    assert max(watch.rows) > 4
    assert served.loaded.opened_tasks == (TASK,)
    idle(served.loaded)


@pytest.mark.parametrize("parameters", WHOLE)
@pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS[2], CHAT])
def test_what_is_more_than_a_row_is_done_whole_as_ever(inputs: Any, parameters: dict[str, Any], family: Any) -> None:
    """Beams, several answers and guidance have the model to themselves, and answer as transformers does."""
    served = family("llama")
    with Watch(served) as watch:
        assert served.run(inputs, parameters) == served.expect(inputs, parameters)
    assert watch.whole == 1


@pytest.mark.parametrize("name", ALONE)
def test_models_that_are_not_batched_answer_as_ever(name: str, family: Any) -> None:
    """A model whose state is no rows of keys and values runs its calls whole."""
    served = family(name)
    for inputs, parameters in ((TEXTS[2], PLAIN[0]), (CHAT, PLAIN[2])):
        assert served.run(inputs, parameters) == served.expect(inputs, parameters)


def test_what_is_beyond_the_context_or_the_cache_is_done_whole(family: Any) -> None:
    """Transformers lets a model without a table of positions go on; so does this, outside of the batch."""
    asked = {"max_new_tokens": 520, "min_new_tokens": 515}
    for served in (family("llama"), family("phi3", kv_cache_bytes=300 * 256)):
        with Watch(served) as watch:
            assert served.run("The cat", asked) == served.expect("The cat", asked)
        assert watch.whole == 1
        idle(served.loaded)


def test_a_stop_string_stays_in_the_text_wherever_it_ends(family: Any) -> None:
    """Strings that several tokens make up, or that end within one, stop the text where transformers stops it."""
    served = family("llama")
    whole = served.run("The old lighthouse", {"max_new_tokens": 40, "return_full_text": False})[0]["generated_text"]
    calls = [
        {"max_new_tokens": 40, "stop_sequence": whole[start : start + size]}
        for start in range(0, len(whole) - 4, 3)
        for size in (1, 2, 4)
        if "\ufffd" not in whole[start : start + size]
    ]
    assert len(calls) > 20
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda asked: served.run("The old lighthouse", asked), calls))
    assert answers == [served.expect("The old lighthouse", asked) for asked in calls]


def test_any_mix_with_generate_gives_each_what_it_gets_alone(family: Any) -> None:
    """Calls with and without truncation, on many threads, do not get in each other's way at the tokenizer."""
    served = family("gpt2")
    draw = random.Random(4)
    kinds = [{"truncation": True}, {"add_special_tokens": False}, {"stop_sequence": "e"}, {"prefix": "A "}, {}]
    calls = [
        ([draw_prompt(draw, 30) for _ in range(3)], {"max_new_tokens": draw.randint(1, 20), **draw.choice(kinds)})
        for _ in range(40)
    ]
    requests = [(draw_prompt(draw, 30), {"max_new_tokens": draw.randint(1, 20)}) for _ in range(40)]
    expected = [served.expect(*call) for call in calls]
    texts = [served.generate(*request) for request in requests]
    with ThreadPoolExecutor(16) as pool:
        asked = [
            (pool.submit(served.run, *call), pool.submit(served.generate, *request))
            for call, request in zip(calls, requests, strict=True)
        ]
        assert [(call.result(), request.result()) for call, request in asked] == list(zip(expected, texts, strict=True))
    idle(served.loaded)


def test_sampling_samples(family: Any) -> None:
    """A call that samples gives texts of its own, each within what its parameters allow."""
    served = family("llama")
    parameters = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12, "return_full_text": False}
    texts = [answer["generated_text"] for [answer] in served.run(["The cat"] * 8, parameters)]
    assert len(set(texts)) > 4
    with Watch(served) as watch:
        served.run("The cat", {**draw_parameters(random.Random(2)), "do_sample": True} | {"max_new_tokens": 4})
    assert watch.whole == 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_route_answers_with_the_pipelines_own_results(
    name: str, app: Any, models_dir: Path, tiny: Callable[[str], str]
) -> None:
    """`/pipeline` of several clients at once: the results are those of `transformers.pipeline(model=folder)`."""
    with on_one_thread():
        models = Models(models_dir, tiny)
        fields = {"model_id": tiny(name), "name": name, "model_type": TASK}
        assert app.test_client().post("/api/huggingface/models", json=fields).status_code == 200
        inputs = [*TEXTS, *([CHAT, [CHAT, PREFILLED]] if name == "llama" else [])]
        calls = [(each, asked) for each in inputs for asked in (PLAIN[0], PLAIN[1], PLAIN[2], WHOLE[0])]

        def ask(call: tuple[Any, dict[str, Any]]) -> Any:
            body = {"model_id": tiny(name), "task": TASK, "inputs": call[0], "do_sample": False, **call[1]}
            return app.test_client().post("/api/huggingface/pipeline", json=body).get_json()

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, calls))
        for (given, asked), answer in zip(calls, answers, strict=True):
            assert answer["results"] == models.upstream(name, TASK, given, do_sample=False, **asked), (given, asked)
        cached = app.test_client().get("/api/huggingface/cache").get_json()
        assert cached["cached_pipelines"] == [f"{tiny(name)}_{TASK}"]


# Turns and queues -----------------------------------------------------------------------------------------------------

LONG = {"max_new_tokens": 400, "min_new_tokens": 400}


def test_a_long_call_holds_nobody_up(family: Any) -> None:
    """While a call makes long texts, requests of `/generate` and other calls come and go."""
    served = family("llama")
    with ThreadPoolExecutor(4) as pool:
        long = pool.submit(served.run, ["The cat", "A dog"], LONG)
        while served.loaded.status.running < 2:
            time.sleep(0.001)
        assert served.generate("The cat", {"max_new_tokens": 3})
        assert served.run("The cat", {"max_new_tokens": 3}) == served.expect("The cat", {"max_new_tokens": 3})
        assert not long.done()
        assert long.result() == served.expect(["The cat", "A dog"], LONG)


def test_a_thousand_prompts_leave_places_in_the_batch_and_in_the_queue(family: Any) -> None:
    """A long list goes through the batch a few at a time, in its order, and others find a place meanwhile."""
    served = family("gpt2", max_batch=8, max_queue=8)
    prompts = [f"{WORDS[index % 100]} {index}" for index in range(1000)]
    asked = {"max_new_tokens": 2}
    expected = {index: served.expect(prompts[index], asked) for index in range(0, 1000, 50)}
    seen: list[Any] = []
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(served.run, prompts, asked)
        while not long.done():
            seen.append(served.loaded.status)
            assert served.generate("The cat", {"max_new_tokens": 1}) is not None
            time.sleep(0.01)
        answers = long.result()
    assert {index: answers[index] for index in expected} == expected
    assert len(answers) == 1000
    assert 1 < max(status.running for status in seen) <= 5
    assert len(seen) > 5
    idle(served.loaded)


def test_a_full_queue_refuses_a_call_at_once(family: Any) -> None:
    """Where as many wait as may, a call is refused with a time to come back; one that has begun is not."""
    served = family("llama", max_batch=1, max_queue=2)
    long = GenerationRequest({"do_sample": False, "max_new_tokens": 400, "min_new_tokens": 400}, prompt="The")
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(served.run, ["The cat", "A dog", "a"], {"max_new_tokens": 100, "min_new_tokens": 100})
        while served.loaded.status.running < 1:
            time.sleep(0.001)
        tickets = [served.loaded.generate(long) for _ in range(2)]
        with pytest.raises(QueueFull) as refused:
            served.run("The cat", {"max_new_tokens": 3})
        assert refused.value.retry_after >= 1
        assert len(begun.result()) == 3
    for ticket in tickets:
        ticket.cancel()
    idle(served.loaded)


# Giving up, and being refused -----------------------------------------------------------------------------------------


def test_a_call_that_is_given_up_frees_its_slots_at_the_next_step(family: Any) -> None:
    """A client that hangs up in the middle of a list: no slot stays taken, and nothing more is begun."""
    served = family("llama")
    gone = Cancellation()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(served.run, ["The cat", "A dog", "What"] * 40, LONG, gone)
        while served.loaded.status.running < 30:
            time.sleep(0.001)
        gone.cancel()
        with Watch(served) as watch:
            with pytest.raises(Cancelled):
                call.result(5)
            idle(served.loaded)
    assert len(watch.rows) <= 20
    assert served.run("The cat", PLAIN[0]) == served.expect("The cat", PLAIN[0])


def test_a_call_whose_time_is_up_is_a_504(app: Any, tiny: Callable[[str], str]) -> None:
    """The request's own timeout ends its texts, and says so."""
    client = app.test_client()
    fields = {"model_id": tiny("llama"), "name": "x", "model_type": TASK}
    assert client.post("/api/huggingface/models", json=fields).status_code == 200
    body = {"model_id": tiny("llama"), "task": TASK, "inputs": ["The cat"] * 100, "min_new_tokens": 400}
    answer = client.post("/api/huggingface/pipeline", json={**body, "max_new_tokens": 400, "timeout": 0.5})
    assert answer.status_code == 504
    model = app.extensions["local-llm"].manager.loaded()[tiny("llama")]
    assert idle(model).running == 0


def test_closing_the_model_ends_a_call(family: Any) -> None:
    """A model that is taken out of memory tells whoever waits for it."""
    served = Served("llama")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(served.run, ["The cat", "A dog"] * 40, LONG)
        while served.loaded.status.running < 2:
            time.sleep(0.001)
        served.loaded.close()
        with pytest.raises(Cancelled):
            call.result(5)


@pytest.mark.parametrize(
    ("inputs", "parameters", "field"),
    [
        (["The cat", "The cat " * 300], {"max_new_tokens": 300}, "inputs"),
        ("The cat", {"max_new_tokens": 600}, "max_new_tokens"),
        ("The cat sat on the mat", {"max_length": 2}, "max_length"),
        (["a", 5], {}, "inputs.1"),
        ([], {}, "inputs"),
        ("a", {"eos_token_id": 5000}, "eos_token_id"),
        ("a", {"continue_final_message": True}, "continue_final_message"),
        (CHAT, {"prefix": "a"}, "prefix"),
        ("a" * 400, {"handle_long_generation": "hole", "max_new_tokens": 101}, "handle_long_generation"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    inputs: Any, parameters: dict[str, Any], field: str, family: Any
) -> None:
    """A prompt too long for the model, or a parameter that does not fit, fails its call with the field's name."""
    served = family("gpt2")
    with pytest.raises(InvalidRequest) as refused:
        served.run(inputs, parameters)
    if field != "inputs" or not inputs:
        assert refused.value.field == field
    idle(served.loaded)


def test_calls_change_neither_the_model_nor_its_tokenizer(family: Any) -> None:
    """The pipeline sets up a tokenizer of its own; the one that everybody else reads with stays as it was."""
    served = family("mistral-window")

    def state() -> Any:
        tokenizer, model = served.tokenizer, served.model
        kept = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token, tokenizer.model_max_length)
        backend = tokenizer.backend_tokenizer
        return kept, backend.truncation, backend.padding, model.config.to_dict(), model.generation_config.to_dict()

    before = state()
    served.run("The cat " * 60, {"truncation": True, "max_new_tokens": 3})
    served.run(TEXTS[2], {"max_new_tokens": 3, "stop_sequence": "e"})
    assert state() == before
