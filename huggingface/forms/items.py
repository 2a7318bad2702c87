"""Reads a JSON value while it is written, and keeps the items of its arrays with `uniqueItems`.

Pure functions and values; one reader serves one text.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

from .places import Place, Places

_SPACE = b" \t\r\n"
_PLAIN = b"0123456789+-.eEtrufalsn" + _SPACE  # allowed outside of strings, besides brackets, commas and colons


class Repeated(Exception):
    """An item equals an earlier one of its array."""


def _number(text: str) -> int | float:
    return int(text) if len(text) <= 4000 else float(text)


def _parsed(text: bytes) -> Any:
    return json.loads(text.decode("utf-8", "surrogateescape"), parse_int=_number)


def _about(value: Any) -> Any:
    """A key that equal values share; a few unequal ones do too, because integers become floats."""
    if isinstance(value, dict):
        return "object", frozenset((name, _about(each)) for name, each in value.items())
    if isinstance(value, list):
        return "array", tuple(map(_about, value))
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return "number", float(value)
        except OverflowError:
            return "number", math.copysign(math.inf, value)
    return type(value).__name__ if not isinstance(value, float) else "number", value


def _equal(one: Any, other: Any) -> bool:
    """Whether two values with the same key are equal: integers are compared exactly."""
    if isinstance(one, dict):
        return all(_equal(each, other[name]) for name, each in one.items())
    if isinstance(one, list):
        return all(map(_equal, one, other))
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return True


@dataclass(frozen=True, slots=True)
class _Array:
    """An array with `uniqueItems`: its items so far, as texts and as values.

    `dead` holds beginnings of the next item that can only end as a repeated item; `choices` holds, for a beginning, how
    many tokens may follow without ending the item.
    """

    texts: tuple[bytes, ...] = ()
    values: tuple[tuple[Any, Any], ...] = ()
    dead: set[bytes] = field(default_factory=set)
    choices: dict[bytes, int] = field(default_factory=dict)

    def with_item(self, text: bytes) -> _Array:
        value = _parsed(text)
        about = _about(value)
        if any(about == other and _equal(value, each) for other, each in self.values):
            raise Repeated
        values = (*self.values, (about, value))
        return _Array((*self.texts, text.strip(_SPACE)), values, set(self.dead), self.choices)


@dataclass(slots=True)
class _Open:
    """An object or array that is not complete yet; `start` is where its present item, name or property begins."""

    place: Place
    start: int
    is_array: bool
    array: _Array | None = None
    counted: bool = False  # whether the present item is complete and in `array`
    name: str | None = None  # of the present property


class Reader:
    """Reads one JSON value byte by byte, and nothing after it. A value that is no object or array ends at once."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.text = b""
        self.in_text = False  # inside a string
        self.begun = False
        self.ended = False
        self._escaped = False
        self._open: list[_Open] = []

    def copy(self) -> Reader:
        """A copy at the same place."""
        other = copy.copy(self)
        other._open = [replace(each) for each in self._open]
        return other

    def read(self, more: bytes) -> Reader:
        """Returns a copy that has read `more` too.

        Raises:
            Repeated: an item that ends in `more` equals an earlier item of its array.
        """
        other = self.copy()
        at = len(other.text)
        other.text += more
        for byte in more:
            if other.ended:
                break
            at += 1
            try:
                other._byte(byte, at)
            except ValueError:  # not JSON, so this is not the schema's value
                other.ended = True
        return other

    def _byte(self, byte: int, end: int) -> None:
        """Reads the byte that ends at offset `end` of the text."""
        if self.in_text:
            if self._escaped:
                self._escaped = False
            elif byte == 0x5C:
                self._escaped = True
            elif byte == 0x22:
                self.in_text = False
                self._whole(end)
            return
        top = self._open[-1] if self._open else None
        if top is None:
            if byte in _SPACE:
                return
            self.begun, self.ended = True, byte not in b"[{"
            if self.ended:
                return
        match byte:
            case 0x22:
                self.in_text = True
            case 0x5B | 0x7B:
                place = self._inner()
                unique = byte == 0x5B and any(each.get("uniqueItems") is True for each in place)
                self._open.append(_Open(place, end, byte == 0x5B, _Array() if unique else None))
            case 0x3A if top is not None:
                top.name, top.start = _parsed(self.text[top.start : end - 1]), end
            case 0x2C if top is not None:
                self._count(top, end - 1)
                self.ended = self._is_other(top, end - 1)
                top.start, top.counted, top.name = end, False, None
            case 0x5D | 0x7D if top is not None:
                self._count(top, end - 1)
                self._open.pop()
                self._whole(end)
            case _ if byte not in _PLAIN:  # not JSON
                self.ended = True

    def _is_other(self, top: _Open, end: int) -> bool:
        """Whether a property shows that the value belongs to another schema, such as a call of another function."""
        if len(self._open) > 1 or len(top.place) > 1 or top.name is None:
            return False
        said = top.place[0].get("properties", {}).get(top.name)
        return isinstance(said, dict) and "const" in said and _parsed(self.text[top.start : end]) != said["const"]

    def _inner(self) -> Place:
        if not self._open:
            return self.places.root
        top = self._open[-1]
        return self.places.item(top.place) if top.is_array else self.places.property(top.place, top.name or "")

    def _whole(self, end: int) -> None:
        """Ends a string, an object or an array."""
        if self._open:
            self._count(self._open[-1], end)
        else:
            self.ended = True

    def _count(self, top: _Open, end: int) -> None:
        if top.array is not None and not top.counted and (item := self.text[top.start : end]).strip(_SPACE):
            top.array = top.array.with_item(item)
            top.counted = True

    @property
    def watching(self) -> bool:
        """Whether an array with `uniqueItems` is being written."""
        return any(each.array is not None for each in self._open)

    def rests(self) -> set[bytes]:
        """The continuations that would make a present item equal to an earlier one."""
        found = set()
        for each in self._open:
            if each.array is not None and not each.counted:
                so_far = self.text[each.start :]
                space = b" " if each.array.texts else b""
                found |= {
                    (space + text)[len(so_far) :] for text in each.array.texts if (space + text).startswith(so_far)
                }
        return found

    @property
    def outermost(self) -> tuple[_Array, bytes]:
        """The outermost array with `uniqueItems`, and the text of its present item."""
        return next((each.array, self.text[each.start :]) for each in self._open if each.array is not None)
