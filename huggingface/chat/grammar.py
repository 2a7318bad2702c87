"""Grammars that hold an answer to the form of a call, or to a form of its text, once its reasoning is done.

In llguidance's dialect of Lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md). What a grammar
here lets a model write as a call, the readers of this room read as one whose arguments satisfy the function's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..forms.gbnf import as_lark
from ..forms.json_schema import TIDY, closed
from ..records import Constraint
from .argument_types import Argument, arguments_of, is_text, resolved, rooted
from .formats import HARMONY, ReasoningTags, Tags, ToolFormat

# What says something of an object's properties; where nothing does, a function has no parameters.
_SAYING = (
    *("properties", "required", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"),
    *("allOf", "anyOf", "oneOf", "$ref", "if", "not", "const", "enum"),
)
_MOST_STEPS = 32  # of schemas within schemas of a text


@dataclass(frozen=True, slots=True)
class Frame:
    """Where an answer begins, and how this model writes what stands around it.

    `added_tokens` are those that were added to the model's vocabulary, by their texts. An answer of a `harmony` model
    names its channel, and may think before.
    """

    reasoning: ReasoningTags | None
    added_tokens: Mapping[str, int]
    inside_reasoning: bool = False
    harmony: bool = False


def calls_grammar(
    form: ToolFormat,
    tools: Sequence[Mapping[str, Any]],
    frame: Frame,
    *,
    required_name: str | None = None,
    parallel: bool = True,
    text: Constraint | None = None,
) -> str:
    """One call, or several where they may be `parallel`, of any of `tools` or of the one named; or a `text`, if given.

    `tools` are OpenAI's; the arguments of each call satisfy its schema.

    Raises:
        ValueError: in this form no call can be held to the schema of one of the functions.
    """
    functions = [tool["function"] for tool in tools]
    chosen = [function for function in functions if required_name in (None, function["name"])]
    written = _Writer(form, frame.added_tokens)
    rules = ["call: " + " | ".join(f"call_{number}" for number in range(len(chosen)))]
    for number, function in enumerate(chosen):
        rules += (
            written.json_call(function, number)
            if text and form.bare and form.as_object
            else written.call(function, number)
        )
    answers = [written.calls(parallel)]
    if text is not None:
        answers.append(written.final("text"))
        rules += _text_rules(text)
    return "\n".join([*_start(" | ".join(answers), frame), *rules])


def answer_grammar(text: Constraint, frame: Frame) -> str:
    """A text of a form, after the rest of the reasoning."""
    answer = _Writer(HARMONY, frame.added_tokens).final("text") if frame.harmony else "text"
    return "\n".join([*_start(answer, frame), *_text_rules(text)])


def tidy_schema(schema: Any) -> Any:
    """The same schema, for JSON without superfluous space."""
    if schema is True:
        schema = {}
    return {**closed(schema), "x-guidance": dict(TIDY)} if isinstance(schema, dict) else schema


def _text_rules(text: Constraint) -> list[str]:
    match text.kind:
        case "json_object":
            return [f"text: %json {json.dumps(tidy_schema({'type': 'object'}))}"]
        case "json_schema":
            return [f"text: %json {json.dumps(tidy_schema(text.value))}"]
        case "regex":
            return ["text: TEXT", f"TEXT: {_regex(text.value)}"]
        case "choice":
            return ["text: TEXT", "TEXT: " + " | ".join(_quoted(each) for each in dict.fromkeys(text.value))]
    return [f"text: %lark {{\n{as_lark(text.value)}\n}}"]


def _start(answer: str, frame: Frame) -> list[str]:
    added = frame.added_tokens
    if frame.harmony:
        head = _literal("<|channel|>analysis<|message|>", HARMONY.special_tokens, added)
        tail = _literal("<|start|>assistant", HARMONY.special_tokens, added)
        thought, rules = _up_to("THOUGHT", "/(?s:.*)/", "<|end|>", added)
        return [f"start: thought? answer\nthought: {head} {thought} {tail}\nanswer: {answer}", *rules]
    reasoning = frame.reasoning
    if not frame.inside_reasoning or reasoning is None:
        return [f"start: answer\nanswer: {answer}"]
    lines = '("\\n" "\\n"?)?'
    if reasoning.close in added:
        close = _literal(reasoning.close, (reasoning.close,), added)
        return [f"start: THOUGHT {close} {lines} answer\nTHOUGHT: /(.|\\n)*/\nanswer: {answer}"]
    # Everything up to the tag, and the tag itself.
    close = _quoted(reasoning.close)
    return [f"start: thought {lines} answer\nthought[suffix={close}]: /(.|\\n)*/\nanswer: {answer}"]


class _Writer:
    """Writes the rules of one form's calls."""

    def __init__(self, form: ToolFormat, added_tokens: Mapping[str, int]) -> None:
        self._form = form
        self._added = added_tokens

    def calls(self, parallel: bool) -> str:
        """Calls, in the rule `call`, with what stands around them."""
        form, between = self._form, self._text(self._form.between)
        if form.name == "harmony":
            return "call"  # its models make one call at a time
        begin, end = ("" if form.silent else self._text(form.begin)), self._text(form.end)
        lead, trail = self._text(form.lead), self._text(form.trail)
        if form.name == "json":
            return f"{lead} call ({between} call)* {trail} | call" if parallel else "call"
        if form.each:
            one = f"{begin} {lead} call {trail} {end}"
            return f"{one} ({between} {one})*" if parallel else one
        several = f"({between} call)*" if parallel else ""
        return f"{begin} {lead} call {several} {trail} {end}"

    def final(self, rule: str) -> str:
        """A text that is no call."""
        return f"{self._text('<|channel|>final<|message|>')} {rule}" if self._form.name == "harmony" else rule

    def call(self, function: Mapping[str, Any], number: int) -> list[str]:
        """The rules of a call. Its arguments are a rule of their own: a `$ref` in them begins at their schema."""
        name = _quoted(function["name"]) if self._form.as_object else function["name"]
        head, _, tail = self._form.call.partition("$arguments")
        before, index, after = head.replace("$name", name).partition("$index")
        told = f"{self._text(before)} /[0-9]/ {self._text(after)}" if index else self._text(before)
        rule = f"call_{number}: {told} arguments_{number} {self._text(tail)}"
        return [rule, *self._arguments(function, number)]

    def json_call(self, function: Mapping[str, Any], number: int) -> list[str]:
        """The same where another JSON text may stand instead: both begin with the same lexemes, so that either may come
        of them."""
        parameters = function.get("parameters") or {}
        names = re.findall(r'"(\w+)": \$', self._form.call)
        called = ({"const": function["name"]}, _with_words(parameters))
        schema = {"type": "object", "properties": dict(zip(names, called, strict=True)), "required": names}
        whole = rooted({**schema, "additionalProperties": False}, parameters)
        return [f"call_{number}: %json {json.dumps(tidy_schema(whole))}"]

    def _arguments(self, function: Mapping[str, Any], number: int) -> list[str]:
        if self._form.tags is None and not self._form.python:
            return [f"arguments_{number}: %json {json.dumps(_parameters(function))}"]
        parameters = function.get("parameters") or {}
        try:
            arguments, others = arguments_of(parameters)
            if self._form.python:
                return list(self._python(arguments, number))
            return list(self._tagged(self._form.tags, arguments, others, number, parameters))
        except ValueError as error:
            raise ValueError(f"the parameters of {function['name']}: {error}") from error

    def _tagged(
        self, tags: Tags | None, arguments: Sequence[Argument], others: Any, number: int, root: Mapping[str, Any]
    ) -> Iterator[str]:
        assert tags is not None  # noqa: S101 - the form has some
        line = "\n" if tags.padded else ""
        gap = "\n"
        parts, rules = [], []
        for place, argument in enumerate(arguments):
            rule = f"argument_{number}_{place}"
            if re.search(r'[<>"\n]', argument.name) or argument.name != argument.name.strip():
                raise ValueError(f"this model's calls have no place for the name {argument.name!r}")
            head = self._text(f"{gap}{tags.open}{argument.name}{tags.middle.replace('><', '>' + gap + '<')}{line}")
            if is_text(argument.schema, argument.schema):
                value, more = _up_to(rule.upper(), _text(argument.schema), tags.close, self._added, line)
            else:
                value = f"{rule}_value {self._text(line + tags.close)}"
                more = [f"{rule}_value: %json {json.dumps(tidy_schema(argument.schema))}"]
            rules += [f"{rule}: {head} {value}", *more]
            parts.append(rule if argument.required else f"{rule}?")
        if others is not False and others is not None:
            schema = others if isinstance(others, dict) else {}
            rule = f"argument_{number}_other"
            head = f"{self._text(gap + tags.open)} /[a-zA-Z0-9_]+/"
            middle = self._text(tags.middle.replace("><", ">" + gap + "<") + line)
            if is_text(schema, root):
                value, more = _up_to(rule.upper(), _text(schema), tags.close, self._added, line)
            else:
                value = f"{rule}_value {self._text(line + tags.close)}"
                more = [f"{rule}_value: %json {json.dumps(tidy_schema(schema))}"]
            rules += [f"{rule}: {head} {middle} {value}", *more]
            parts.append(f"{rule}*")
        yield f"arguments_{number}: {' '.join(parts)} {self._text(gap + tags.end)}"
        yield from rules

    def _python(self, arguments: Sequence[Argument], number: int) -> Iterator[str]:
        """Two rules an argument: with a comma before it, if it comes, and without."""
        yield f"arguments_{number}: first_{number}_0"
        for place, argument in enumerate(arguments):
            if not argument.name.isidentifier():
                raise ValueError(f"this model's calls have no place for the name {argument.name!r}")
            rule = f"argument_{number}_{place}"
            yield f"{rule}: {_quoted(argument.name + '=')} {rule}_value"
            yield f"{rule}_value: %json {json.dumps(tidy_schema(argument.schema))}"
            others = f"{number}_{place + 1}"
            without = "" if argument.required else f" | first_{others}"
            yield f"first_{number}_{place}: {rule} more_{others}{without}"
            without = "" if argument.required else f" | more_{others}"
            yield f'more_{number}_{place}: ", " {rule} more_{others}{without}'
        yield f'first_{number}_{len(arguments)}: ""'
        yield f'more_{number}_{len(arguments)}: ""'

    def _text(self, text: str) -> str:
        return _literal(text, self._form.special_tokens, self._added)


def _up_to(name: str, text: str, close: str, added_tokens: Mapping[str, int], line: str = "") -> tuple[str, list[str]]:
    """Text that does not hold `close`, and that: how to refer to both, and the rules."""
    held = f"({text} & ~/(?s:.*){_escaped(close)}(?s:.*)/)"
    if close in added_tokens:
        return f"{name} {_literal(line + close, (close,), added_tokens)}", [f"{name}: {held}"]
    return name, [f"{name}: {held} {_quoted(line + close)}"]


def _text(schema: Any, depth: int = 0) -> str:
    """What a bare text has to be, as a terminal's expression."""
    return _text_within(schema, schema, depth)


def _text_within(schema: Any, root: Any, depth: int) -> str:
    schema = resolved(schema, root)
    if depth > _MOST_STEPS or not isinstance(schema, Mapping):
        return "/(?s:.*)/"
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        texts = [_quoted(value) for value in values if isinstance(value, str)]
        if not texts:
            raise ValueError("a text has no value that it may be")
        return f"({' | '.join(texts)})"
    parts = []
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    parts.append(f"/(?s:.{{{least},{most}}})/" if least or most != "" else "/(?s:.*)/")
    if isinstance(schema.get("pattern"), str):
        parts.append(_searched(schema["pattern"]))
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            parts.append("(" + " | ".join(_text_within(each, root, depth + 1) for each in schema[word]) + ")")
    parts += [_text_within(each, root, depth + 1) for each in schema.get("allOf") or ()]
    return parts[0] if len(parts) == 1 else "(" + " & ".join(parts) + ")"


def _searched(pattern: str) -> str:
    """A text in which the pattern is found."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[begins : len(pattern) - ends]
    return _regex(("" if begins else "(?s:.*)") + f"(?:{inner})" + ("" if ends else "(?s:.*)"))


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object."""
    return dict(tidy_schema(_with_words(function.get("parameters") or {})))


def _with_words(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object, which has no properties where nothing is said of any."""
    schema = {**parameters, "type": "object"}
    if "additionalProperties" not in schema and not any(schema.get(name) for name in _SAYING):
        schema["additionalProperties"] = False
    return schema


def _literal(text: str, markers: Sequence[str], added_tokens: Mapping[str, int]) -> str:
    """A text in a grammar, with the markers in it as tokens of their own where they are some."""
    tokens = [marker for marker in markers if marker in added_tokens]
    pieces = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text) if tokens else [text]
    written = [f"<[{added_tokens[piece]}]>" if piece in tokens else _quoted(piece) for piece in pieces if piece]
    return " ".join(written)


def _regex(pattern: str) -> str:
    """A regular expression as grammars write it."""
    return "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern).replace("\n", "\\n") + "/"


def _escaped(text: str) -> str:
    """A regular expression that means a text, within slashes."""
    return re.sub(r"([^\w\s<>])", r"\\\1", text)


def _quoted(text: str) -> str:
    """A text as JSON and grammars quote it."""
    return json.dumps(text, ensure_ascii=False)
