"""Recognizes the form of a model's calls and reasoning by its chat template and its added tokens.

Sources: the chat templates of the models named below; vLLM's tool parsers; "Function calling" in transformers' docs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Template = str | Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class Tags:
    """Arguments written one by one: `open` KEY `middle` VALUE `close`, and `end` after the last one.

    A `padded` value stands on its own lines. Strings are written bare, everything else as JSON.
    """

    open: str
    middle: str
    close: str
    end: str
    padded: bool = False


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The form of a model's calls.

    `begin` comes before a call, or before a list of calls, `end` after it; if `begin` is empty, an answer that consists
    of calls only is read as calls. `call` is one call, with `$name`, `$arguments` and, where calls are numbered,
    `$index` in their places: a JSON object if it begins with a brace, else a head, the arguments and a tail. The
    arguments are JSON, Gemma's form (`lax`), or between `tags`; `python` is a list of calls in Python's syntax.

    A model writes `lead` before the calls of one list, `between` between them and `trail` after them. Without a list
    (`each`), every call has its own `begin` and `end`, with `between` between the calls. `special_tokens` are kept in
    the decoded text, where the model's vocabulary has them as special tokens.
    """

    name: str
    begin: str
    end: str
    call: str
    special_tokens: tuple[str, ...] = ()
    lead: str = ""
    between: str = ""
    trail: str = ""
    each: bool = False
    silent: bool = False  # `begin` is read, but a grammar does not write it
    lax: bool = False
    python: bool = False
    tags: Tags | None = None
    id_length: int = 24  # Mistral's templates accept ids of 9 characters only

    @property
    def as_object(self) -> bool:
        """Whether a call is a JSON object with its name and its arguments."""
        return self.call.startswith("{")

    @property
    def bare(self) -> bool:
        """Whether a call may appear in an answer without a mark."""
        return not self.begin or self.silent


def _object(arguments: str) -> str:
    return f'{{"name": $name, "{arguments}": $arguments}}'


def _marked(name: str, begin: str, end: str, call: str, **more: Any) -> ToolFormat:
    more.setdefault("special_tokens", tuple(filter(None, (begin, end))))
    return ToolFormat(name, begin, end, call, **more)


_LINES: Mapping[str, Any] = {"lead": "\n", "between": "\n", "trail": "\n"}
_LIST: Mapping[str, Any] = {"lead": "[", "between": ", ", "trail": "]"}
_CALL = ("<tool_call>", "</tool_call>")
_MISTRAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
_DEEPSEEK = (
    "<\uff5ctool▁calls▁begin\uff5c>",
    "<\uff5ctool▁calls▁end\uff5c>",
    "<\uff5ctool▁call▁begin\uff5c>",
    "<\uff5ctool▁call▁end\uff5c>",
    "<\uff5ctool▁sep\uff5c>",
)
_KIMI = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_KIMI_CALL = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")

# Qwen 2.5 and 3, Hermes, Granite 4, SmolLM3.
HERMES = _marked("hermes", *_CALL, _object("arguments"), each=True, **_LINES)
# Qwen 3.5 and Qwen3-Coder.
QWEN_XML = _marked(
    "qwen-xml",
    *_CALL,
    "<function=$name>$arguments",
    tags=Tags("<parameter=", ">", "</parameter>", "</function>", padded=True),
    each=True,
    **_LINES,
)
# GLM 4.5 and later.
GLM = _marked(
    "glm",
    _CALL[0],
    "",
    "$name$arguments",
    tags=Tags("<arg_key>", "</arg_key><arg_value>", "</arg_value>", _CALL[1]),
    special_tokens=(*_CALL, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    between="\n",
    each=True,
)
# MiniMax M2.
MINIMAX = _marked(
    "minimax",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    '<invoke name="$name">$arguments',
    tags=Tags('<parameter name="', '">', "</parameter>", "</invoke>"),
    **_LINES,
)
# Gemma 4: keys without quotes, strings between marks of its own.
GEMMA = _marked(
    "gemma",
    "<|tool_call>",
    "<tool_call|>",
    "call:$name$arguments",
    special_tokens=("<|tool_call>", "<tool_call|>", '<|"|>'),
    lax=True,
    each=True,
)
# DeepSeek V3.1 and later, and V3 and R1 before it.
DEEPSEEK = _marked(
    "deepseek",
    _DEEPSEEK[0],
    _DEEPSEEK[1],
    f"{_DEEPSEEK[2]}$name{_DEEPSEEK[4]}$arguments{_DEEPSEEK[3]}",
    special_tokens=_DEEPSEEK,
)
DEEPSEEK_V3 = _marked(
    "deepseek-v3",
    _DEEPSEEK[0],
    _DEEPSEEK[1],
    f"{_DEEPSEEK[2]}function{_DEEPSEEK[4]}$name\n```json\n$arguments\n```{_DEEPSEEK[3]}",
    special_tokens=_DEEPSEEK,
    between="\n",
)
KIMI = _marked(
    "kimi",
    *_KIMI,
    f"{_KIMI_CALL[0]}functions.$name:$index{_KIMI_CALL[1]}$arguments{_KIMI_CALL[2]}",
    special_tokens=(*_KIMI, *_KIMI_CALL),
)
# Cohere's Command.
COHERE = _marked(
    "cohere",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    '{"tool_call_id": "$index", "tool_name": $name, "parameters": $arguments}',
    lead="[\n    ",
    between=",\n    ",
    trail="\n]",
)
# Granite 3, and Phi-4-mini.
BARRED = _marked(
    "barred",
    "<|tool_call|>",
    "<|/tool_call|>",
    _object("arguments"),
    **_LIST,
)
GRANITE = replace(BARRED, name="granite", end="", special_tokens=("<|tool_call|>",))
LLAMA = _marked("llama", "<|python_tag|>", "", _object("parameters"), between="; ", silent=True)
# Llama 4, and others that write calls in Python's syntax; LFM 2 puts marks around them.
PYTHON = _marked("python", "", "", "$name($arguments)", python=True, **_LIST)
LFM = replace(
    PYTHON,
    name="lfm",
    begin="<|tool_call_start|>",
    end="<|tool_call_end|>",
    special_tokens=("<|tool_call_start|>", "<|tool_call_end|>"),
)
MISTRAL = _marked("mistral", "[TOOL_CALLS]", "", _object("arguments"), special_tokens=_MISTRAL, id_length=9, **_LIST)
# Since Mistral Small 3.2 and Devstral.
MISTRAL_ARGS = _marked(
    "mistral", "[TOOL_CALLS]", "", "$name[ARGS]$arguments", special_tokens=_MISTRAL, id_length=9, each=True
)
# gpt-oss: an answer is a sequence of messages, each in a channel (see `harmony`).
HARMONY = _marked(
    "harmony",
    "",
    "",
    "<|channel|>commentary to=functions.$name <|constrain|>json<|message|>$arguments",
    special_tokens=tuple(
        f"<|{mark}|>" for mark in ("start", "end", "message", "channel", "constrain", "call", "return")
    ),
)
JSON = _marked("json", "", "", _object("arguments"), **_LIST)


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The tags around a model's reasoning."""

    open: str
    close: str

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The tags and their inner marks, kept in the decoded text where the vocabulary has them as special tokens."""
        return self.open, self.close, *re.findall(r"<[|]?\w+[|]?>", self.open)


_REASONING = (
    ReasoningTags("<think>", "</think>"),
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningTags("<|channel>thought\n", "<channel|>"),
)

# Each form with a pattern that its templates contain; the first that matches counts.
_FOUND_BY: Sequence[tuple[ToolFormat, str]] = (
    (HARMONY, r"<\|channel\|>[\s\S]*functions\."),
    (MINIMAX, "<minimax:tool_call>"),
    (QWEN_XML, "<function="),
    (GLM, "<arg_key>"),
    (GEMMA, r"<\|tool_call>"),
    (KIMI, re.escape(_KIMI[0])),
    (DEEPSEEK_V3, f"{re.escape(_DEEPSEEK[0])}[\\s\\S]*```json|```json[\\s\\S]*{re.escape(_DEEPSEEK[0])}"),
    (DEEPSEEK, re.escape(_DEEPSEEK[0])),
    (COHERE, r"<\|START_ACTION\|>"),
    (LFM, r"<\|tool_call_start\|>"),
    (HERMES, "<tool_call>"),
    (MISTRAL_ARGS, r"\[TOOL_CALLS\][\s\S]*\[ARGS\]"),
    (MISTRAL, r"\[TOOL_CALLS\]"),
    (BARRED, r"<\|/tool_call\|>"),
    (GRANITE, r"<\|tool_call\|>"),
    (PYTHON, r"func(?:tion)?_name\d?\(param"),
    (LLAMA, r"<\|python_tag\|>"),
)
# Each form with a token of its vocabulary, for templates that do not show the form.
_FOUND_BY_TOKEN: Sequence[tuple[ToolFormat, str]] = (
    (LLAMA, "<|python_tag|>"),
    (HERMES, "<tool_call>"),
    (BARRED, "<|/tool_call|>"),
    (GRANITE, "<|tool_call|>"),
    (GEMMA, "<|tool_call>"),
    (LFM, "<|tool_call_start|>"),
)


def find_tool_format(template: Template, added_tokens: Collection[str]) -> ToolFormat:
    """The form of a model's calls; `added_tokens` are the texts of the tokens added to its vocabulary.

    It is `JSON` where the template takes no tools (see `describe_tools`), or has an unknown form.
    """
    text = _text(template)
    if not takes_tools(template):
        return JSON
    for form, pattern in _FOUND_BY:
        if re.search(pattern, text):
            return form
    for form, token in _FOUND_BY_TOKEN:
        if token in added_tokens:
            return form
    if re.search(r"""["']parameters["']\s*:""", text) and "<|start_header_id|>" in text:
        return LLAMA
    return JSON


def speaks_harmony(template: Template) -> bool:
    """Whether answers are sequences of messages in channels, as gpt-oss's are, with tools or without."""
    text = _text(template)
    return "<|channel|>" in text and "<|message|>" in text


def harmony_tokens() -> tuple[str, ...]:
    """The marks of messages in channels."""
    return HARMONY.special_tokens


def find_reasoning(template: Template, added_tokens: Collection[str]) -> ReasoningTags | None:
    """The tags around a model's reasoning; None for a model without reasoning."""
    text = _text(template)
    by_template = (tags for tags in _REASONING if tags.close in text)
    by_tokens = (tags for tags in _REASONING if tags.open in added_tokens and tags.close in added_tokens)
    return next(by_template, None) or next(by_tokens, None)


def begins_inside_reasoning(prompt_end: str, tags: ReasoningTags) -> bool:
    """Whether the prompt ends with the opening tag, so that the answer begins inside the reasoning."""
    return prompt_end.rstrip().endswith(tags.open.rstrip())


def takes_tools(template: Template) -> bool:
    """Whether a chat template uses `tools`."""
    return re.search(r"\btools\b", _text(template)) is not None


def describe_tools(tools: Sequence[Mapping[str, Any]], choice: str, *, answers: bool = False) -> str:
    """Describes tools, and how to call one in the form `JSON`, to a model whose template takes no tools.

    `choice` is `auto`, `required`, or the name of the function to call. With `answers`, an answer without a call is
    JSON too.
    """
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    when = {
        "auto": "If a function helps to answer, reply with nothing but a JSON object that calls it",
        "required": "Reply with nothing but a JSON object that calls one of them",
    }.get(choice, f"Reply with nothing but a JSON object that calls {choice}")
    example = '{"name": "the function\'s name", "arguments": {its arguments}}'
    answer = "\nElse reply with the JSON object that is asked for." if answers else ""
    return f"You can call functions. Each is described by a JSON object:\n{functions}\n\n{when}: {example}{answer}"


def _text(template: Template) -> str:
    if template is None:
        return ""
    return template if isinstance(template, str) else "\n".join(template.values())
