"""JSON schemas made such that a model which keeps to them comes to an end.

Pure functions on plain values; standard library only, so that any room may use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# llguidance's options for JSON as `json.dumps` writes it: with whitespace at will, a model may write nothing else.
TIDY: Mapping[str, Any] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

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


def closed(schema: Any) -> Any:
    """The same schema, with objects that name their properties held to these, where nothing else is said.

    Whatever fits it, fits the schema. A model would else invent property after property; OpenAI's strict schemas and
    most servers hold to the named ones too. Schemas that put objects together (`allOf`) are left as they are.
    """
    return schema if _has(schema, "allOf") else _closed(schema)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {
        name: value if name in ("const", "enum", "default", "examples") else _closed(value)
        for name, value in schema.items()
    }
    properties = schema.get("properties")
    if isinstance(properties, dict):
        result["properties"] = {name: _closed(value) for name, value in properties.items()}  # whatever they are called
        required = schema.get("required", [])
        listed = isinstance(required, list) and all(name in properties for name in required)
        least = schema.get("minProperties", 0)
        enough = isinstance(least, int) and least <= len(properties)
        if properties and listed and enough and not any(name in schema for name in _COMPOSED):
            result["additionalProperties"] = False
    return result


def _has(schema: Any, keyword: str) -> bool:
    if isinstance(schema, dict):
        return keyword in schema or any(_has(value, keyword) for value in schema.values())
    return isinstance(schema, list) and any(_has(item, keyword) for item in schema)
