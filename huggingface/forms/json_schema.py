"""Rewrites JSON schemas with keywords that llguidance supports, and narrows them so that a model's answer ends.

Pure functions on plain values; standard library only, so that any folder may use them. `keywords` rewrites the
keywords that llguidance does not support.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .keywords import said_otherwise

# llguidance's options for JSON as `json.dumps` writes it: with free whitespace, a model may write nothing but that.
TIDY: Mapping[str, Any] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

# Keywords with plain values, and keywords that map names to schemas; such a name may itself be `format`, say.
_VALUES = ("const", "enum", "default", "examples")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

# Keywords that may add properties to those that an object names.
_COMPOSED = (
    "additionalProperties",
    "patternProperties",
    "unevaluatedProperties",
    "anyOf",
    "oneOf",
    "$ref",
    "if",
    "not",
)
_OBJECTS = ("properties", "required", "additionalProperties", "patternProperties")

# The formats that llguidance enforces.
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})

_LIMIT = 2**63 - 1024  # the largest integer that llguidance reads and writes exactly
_EXACT = 2**53  # up to here every integer


def closed(schema: Any) -> Any:
    """Rewrites a schema with keywords that llguidance supports, and limits objects to the properties that they name.

    Every value that satisfies the result satisfies the schema. Without the limit a model would invent property after
    property; OpenAI's strict schemas and most servers have it too. Schemas that combine objects (`allOf`, `if`) are not
    limited. Unknown formats are left out: JSON Schema defines them as annotations.

    Raises:
        ValueError: a number cannot be written by llguidance; or `minProperties` asks for unnamed properties, which
            cannot be counted, since a model may write a name twice.
    """
    narrow = not any(_has(schema, word) for word in ("allOf", "if", "dependentRequired", "dependentSchemas"))
    return _closed(schema, schema, narrow=narrow)


def _closed(schema: Any, root: Any, *, narrow: bool) -> Any:
    if isinstance(schema, list):
        return [_closed(item, root, narrow=narrow) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = said_otherwise(schema, root)
    if not isinstance(schema, dict):
        return schema
    # The parts of a combined object do not know each other's properties.
    apart = narrow and not any(word in schema for word in _OBJECTS)
    result: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _VALUES:
            result[name] = value
        elif name in _NAMED and isinstance(value, dict):
            result[name] = {each: _closed(part, root, narrow=narrow) for each, part in value.items()}
        else:
            result[name] = _closed(value, root, narrow=apart if name in ("anyOf", "oneOf", "not") else narrow)
    _check_numbers(result)
    if isinstance(schema.get("format"), str) and schema["format"] not in _FORMATS:
        del result["format"]
    properties = schema.get("properties")
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    open_ended = schema.get("additionalProperties", True) is not False or "patternProperties" in schema
    sure = len(required) if isinstance(required, list) else 0
    if isinstance(least, int) and least > max(1, sure) and open_ended:
        raise ValueError(f"minProperties of {least} needs properties that are named, and no others")
    if narrow and isinstance(properties, dict):
        listed = isinstance(required, list) and all(name in properties for name in required)
        if properties and listed and not any(name in schema for name in _COMPOSED):
            result["additionalProperties"] = False
    return result


def _has(schema: Any, keyword: str) -> bool:
    if isinstance(schema, dict):
        return keyword in schema or any(_has(value, keyword) for value in schema.values())
    return isinstance(schema, list) and any(_has(item, keyword) for item in schema)


def _check_numbers(schema: dict[str, Any]) -> None:
    """Replaces bounds that llguidance cannot represent, and refuses values that it would write differently.

    llguidance represents numbers as 64-bit floats. A bound between two floats becomes the nearest allowed float.
    """
    for word in ("const", "enum"):
        if word in schema:
            _check_value(schema[word], word)
    for word, inwards in (("minimum", math.inf), ("exclusiveMinimum", math.inf)):
        _set_bound(schema, word, inwards)
    for word, inwards in (("maximum", -math.inf), ("exclusiveMaximum", -math.inf)):
        _set_bound(schema, word, inwards)


def _set_bound(schema: dict[str, Any], word: str, inwards: float) -> None:
    bound = schema.get(word)
    if not isinstance(bound, int) or isinstance(bound, bool) or abs(bound) <= _EXACT:
        return
    if abs(bound) > _LIMIT:
        if (bound > 0) == (inwards > 0):
            raise ValueError(f"'{word}' of {bound} is more than numbers can be held to")
        schema[word] = _LIMIT if bound > 0 else -_LIMIT
        return
    near = float(bound)
    if near != bound and (near < bound) == (inwards > 0):
        near = math.nextafter(near, inwards)
    inside = int(near)
    if inside != bound and word.startswith("exclusive"):
        # The excluded bound lies outside, so the nearest float inside is itself allowed.
        del schema[word]
        other = word.removeprefix("exclusive").lower()
        choose = max if inwards > 0 else min
        inside, word = choose(inside, schema.get(other, inside)), other
    schema[word] = inside
    least, maximum = schema.get("minimum"), schema.get("maximum")
    if isinstance(least, int) and isinstance(maximum, int) and least > maximum:
        raise ValueError(f"no number between its bounds can be written exactly: '{word}' is {bound}; say it as a text")


def _check_value(value: Any, word: str) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            _check_value(each, word)
    elif isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > _EXACT and (abs(value) > _LIMIT or float(value) != value):
            raise ValueError(f"'{word}' has {value}, a number that cannot be written exactly; say it as a text")
    elif isinstance(value, float) and not _read_exactly(value):
        raise ValueError(f"'{word}' has {value!r}, a number that cannot be written exactly; say it as a text")


def _read_exactly(value: float) -> bool:
    """Whether llguidance reads the float exactly: it parses all digits as one integer and scales that."""
    digits, _, exponent = repr(abs(value)).partition("e")
    whole, _, part = digits.partition(".")
    shift = int(exponent or 0) - len(part)
    try:
        number = float(int(whole + part))
        return abs(value) == (number * 10.0**shift if shift >= 0 else number / 10.0**-shift)
    except OverflowError:
        return False
