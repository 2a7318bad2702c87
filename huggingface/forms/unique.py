"""Arrays whose items differ (`uniqueItems`), checked while they are written: a wrapper of llguidance's matcher.

It reads the text along, knows the items of each such array, and takes away the tokens that would end an item equal to
an earlier one. Where few values are left (of an `enum`, say), it also looks ahead, and takes away what could only come
to such an item. One thread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from .places import Place, Places

_MOST_LOOKS = 2000  # ahead, for one token
_SPACE = b" \t\r\n"
_NOTHING_LEFT = "'uniqueItems': nothing fits it that is not in the array yet"


class Repeated(Exception):
    """An item equals an earlier one of its array."""


def _number(text: str) -> int | float:
    return int(text) if len(text) <= 4000 else float(text)


def _parsed(text: bytes) -> Any:
    return json.loads(text.decode("utf-8", "surrogateescape"), parse_int=_number)


def _about(value: Any) -> Any:
    """The same for all values that are equal, and for some more: integers as floats."""
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
    """Whether they are equal for any reader, of those that are about the same: integers are told apart exactly."""
    if isinstance(one, dict):
        return all(_equal(each, other[name]) for name, each in one.items())
    if isinstance(one, list):
        return all(map(_equal, one, other))
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return True


@dataclass(frozen=True, slots=True)
class _Array:
    """One whose items differ: those so far, as they are written and what they are.

    Besides what was found of texts of its next item: that it comes to one of these, whatever follows (`dead`), and how
    many tokens it may go on with (`choices`).
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
    """An object or array that is not whole yet; `start` is where its present item or name begins."""

    place: Place
    start: int
    is_array: bool
    array: _Array | None = None
    counted: bool = False  # whether the present item is whole and among those of `array`
    name: str | None = None  # of the present property


class Reader:
    """Reads a text of JSON, byte by byte."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.text = b""
        self.in_text = False  # whether between quotes
        self._escaped = False
        self._open: list[_Open] = []

    def copy(self) -> Reader:
        """Another at the same place."""
        other = Reader.__new__(Reader)
        other._places, other.text, other.in_text, other._escaped = self._places, self.text, self.in_text, self._escaped
        other._open = [replace(each) for each in self._open]
        return other

    def read(self, more: bytes) -> Reader:
        """Another one that has read these bytes too.

        Raises:
            Repeated: an item that ends within them equals an earlier one of its array.
        """
        other = self.copy()
        at = len(other.text)
        other.text += more
        for byte in more:
            at += 1
            other._byte(byte, at)
        return other

    def _byte(self, byte: int, end: int) -> None:
        """The byte that ends at `end` bytes of the text."""
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
        match byte:
            case 0x22:
                self.in_text = True
            case 0x5B | 0x7B:
                place = self._inner()
                unique = byte == 0x5B and any(each.get("uniqueItems") is True for each in place)
                self._open.append(_Open(place, end, byte == 0x5B, _Array() if unique else None))
            case 0x3A if top is not None:
                top.name = _parsed(self.text[top.start : end - 1])
            case 0x2C if top is not None:
                self._count(top, end - 1)
                top.start, top.counted, top.name = end, False, None
            case 0x5D | 0x7D if top is not None:
                self._count(top, end - 1)
                self._open.pop()
                self._whole(end)

    def _inner(self) -> Place:
        if not self._open:
            return self._places.root
        top = self._open[-1]
        return self._places.item(top.place) if top.is_array else self._places.property(top.place, top.name or "")

    def _whole(self, end: int) -> None:
        """A text, an object or an array is whole."""
        if self._open:
            self._count(self._open[-1], end)

    def _count(self, top: _Open, end: int) -> None:
        if top.array is not None and not top.counted and (item := self.text[top.start : end]).strip(_SPACE):
            top.array = top.array.with_item(item)
            top.counted = True

    @property
    def watching(self) -> bool:
        """Whether items are being written that have to differ."""
        return any(each.array is not None for each in self._open)

    def rests(self) -> set[bytes]:
        """What would make the present items the same as earlier ones."""
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
        """The outermost array whose items differ, and the text of its present one."""
        return next((each.array, self.text[each.start :]) for each in self._open if each.array is not None)


class Tokens:
    """The bytes of a tokenizer's tokens, and which of them may end an item."""

    def __init__(self, tokens: LLTokenizer) -> None:
        special = tokens.is_special_token
        self.texts = [b"" if special(each) else tokens.decode_bytes([each]) for each in range(tokens.vocab_size)]
        self.by_text: dict[bytes, list[int]] = {}
        for number, text in enumerate(self.texts):
            self.by_text.setdefault(text, []).append(number)
        self.most_alike = max((len(several) for text, several in self.by_text.items() if text), default=1)
        marks = frozenset(b'"[]{},')
        self.structural = [number for number, text in enumerate(self.texts) if not marks.isdisjoint(text)]
        self.quotes = [number for number in self.structural if b'"' in self.texts[number]]
        # Of an array that is not begun yet, with a first item and what follows it.
        opening = [number for number in self.structural if {0x5B, 0x2C} <= set(self.texts[number])]
        self._opening = {False: opening, True: [number for number in opening if b'"' in self.texts[number]]}
        self._plain = {True: self._without(self.quotes), False: self._without(self.structural)}

    def _without(self, numbers: list[int]) -> int:
        bits = bytearray(b"\xff" * ((len(self.texts) + 7) // 8))
        for number in [*numbers, *self.by_text.get(b"", [])]:
            bits[number >> 3] &= ~(1 << (number & 7))
        return int.from_bytes(bits, "little")

    def marks(self, reader: Reader) -> list[int]:
        """The tokens in which an item may end."""
        if not reader.watching:
            return self._opening[reader.in_text]
        return self.quotes if reader.in_text else self.structural

    def along(self, reader: Reader) -> set[int]:
        """The others that go on as earlier items do."""
        marks = b'"' if reader.in_text else b'"[]{},'
        found: set[int] = set()
        for rest in reader.rests():
            for end in range(1, len(rest) + 1):
                if rest[end - 1] in marks:
                    break
                found.update(self.by_text.get(rest[:end], ()))
        return found

    def plain(self, mask: bytes, in_text: bool) -> int:
        """How many tokens of a mask end no item."""
        return (int.from_bytes(mask, "little") & self._plain[in_text]).bit_count()


class Watched:
    """A matcher and the reader of its text; has the methods of a matcher that `process` needs."""

    def __init__(self, matcher: LLMatcher, tokens: Tokens, reader: Reader) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._reader = reader
        self._error = ""
        self._looks = 0
        self.is_accepting = matcher.is_accepting
        self.is_stopped = matcher.is_stopped

    def deep_copy(self) -> Watched:
        """Another text at the same place."""
        return Watched(self._matcher.deep_copy(), self._tokens, self._reader)

    def consume_token(self, token: int) -> None:
        """Go on by a token."""
        self._matcher.consume_token(token)
        try:
            self._reader = self._reader.read(self._tokens.texts[token])
        except Repeated:
            self._error = "'uniqueItems': an item is in the array already"

    def is_error(self) -> bool:
        """Whether the text cannot go on."""
        return bool(self._error) or self._matcher.is_error()

    def get_error(self) -> str:
        """Why it cannot."""
        return self._error or self._matcher.get_error()

    def compute_bitmask(self) -> bytes:
        """The mask of what may follow."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error() or self._matcher.is_stopped():
            return mask
        self._looks = _MOST_LOOKS
        left = bytearray(mask)
        for token in self._doubtful(self._reader, mask):
            if not self._may_follow(self._matcher, self._reader, token):
                left[token >> 3] &= ~(1 << (token & 7))
        if not any(left):
            self._error = _NOTHING_LEFT
        return bytes(left)

    def _doubtful(self, reader: Reader, mask: bytes) -> list[int]:
        """The tokens of a mask that may come to an item that is there already."""
        several = [*self._tokens.marks(reader), *(self._tokens.along(reader) if reader.watching else ())]
        return [token for token in several if mask[token >> 3] >> (token & 7) & 1]

    def _may_follow(self, matcher: LLMatcher, reader: Reader, token: int) -> bool:
        try:
            after = reader.read(self._tokens.texts[token])
        except Repeated:
            return False
        return self._goes_on(partial(_after, matcher, token), after)

    def _goes_on(self, make: Callable[[], LLMatcher], reader: Reader) -> bool:
        """Whether the present items can still become others than the earlier ones."""
        if not (rests := reader.rests()):
            return True
        array, text = reader.outermost
        if text in array.dead:
            return False
        choices = array.choices.get(text, 0)
        if self._looks <= 0 or choices > self._tokens.most_alike * sum(map(len, rests)):  # more than go along
            return True
        if choices > (along := len(self._tokens.along(reader))):
            return True
        self._looks -= 1
        matcher = make()
        mask = matcher.compute_bitmask()
        array.choices[text] = self._tokens.plain(mask, reader.in_text)
        if array.choices[text] > along:
            return True
        if any(self._may_follow(matcher, reader, token) for token in self._doubtful(reader, mask)):
            return True
        if self._looks > 0:
            array.dead.add(text)
        return False


def _after(matcher: LLMatcher, token: int) -> LLMatcher:
    after = matcher.deep_copy()
    after.consume_token(token)
    return after


def watched(matcher: LLMatcher, tokens: LLTokenizer, schema: Any) -> Watched:
    """A text of a schema that says which items differ, at its beginning; the matcher is of its other words."""
    return Watched(matcher, Tokens(tokens), Reader(Places(schema)))
