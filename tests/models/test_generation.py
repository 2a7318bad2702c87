"""`/generate`: the text is what transformers itself gives, and what is accepted is honoured."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from huggingface.cancellation import Cancellation
from huggingface.errors import Cancelled
from huggingface.loading import loader
from huggingface.registry.records import ModelRecord
from huggingface.types import GenerationRequest, LoadOptions

DEFAULTS = {
    "max_new_tokens": 100,
    "temperature": 0.7,
    "do_sample": True,
    "top_p": 0.9,
    "top_k": 50,
    "repetition_penalty": 1.1,
}
SEQ2SEQ = ("t5", "bart", "marian")


@pytest.fixture(scope="module")
def oracle(models_dir: Path, tiny: Callable[[str], str]) -> Callable[..., list[str]]:
    """`model.generate` of transformers, called as a notebook would."""
    loaded: dict[str, Any] = {}

    def generate(name: str, prompt: str | list[int], seed: int | None = None, **parameters: Any) -> list[str]:
        if name not in loaded:
            folder = models_dir / tiny(name)
            cls = AutoModelForSeq2SeqLM if name in SEQ2SEQ else AutoModelForCausalLM
            loaded[name] = cls.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        model, tokenizer = loaded[name]
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if seed is not None:
            torch.manual_seed(seed)
        if "stop_strings" in parameters:
            parameters["tokenizer"] = tokenizer
        inputs = torch.tensor([ids])
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), **parameters)
        start = 0 if name in SEQ2SEQ else len(ids)
        return [tokenizer.decode(row[start:], skip_special_tokens=True) for row in output]

    return generate


@pytest.fixture
def generate(client: Any, tiny: Callable[[str], str]) -> Callable[..., Any]:
    """A call to `/generate` for a tiny model, registered on the way."""

    def call(name: str, model_type: str = "text-generation", status: int = 200, **body: Any) -> Any:
        model_id = tiny(name)
        client.post("/api/huggingface/models", json={"model_id": model_id, "name": name, "model_type": model_type})
        response = client.post("/api/huggingface/generate", json={"model_id": model_id, **body})
        assert response.status_code == status, response.get_data(as_text=True)
        return response.get_json()

    return call


@pytest.mark.parametrize("name", ["gpt2", "llama", *SEQ2SEQ])
def test_greedy_text_is_that_of_model_generate(name: str, generate: Any, oracle: Any) -> None:
    """Greedy generation gives the text of `model.generate` with the same arguments."""
    for prompt in ("The cat sat on the", "Once upon a time, there was a dog.", "ünïcödé and 日本"):
        answer = generate(name, prompt=prompt, do_sample=False, max_new_tokens=24)
        expected = oracle(name, prompt, do_sample=False, max_new_tokens=24, repetition_penalty=1.1)
        assert answer["response"] == expected[0]
        assert answer["prompt"] == prompt


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, {"num_return_sequences": 3}, {"min_p": 0.02, "top_k": 0}])
def test_a_seed_gives_the_text_of_manual_seed(name: str, extra: dict[str, Any], generate: Any, oracle: Any) -> None:
    """A seeded answer is what `torch.manual_seed(seed)` before `model.generate` gives, and can be had again."""
    parameters = {**DEFAULTS, "max_new_tokens": 16, **extra}
    answer = generate(name, prompt="The cat sat on the", seed=11, max_new_tokens=16, **extra)
    expected = oracle(name, "The cat sat on the", seed=11, **parameters)
    assert answer.get("responses", [answer["response"]]) == expected
    torch.manual_seed(0)  # whatever else draws in between makes no difference
    again = generate(name, prompt="The cat sat on the", seed=11, max_new_tokens=16, **extra)
    assert again["response"] == answer["response"]
    assert again.get("responses") == answer.get("responses")
    other = generate(name, prompt="The cat sat on the", seed=12, max_new_tokens=16, **extra)
    assert other["response"] != answer["response"]


@pytest.mark.parametrize("window", [-1, 0, 1, 5, 12, 400])
def test_penalties_look_at_the_last_tokens_only(window: int, generate: Any, oracle: Any) -> None:
    """As llama.cpp has it: what transformers' penalty makes of these tokens, or none at all."""

    def lately(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = ids if window < 0 else ids[:, max(0, ids.shape[1] - window) :] if window else ids[:, :0]
        return RepetitionPenaltyLogitsProcessor(1.6)(seen, scores)

    plain = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.0}
    rules = LogitsProcessorList([lately])
    [wanted] = oracle("llama", "The little harbour", logits_processor=rules, **plain)
    asked = {**plain, "repetition_penalty": 1.6, "repeat_last_n": window}
    assert generate("llama", prompt="The little harbour", **asked)["response"] == wanted


def test_the_documented_defaults_apply_and_are_echoed(generate: Any) -> None:
    """Without parameters the documented defaults are in effect, and the answer says so."""
    answer = generate("gpt2", prompt="Hello")
    assert answer["parameters"] == DEFAULTS
    documented = ["success", "response", "model_used", "prompt", "parameters", "model_info"]
    assert list(answer) == [*documented, "finish_reason", "usage", "timings"]


def test_request_goes_over_registered_goes_over_default(client: Any, tiny: Any) -> None:
    """A parameter is the request's, else the model's registered one, else the documented default."""
    registered = {"max_new_tokens": 7, "temperature": 0.3, "do_sample": False}
    body = {"model_id": tiny("gpt2"), "name": "x", "model_type": "text-generation", "parameters": registered}
    assert client.post("/api/huggingface/models", json=body).status_code == 200
    body = {"model_id": tiny("gpt2"), "prompt": "Hello", "temperature": 0.9}
    answer = client.post("/api/huggingface/generate", json=body).get_json()
    assert answer["parameters"] == {**DEFAULTS, **registered, "temperature": 0.9}


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_requested_max_length_is_honoured(name: str, generate: Any, oracle: Any) -> None:
    """`max_length` replaces the default of `max_new_tokens`, instead of being overridden by it."""
    answer = generate(name, prompt="The cat sat", max_length=14, do_sample=False)
    assert answer["response"] == oracle(name, "The cat sat", max_length=14, do_sample=False, repetition_penalty=1.1)[0]
    assert answer["parameters"]["max_length"] == 14
    assert "max_new_tokens" not in answer["parameters"]


def test_temperature_zero_is_greedy(generate: Any) -> None:
    """A temperature of 0 gives the greedy text, and the answer shows it."""
    greedy = generate("llama", prompt="The cat", do_sample=False, max_new_tokens=12)
    answer = generate("llama", prompt="The cat", temperature=0, max_new_tokens=12)
    assert answer["response"] == greedy["response"]
    assert answer["parameters"]["do_sample"] is False


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(generate: Any) -> None:
    """Generation stops at a stop string, which is left out of the response."""
    whole = generate("gpt2", prompt="The cat sat on", do_sample=False, max_new_tokens=20)["response"]
    stop = whole[5:7]
    answer = generate("gpt2", prompt="The cat sat on", do_sample=False, max_new_tokens=20, stop_strings=[stop])
    assert answer["response"] == whole[: whole.index(stop)]


def test_a_chat_model_goes_through_its_template(generate: Any, oracle: Any, models_dir: Path, tiny: Any) -> None:
    """A conversational model's prompt is the user's turn of a chat, written by the model's own template."""
    tokenizer = AutoTokenizer.from_pretrained(models_dir / tiny("llama"))
    chat = [{"role": "user", "content": "Where is the cat?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    expected = oracle("llama", ids, do_sample=False, max_new_tokens=16, repetition_penalty=1.1)[0]
    options = {"do_sample": False, "max_new_tokens": 16}
    assert generate("llama", "conversational", prompt="Where is the cat?", **options)["response"] == expected
    answer = generate("llama", "conversational", messages=chat, **options)
    assert answer["response"] == expected
    assert answer["messages"] == chat


def test_the_template_is_used_for_messages_to_any_model(generate: Any) -> None:
    """`messages` go through the template whatever the model is registered as; a plain prompt does not."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the cat?"}]
    as_chat = generate("llama", messages=chat, do_sample=False, max_new_tokens=16)["response"]
    as_text = generate("llama", prompt="Where is the cat?", do_sample=False, max_new_tokens=16)["response"]
    assert as_chat != as_text


def test_without_a_template_turns_are_joined_by_the_end_token(generate: Any, oracle: Any) -> None:
    """A chat model without template (DialoGPT) reads each turn followed by its end-of-text token."""
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": "Where is the cat?"},
    ]
    text = "".join(turn["content"] + "<|endoftext|>" for turn in chat)
    expected = oracle("dialogpt", text, do_sample=False, max_new_tokens=16, repetition_penalty=1.1)[0]
    answer = generate("dialogpt", "conversational", messages=chat, do_sample=False, max_new_tokens=16)
    assert answer["response"] == expected


def test_an_empty_prompt_starts_from_the_models_first_token(generate: Any, oracle: Any) -> None:
    """An empty prompt is a valid one where the model has a token to start from."""
    answer = generate("gpt2", prompt="", do_sample=False, max_new_tokens=8)
    assert len(answer["response"]) > 0


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(generate: Any) -> None:
    """A prompt longer than the context is a 400 that gives its length and the context's; nothing is cut in silence."""
    message = generate("gpt2", prompt="a cat " * 600, status=400)["error"]
    assert "prompt" in message
    assert "256" in message
    assert "1801" in message or any(word.isdigit() and int(word) > 256 for word in message.split())


def test_generation_ends_where_the_context_does(generate: Any) -> None:
    """`max_new_tokens` beyond the room that is left gives as many tokens as fit, not a failure."""
    assert generate("gpt2", prompt="The cat", do_sample=False, max_new_tokens=5000)["response"]


@pytest.mark.parametrize("name", ["bert-mlm", "distilbert-sst2", "bert-qa", "bert-embed"])
def test_a_model_that_cannot_generate_says_what_it_can_do(name: str, generate: Any) -> None:
    """`/generate` for a model without a language-model head is a 400 that lists the model's tasks."""
    own = {
        "bert-mlm": "fill-mask",
        "distilbert-sst2": "sentiment-analysis",
        "bert-qa": "question-answering",
        "bert-embed": "feature-extraction",
    }[name]
    message = generate(name, own, prompt="Hello", status=400)["error"]
    assert own in message
    assert "tiny/" in message


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "top_p": 5}, "top_p"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": "5"}, "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": 5.5}, "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens"),
        ({"prompt": "x", "do_sample": 1}, "do_sample"),
        ({"prompt": "x", "do_sample": False, "num_return_sequences": 2}, "num_return_sequences"),
        ({"prompt": "x", "top_k": -1}, "top_k"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "no_such_thing": 1}, "no_such_thing"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({}, "prompt"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], field: str, generate: Any) -> None:
    """A wrong type, a value out of range, an unknown or a missing field is a 400 that names the field."""
    answer = generate("gpt2", status=400, **body)
    assert list(answer) == ["success", "error"]
    assert answer["success"] is False
    assert field in answer["error"]


def test_every_call_is_counted(client: Any, generate: Any, tiny: Any) -> None:
    """`usage_count` and `last_used` move with every generate call that succeeds, and with no other."""
    path = f"/api/huggingface/models/{tiny('gpt2')}"
    generate("gpt2", prompt="x", max_new_tokens=1)
    generate("gpt2", prompt="x", max_new_tokens=1)
    first = client.get(path).get_json()["model"]
    assert first["usage_count"] == 2
    generate("gpt2", prompt="x", max_new_tokens=0, status=400)
    assert client.get(path).get_json()["model"]["usage_count"] == 2
    generate("gpt2", prompt="x", max_new_tokens=1)
    last = client.get(path).get_json()["model"]
    assert last["usage_count"] == 3
    assert last["last_used"] > first["last_used"]


@pytest.mark.parametrize(
    ("name", "body", "field"),
    [
        ("gpt2", {"min_new_tokens": 300, "max_new_tokens": 400}, "min_new_tokens"),
        ("gpt2", {"max_length": 400, "min_length": 350}, "min_length"),
        ("gpt2", {"max_length": 2}, "max_length"),
        ("bart", {"max_length": 3000, "min_length": 2900}, "min_length"),
        ("gpt2", {"forced_eos_token_id": 100_000}, "forced_eos_token_id"),
        ("gpt2", {"eos_token_id": 100_000}, "eos_token_id"),
        ("gpt2", {"suppress_tokens": list(range(2000))}, "suppress_tokens"),
        ("gpt2", {"forced_bos_token_id": 3}, "forced_bos_token_id"),
        ("t5", {"guidance_scale": 2.0}, "guidance_scale"),
        ("gpt2", {"stop_strings": "x" * 1000}, "stop_strings"),
    ],
)
def test_what_this_model_cannot_honour_is_refused_by_name(
    name: str, body: dict[str, Any], field: str, generate: Any
) -> None:
    """Limits that only the model knows (its context, its vocabulary, its kind) are a 400 that names the field."""
    assert field in generate(name, prompt="The cat sat on the mat", status=400, **body)["error"]


def test_a_vocabulary_cannot_be_banned_altogether(generate: Any, models_dir: Path, tiny: Any) -> None:
    """Where no token is left to generate, nothing is drawn from nothing: the request is refused."""
    config = json.loads((models_dir / tiny("gpt2") / "config.json").read_text())
    tokens = [token for token in range(config["vocab_size"]) if token != config["eos_token_id"]]
    body = {"prompt": "x", "suppress_tokens": tokens}
    assert "suppress_tokens" in generate("gpt2", status=400, min_new_tokens=2, **body)["error"]
    assert generate("gpt2", **body)["response"] == ""


def test_the_answer_shows_how_many_tokens_there_was_room_for(generate: Any) -> None:
    """`max_new_tokens` beyond the context is cut to the room behind the prompt, and shown so."""
    parameters = generate("gpt2", prompt="The cat", do_sample=False, max_new_tokens=5000)["parameters"]
    assert 200 < parameters["max_new_tokens"] <= 256


def test_a_request_that_was_given_up_holds_no_memory(models_dir: Path, tiny: Any) -> None:
    """The cache of a cancelled generation is gone with it, without waiting for the garbage collector."""
    record = ModelRecord(tiny("gpt2"), "x", "text-generation")
    model = loader.load(record, LoadOptions(models_dir, "cpu"), models_dir / record.model_id)
    asked = itertools.count()
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(Cancelled):
            request = GenerationRequest({"max_new_tokens": 50}, prompt="x")
            list(model.generate(request, Cancellation(lambda: next(asked) > 5)))
        assert next(asked) > 5
        assert not [thing for thing in gc.get_objects() if type(thing) is DynamicCache]
    finally:
        gc.enable()
        model.close()


@pytest.mark.parametrize(
    ("registered", "asked", "expected"),
    [
        ({"temperature": 0}, {"do_sample": True}, {"do_sample": True, "temperature": 0.7}),
        ({"temperature": 0}, {}, {"do_sample": False}),
        ({"min_new_tokens": 50}, {"max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 1, "do_sample": False}, {"num_beams": 1}),
        ({"max_length": 30}, {"max_new_tokens": 5}, {"max_new_tokens": 5}),
    ],
)
def test_what_is_asked_wins_over_what_is_registered(
    client: Any, tiny: Any, registered: dict[str, Any], asked: dict[str, Any], expected: dict[str, Any]
) -> None:
    """A registered parameter that does not go together with the request's gives way to it."""
    body = {"model_id": tiny("gpt2"), "name": "x", "model_type": "text-generation", "parameters": registered}
    assert client.post("/api/huggingface/models", json=body).status_code == 200
    answer = client.post("/api/huggingface/generate", json={"model_id": tiny("gpt2"), "prompt": "The", **asked})
    effective = answer.get_json()["parameters"]
    assert expected.items() <= effective.items()
    assert not ({"min_new_tokens", "num_return_sequences", "max_length"} - set(expected)) & set(effective) - set(asked)


def test_a_requested_stop_sequence_replaces_registered_stop_strings(client: Any, tiny: Any) -> None:
    """Two names of one parameter: the request's counts."""
    body = {
        "model_id": tiny("gpt2"),
        "name": "x",
        "model_type": "text-generation",
        "parameters": {"stop_strings": ["q"]},
    }
    assert client.post("/api/huggingface/models", json=body).status_code == 200
    body = {"model_id": tiny("gpt2"), "task": "text-generation", "inputs": "The", "stop_sequence": "e"}
    assert client.post("/api/huggingface/pipeline", json=body).status_code == 200


def test_a_models_own_stop_strings_are_honoured(client: Any, generate: Any, models_dir: Path, tiny: Any) -> None:
    """Stop strings of a model's `generation_config.json` end its texts, and are left out of them like a request's."""
    options = {"do_sample": False, "max_new_tokens": 20}
    whole = generate("gpt2", prompt="The cat sat on", **options)["response"]
    stop = whole[5:7]
    folder = models_dir / "tiny" / "gpt2-stops"
    shutil.copytree(models_dir / tiny("gpt2"), folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "stop_strings": [stop]}))
    body = {"model_id": "tiny/gpt2-stops", "name": "x", "model_type": "text-generation"}
    assert client.post("/api/huggingface/models", json=body).status_code == 200
    answer = client.post(
        "/api/huggingface/generate", json={"model_id": "tiny/gpt2-stops", "prompt": "The cat sat on", **options}
    )
    assert answer.status_code == 200, answer.get_data(as_text=True)
    assert answer.get_json()["response"] == whole[: whole.index(stop)]
