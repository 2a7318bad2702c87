"""Grammars that hold an answer to the form of a call, or to JSON once its reasoning is done.

In llguidance's dialect of Lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..json_schema import TIDY, closed
from .formats import ReasoningTags, ToolFormat

# What says something of an object's properties; where nothing does, a function has no parameters.
_SAYING = (
    *("properties", "required", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"),
    *("allOf", "anyOf", "oneOf", "$ref", "if", "not", "const", "enum"),
)


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
    rules = ["call: " + " | ".join(f"call_{number}" for number in range(len(chosen)))]
    for number, function in enumerate(chosen):
        rules.append(_call(form, function["name"], number, added_tokens))
        rules.append(f"arguments_{number}: %json {json.dumps(_parameters(function))}")
    begin, end = _marker(form.begin, added_tokens), _marker(form.end, added_tokens)

    match form.name:
        case "hermes":
            one = f'{begin} "\\n" call "\\n" {end}'
            answer = f'{one} ("\\n" {one})*' if parallel else one
        case "mistral" if form.between:
            answer = f"({begin} call)+" if parallel else f"{begin} call"
        case "mistral":
            answer = f'{begin} "[" call {_again(parallel)} "]"'
        case "llama":
            answer = f"call {_again(parallel, '; ')}"
        case _:
            answer = f'"[" call {_again(True)} "]" | call' if parallel else "call"
    return "\n".join([*_start(answer, inside_reasoning, reasoning, added_tokens), *rules])


def answer_grammar(
    schema: Any, *, inside_reasoning: bool, reasoning: ReasoningTags | None, added_tokens: Mapping[str, int]
) -> str:
    """JSON of a schema, any JSON object where that is None, after the rest of the reasoning."""
    tidy = tidy_schema({"type": "object"} if schema is None else schema)
    return "\n".join([*_start("value", inside_reasoning, reasoning, added_tokens), f"value: %json {json.dumps(tidy)}"])


def tidy_schema(schema: Any) -> Any:
    """The same schema, for JSON without superfluous space."""
    if schema is True:
        schema = {}
    return {**closed(schema), "x-guidance": dict(TIDY)} if isinstance(schema, dict) else schema


def _start(
    answer: str, inside_reasoning: bool, reasoning: ReasoningTags | None, added_tokens: Mapping[str, int]
) -> list[str]:
    if not inside_reasoning or reasoning is None:
        return [f"start: answer\nanswer: {answer}"]
    lines = '("\\n" "\\n"?)?'
    if reasoning.close in added_tokens:
        close = _marker(reasoning.close, added_tokens)
        return [f"start: THOUGHT {close} {lines} answer\nTHOUGHT: /(.|\\n)*/\nanswer: {answer}"]
    # Everything up to the tag, and the tag itself.
    close = _quoted(reasoning.close)
    return [f"start: thought {lines} answer\nthought[suffix={close}]: /(.|\\n)*/\nanswer: {answer}"]


def _call(form: ToolFormat, name: str, number: int, added_tokens: Mapping[str, int]) -> str:
    """The rule of a call. Its arguments are a rule of their own, so that a `$ref` in them begins at their schema."""
    rule, arguments = f"call_{number}:", f"arguments_{number}"
    if form.between in added_tokens:
        return f"{rule} {_quoted(name)} {_marker(form.between, added_tokens)} {arguments}"
    if form.between:
        return f"{rule} {_quoted(name + form.between)} {arguments}"
    head = f'{{"name": {_quoted(name)}, "{form.arguments}": '
    return f'{rule} {_quoted(head)} {arguments} "}}"'


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object."""
    schema = {**(function.get("parameters") or {}), "type": "object"}
    if "additionalProperties" not in schema and not any(schema.get(name) for name in _SAYING):
        schema["additionalProperties"] = False
    return dict(tidy_schema(schema))


def _again(parallel: bool, between: str = ", ") -> str:
    return f'("{between}" call)*' if parallel else ""


def _marker(text: str, added_tokens: Mapping[str, int]) -> str:
    """A marker in a grammar: a token of its own, where it is one."""
    return f"<[{added_tokens[text]}]>" if text in added_tokens else _quoted(text)


def _quoted(text: str) -> str:
    """A text as JSON and grammars quote it."""
    return json.dumps(text, ensure_ascii=False)
