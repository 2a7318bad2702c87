"""Translates pydantic's errors about a request into the project's errors, in plain English.

Pure functions, for any thread. An error reports one problem: a missing field first, then an unknown one, then a wrong
value. Must not know single fields or HTTP; of pydantic it uses only the result of `errors()`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Protocol

from ...errors import InvalidRequest, MissingField, UnknownField


class Complaints(Protocol):
    """The part of `pydantic.ValidationError` that this file uses."""

    def errors(self, *, include_url: bool) -> Sequence[Mapping[str, Any]]:
        """Each problem as `type`, `loc`, `msg` and perhaps `ctx`."""
        ...


def request_error(
    exc: Complaints, prefix: str = "", known: Iterable[str] = (), suggested: frozenset[str] = frozenset()
) -> InvalidRequest:
    """Returns the error for one problem of a body: a missing field first, then an unknown one, then a wrong value.

    Args:
        exc: pydantic's error.
        prefix: put before the field's name.
        known: the names that the error for an unknown field lists.
        suggested: the names of which that error suggests the nearest.
    """
    problems = exc.errors(include_url=False)
    for kind in ("missing", "extra_forbidden"):
        for problem in problems:
            if problem["type"] == kind:
                field = prefix + _path(problem)
                if kind == "missing":
                    return MissingField(field)
                name = field.removeprefix(prefix)
                place, dot, last = name.rpartition(".")
                beside = [each.removeprefix(place + dot) for each in suggested if each.rpartition(".")[0] == place]
                nearest = nearest_name(last, beside)
                listed = known if len(problem["loc"]) == 1 else ()
                return UnknownField(field, listed, nearest and place + dot + nearest)
    # A value that fits no branch of a union has a problem from each: keep those that went deepest into the value.
    first = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    depth = max(len(_path(problem)) for problem in first)
    path = next(_path(problem) for problem in first if len(_path(problem)) == depth)
    there = [problem for problem in first if _path(problem) == path]
    # If the value has the right type but is out of range, the branches of other types do not matter.
    there = [problem for problem in there if not _is_of_type(problem)] or there
    reasons = list(dict.fromkeys(_reason(problem) for problem in there))
    reason = reasons[0] + "".join(f" or {other.removeprefix('must be ')}" for other in reasons[1:])
    if not path:
        return InvalidRequest(f"Invalid request: the body {reason}")
    return InvalidRequest(f"Invalid value for field '{prefix}{path}': {reason}", prefix + path)


def nearest_name(field: str, known: Iterable[str]) -> str | None:
    """The known name that an unknown one probably means, or None."""
    names, words = sorted(known), set(field.split("_"))
    if len(words) > 1:  # `max_tokens` is closer to `max_output_tokens` than to `min_tokens`
        longer = [name for name in names if words < set(name.split("_"))]
        if longer:
            return min(longer, key=len)
    nearest = get_close_matches(field, names, 1, _NEAR)
    return nearest[0] if nearest else None


_NEAR = 0.75  # the least similarity of two names, from 0 to 1

# pydantic's names for branches of a union in a location; no field has such a name.
_BRANCH = re.compile(r"int|str|float|bool|none|[A-Z].*|.*[\[\]( ].*|constrained-.*|function-.*|literal.*")


def _path(problem: Mapping[str, Any]) -> str:
    """The field with the problem, its parts joined by dots (`messages.0.role`); empty for the whole body."""
    parts = [str(part) for part in problem["loc"] if isinstance(part, int) or not _BRANCH.fullmatch(part)]
    field = problem.get("ctx", {}).get("field") if problem["type"] == "rule" else None
    return ".".join([*parts, field] if field else parts)


def _is_of_type(problem: Mapping[str, Any]) -> bool:
    """Whether the problem is the value's type, or its absence from a list of values."""
    return problem["type"].endswith("_type") or problem["type"] in ("literal_error", "int_from_float")


_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "bool_type": "must be true or false",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_type": "must be a number",
        "string_type": "must be text",
        "string_unicode": "must be valid Unicode text",
        "list_type": "must be a list",
        "dict_type": "must be an object",
        "model_type": "must be an object",
        "model_attributes_type": "must be an object",
        "none_required": "must be null",
        "finite_number": "must be a finite number",
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be less than {lt}",
        "less_than_equal": "must be at most {le}",
        "literal_error": "must be one of {expected}",
        "too_long": "must have at most {max_length} item(s)",
        "string_too_long": "must have at most {max_length} character(s)",
        "string_pattern_mismatch": "must match {pattern}",
        "rule": "{reason}",
    }
)


def _reason(problem: Mapping[str, Any]) -> str:
    """The reason why a value is refused, in words that follow a field's name."""
    context = problem.get("ctx", {})
    kind = problem["type"]
    if kind in ("too_short", "string_too_short"):
        least = context["min_length"]
        unit = "item(s)" if kind == "too_short" else "character(s)"
        return "must not be empty" if least == 1 else f"must have at least {least} {unit}"
    if kind == "literal_error":
        expected = context["expected"]
        for python, json in (("False", "false"), ("True", "true"), ("None", "null")):
            expected = expected.replace(python, json)
        return f"must be one of {expected}" if " or " in expected else f"must be {expected}"
    if kind == "value_error":
        return str(context["error"])
    if kind in _REASONS:
        return _REASONS[kind].format_map({k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()})
    message = str(problem["msg"])
    return message[:1].lower() + message[1:]
