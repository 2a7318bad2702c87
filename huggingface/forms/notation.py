"""A form as it is asked for, in llguidance's own notation. Pure functions on plain values.

Runs in the processes of `process`, where a form that takes long or nests deeply holds nothing else up.
"""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher

from .gbnf import as_lark
from .json_schema import TIDY, closed
from .places import apart

_MOST_CHOICES = 10_000


def notation(kind: str, value: Any) -> tuple[str, Any]:
    """The grammar of a form, and the schema whose `uniqueItems` is still to be watched, or None; `kind` and `value` are
    a `records.Constraint`'s.

    Raises:
        ValueError, TypeError: the value is not of its kind. RecursionError: it is nested too deeply.
    """
    if kind == "json_schema":
        schema, unique = apart(closed(json.loads(value) if isinstance(value, str) else value))
        return _schema(schema), unique
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


def _schema(schema: Any) -> str:
    """Where it cannot be compiled, with those branches of its unions that can be."""
    if LLMatcher.validate_grammar(_json(schema)):
        _keep_branches(schema, schema)
    return _json(schema)


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
    if not texts or len(texts) > _MOST_CHOICES or not all(texts):
        raise ValueError(f"1 to {_MOST_CHOICES} texts are needed, none of them empty")
    # One terminal: of as many rules, more would be open at once than llguidance allows.
    return "start: TEXT\nTEXT: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))
