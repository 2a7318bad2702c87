"""Section 2 of the API document against a live server: `/generate` and `/pipeline`, for all eight model types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Server
from documented import TIME, TYPES, add_gpt2, bad, emptied, good

pytestmark = pytest.mark.each_backend

# What `/generate` tells beyond the document.
BEYOND = ("finish_reason", "usage", "timings")


@pytest.fixture
def api(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> Server:
    """The live server, with nothing registered and nothing in memory."""
    return emptied(server, models_dir, tiny)


# 2. Generation --------------------------------------------------------------------------------------------------------


def test_generate_answers_with_the_new_text_and_how_it_was_made(api: Server) -> None:
    add_gpt2(api)
    prompt = "The future of artificial intelligence is"
    asked = {
        "max_new_tokens": 12,
        "temperature": 0.5,
        "do_sample": False,
        "top_p": 0.8,
        "top_k": 7,
        "repetition_penalty": 1.2,
    }
    body = good(api.call("POST", "/generate", json={"model_id": "gpt2", "prompt": prompt, **asked}))
    assert list(body) == ["success", "response", "model_used", "prompt", "parameters", "model_info", *BEYOND]
    assert body["model_used"] == "gpt2"
    assert body["prompt"] == prompt
    assert list(body["parameters"].items()) == list(asked.items())
    assert body["model_info"] == {"model_id": "gpt2", "name": "GPT-2", "model_type": "text-generation"}
    same = {
        name: value for name, value in asked.items() if name in ("max_new_tokens", "do_sample", "repetition_penalty")
    }
    call = {"model_id": "gpt2", "task": "text-generation", "inputs": prompt, **same}
    [whole] = good(api.call("POST", "/pipeline", json=call))["results"]
    assert body["response"]
    assert whole["generated_text"] == prompt + body["response"]


def test_generate_has_the_documented_defaults(api: Server) -> None:
    add_gpt2(api)
    body = good(api.call("POST", "/generate", json={"model_id": "gpt2", "prompt": "Hello"}))
    defaults = {"max_new_tokens": 100, "temperature": 0.7, "do_sample": True, "top_p": 0.9, "top_k": 50}
    assert list(body["parameters"].items()) == [*defaults.items(), ("repetition_penalty", 1.1)]


def test_the_request_wins_over_the_model_and_the_model_over_the_defaults(api: Server) -> None:
    add_gpt2(api, parameters={"max_new_tokens": 5, "temperature": 0.8})
    body = good(api.call("POST", "/generate", json={"model_id": "gpt2", "prompt": "Hello", "max_new_tokens": 3}))
    assert body["parameters"]["max_new_tokens"] == 3
    assert body["parameters"]["temperature"] == 0.8
    assert body["parameters"]["top_k"] == 50


@pytest.mark.parametrize(
    "model_type", [name for name, row in TYPES.items() if row[0] in ("gpt2", "dialogpt", "t5", "bart", "marian")]
)
def test_every_type_that_writes_text_can_generate(api: Server, model_type: str) -> None:
    model_id = f"tiny/{TYPES[model_type][0]}"
    api.add(model_id, model_type)
    body = {"model_id": model_id, "prompt": "The old lighthouse", "max_new_tokens": 6, "do_sample": False}
    assert good(api.call("POST", "/generate", json=body))["response"]


@pytest.mark.parametrize("model_type", ["question-answering", "fill-mask", "sentiment-analysis"])
def test_a_model_that_writes_no_text_is_refused_with_what_it_can_do(api: Server, model_type: str) -> None:
    model_id = f"tiny/{TYPES[model_type][0]}"
    api.add(model_id, model_type)
    message = bad(api.call("POST", "/generate", json={"model_id": model_id, "prompt": "Hello"}), 400)
    assert model_id in message
    assert model_type in message


@pytest.mark.parametrize("model_type", TYPES)
def test_the_pipeline_serves_every_type_of_model(api: Server, model_type: str) -> None:
    name, task, inputs, keys = TYPES[model_type]
    api.add(f"tiny/{name}", model_type, name="A name")
    limit = {"max_new_tokens": 6} if name in ("gpt2", "dialogpt", "t5", "marian") else {}
    request = {"model_id": f"tiny/{name}", "task": task, "inputs": inputs, **limit}
    body = good(api.call("POST", "/pipeline", json=request))
    assert list(body) == ["success", "results", "model_used", "task", "inputs", "model_info"]
    assert body["model_used"] == f"tiny/{name}"
    assert body["task"] == task
    assert body["inputs"] == inputs
    assert body["model_info"] == {"model_id": f"tiny/{name}", "name": "A name", "model_type": model_type}
    results = body["results"]
    if task == "question-answering":
        assert results["answer"] == inputs["context"][results["start"] : results["end"]]
        results = [results]
    assert results
    assert all(set(result) == keys for result in results)


def test_the_pipeline_takes_the_parameters_of_the_documents_summary(api: Server) -> None:
    api.add("facebook/bart-large-cnn", "summarization")
    text = "The committee agreed on Monday that the bridge must be closed for repairs during the summer. " * 3
    request = {"model_id": "facebook/bart-large-cnn", "task": "summarization", "inputs": text}
    [result] = good(
        api.call("POST", "/pipeline", json={**request, "max_length": 130, "min_length": 30, "do_sample": False})
    )["results"]
    [shorter] = good(api.call("POST", "/pipeline", json={**request, "max_length": 12, "min_length": 2}))["results"]
    assert len(shorter["summary_text"]) < len(result["summary_text"])


@pytest.mark.parametrize("path", ["/generate", "/pipeline"])
def test_a_request_without_a_required_field_is_refused_by_its_name(api: Server, path: str) -> None:
    add_gpt2(api)
    whole = {"model_id": "gpt2", "prompt": "Hello"}
    if path == "/pipeline":
        whole = {"model_id": "gpt2", "task": "text-generation", "inputs": "Hello"}
    for field in whole:
        rest = {name: value for name, value in whole.items() if name != field}
        assert bad(api.call("POST", path, json=rest), 400) == f"Missing required field: {field}"
    assert bad(api.call("POST", path, json={}), 400) == "Missing required field: model_id"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "warm"),
        ("top_p", 5),
        ("top_k", 1.5),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("do_sample", "yes"),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("nan")),
        ("no_such_parameter", 1),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_refused_by_its_name(api: Server, field: str, value: Any) -> None:
    add_gpt2(api)
    # Written by hand, because `requests` itself refuses NaN, which other clients send.
    data = json.dumps({"model_id": "gpt2", "prompt": "Hello", field: value})
    response = api.call("POST", "/generate", data=data, headers={"Content-Type": "application/json"})
    assert field in bad(response, 400)
    fields = {"model_id": "other", "name": "Other", "model_type": "text-generation"}
    if value == value:
        assert field in bad(api.call("POST", "/models", json={**fields, "parameters": {field: value}}), 400)


@pytest.mark.parametrize(
    ("field", "source"),
    [
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": 5}),
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "user"}]}),
        ("messages", {"prompt": "Hello", "messages": [{"role": "user", "content": "Hello"}]}),
    ],
)
def test_a_prompt_or_chat_that_is_none_is_refused_by_its_name(api: Server, field: str, source: dict[str, Any]) -> None:
    add_gpt2(api)
    assert field in bad(api.call("POST", "/generate", json={"model_id": "gpt2", **source}), 400)


def test_a_chat_is_answered_and_shown_as_it_was_sent(api: Server) -> None:
    api.add("microsoft/DialoGPT-medium", "conversational")
    messages = [
        {"role": "user", "content": "How do you do?"},
        {"role": "assistant", "content": "Good, thank you."},
        {"role": "user", "content": "What is your name?"},
    ]
    request = {"model_id": "microsoft/DialoGPT-medium", "max_new_tokens": 6, "do_sample": False}
    body = good(api.call("POST", "/generate", json={**request, "messages": messages}))
    assert list(body) == ["success", "response", "model_used", "messages", "parameters", "model_info", *BEYOND]
    assert body["messages"] == messages
    # A prompt is a chat of one turn; each turn ends with the end-of-text token, as nothing here has a template.
    one = good(api.call("POST", "/generate", json={**request, "messages": messages[:1]}))
    assert (
        good(api.call("POST", "/generate", json={**request, "prompt": "How do you do?"}))["response"] == one["response"]
    )
    joined = "".join(f"{message['content']}<|endoftext|>" for message in messages)
    api.add("tiny/dialogpt", "text-generation")  # the same weights, under a type that takes the prompt as it is
    plain = {**request, "model_id": "tiny/dialogpt", "prompt": joined}
    assert good(api.call("POST", "/generate", json=plain))["response"] == body["response"]


def test_a_task_that_does_not_exist_is_refused_with_those_that_do(api: Server) -> None:
    add_gpt2(api)
    message = bad(api.call("POST", "/pipeline", json={"model_id": "gpt2", "task": "sing", "inputs": "La"}), 400)
    assert "sing" in message
    assert all(task in message for _, task, _, _ in TYPES.values())


def test_a_task_that_the_model_cannot_do_is_refused_with_those_it_can(api: Server) -> None:
    add_gpt2(api)
    message = bad(api.call("POST", "/pipeline", json={"model_id": "gpt2", "task": "fill-mask", "inputs": "La"}), 400)
    assert message.startswith("Model 'gpt2' cannot do 'fill-mask'. It can do: text-generation")


def test_every_generate_and_pipeline_call_counts_as_a_use(api: Server) -> None:
    add_gpt2(api)
    seen = []
    for path, extra in (
        ("/generate", {"prompt": "Hello"}),
        ("/pipeline", {"task": "text-generation", "inputs": "Hello"}),
    ):
        good(api.call("POST", path, json={"model_id": "gpt2", "max_new_tokens": 2, **extra}))
        model = good(api.call("GET", "/models/gpt2"))["model"]
        assert TIME.fullmatch(model["last_used"])
        seen.append((model["usage_count"], model["last_used"]))
    assert [count for count, _ in seen] == [1, 2]
    assert seen[0][1] < seen[1][1]
