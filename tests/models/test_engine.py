"""The engine: whoever else is in the batch, each request gets what `model.generate` gives it alone."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from causal_models import ALONE, BATCHED, LARGE, UNPAGED, build, build_config, serve
from conftest import until
from gguf_files import ARCHITECTURES
from loaded_parts import Parts, laying_out, noted_parts
from tiny_tokenizers import TEXT

from huggingface.engine.layers import NotBatchable
from huggingface.errors import Cancelled, GenerationFailed, OutOfMemory, QueueFull
from huggingface.model.loaded import LoadedModel
from huggingface.types import Chunk, GenerationRequest

WORDS = TEXT.split()


@dataclass
class Served:
    """A model as it is served, itself, and what it is served by."""

    name: str
    model: Any
    tokenizer: Any
    loaded: LoadedModel
    parts: Parts

    def expect(self, prompt: str, parameters: dict[str, Any]) -> str:
        """The text that `model.generate` gives, called as a notebook would."""
        arguments = {name: value for name, value in parameters.items() if name != "seed"}
        if arguments.get("temperature") == 0:
            del arguments["temperature"]
            arguments["do_sample"] = False
        if "stop_strings" in arguments:
            arguments["tokenizer"] = self.tokenizer
        inputs = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        if "seed" in parameters:
            torch.manual_seed(parameters["seed"])
        with torch.inference_mode():
            output = self.model.generate(inputs, attention_mask=torch.ones_like(inputs), **arguments)
        text = self.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
        found = [text.index(stop) for stop in parameters.get("stop_strings", ()) if stop in text]
        return text[: min(found)] if found else text

    def ask(self, prompt: str, parameters: dict[str, Any], **options: Any) -> list[Chunk]:
        """All chunks of the answer."""
        return list(self.loaded.generate(GenerationRequest(parameters, prompt=prompt, **options)))

    def text(self, prompt: str, parameters: dict[str, Any]) -> str:
        """The text of the answer."""
        return self.ask(prompt, parameters)[-1].whole or ""


def serve_noted(name: str, model: Any, tokenizer: Any, engine: str = "torch", **options: Any) -> Served:
    """Serves a model, and notes by what."""
    with noted_parts() as noted:
        loaded = serve(name, model, tokenizer, engine, **options)
    return Served(name, model, tokenizer, loaded, noted[loaded.model_id])


@pytest.fixture(scope="module", params=["torch", "openvino", "llama.cpp"])
def family(request: pytest.FixtureRequest) -> Iterator[Callable[..., Served]]:
    """Builds a model by the name of its family and serves it on each runner, once for the same options."""
    built: dict[tuple[Any, ...], Served] = {}
    engine = request.param

    def make(name: str, **options: Any) -> Served:
        if engine == "openvino" and (name in UNPAGED or name in ALONE):
            pytest.skip("OpenVINO does not compute it")
        if engine == "llama.cpp" and name not in ARCHITECTURES:
            pytest.skip("no GGUF file of it is read")
        key = (name, *sorted(options.items()))
        if key not in built:
            built[key] = serve_noted(name, *build(name), engine, **options)
        return built[key]

    yield make
    for served in built.values():
        served.loaded.close()


def idle(loaded: LoadedModel) -> Any:
    """The engine's status once nothing runs or waits any more."""

    def none() -> Any:
        status = loaded.status
        assert status is not None
        return None if status.running or status.waiting or status.slots else status

    return until(none)


def draw_prompt(draw: random.Random, maximum: int = 60) -> str:
    """Some words of the text; now and then the beginning that others have too."""
    start = 0 if draw.random() < 0.3 else draw.randrange(len(WORDS) - maximum)
    return " ".join(WORDS[start : start + draw.randint(1, maximum)])


def draw_parameters(draw: random.Random) -> dict[str, Any]:
    """Greedy or seeded, with some of the parameters that a row of the batch can have."""
    parameters: dict[str, Any] = {"max_new_tokens": draw.randint(1, 24)}
    if draw.random() < 0.5:
        parameters["do_sample"] = False
    else:
        parameters |= {"do_sample": True, "seed": draw.randrange(1000), "temperature": draw.choice([0.3, 0.7, 1.5])}
        extra: list[dict[str, Any]] = [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"typical_p": 0.7}, {"top_k": 0}]
        extra += [{"top_k": 40, "top_p": 0.9}, {"top_h": 0.5}, {"epsilon_cutoff": 0.001}, {"eta_cutoff": 0.001}]
        parameters |= draw.choice(extra)
    more: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 6}]
    more += [{"bad_words_ids": [[20], [33, 34]]}, {"suppress_tokens": [50, 51, 52]}, {"stop_strings": ["e", "th"]}]
    more += [{"eos_token_id": [40, 41, 42, 43, 44]}, {"sequence_bias": [[[60], 5.0]]}, {"begin_suppress_tokens": [12]}]
    more += [{"encoder_repetition_penalty": 1.2}, {"encoder_no_repeat_ngram_size": 3}, {"renormalize_logits": True}]
    more += [{"exponential_decay_length_penalty": [4, 1.2]}, {"forced_eos_token_id": 9}]
    parameters |= draw.choice(more)
    if "min_new_tokens" in parameters:
        parameters["max_new_tokens"] = max(parameters["max_new_tokens"], parameters["min_new_tokens"])
    return parameters


@pytest.mark.parametrize("name", [*BATCHED, *ALONE])
def test_a_family_is_served_as_it_can_be(name: str, family: Any) -> None:
    """Families whose cache and masks are the usual ones are batched; recurrent ones are not, and say why."""
    status = family(name).loaded.status
    assert status.mode == ("batched" if name in BATCHED else "one at a time")
    assert (status.reason is None) is (name in BATCHED)


@pytest.mark.parametrize("name", [*BATCHED, *ALONE])
@pytest.mark.parametrize("seed", [1, 2])
def test_any_mix_of_requests_gives_each_what_it_gets_alone(name: str, seed: int, family: Any) -> None:
    """Requests of all kinds join, leave and are cancelled at random; each gets `generate`'s answer, no slot leaks."""
    served = family(name)
    draw = random.Random(f"{name} {seed}")
    requests = [(draw_prompt(draw), draw_parameters(draw)) for _ in range(24)]
    expected = [served.expect(*request) for request in requests]

    def ask(index: int) -> str | None:
        pause, cancel = random.Random(index).random() * 0.15, index % 6 == 5
        time.sleep(pause)
        prompt, parameters = requests[index]
        if not cancel:
            return served.text(prompt, parameters)
        ticket = served.loaded.generate(GenerationRequest({**parameters, "max_new_tokens": 300}, prompt=prompt))
        time.sleep(pause / 4)
        ticket.cancel()
        with contextlib.suppress(Cancelled):
            list(ticket)
        return None

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(len(requests))))
    for index, answer in enumerate(answers):
        if answer is not None:
            assert answer == expected[index], (index, requests[index])
    idle(served.loaded)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-mixed", "mistral-window", "gemma2-eager"])
def test_prompts_read_in_chunks_give_the_same_text(name: str, family: Any) -> None:
    """Long prompts, read bit by bit while others decode, and prompts that begin alike, are as if read at once."""
    served = family(name, max_batch=6)
    draw = random.Random(name)
    requests = []
    for _ in range(12):
        size = draw.choice([3, 150, 90, 60])
        parameters = {"do_sample": False, "max_new_tokens": draw.randint(5, 40)}
        requests.append((" ".join(WORDS[draw.choice([0, 0, 40]) :][:size]), parameters))
    expected = [served.expect(*request) for request in requests]
    for _ in range(2):  # the second time most prompts are still there
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(lambda request: served.text(*request), requests)) == expected
    idle(served.loaded)


def test_processed_logits_are_those_of_transformers(family: Any) -> None:
    """A row's logits go through the very processors that `generate` builds: same numbers, bit by bit."""
    served = family("llama")
    draw = random.Random(3)
    for _ in range(40):
        prompt = draw_prompt(draw)
        parameters = draw_parameters(draw)
        parameters.pop("stop_strings", None)
        prepared = served.parts.preparer.prepare(GenerationRequest(parameters, prompt=prompt))
        settings = {name: value for name, value in prepared.arguments.items() if name != "tokenizer"}
        with torch.inference_mode():
            torch.manual_seed(0)
            output = served.model.generate(
                **prepared.inputs, **settings, return_dict_in_generate=True, output_scores=True, output_logits=True
            )
            count = prepared.prompt_tokens
            for step, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
                mine = prepared.resolved.processors(output.sequences[:, : count + step], logits.clone())
                assert torch.equal(mine, scores), parameters


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties_are_taken_from_what_was_made(penalty: str, family: Any) -> None:
    """The two penalties of the OpenAI API are taken from the logits of new tokens: once, or for each time."""
    served = family("llama")
    prompt = "The cat sat on the mat"
    ids = served.tokenizer(prompt)["input_ids"]
    tokens: list[int] = []
    with torch.inference_mode():
        for _ in range(30):
            logits = served.model(torch.tensor([ids + tokens])).logits[0, -1]
            for token in set(tokens):
                logits[token] -= 2.0 * (1 if penalty == "presence_penalty" else tokens.count(token))
            tokens.append(int(logits.argmax()))
            if tokens[-1] == served.tokenizer.eos_token_id:
                break
    answer = served.text(prompt, {"do_sample": False, "max_new_tokens": 30, penalty: 2.0})
    assert answer == served.tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer != served.text(prompt, {"do_sample": False, "max_new_tokens": 30})


def test_a_bias_makes_a_token_likely_or_impossible(family: Any) -> None:
    """`logit_bias` is added to the logits: 100 has a token made always, -100 never."""
    served = family("llama")
    options = {"do_sample": False, "max_new_tokens": 8}
    whole = served.text("The cat", options)
    [token] = served.tokenizer("x", add_special_tokens=False)["input_ids"]
    assert served.text("The cat", {**options, "logit_bias": {str(token): 100.0}}) == "x" * 8
    first = served.tokenizer(whole, add_special_tokens=False)["input_ids"][0]
    assert served.text("The cat", {**options, "logit_bias": {str(first): -100.0}})[:1] != whole[:1]


def test_streamed_text_is_whole_characters_and_adds_up(family: Any) -> None:
    """The pieces of a stream join to the answer, none of them ends within a character, and stop strings never leak."""
    served = family("gpt2")
    draw = random.Random(5)
    for _ in range(30):
        prompt, parameters = draw_prompt(draw), draw_parameters(draw)
        chunks = served.ask(prompt, parameters, streams=True)
        assert "".join(chunk.text for chunk in chunks) == chunks[-1].whole == served.expect(prompt, parameters)
        assert chunks[-1].usage.completion_tokens <= parameters["max_new_tokens"]


def test_a_stop_string_across_tokens_is_never_shown(family: Any) -> None:
    """A stop string that several tokens make up ends the text before it, and no part of it was streamed."""
    served = family("llama")
    options = {"do_sample": False, "max_new_tokens": 40}
    whole = served.text("The old lighthouse", options)
    for start in range(3, 20):
        stop = whole[start : start + 5]
        if len(stop) < 5 or "\ufffd" in stop:
            continue
        chunks = served.ask("The old lighthouse", {**options, "stop_strings": [stop]}, streams=True)
        assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].finish_reason == "stop"


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(family: Any) -> None:
    """More than may run and wait are refused, with a time to come back; the others are served in their order."""
    served = family("llama", max_batch=2, max_queue=3)
    request = GenerationRequest({"do_sample": False, "max_new_tokens": 200, "min_new_tokens": 200}, prompt="The cat")
    tickets = [served.loaded.generate(request) for _ in range(5)]
    with pytest.raises(QueueFull) as refused:
        for _ in range(3):  # the first two may have been let in meanwhile
            tickets.append(served.loaded.generate(request))
    assert refused.value.retry_after >= 1
    assert {ticket.position for ticket in tickets} <= {None, 1, 2, 3, 4, 5, 6}
    texts = {"".join(chunk.whole or "" for chunk in ticket) for ticket in tickets}
    assert len(texts) == 1
    idle(served.loaded)


def test_who_cancels_in_the_queue_or_in_the_prompt_frees_the_place(family: Any) -> None:
    """Cancelled while it waits or is read, a request ends at the next step, and who comes after it is served."""
    served = family("gpt2", max_batch=1)
    long = GenerationRequest({"do_sample": False, "max_new_tokens": 400, "min_new_tokens": 400}, prompt="The")
    tickets = [served.loaded.generate(long) for _ in range(4)]
    for ticket in tickets[:3]:
        ticket.cancel()
        ticket.cancel()
    for ticket in tickets[:3]:
        with pytest.raises(Cancelled):
            list(ticket)
    assert list(tickets[3])[-1].usage.completion_tokens == 400
    idle(served.loaded)


def test_a_prompt_that_begins_alike_is_not_read_again(family: Any) -> None:
    """The next turn of a chat computes its own tokens only: those before it are there still."""
    served = family("llama", max_batch=4)
    batch = served.parts.batch
    read: list[int] = []
    forward = batch.forward

    def count(rows: Any) -> Any:
        read.append(sum(len(row.tokens) for row in rows))
        return forward(rows)

    text = " ".join(WORDS[:80])
    first = served.text(text, {"do_sample": False, "max_new_tokens": 8})
    batch.forward = count
    try:
        prompt = f"{text}{first} And then?"
        assert served.text(prompt, {"do_sample": False, "max_new_tokens": 4}) == served.expect(
            prompt, {"do_sample": False, "max_new_tokens": 4}
        )
    finally:
        del batch.forward
    new = len(served.tokenizer(prompt)["input_ids"]) - len(served.tokenizer(text)["input_ids"])
    assert sum(read) <= new + 4


def test_kv_memory_is_bounded_and_who_does_not_fit_waits_or_is_refused(family: Any) -> None:
    """The cache never grows beyond its limit: requests wait for room, and one that never fits is refused by numbers."""
    served = family("qwen3", kv_cache_bytes=2**20)
    status = served.loaded.status
    assert 2**20 // served.parts.runner.cache.token_bytes <= 4096
    options = {"do_sample": False, "max_new_tokens": 30}
    prompts = [" ".join(WORDS[start : start + 100]) for start in range(12)]
    expected = [served.expect(prompt, options) for prompt in prompts]
    maximum: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            maximum.append(served.loaded.status.kv_cache_bytes)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda prompt: served.text(prompt, options), prompts)) == expected
    done.set()
    watcher.join()
    assert 0 < max(maximum) <= status.kv_cache_limit == 2**20
    small = family("phi3", kv_cache_bytes=300 * 256)
    with pytest.raises(OutOfMemory, match="LOCAL_LLM_KV_CACHE_BYTES"):
        small.text(prompts[0], {**options, "max_new_tokens": 300})


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_row_whose_numbers_break_fails_alone(engine: str) -> None:
    """Where one row's logits are NaN only its request fails; the others' texts are right, then and afterwards."""
    model, tokenizer = build("llama")
    bad = tokenizer("~", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
    served = serve_noted("llama", model, tokenizer, engine, max_batch=8)
    assert served.loaded.status is not None
    assert served.loaded.status.mode == "batched", "the check at load has seen it"
    options = {"do_sample": False, "max_new_tokens": 20}
    prompts = [" ".join(WORDS[start : start + 9]) for start in range(5)]
    expected = [served.expect(prompt, options) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        broken = pool.submit(served.text, "The ~", options)
        answers = list(pool.map(lambda prompt: served.text(prompt, options), prompts))
        with pytest.raises(GenerationFailed):
            broken.result()
    assert answers == expected
    assert [served.text(prompt, options) for prompt in prompts] == expected
    idle(served.loaded)
    served.loaded.close()


def test_a_step_that_fails_fails_those_who_made_it_fail(family: Any) -> None:
    """A forward pass that raises for one row is repeated row by row: the others never notice."""
    served = family("gpt2", max_batch=8)
    runner = served.parts.runner
    forward = runner.forward
    poison = served.tokenizer("zzz")["input_ids"]

    def fail(pieces: Any, every: Any) -> Any:
        if any(list(piece.slot.tokens or piece.tokens)[: len(poison)] == poison for piece in pieces):
            raise RuntimeError("a bug")
        return forward(pieces, every)

    options = {"do_sample": False, "max_new_tokens": 15}
    prompts = [" ".join(WORDS[start : start + 9]) for start in range(5)]
    expected = [served.expect(prompt, options) for prompt in prompts]
    runner.forward = fail
    try:
        with ThreadPoolExecutor(6) as pool:
            broken = pool.submit(served.text, "zzz", options)
            assert list(pool.map(lambda prompt: served.text(prompt, options), prompts)) == expected
            with pytest.raises(GenerationFailed):
                broken.result()
    finally:
        del runner.forward
    assert served.text("zzz", options) == served.expect("zzz", options)
    idle(served.loaded)


def test_an_engine_that_breaks_tells_everyone() -> None:
    """A failure of the engine itself ends all who wait with an error, shows in its status, and is never a hang."""
    served = serve_noted("llama", *build("llama"))
    loaded = served.loaded

    def broken(*_: Any) -> Any:
        raise AssertionError("a bug of the engine's own")

    served.parts.batch.sample = broken
    with pytest.raises(Exception, match="out of service"):
        list(loaded.generate(GenerationRequest({"max_new_tokens": 5}, prompt="The cat")))
    assert loaded.failed
    assert loaded.status.state == "failed"
    with pytest.raises(Exception, match="out of service"):
        loaded.generate(GenerationRequest({"max_new_tokens": 5}, prompt="The cat"))
    loaded.close()


def test_what_cannot_be_right_is_found_out() -> None:
    """A model that computes something else in a batch is not batched: the check at load compares numbers."""
    from huggingface.engine.torch.parity import batch_runner

    model, _ = build("llama")
    plain = type(model.model).forward

    class Odd(type(model.model)):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            options["position_ids"] = None  # it counts by its own cache, and so takes no rows at positions of their own
            return plain(self, *arguments, **options)

    model.model.__class__ = Odd
    with pytest.raises(NotBatchable):
        batch_runner(model)


def test_whoever_uses_the_model_itself_finds_it_whole() -> None:
    """Weights that are laid out for the batch are back before anybody uses the model itself, whenever it comes."""
    model, tokenizer = build_config("LlamaConfig", LARGE)
    served = serve_noted("large", model, tokenizer, max_batch=3, findings=laying_out())
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]

    def laid_out() -> list[bool]:
        return [weight.numel() == 0 for weight in weights]

    asked = {"do_sample": False, "max_new_tokens": 40, "min_new_tokens": 40}
    for _ in range(2):
        text = served.text("The cat", asked)
        assert all(laid_out())
        assert not any(served.loaded.engine.call(laid_out))
        assert text == served.expect("The cat", asked)
    assert served.parts.batch.allocated_bytes > 0
    served.loaded.close()
