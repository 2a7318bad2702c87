"""Long texts: what cannot fit is refused before it is read whole, what fits is read as ever, and readings end early."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import changed_models
import pytest
from transformers import AutoTokenizer

from huggingface.cancellation import NEVER, Cancellation
from huggingface.engine.lengths import TextLengths, TooLong
from huggingface.errors import Cancelled, ContextExceeded, InvalidRequest
from huggingface.types import GenerationRequest

WORDS = "The little harbour lay still, and nobody came to see it. "
LONG = WORDS * (1_500_000 // len(WORDS))


class Counting:
    """A tokenizer, and how many characters it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.characters = 0

    def __call__(self, text: str, **how: Any) -> Any:
        self.characters += len(text)
        return self.tokenizer(text, **how)


@pytest.fixture(params=["gpt2", "llama", "t5", "bert-mlm", "roberta-mlm", "marian", "mbart"])
def tokenizer(request: Any, tiny: Any, models_dir: Path) -> Any:
    """Tokenizers of each kind: byte-level, byte fallback, pieces, words, and one written in Python."""
    return AutoTokenizer.from_pretrained(models_dir / tiny(request.param))


def test_what_is_far_too_long_is_refused_before_it_is_read_whole(tokenizer: Any) -> None:
    """Of more than a million characters a small part tells that they do not fit a context of a thousand tokens."""
    counting = Counting(tokenizer)
    with pytest.raises(TooLong) as error, TextLengths(counting, 1000).reading(LONG, 2000, NEVER):
        raise AssertionError
    assert error.value.tokens > 2000
    assert counting.characters < 200_000


def test_what_fits_is_never_refused(tokenizer: Any) -> None:
    """However few tokens a long text comes to, in whole it is read where they fit."""
    texts = (
        LONG[:80_000],
        WORDS + " " * 100_000 + WORDS,
        WORDS + "\n" * 100_000,
        "a" * 80_000,
        "\u6f22" * 80_000,
        "\u0301" * 80_000,
        ("word" * 20_000 + " ") * 2,
    )
    for text in texts:
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        with TextLengths(tokenizer, None).reading(text, count, NEVER):
            pass


def test_a_reading_ends_when_nobody_waits_for_it(tokenizer: Any) -> None:
    """A client that leaves, in the middle of a reading or before its turn, costs no more."""
    counting = Counting(tokenizer)
    asked: list[bool] = []

    def gone() -> bool:
        asked.append(len(asked) >= 2)
        return asked[-1]

    lengths = TextLengths(counting, None)
    with pytest.raises(Cancelled), lengths.reading(LONG, 10**9, Cancellation(gone)):
        raise AssertionError
    assert counting.characters < 200_000
    text = LONG[:100_000]
    with lengths.reading(text, 10**9, NEVER), lengths.reading(text, 10**9, NEVER):
        read = counting.characters
        with pytest.raises(Cancelled), lengths.reading(text, 10**9, Cancellation(lambda: True)):
            raise AssertionError
        assert counting.characters == read
        with lengths.reading("short", 10**9, NEVER):  # which needs no turn
            pass
        waiting = threading.Thread(target=lambda: lengths.reading(text, 10**9, NEVER).__enter__())
        waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()


@pytest.fixture
def model(tiny: Any, models_dir: Path) -> Iterator[Any]:
    """A tiny Llama with a chat template."""
    changed_models.copy(models_dir, "llama", "changed/long-texts")
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    changed_models.edit(models_dir / "changed/long-texts", "tokenizer_config.json", chat_template=template)
    model = changed_models.load(models_dir, "changed/long-texts", "text-generation")
    yield model
    model.close()


def test_a_long_prompt_or_chat_is_refused_as_a_somewhat_too_long_one_is(model: Any) -> None:
    """The refusal names the field and both numbers, whichever way the prompt is given."""
    for content in (WORDS * 200, LONG):
        chat = [{"role": "user", "content": content}]
        for field, source in (("prompt", {"prompt": content}), ("messages", {"messages": chat})):
            request = GenerationRequest({"max_new_tokens": 1}, **source)
            with pytest.raises(ContextExceeded) as error:
                model.generate(request)
            assert error.value.field == field
            assert error.value.tokens > error.value.room == 512
            assert f"tokens, but the context of model 'changed/long-texts' holds {error.value.room}" in str(error.value)


def test_tokens_are_counted_and_cut_exactly_far_beyond_the_context(model: Any, models_dir: Path) -> None:
    """What is only counted, or of which the end is kept, may be much longer than the context."""
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "changed/long-texts")
    text = LONG[:100_000]
    chat = [{"role": "user", "content": text}] * 2
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert model.count_prompt(GenerationRequest({}, messages=chat)) == len(expected)
    assert model.count_prompt(GenerationRequest({}, prompt=text)) == len(tokenizer(text)["input_ids"])
    assert model.encode(text) == tokenizer(text)["input_ids"]
    with pytest.raises(ContextExceeded):
        model.count_prompt(GenerationRequest({}, prompt=LONG))
    with pytest.raises(InvalidRequest, match="longer than 262144 tokens"):
        model.encode(LONG)


def test_a_chat_that_is_given_up_is_not_laid_out_to_its_end(model: Any) -> None:
    """Neither a chat of many messages nor a long prompt is worked on for a client that has left."""
    for source in ({"messages": [{"role": "user", "content": WORDS}] * 1000}, {"prompt": LONG}):
        for call in (model.generate, model.count_prompt):
            with pytest.raises(Cancelled):
                call(GenerationRequest({"max_new_tokens": 1}, **source), Cancellation(lambda: True))


@pytest.mark.parametrize(
    ("name", "task", "inputs", "parameters", "field"),
    [
        ("distilbert-sst2", "text-classification", ["short", LONG], {"truncation": True}, "inputs.1"),
        ("bert-qa", "question-answering", {"question": "Who?", "context": LONG}, {}, "inputs.context"),
        ("bert-embed", "sentence-embeddings", [LONG], {"truncate": True}, "inputs.0"),
        ("llama", "text-generation", "short", {"prefix": LONG, "max_new_tokens": 1}, "prefix"),
        ("t5", "summarization", LONG, {"truncation": True}, "inputs"),
    ],
)
def test_a_task_refuses_a_text_that_would_hold_the_model_for_a_minute(
    name: str,
    task: str,
    inputs: Any,
    parameters: dict[str, Any],
    field: str,
    tiny: Any,
    models_dir: Path,
) -> None:
    """Where a task cuts a text or reads it in pieces, there is a most that is read, far beyond any context."""
    model = changed_models.load(models_dir, tiny(name), task)
    try:
        with pytest.raises(InvalidRequest, match="longer than 262144 tokens") as error:
            model.run(task, inputs, parameters)
        assert error.value.field == field
        with pytest.raises(Cancelled):
            model.run(task, inputs, parameters, Cancellation(lambda: True))
    finally:
        model.close()


def test_a_request_whose_text_is_being_read_is_listed_and_can_be_cancelled(server: Any, tiny: Any) -> None:
    """DELETE of a request's id reaches it while its long prompt is being read."""
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    server.call("POST", f"/models/{model_id}/load")
    answers: list[Any] = []

    def ask() -> None:
        body = {"model_id": model_id, "task": "text-generation", "inputs": LONG, "max_new_tokens": 1}
        answers.append(server.call("POST", "/pipeline", json=body))

    thread = threading.Thread(target=ask)
    thread.start()
    found: list[Any] = []
    while thread.is_alive() and not found:
        time.sleep(0.02)
        found = server.call("GET", "/requests").json()["requests"]
    for each in found:
        server.call("DELETE", f"/requests/{each['request_id']}")
    thread.join(120)
    assert answers[0].status_code in (400, 499)  # the former where it had been read by then
    assert server.call("GET", "/requests").json()["count"] == 0
