"""Where a schema says `uniqueItems`: which arrays of a text it holds to that.

Pure functions on plain values. A place is all the schemas that may say something of one value; it may be too many, so
that an array is held to more than its schema says, never to less.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

# Keywords with schemas of the same value, and of its parts: one schema, a list of them, or some by their names.
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
    """A schema without its `uniqueItems`, and the schema that says where they are; None where there are none.

    Where it has references that only llguidance can follow, the schema stays as it is, to be refused by that name.
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
    """The schema and those within, but for such as are there to fail."""
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
    """Goes from the place of a value to those of its parts."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._known: dict[tuple[tuple[int, ...], str | None], Place] = {}
        self.root = self._all([schema])

    def property(self, place: Place, name: str) -> Place:
        """That of an object's property."""
        return self._part(place, name)

    def item(self, place: Place) -> Place:
        """That of an array's items, whichever."""
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
        """With all those of the same value."""
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
