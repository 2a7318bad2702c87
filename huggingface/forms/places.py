"""Finds the places of a schema's `uniqueItems`: the arrays of a text that they apply to.

Pure functions on plain values. A place is the set of all schemas that may apply to one value. It may hold too many, so
an array may be restricted more than its schema says, never less.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

# Keywords with schemas of the same value; then keywords with one schema, with a list, and with schemas by name.
_SAME = ("allOf", "anyOf", "oneOf", "then", "else", "dependentSchemas", "$ref")
_ONES = (
    "additionalProperties",
    "unevaluatedProperties",
    "items",
    "additionalItems",
    "unevaluatedItems",
    "then",
    "else",
)
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_OTHER_PROPERTIES = ("additionalProperties", "unevaluatedProperties")
_ITEMS = ("items", "prefixItems", "additionalItems", "unevaluatedItems")

Place = tuple[dict[str, Any], ...]


def apart(schema: Any) -> tuple[Any, Any]:
    """Returns a schema without its `uniqueItems`, and the schema that has them, or None if there are none.

    A schema with references that only llguidance can follow stays unchanged, and llguidance refuses `uniqueItems`.
    """
    parts = list(_parts(schema))
    if not any(part.get("uniqueItems") is True for part in parts):
        return schema, None
    for part in parts:
        if "$id" in part and part is not schema:
            return schema, None
        if "$ref" in part and _target(part["$ref"], schema) is None:
            return schema, None
    plain = json.loads(json.dumps(schema))
    for part in _parts(plain):
        if part.get("uniqueItems") is True:
            del part["uniqueItems"]
    return plain, schema


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and the schemas in it, except those of keywords such as `not` and `if`, which values may fail."""
    if not isinstance(schema, dict):
        return
    yield schema
    for word in _ONES:
        yield from _parts(schema.get(word))
    for word in _LISTS:
        if isinstance(schema.get(word), list):
            for each in schema[word]:
                yield from _parts(each)
    for word in _NAMED:
        if isinstance(schema.get(word), dict):
            for each in schema[word].values():
                yield from _parts(each)


def _target(reference: Any, root: Any) -> Any:
    if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
        return None
    found = root
    for step in reference.split("/")[1:]:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            return None
    return found


class Places:
    """Finds the places of a value's parts from the value's place."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._known: dict[tuple[tuple[int, ...], str | None], Place] = {}
        self.root = self._all([schema])

    def property(self, place: Place, name: str) -> Place:
        """The place of an object's property."""
        return self._part(place, name)

    def item(self, place: Place) -> Place:
        """The place of an array's items, the same for all."""
        return self._part(place, None)

    def _part(self, place: Place, name: str | None) -> Place:
        key = (tuple(map(id, place)), name)
        if key not in self._known:
            found: list[Any] = []
            for schema in place:
                if name is None:
                    for word in _ITEMS:
                        more = schema.get(word)
                        found += more if isinstance(more, list) else [more]
                    continue
                named = schema.get("properties")
                patterns = schema.get("patternProperties")
                if isinstance(named, dict) and name in named:
                    found.append(named[name])
                else:
                    found += [schema.get(word) for word in _OTHER_PROPERTIES]
                found += patterns.values() if isinstance(patterns, dict) else ()
            self._known[key] = self._all(found)
        return self._known[key]

    def _all(self, schemas: list[Any]) -> Place:
        """The schemas together with all others that apply to the same value."""
        found: dict[int, dict[str, Any]] = {}
        left = list(schemas)
        while left:
            schema = left.pop()
            if not isinstance(schema, dict) or id(schema) in found:
                continue
            found[id(schema)] = schema
            for word in _SAME:
                more = schema.get(word)
                if word == "$ref":
                    more = _target(more, self._schema)
                elif word == "dependentSchemas" and isinstance(more, dict):
                    more = list(more.values())
                left += more if isinstance(more, list) else [more]
        return tuple(found.values())
