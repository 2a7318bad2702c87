"""The space before the first new word: kept where a text goes on, left out where an answer stands for itself.

Decoders of SentencePiece's kind and of BERT's drop the space before the first word that they are given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_tokenizers import byte_fallback, byte_level, unigram, wordpiece
from tokenizers import processors
from transformers import AutoTokenizer

import huggingface
from app import create_app
from config import Settings
from huggingface.engine.detokenizer import TextStream

API = "/api/huggingface"
MODEL = "tiny/first-word"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)
SAID = [{"role": "user", "content": "the cat"}]


def llama(root: Path) -> Any:
    """A model with Llama 2's kind of tokenizer; its tokenizer."""
    folder = root / MODEL
    folder.mkdir(parents=True)
    rows = byte_fallback(folder, TEMPLATE)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**shape, vocab_size=rows, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """A client of a server with the model, and its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = llama(root)
    app = create_app(Settings(_env_file=None, registry=root / "r.json", models_dir=root, device="cpu"))
    fields = {"model_id": MODEL, "name": "x", "model_type": "text-generation"}
    assert app.test_client().post(f"{API}/models", json=fields).status_code == 200
    yield app.test_client(), tokenizer
    huggingface.close(app)


def bias(tokenizer: Any, *pieces: str) -> dict[str, float]:
    """Have the model write one of these pieces, and no other."""
    return {str(tokenizer.convert_tokens_to_ids(piece)): 100.0 for piece in pieces}


def answered(answer: Any) -> Any:
    assert answer.status_code == 200, answer.get_json()
    return answer.get_json()


def events(answer: Any) -> list[Any]:
    """What a stream of server-sent events tells."""
    lines = [line.removeprefix("data:").strip() for line in answer.get_data(as_text=True).splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


# Every way to continue a text -----------------------------------------------------------------------------------------


def test_a_completion_begins_with_the_space_of_its_first_word(served: tuple[Any, Any]) -> None:
    """Alone and behind the echoed prompt, whole and streamed, from a text and from tokens; its tokens add up to it."""
    client, tokenizer = served
    ask = {"model": MODEL, "prompt": "a cat", "max_tokens": 2, "temperature": 0, "logit_bias": bias(tokenizer, "▁the")}

    def complete(**fields: Any) -> Any:
        return client.post("/v1/completions", json={**ask, **fields})

    for prompt in ("a cat", tokenizer("a cat")["input_ids"]):
        [choice] = answered(complete(prompt=prompt, logprobs=0))["choices"]
        assert choice["text"] == " the the" == "".join(choice["logprobs"]["tokens"])
    assert answered(complete(echo=True))["choices"][0]["text"] == "a cat the the"
    assert answered(complete(echo=True, max_tokens=0))["choices"][0]["text"] == "a cat"
    told = [event["choices"][0]["text"] for event in events(complete(stream=True)) if event["choices"]]
    assert [text for text in told if text] == [" the", " the"]
    assert answered(complete(stop=[" the"]))["choices"][0]["text"] == ""
    [echoed] = answered(complete(echo=True, logprobs=0))["choices"]
    assert "".join(echoed["logprobs"]["tokens"]) == "<s>a cat the the"


def test_every_route_that_continues_a_text_keeps_the_space(served: tuple[Any, Any]) -> None:
    """The documented one, Hugging Face's, Ollama's raw prompts, and a chat whose last answer is to be continued."""
    client, tokenizer = served
    ids = bias(tokenizer, "▁the")
    greedy = {"do_sample": False, "max_new_tokens": 2, "logit_bias": ids}
    body = {"model_id": MODEL, "prompt": "a cat", **greedy}
    assert answered(client.post(f"{API}/generate", json=body))["response"] == " the the"
    told = [
        event["text"]
        for event in events(client.post(f"{API}/generate", json={**body, "stream": True}))
        if "text" in event
    ]
    assert "".join(told) == " the the"
    last = [*SAID, {"role": "assistant", "content": "a cat"}]
    continued = {"model_id": MODEL, "messages": last, **greedy}
    assert answered(client.post(f"{API}/generate", json=continued))["response"] == " the the"

    choice = {"type": "regex", "value": " the( the)?"}
    wanted = {"max_new_tokens": 4, "grammar": choice, "details": True}
    [made] = answered(client.post(f"{API}/models/{MODEL}", json={"inputs": "a cat", "parameters": wanted}))
    assert made["generated_text"].startswith(" the")
    assert (
        "".join(token["text"] for token in made["details"]["tokens"] if not token["special"]) == made["generated_text"]
    )
    wanted["return_full_text"] = True
    [made] = answered(client.post(f"{API}/models/{MODEL}", json={"inputs": "a cat", "parameters": wanted}))
    assert made["generated_text"].startswith("a cat the")

    # Ollama's body says nothing of single tokens: what the model writes of its own accord.
    ask = {
        "model": MODEL,
        "prompt": "a cat",
        "stream": False,
        "options": {"temperature": 0, "repeat_penalty": 1, "num_predict": 6},
    }
    own = {"model_id": MODEL, "do_sample": False, "repetition_penalty": 1, "max_new_tokens": 6}
    for ollama, source in (
        ({"raw": True}, {"prompt": "a cat"}),
        ({}, {"messages": [{"role": "user", "content": "a cat"}]}),
    ):
        expected = answered(client.post(f"{API}/generate", json={**own, **source}))["response"]
        assert answered(client.post("/api/generate", json={**ask, **ollama}))["response"] == expected


def test_beams_and_several_answers_keep_the_space(served: tuple[Any, Any]) -> None:
    client, tokenizer = served
    body = {"model_id": MODEL, "prompt": "a cat", "max_new_tokens": 2, "logit_bias": bias(tokenizer, "▁the")}
    made = answered(client.post(f"{API}/generate", json={**body, "num_beams": 2, "do_sample": False}))
    assert made["response"] == " the the"
    made = answered(client.post(f"{API}/generate", json={**body, "num_return_sequences": 2, "do_sample": True}))
    assert made["responses"] == [" the the"] * 2


# Answers that stand for themselves ------------------------------------------------------------------------------------


def test_an_answer_to_a_chat_is_what_transformers_decodes(served: tuple[Any, Any]) -> None:
    """Without a space before its first word, whole and streamed, and so are its first token and those in its place."""
    client, tokenizer = served
    bias_of = bias(tokenizer, "▁the")
    ask = {"model": MODEL, "messages": SAID, "max_tokens": 2, "temperature": 0, "logit_bias": bias_of}
    ask |= {"logprobs": True, "top_logprobs": 2}
    [choice] = answered(client.post("/v1/chat/completions", json=ask))["choices"]
    the = tokenizer.convert_tokens_to_ids("▁the")
    assert choice["message"]["content"] == "the the" == tokenizer.decode([the, the])
    told = choice["logprobs"]["content"]
    assert [token["token"] for token in told] == ["the", " the"]
    assert [bytes(token["bytes"]) for token in told] == [b"the", b" the"]
    streamed = events(client.post("/v1/chat/completions", json={**ask, "stream": True}))
    assert [event["choices"][0]["delta"].get("content") for event in streamed if event["choices"]][1:3] == [
        "the",
        " the",
    ]
    tokens = [
        token
        for event in streamed
        for choice in event["choices"]
        for token in (choice["logprobs"] or {}).get("content", ())
    ]
    assert [token["token"] for token in tokens] == ["the", " the"]
    stopped = answered(client.post("/v1/chat/completions", json={**ask, "stop": [" the"]}))
    assert stopped["choices"][0]["message"]["content"] == ""


def test_a_text_of_a_form_is_exactly_what_the_form_says(served: tuple[Any, Any]) -> None:
    """With its first space, behind any prompt and none, and in a chat."""
    client, _ = served
    for form in ({"choice": [" yes"]}, {"choice": ["yes"]}, {"regex": " ?yes", "logit_bias": bias(served[1], "▁y")}):
        expected = " yes" if form.get("choice") != ["yes"] else "yes"
        for source in ({"prompt": "a cat"}, {"prompt": "a cat "}, {"prompt": ""}, {"messages": SAID}):
            body = {"model_id": MODEL, **source, **form, "do_sample": False, "max_new_tokens": 20}
            assert answered(client.post(f"{API}/generate", json=body))["response"] == expected, source


# Tokenizers of every kind ---------------------------------------------------------------------------------------------


def _byte_level(folder: Path) -> None:
    byte_level(folder, ["<|endoftext|>"], lambda _: processors.ByteLevel(trim_offsets=False))


def _unigram(folder: Path) -> None:
    unigram(folder, ["<pad>", "</s>", "<unk>"], [], {"tokens": ["</s>"], "single": "$A </s>", "pair": "$A $B </s>"})


KINDS: dict[str, Callable[[Path], Any]] = {
    "bytes": _byte_level,
    "sentencepiece": byte_fallback,
    "unigram": _unigram,
    "wordpiece": lambda folder: wordpiece(folder, []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_continued_at_any_of_its_tokens_is_the_same(kind: str, tmp_path: Path) -> None:
    """The prompt's text and the new one are the whole text, in pieces as well, and even within a character."""
    KINDS[kind](tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "the cat isn't red. in the house ." + ("" if kind in ("unigram", "wordpiece") else " grüße ☃\n  the  end ")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids)
    for at in range(1, len(ids)):
        stream = TextStream(tokenizer, (), ids[:at])
        pieces = [stream.add(token) for token in ids[at:]]
        rest, made = stream.finish()
        before = tokenizer.decode(ids[:at])
        assert whole.endswith(made)
        assert "".join(pieces) + rest == made
        assert len(made) == len(whole) - len(before.rstrip("\ufffd")), (before, made)
    alone = TextStream(tokenizer, (), ids[:3], begin="alone")
    pieces = [alone.add(token) for token in ids]
    rest, made = alone.finish()
    assert "".join(pieces) + rest == made == whole


# Where tokens stand ---------------------------------------------------------------------------------------------------


SNOW = "☃☃ the"  # <s>, a space of the tokenizer's, three bytes each, a word


@pytest.mark.parametrize(
    ("prompt", "echoed", "places"),
    [
        (SNOW, SNOW, [0, 0, 0, 0, 0, 1, 1, 1, 2]),
        (f"<s>{SNOW}", f"<s>{SNOW}", [0, 3, 3, 3, 3, 3, 4, 4, 4, 5]),
        (None, f"<s> {SNOW}", [0, 3, 4, 4, 4, 5, 5, 5, 6]),
    ],
)
def test_text_offsets_tell_where_each_token_begins_in_the_text(
    prompt: str | None, echoed: str, places: list[int], served: tuple[Any, Any]
) -> None:
    """Of characters of several tokens too, and behind special tokens that the text shows, and that it does not."""
    client, tokenizer = served
    ids = tokenizer(SNOW)["input_ids"]
    ask = {
        "model": MODEL,
        "prompt": ids if prompt is None else prompt,
        "temperature": 0,
        "logprobs": 0,
        "max_tokens": 9,
    }
    ask["structured_outputs"] = {"choice": [" ☃"]}  # a space and three bytes
    for echo in (True, False):
        begin = len(echoed) if echo else 0
        expected = [*(places if echo else ()), begin, begin + 1, begin + 1, begin + 1]
        [choice] = answered(client.post("/v1/completions", json={**ask, "echo": echo}))["choices"]
        assert choice["text"] == (echoed if echo else "") + " ☃"
        assert choice["logprobs"]["text_offset"] == expected
        streamed = events(client.post("/v1/completions", json={**ask, "echo": echo, "stream": True}))
        told = [event["choices"][0]["logprobs"]["text_offset"] for event in streamed if event["choices"]]
        assert [place for each in told for place in each] == expected
    [choice] = answered(client.post("/v1/completions", json={**ask, "echo": True, "max_tokens": 0}))["choices"]
    assert choice["logprobs"]["text_offset"] == places
