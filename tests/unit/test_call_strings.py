"""What models write in and around calls against JSON's rules: it reaches the client as valid JSON, and as one text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from huggingface.api.openai.chat import message_of
from huggingface.api.openai.conversation import Conversation, Wish
from huggingface.chat.calls import Quoted
from huggingface.chat.formats import (
    GEMMA,
    HERMES,
    JSON,
    LFM,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    PYTHON,
    QWEN_XML,
    ReasoningTags,
    ToolFormat,
)
from huggingface.chat.harmony import HarmonyReader
from huggingface.chat.parser import AnswerParser, AnswerReader, CallArguments, CallStart, Content, Part, Reasoning
from huggingface.chat.seams import Seams
from huggingface.types import ChatTraits

RAW = '{"text": "one\ntwo\t\\\'it\\\' \\d \\u12 \\\n\\\\ \\"q\\" \\u00e9"}'
MEANT = "one\ntwo\t'it' \\d \\u12 \n\\ \"q\" é"
SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}, "more": {"type": "object"}}}

# What a model wrote, by its form: one call of `note`, whose `text` is MEANT.
WRITTEN: dict[str, tuple[ToolFormat | None, str]] = {
    "hermes": (HERMES, f'<tool_call>\n{{"name": "note", "arguments": {RAW}}}\n</tool_call>'),
    "arguments first": (HERMES, f'<tool_call>\n{{"arguments": {RAW}, "name": "note"}}\n</tool_call>'),
    "arguments as text": (HERMES, f'<tool_call>{{"name": "note", "arguments": {json.dumps(RAW)}}}</tool_call>'),
    "llama": (LLAMA, f'{{"name": "note", "parameters": {RAW}}}'),
    "json": (JSON, f'```json\n[{{"name": "note", "arguments": {RAW}}}]\n```'),
    "mistral": (MISTRAL, f'[TOOL_CALLS][{{"name": "note", "arguments": {RAW}}}]'),
    "mistral-args": (MISTRAL_ARGS, f"[TOOL_CALLS]note[ARGS]{RAW}"),
    "gemma": (GEMMA, f"<|tool_call>call:note{RAW}<tool_call|>"),
    "harmony": (None, f"<|channel|>commentary to=functions.note <|constrain|>json<|message|>{RAW}<|call|>"),
}


def reader(form: ToolFormat | None) -> AnswerReader:
    return HarmonyReader({"note": SCHEMA}) if form is None else AnswerParser(form, None, tools={"note": SCHEMA})


def read(form: ToolFormat | None, pieces: list[str]) -> list[Part]:
    parser = reader(form)
    return [*(part for piece in pieces for part in parser.feed(piece)), *parser.finish()]


def calls(parts: list[Part]) -> list[tuple[str, str]]:
    named = [part.name for part in parts if isinstance(part, CallStart)]
    return [
        (name, "".join(part.text for part in parts if isinstance(part, CallArguments) and part.index == index))
        for index, name in enumerate(named)
    ]


@pytest.mark.parametrize("name", WRITTEN)
def test_arguments_with_raw_line_breaks_and_wrong_escapes_are_valid_json(name: str) -> None:
    """Whole and letter by letter, in every form that models write."""
    form, text = WRITTEN[name]
    for pieces in ([text], list(text)):
        [(called, arguments)] = calls(read(form, pieces))
        assert (called, json.loads(arguments)) == ("note", {"text": MEANT})


@pytest.mark.parametrize("form", [PYTHON, LFM])
def test_pythons_calls_may_hold_raw_line_breaks(form: ToolFormat) -> None:
    text = f"""{form.begin}[note(text='one\ntwo "q" it\\'s', more={{"a": ["x\ny",\n1]}})]{form.end}"""
    [(_, arguments)] = calls(read(form, [text]))
    assert json.loads(arguments) == {"text": 'one\ntwo "q" it\'s', "more": {"a": ["x\ny", 1]}}


def test_values_between_tags_may_hold_raw_line_breaks() -> None:
    """They stay what they are: an object is no text for a line break in it."""
    text = '<tool_call>\n<function=note>\n<parameter=more>\n{"a": "x\ny"}\n</parameter>\n</function>\n</tool_call>'
    [(_, arguments)] = calls(read(QWEN_XML, [text]))
    assert json.loads(arguments) == {"more": {"a": "x\ny"}}


@settings(max_examples=500, deadline=None)
@given(st.text("ab\\\"u0f\n\t'é", max_size=12))
def test_whatever_stands_within_quotes_becomes_json(text: str) -> None:
    """And what is JSON already, remains as it is."""
    quoted = Quoted()
    told = ""
    for char in text + '"':
        if quoted.done:
            break
        told += quoted.take(char)
    if quoted.done:
        json.loads('"' + told)
    as_json = json.dumps(text, ensure_ascii=False)[1:]
    again = Quoted()
    assert "".join(map(again.take, as_json)) == as_json


# Around calls ---------------------------------------------------------------------------------------------------------


def told(parts: list[Part]) -> tuple[str, str]:
    joined = list(map(Seams().of, parts))
    said = "".join(part.text for part in joined if isinstance(part, Content))
    return said, "".join(part.text for part in joined if isinstance(part, Reasoning))


CALL = '<tool_call>\n{"name": "note", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("space", ["", " ", "\n", "\n\n"])
def test_texts_before_and_behind_a_call_stand_apart(space: str) -> None:
    """In a chat's one content, whole and streamed, however the model parted them; nothing is added at the ends."""
    wish = Wish(tools=[{"type": "function", "function": {"name": "note", "parameters": SCHEMA}}])
    chat = Conversation(ChatTraits("", {}, frozenset()), [{"role": "user", "content": "hi"}], wish)
    text = f"I look.{space}{CALL}{space}{CALL}{space}It is so.{space}{CALL}"
    for pieces in ([text], list(text)):
        parts = read(HERMES, pieces)
        assert told(parts) == ("I look.\n\nIt is so.", "")
        assert message_of(parts, chat)["content"] == "I look.\n\nIt is so."
    assert told(read(HERMES, [f"{CALL}{space}It is so."]))[0] == "It is so."
    assert told(read(HERMES, ["I look. ", "And see."]))[0] == "I look. And see."


def test_what_a_model_thinks_before_and_behind_a_call_stands_apart() -> None:
    text = (
        "<|channel|>analysis<|message|>first<|end|><|start|>assistant<|channel|>commentary to=functions.note"
        "<|message|>{}<|call|><|start|>assistant<|channel|>analysis<|message|>then<|end|>"
        "<|start|>assistant<|channel|>final<|message|>so<|return|>"
    )
    assert told(read(None, [text])) == ("so", "first\n\nthen")
    tags = ReasoningTags("<think>", "</think>")
    parser: Any = AnswerParser(HERMES, tags, tools={"note": SCHEMA})
    parts = [*parser.feed(f"<think>hm</think>I look.{CALL}Done."), *parser.finish()]
    assert told(parts) == ("I look.\n\nDone.", "hm")
