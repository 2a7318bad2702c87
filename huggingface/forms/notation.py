"""Translates a requested form into llguidance's notation. Pure functions on plain values.

Runs in the processes of `process`, where a slow or deeply nested form delays nothing else.
"""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher

from .gbnf import as_lark
from .json_schema import TIDY, closed
from .places import apart
from .unique import Watch

_MAX_CHOICES = 10_000


def notation(kind: str, value: Any, *, pruned: bool = False) -> tuple[str, Watch | None]:
    """Returns the grammar of a form, and the values whose `uniqueItems` must be watched, or None.

    `kind` and `value` are a `types.Constraint`'s. With `pruned`, unions keep only the branches that can be compiled.

    Raises:
        ValueError, TypeError: the value does not match its kind. RecursionError: it is nested too deeply.
    """
    if kind == "json_schema":
        schema, unique = _schema(value, pruned=pruned)
        return _json(schema), None if unique is None else Watch({"": unique}, {}, [""])
    if isinstance(value, dict):
        return _composed(value, pruned=pruned)
    return _grammar(kind, value), None


def _grammar(kind: str, value: Any) -> str:
    match kind:
        case "json_object":
            return _json({"type": "object"})
        case "regex":
            return str(LLMatcher.grammar_from_regex(value))
        case "choice":
            return str(LLMatcher.grammar_from_lark(_choices(value)))
    return str(LLMatcher.grammar_from_lark(as_lark(value)))


def _composed(form: dict[str, Any], *, pruned: bool) -> tuple[str, Watch | None]:
    """Returns the grammar of a form that lists its JSON values separately: see `chat.grammar`."""
    rules, watched = list(form["rules"]), {}
    for name, value in form["schemas"].items():
        schema, unique = _schema(value, pruned=pruned)
        if unique is not None:
            watched[name] = unique
        tidy = {**schema, "x-guidance": dict(TIDY)} if isinstance(schema, dict) else schema
        rules.append(f"{name}: %json {json.dumps(tidy)}")
    marks = {}
    for name, (text, values) in form["marks"].items():
        if watched.keys() & values:
            marks[name] = values
        rules.append(f"{name}{f'[capture={json.dumps(name)}]' if name in marks else ''}: {text}")
    watch = Watch(watched, marks, form["first"]) if watched else None
    return str(LLMatcher.grammar_from_lark("\n".join(rules))), watch


def _schema(value: Any, *, pruned: bool) -> tuple[Any, Any]:
    """Returns a schema for llguidance, and the schema that says where its `uniqueItems` are, or None."""
    schema, unique = apart(closed(json.loads(value) if isinstance(value, str) else value))
    if schema is True:
        schema = {}
    if pruned and LLMatcher.validate_grammar(_json(schema)):
        _keep_branches(schema, schema)
    return schema, unique


def _keep_branches(schema: Any, root: Any) -> None:
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _keep_branches(part, root)
    for word in ("anyOf", "oneOf"):
        if isinstance(schema, dict) and isinstance(schema.get(word), list):
            defined = {name: root[name] for name in ("$defs", "definitions") if isinstance(root, dict) and name in root}
            kept = [
                branch
                for branch in schema[word]
                if not isinstance(branch, dict) or not LLMatcher.validate_grammar(_json({**defined, **branch}))
            ]
            schema[word] = kept or schema[word]


def _json(schema: Any) -> str:
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=dict(TIDY)))  # type: ignore[arg-type]


def _choices(texts: list[str]) -> str:
    if not texts or len(texts) > _MAX_CHOICES or not all(texts):
        raise ValueError(f"1 to {_MAX_CHOICES} texts are needed, none of them empty")
    # One terminal: with one rule for each text, more would be open at once than llguidance allows.
    return "start: TEXT\nTEXT: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))
