"""Grammars that hold an answer to the form of a call, or to JSON once its reasoning is done.

In llguidance's dialect of Lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..json_schema import TIDY, closed
from .formats import ReasoningTags, ToolFormat

_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def calls_grammar(
    form: ToolFormat,
    tools: Sequence[Mapping[str, Any]],
    *,
    required_name: str | None,
    parallel: bool,
    inside_reasoning: bool,
    reasoning: ReasoningTags | None,
    added_tokens: Mapping[str, int],
) -> str:
    """One call, or several where they may be `parallel`, of any of `tools` or of the one named.

    `tools` are OpenAI's; the arguments of each call satisfy its schema. `added_tokens` are those
    that were added to the model's vocabulary, by their texts.
    """
    functions = [tool["function"] for tool in tools]
    chosen = [function for function in functions if required_name in (None, function["name"])]
    options = [_object(form, function) for function in chosen]
    call = "call: " + " | ".join(f"%json {json.dumps(option)}" for option in options)

    match form.name:
        case "hermes":
            one = f'{_marker(form.begin, added_tokens)} "\\n" call "\\n" {_marker(form.end, added_tokens)}'
            answer = f'{one} ("\\n" {one})*' if parallel else one
        case "mistral":
            answer = f'{_marker(form.begin, added_tokens)} "[" call {_again(parallel)} "]"'
        case "llama":
            answer = f"call {_again(parallel, '; ')}"
        case _:
            answer = f'"[" call {_again(True)} "]" | call' if parallel else "call"
    return "\n".join([*_start(answer, inside_reasoning, reasoning, added_tokens), call])


def answer_grammar(
    schema: Any, *, inside_reasoning: bool, reasoning: ReasoningTags | None, added_tokens: Mapping[str, int]
) -> str:
    """JSON of a schema, any JSON object where that is None, after the rest of the reasoning."""
    tidy = tidy_schema({"type": "object"} if schema is None else schema)
    return "\n".join([*_start("value", inside_reasoning, reasoning, added_tokens), f"value: %json {json.dumps(tidy)}"])


def tidy_schema(schema: Any) -> Any:
    """The same schema, for JSON without superfluous space."""
    return {**closed(schema), "x-guidance": dict(TIDY)} if isinstance(schema, dict) else schema


def _start(
    answer: str, inside_reasoning: bool, reasoning: ReasoningTags | None, added_tokens: Mapping[str, int]
) -> list[str]:
    if not inside_reasoning or reasoning is None:
        return [f"start: answer\nanswer: {answer}"]
    if reasoning.close in added_tokens:
        close = _marker(reasoning.close, added_tokens)
        return [f'start: THOUGHT {close} "\\n\\n" answer\nTHOUGHT: /(.|\\n)*/\nanswer: {answer}']
    # Everything up to the tag, and the tag itself.
    close = json.dumps(reasoning.close)
    return [f'start: thought "\\n\\n" answer\nthought[suffix={close}]: /(.|\\n)*/\nanswer: {answer}']


def _object(form: ToolFormat, function: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a call."""
    parameters = dict(closed(function.get("parameters") or {})) or dict(_NOTHING)
    parameters.setdefault("type", "object")
    if not parameters.get("properties") and "additionalProperties" not in parameters:
        parameters = {**parameters, "additionalProperties": False}
    definitions = {name: parameters.pop(name) for name in ("$defs", "definitions") if name in parameters}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, form.arguments: parameters},
        "required": ["name", form.arguments],
        "additionalProperties": False,
        "x-guidance": dict(TIDY),
        **definitions,  # what `$ref` looks for stands at the root
    }


def _again(parallel: bool, between: str = ", ") -> str:
    return f'("{between}" call)*' if parallel else ""


def _marker(text: str, added_tokens: Mapping[str, int]) -> str:
    """A marker in a grammar: a token of its own, where it is one."""
    return f"<[{added_tokens[text]}]>" if text in added_tokens else json.dumps(text)
