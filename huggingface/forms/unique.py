"""Enforces `uniqueItems` while an array is written: a wrapper of llguidance's matcher.

`Watched` reads the JSON values of a text, keeps the items of each such array, and removes from the mask the tokens that
would end an item equal to an earlier one. Where few values are left (of an `enum`, say), it also looks ahead, and
removes tokens that can only lead to such an item. The matcher's captures say where a value begins. One thread.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from .items import Reader, Repeated
from .places import Places

_MAX_LOOKS = 2000  # masks computed ahead, for one token
_TAIL = 4000  # bytes before a value, by which it is recognized
_NOTHING_LEFT = "'uniqueItems': nothing fits it that is not in the array yet"


class Tokens:
    """The bytes of a tokenizer's tokens, and the tokens that may end an item."""

    def __init__(self, tokens: LLTokenizer) -> None:
        self._written = tokens.decode_bytes
        special = tokens.is_special_token
        self.texts = [b"" if special(each) else tokens.decode_bytes([each]) for each in range(tokens.vocab_size)]
        self.by_text: dict[bytes, list[int]] = {}
        for number, text in enumerate(self.texts):
            self.by_text.setdefault(text, []).append(number)
        self.max_alike = max((len(several) for text, several in self.by_text.items() if text), default=1)
        marks = frozenset(b'"[]{},')
        self.structural = [number for number, text in enumerate(self.texts) if not marks.isdisjoint(text)]
        self.quotes = [number for number in self.structural if b'"' in self.texts[number]]
        # Tokens that begin an array, and hold its first item and the comma after it.
        opening = [number for number in self.structural if {0x5B, 0x2C} <= set(self.texts[number])]
        self._opening = {False: opening, True: [number for number in opening if b'"' in self.texts[number]]}
        self._plain = {True: self._without(self.quotes), False: self._without(self.structural)}

    def _without(self, numbers: list[int]) -> int:
        bits = bytearray(b"\xff" * ((len(self.texts) + 7) // 8))
        for number in [*numbers, *self.by_text.get(b"", [])]:
            bits[number >> 3] &= ~(1 << (number & 7))
        return int.from_bytes(bits, "little")

    def shown(self, token: int) -> bytes:
        """A token's bytes, also of a special token."""
        return self._written([token])

    def marks(self, reader: Reader) -> list[int]:
        """The tokens that may end an item."""
        if not reader.watching:
            return self._opening[reader.in_text]
        return self.quotes if reader.in_text else self.structural

    def along(self, reader: Reader) -> set[int]:
        """The other tokens that continue as an earlier item does."""
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


@dataclass(frozen=True, slots=True)
class Watch:
    """The watched values of a text: the schemas by rule, the rules that may follow each capture (by its name), and the
    rules that the text may begin with."""

    schemas: Mapping[str, Any]
    marks: Mapping[str, Sequence[str]]
    first: Sequence[str]


class Watched:
    """A matcher with readers of its text's values; it has the methods of a matcher that `process` needs."""

    def __init__(self, matcher: LLMatcher, tokens: Tokens, watch: Watch) -> None:
        self._tokens = tokens
        self._marks = watch.marks
        self._places = {rule: Places(schema) for rule, schema in watch.schemas.items()}
        self._readers = [Reader(self._places[rule]) for rule in watch.first if rule in self._places]
        # Finds the ends of heads: the matcher itself, asked for masks, runs ahead where only one text may follow.
        self._follower = matcher.deep_copy() if watch.marks else None
        self._heads: list[tuple[bytes, Sequence[str]]] = []  # captured texts, and the rules that may follow each
        self._captured = 0
        self._tail = b""
        self._error = ""
        self._looks = 0
        self._set(matcher)

    def _set(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.is_accepting = matcher.is_accepting
        self.is_stopped = matcher.is_stopped

    def deep_copy(self) -> Watched:
        """Copies the text at its present place."""
        other = copy.copy(self)
        other._set(self._matcher.deep_copy())
        other._follower = self._follower and self._follower.deep_copy()
        return other

    def consume_token(self, token: int) -> None:
        """Advances by a token."""
        self._matcher.consume_token(token)
        text = self._tokens.texts[token]
        try:
            self._readers = [reader.read(text) for reader in self._readers]
            self._begin(token)
        except Repeated:
            self._error = "'uniqueItems': an item is in the array already"
        self._readers = [reader for reader in self._readers if not reader.ended]

    def _begin(self, token: int) -> None:
        """Begins to read the values that start within a token, or right after it.

        llguidance captures the text before a value only the first time; from then on that text is searched for. If it
        occurs within another text, an array may be restricted more than its schema says.
        """
        if self._follower is None:
            return
        self._follower.consume_token(token)
        shown, before = self._tokens.shown(token), len(self._tail)
        text = self._tail + shown
        captures = self._follower.get_captures()
        new = [(_ending(head[-_TAIL:], text), self._marks[name]) for name, head in captures[self._captured :]]
        self._captured, self._heads = len(captures), [*self._heads, *new]
        for head, rules in self._heads:
            at = text.find(head, max(0, before + 1 - len(head)))
            while at >= 0:
                if not (text[at - 1 : at] + head[:1]).isalnum() or not at:  # else a longer name ends like this one
                    self._read_at(text[at + len(head) :], rules)
                at = text.find(head, at + 1)
        self._tail = text[-_TAIL:]

    def _read_at(self, text: bytes, rules: Sequence[str]) -> None:
        """Begins to read values of these rules, with `text` as their beginning."""
        for rule in rules:
            if (places := self._places.get(rule)) is not None:
                self._readers = [each for each in self._readers if each.begun or each.places is not places]
                self._readers.append(Reader(places).read(text))

    def is_error(self) -> bool:
        """Whether the text cannot go on."""
        return bool(self._error) or self._matcher.is_error()

    def get_error(self) -> str:
        """The reason why the text cannot go on."""
        return self._error or self._matcher.get_error()

    def compute_bitmask(self) -> bytes:
        """The mask of the allowed tokens, one bit each."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error() or self._matcher.is_stopped():
            return mask
        self._looks = _MAX_LOOKS
        left = bytearray(mask)
        for reader in self._readers:
            for token in self._doubtful(reader, left):
                if not self._may_follow(self._matcher, reader, token):
                    left[token >> 3] &= ~(1 << (token & 7))
        if not any(left):
            self._error = _NOTHING_LEFT
        return bytes(left)

    def _doubtful(self, reader: Reader, mask: bytes | bytearray) -> list[int]:
        """The tokens of a mask that may lead to a repeated item."""
        several = [*self._tokens.marks(reader), *(self._tokens.along(reader) if reader.watching else ())]
        return [token for token in several if mask[token >> 3] >> (token & 7) & 1]

    def _may_follow(self, matcher: LLMatcher, reader: Reader, token: int) -> bool:
        try:
            after = reader.read(self._tokens.texts[token])
        except Repeated:
            return False
        return self._goes_on(partial(_after, matcher, token), after)

    def _goes_on(self, make: Callable[[], LLMatcher], reader: Reader) -> bool:
        """Whether the present items can still differ from all earlier ones."""
        if not (rests := reader.rests()):
            return True
        array, text = reader.outermost
        if text in array.dead:
            return False
        choices = array.choices.get(text, 0)
        if self._looks <= 0 or choices > self._tokens.max_alike * sum(map(len, rests)):  # more than can repeat
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


def _ending(head: bytes, text: bytes) -> bytes:
    """The captured text with a bracket after it: llguidance drops the last bracket of an added token (`[ARGS]`)."""
    end = text.rfind(head) + len(head)
    return head + (b"]" if head in text and text[end : end + 1] == b"]" else b"")


def _after(matcher: LLMatcher, token: int) -> LLMatcher:
    after = matcher.deep_copy()
    after.consume_token(token)
    return after
