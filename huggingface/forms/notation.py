"""A form as it is asked for, in llguidance's own notation. Pure functions on plain values.

Runs in the processes of `process`, where a form that takes long or nests deeply holds nothing else up.
"""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher

from .gbnf import as_lark
from .json_schema import TIDY, closed

_MOST_CHOICES = 10_000


def notation(kind: str, value: Any) -> str:
    """The grammar of a form; `kind` and `value` are a `records.Constraint`'s.

    Raises:
        ValueError, TypeError: the value is not of its kind. RecursionError: it is nested too deeply.
    """
    match kind:
        case "json_object":
            return _json({"type": "object"})
        case "json_schema":
            return _json(closed(value))
        case "regex":
            return str(LLMatcher.grammar_from_regex(value))
        case "choice":
            return str(LLMatcher.grammar_from_lark(_choices(value)))
    return str(LLMatcher.grammar_from_lark(as_lark(value)))


def _json(schema: Any) -> str:
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=dict(TIDY)))  # type: ignore[arg-type]


def _choices(texts: list[str]) -> str:
    if not texts or len(texts) > _MOST_CHOICES or not all(texts):
        raise ValueError(f"1 to {_MOST_CHOICES} texts are needed, none of them empty")
    # One terminal: of as many rules, more would be open at once than llguidance allows.
    return "start: TEXT\nTEXT: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))
