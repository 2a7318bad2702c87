"""Grammars that restrict an answer, after its reasoning, to tool calls or to a text of a given form.

In llguidance's dialect of Lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md), except the JSON
values, which `forms.notation` adds. A grammar here is an object with four fields: `rules` of Lark; `schemas` of the
JSON values, by the names of their rules; `marks`, the texts right before such values: for each rule's name, its text in
Lark and the names of the values; and `first`, the values that the answer may begin with.

The readers of this folder read every call that such a grammar allows, and its arguments satisfy the function's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..forms.gbnf import as_lark
from ..forms.keywords import said_otherwise
from ..types import Constraint
from .argument_types import Argument, arguments_of, is_text, resolved, rooted
from .formats import HARMONY, JSON, ReasoningTags, Tags, ToolFormat

# Keywords that describe an object's properties; a function whose schema has none of them has no parameters.
_SAYING = (
    *("properties", "required", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"),
    *("allOf", "anyOf", "oneOf", "$ref", "if", "not", "const", "enum"),
)
_MAX_STEPS = 32  # nested schemas of a text


@dataclass(frozen=True, slots=True)
class Frame:
    """How an answer of this model begins, and the marks around its parts.

    `added_tokens` are the ids of the tokens added to the model's vocabulary, by their texts. An answer of a `harmony`
    model names its channel, and may have reasoning before it.
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
) -> dict[str, Any]:
    """Returns the grammar of one call, or of several if `parallel`; or also of a `text`, if given.

    The calls are of any of `tools`, which are OpenAI's, or only of `required_name`. The arguments of each call satisfy
    its schema.

    Raises:
        ValueError: this form of calls cannot express the schema of one of the functions.
    """
    functions = [tool["function"] for tool in tools]
    chosen = [function for function in functions if required_name in (None, function["name"])]
    written = _Writer(form, frame.added_tokens)
    # Where the answer may be other JSON instead, each call is one JSON value, since both begin with the same lexemes.
    whole = text is not None and form.bare and form.as_object
    for number, function in enumerate(chosen):
        (written.json_call if whole else written.call)(function, number)
    calls = [f"call_{number}" for number in range(len(chosen))]
    written.rules.append("call: " + " | ".join(calls))
    answers = [written.calls(parallel, calls if whole else [])]
    first = calls if whole else []
    if text is not None:
        answers.append(written.final(text))
        first = ["text", *first]
    return written.whole(" | ".join(answers), first, frame)


def answer_grammar(text: Constraint, frame: Frame) -> dict[str, Any]:
    """Returns the grammar of a text of a given form, after the rest of the reasoning."""
    written = _Writer(HARMONY if frame.harmony else JSON, frame.added_tokens)
    return written.whole(written.final(text), ["text"], frame)


class _Writer:
    """Writes the rules of one form's calls."""

    def __init__(self, form: ToolFormat, added_tokens: Mapping[str, int]) -> None:
        self._form = form
        self._added = added_tokens
        self.rules: list[str] = []
        self._schemas: dict[str, Any] = {}
        self._marks: dict[str, tuple[str, Sequence[str]]] = {}

    def whole(self, answer: str, first: Sequence[str], frame: Frame) -> dict[str, Any]:
        """Returns the grammar of an answer that may begin with the values of `first`, after the reasoning."""
        self._start(answer, first, frame)
        first = [] if "before" in self._marks or frame.harmony else first
        return {"rules": self.rules, "schemas": self._schemas, "marks": self._marks, "first": first}

    def _start(self, answer: str, first: Sequence[str], frame: Frame) -> None:
        added, reasoning = self._added, frame.reasoning
        self.rules.append(f"answer: {answer}")
        if frame.harmony:
            head = _literal("<|channel|>analysis<|message|>", HARMONY.special_tokens, added)
            tail = _literal("<|start|>assistant", HARMONY.special_tokens, added)
            thought, rules = _up_to("THOUGHT", "/(?s:.*)/", "<|end|>", added)
            self.rules += ["start: thought? answer", f"thought: {head} {thought} {tail}", *rules]
            return
        if not frame.inside_reasoning or reasoning is None:
            self.rules.append("start: answer")
            return
        lines = '("\\n" "\\n"?)?'
        if reasoning.close in added:
            thought = f"THOUGHT {_literal(reasoning.close, (reasoning.close,), added)}"
            self.rules.append("THOUGHT: /(.|\\n)*/")
        else:  # the text up to the tag, and the tag
            thought = "thought"
            self.rules.append(f"thought[suffix={_quoted(reasoning.close)}]: /(.|\\n)*/")
        self.rules.append(f"start: {self._mark('before', f'{thought} {lines}', first)} answer")

    def _mark(self, name: str, text: str, values: Sequence[str]) -> str:
        """Records the text right before values as a mark; returns the expression that refers to it."""
        if not text or not values:
            return text
        self._marks[name] = text, values
        return name

    def calls(self, parallel: bool, values: Sequence[str]) -> str:
        """Returns the expression for calls (the rule `call`) with their marks; `values` are calls that are one JSON
        value."""
        form, between = self._form, self._mark("between", self._text(self._form.between), values)
        if form.name == "harmony":
            return "call"  # gpt-oss makes one call at a time
        begin, end = ("" if form.silent else self._text(form.begin)), self._text(form.end)
        lead, trail = self._mark("lead", self._text(form.lead), values), self._text(form.trail)
        if form.name == "json":
            return f"{lead} call ({between} call)* {trail} | call" if parallel else "call"
        if form.each:
            one = f"{begin} {lead} call {trail} {end}"
            return f"{one} ({between} {one})*" if parallel else one
        several = f"({between} call)*" if parallel else ""
        return f"{begin} {lead} call {several} {trail} {end}"

    def final(self, text: Constraint) -> str:
        """Adds the rule `text` for an answer without a call; returns the expression for it."""
        match text.kind:
            case "json_object":
                self._schemas["text"] = {"type": "object"}
            case "json_schema":
                self._schemas["text"] = text.value
            case "regex":
                self.rules += ["text: TEXT", f"TEXT: {_regex(text.value)}"]
            case "choice":
                choices = " | ".join(_quoted(each) for each in dict.fromkeys(text.value))
                self.rules += ["text: TEXT", f"TEXT: {choices}"]
            case "grammar":
                self.rules.append(f"text: %lark {{\n{as_lark(text.value)}\n}}")
        if self._form.name != "harmony":
            return "text"
        return f"{self._mark('final', self._text('<|channel|>final<|message|>'), ['text'])} text"

    def call(self, function: Mapping[str, Any], number: int) -> None:
        """Adds the rules of a call. The arguments have a rule of their own, since a `$ref` in them begins at their
        schema."""
        name = _quoted(function["name"]) if self._form.as_object else function["name"]
        head, _, tail = self._form.call.partition("$arguments")
        before, index, after = head.replace("$name", name).partition("$index")
        told = f"{self._text(before)} /[0-9]/ {self._text(after)}" if index else self._text(before)
        if self._form.tags is not None or self._form.python:
            whole = self._one_by_one(function, number, told)
        else:
            rule = f"arguments_{number}"
            self._schemas[rule] = _with_words(function.get("parameters") or {})
            whole = f"{self._mark(f'head_{number}', told, [rule])} {rule}"
        self.rules.append(f"call_{number}: {whole} {self._text(tail)}")

    def json_call(self, function: Mapping[str, Any], number: int) -> None:
        """Adds the rules of a call that is one JSON value."""
        parameters = function.get("parameters") or {}
        names = re.findall(r'"(\w+)": \$', self._form.call)
        called = ({"const": function["name"]}, _with_words(parameters))
        schema = {"type": "object", "properties": dict(zip(names, called, strict=True)), "required": names}
        self._schemas[f"call_{number}"] = rooted({**schema, "additionalProperties": False}, parameters)

    def _one_by_one(self, function: Mapping[str, Any], number: int, told: str) -> str:
        """Returns the expression for a call up to its last argument. Each value's mark is the whole call so far, which
        distinguishes the argument from those of the same name in other functions."""
        parameters = function.get("parameters") or {}
        self.rules.append(f"told_{number}: {told}")
        try:
            arguments, others = arguments_of(parameters)
            if self._form.python:
                return self._python(arguments, number)
            return self._tagged(self._form.tags, arguments, others, number, parameters)
        except ValueError as error:
            raise ValueError(f"the parameters of {function['name']}: {error}") from error

    def _tagged(
        self, tags: Tags | None, arguments: Sequence[Argument], others: Any, number: int, root: Mapping[str, Any]
    ) -> str:
        assert tags is not None  # noqa: S101 - the form has some
        line = "\n" if tags.padded else ""
        gap = "\n"
        middle = tags.middle.replace("><", ">" + gap + "<") + line
        told = f"told_{number}"
        for place, argument in enumerate(arguments):
            rule = f"argument_{number}_{place}"
            if re.search(r'[<>"\n]', argument.name) or argument.name != argument.name.strip():
                raise ValueError(f"this model's calls have no place for the name {argument.name!r}")
            head = self._text(f"{gap}{tags.open}{argument.name}{middle}")
            value = self._value(rule, f"{told} {head}", argument.schema, tags, line)
            self.rules.append(f"{rule}: {value}" if argument.required else f"{rule}: {value} | {told}")
            told = rule
        if others is not False and others is not None:
            rule = f"argument_{number}_other"
            head = f"{rule} {self._text(gap + tags.open)} /[a-zA-Z0-9_]+/ {self._text(middle)}"
            value = self._value(rule, head, rooted(others if isinstance(others, dict) else {}, root), tags, line)
            self.rules.append(f"{rule}: {value} | {told}")
            told = rule
        return f"{told} {self._text(gap + tags.end)}"

    def _value(self, rule: str, head: str, schema: Any, tags: Tags, line: str) -> str:
        """Returns the expression for an argument: the text before its value, the value, and the closing tag."""
        if is_text(schema, schema):
            value, more = _up_to(rule.upper(), _text(schema), tags.close, self._added, line)
            self.rules += more
            return f"{head} {value}"
        self._schemas[f"{rule}_value"] = schema
        return f"{self._mark(f'{rule}_head', head, [f'{rule}_value'])} {rule}_value {self._text(line + tags.close)}"

    def _python(self, arguments: Sequence[Argument], number: int) -> str:
        bare, told = f"told_{number}", ""  # the call so far without arguments, and with some
        for place, argument in enumerate(arguments):
            if not argument.name.isidentifier():
                raise ValueError(f"this model's calls have no place for the name {argument.name!r}")
            rule, value = f"argument_{number}_{place}", f"argument_{number}_{place}_value"
            self._schemas[value] = argument.schema
            before = " | ".join(filter(None, [bare, told and f'{told} ", "']))
            head = self._mark(f"{rule}_head", f"({before}) {_quoted(argument.name + '=')}", [value])
            self.rules.append(f"{rule}: {head} {value}" + (f" | {told}" if told and not argument.required else ""))
            bare, told = "" if argument.required else bare, rule
        return f"({' | '.join(filter(None, [bare, told]))})"

    def _text(self, text: str) -> str:
        return _literal(text, self._form.special_tokens, self._added)


def _up_to(name: str, text: str, close: str, added_tokens: Mapping[str, int], line: str = "") -> tuple[str, list[str]]:
    """Returns the expression for a text without `close`, followed by `close`, and the rules that it needs."""
    held = f"({text} & ~/(?s:.*){_escaped(close)}(?s:.*)/)"
    if close in added_tokens:
        return f"{name} {_literal(line + close, (close,), added_tokens)}", [f"{name}: {held}"]
    return name, [f"{name}: {held} {_quoted(line + close)}"]


def _text(schema: Any, depth: int = 0) -> str:
    """Returns the terminal's expression for a bare text that satisfies `schema`."""
    return _text_within(schema, schema, depth)


def _text_within(schema: Any, root: Any, depth: int) -> str:
    schema = resolved(schema, root)
    if depth > _MAX_STEPS or not isinstance(schema, Mapping):
        return "/(?s:.*)/"
    schema = said_otherwise(dict(schema), root)
    if schema is False:
        raise ValueError("a text has no value that it may be")
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        texts = [_quoted(value) for value in values if isinstance(value, str)]
        if not texts:
            raise ValueError("a text has no value that it may be")
        return f"({' | '.join(texts)})"
    parts = []
    least, maximum = schema.get("minLength", 0), schema.get("maxLength", "")
    parts.append(f"/(?s:.{{{least},{maximum}}})/" if least or maximum != "" else "/(?s:.*)/")
    if isinstance(schema.get("pattern"), str):
        parts.append(_searched(schema["pattern"]))
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            parts.append(_any_text(schema[word], root, depth + 1))
    parts += [_text_within(each, root, depth + 1) for each in schema.get("allOf") or ()]
    return parts[0] if len(parts) == 1 else "(" + " & ".join(parts) + ")"


def _any_text(schemas: Sequence[Any], root: Any, depth: int) -> str:
    """Returns the expression for a text of one of `schemas`; schemas that cannot be expressed are left out."""
    found, reason = [], None
    for each in schemas:
        try:
            found.append(_text_within(each, root, depth))
        except ValueError as error:
            reason = error
    if reason is not None and not found:
        raise reason
    return "(" + " | ".join(found) + ")"


def _searched(pattern: str) -> str:
    """Returns the expression for a text in which `pattern` is found.

    Raises:
        ValueError: the pattern has look-around, which llguidance does not support.
    """
    if re.search(r"(?<!\\)\(\?<?[=!]", pattern):
        raise ValueError(f"a text cannot be held to the pattern {pattern!r}: look-around is not supported")
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[begins : len(pattern) - ends]
    return _regex(("" if begins else "(?s:.*)") + f"(?:{inner})" + ("" if ends else "(?s:.*)"))


def _with_words(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object; without keywords for properties, it allows none."""
    schema = {**parameters, "type": "object"}
    if "additionalProperties" not in schema and not any(schema.get(name) for name in _SAYING):
        schema["additionalProperties"] = False
    return schema


def _literal(text: str, markers: Sequence[str], added_tokens: Mapping[str, int]) -> str:
    """Returns the grammar's expression for a text; markers that are added tokens become tokens in it."""
    tokens = [marker for marker in markers if marker in added_tokens]
    pieces = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text) if tokens else [text]
    written = [f"<[{added_tokens[piece]}]>" if piece in tokens else _quoted(piece) for piece in pieces if piece]
    return " ".join(written)


def _regex(pattern: str) -> str:
    """Writes a regular expression as grammars do, between slashes."""
    return "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern).replace("\n", "\\n") + "/"


def _escaped(text: str) -> str:
    """Escapes a text for a regular expression between slashes."""
    return re.sub(r"([^\w\s<>])", r"\\\1", text)


def _quoted(text: str) -> str:
    """Quotes a text as JSON and grammars do."""
    return json.dumps(text, ensure_ascii=False)
