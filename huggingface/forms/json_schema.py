"""JSON schemas made such that a model which keeps to them comes to an end.

Pure functions on plain values; standard library only, so that any room may use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# llguidance's options for JSON as `json.dumps` writes it: with whitespace at will, a model may write nothing else.
TIDY: Mapping[str, Any] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

# Values, not schemas; and `properties`, whose names are not keywords.
_AS_THEY_ARE = ("const", "enum", "default", "examples", "properties")

# What may add properties to those of an object, beside it or from afar.
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


# The formats that llguidance holds a text to.
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})


def closed(schema: Any) -> Any:
    """The same schema in words that llguidance knows, with objects held to the properties that they name.

    Whatever fits it, fits the schema. A model would else invent property after property; OpenAI's strict schemas and
    most servers hold to the named ones too. Schemas that put objects together (`allOf`) are not narrowed so. Formats
    that are not known are left out: JSON Schema has them as annotations.

    Raises:
        ValueError: it wants several properties without naming them: a name may come twice, and then be one too few.
    """
    return _closed(schema, narrow=not _has(schema, "allOf"))


def _closed(schema: Any, *, narrow: bool) -> Any:
    if isinstance(schema, list):
        return [_closed(item, narrow=narrow) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: value if name in _AS_THEY_ARE else _closed(value, narrow=narrow) for name, value in schema.items()}
    if isinstance(schema.get("format"), str) and schema["format"] not in _FORMATS:
        del result["format"]
    properties = schema.get("properties")
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    open_ended = schema.get("additionalProperties", True) is not False or "patternProperties" in schema
    sure = len(required) if isinstance(required, list) else 0
    if isinstance(least, int) and least > max(1, sure) and open_ended:
        raise ValueError(f"minProperties of {least} needs properties that are named, and no others")
    if "propertyNames" in schema:
        _name_properties(result, schema["propertyNames"])
    if isinstance(properties, dict):
        # Whatever they are called: also `format`, or `properties`.
        result["properties"] = {name: _closed(value, narrow=narrow) for name, value in properties.items()}
    if narrow and isinstance(properties, dict):
        listed = isinstance(required, list) and all(name in properties for name in required)
        if properties and listed and not any(name in schema for name in _COMPOSED):
            result["additionalProperties"] = False
    return result


def _name_properties(schema: dict[str, Any], names: Any) -> None:
    """Say `propertyNames` as `properties`, where it says that they are texts, or which ones there are."""
    if names is True or names == {"type": "string"}:
        del schema["propertyNames"]
        return
    listed = names.get("enum") if isinstance(names, dict) and names.keys() <= {"enum", "type"} else None
    if isinstance(listed, list) and "properties" not in schema and "patternProperties" not in schema:
        del schema["propertyNames"]
        values = schema.get("additionalProperties", True)
        schema["properties"] = {name: values for name in listed if isinstance(name, str)}
        schema["additionalProperties"] = False


def _has(schema: Any, keyword: str) -> bool:
    if isinstance(schema, dict):
        return keyword in schema or any(_has(value, keyword) for value in schema.values())
    return isinstance(schema, list) and any(_has(item, keyword) for item in schema)
