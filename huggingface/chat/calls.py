"""Reads one call while it is generated, character by character: a JSON object with a name and arguments."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from typing import Literal

_SPACE = " \t\r\n"
_CLOSING = {"{": "}", "[": "]"}
_ESCAPES = '"\\/bfnrt'
_UNICODE = len("\\u0000")
_PLAIN = frozenset(_SPACE + ",:+-." + string.ascii_letters + string.digits)  # outside of strings, brackets aside


class Quoted:
    """Reads a JSON string after its opening quote, and repairs what JSON does not allow: raw line breaks, and
    backslashes that escape nothing, which models write."""

    def __init__(self) -> None:
        self.done = False
        self._escape = ""  # the beginning of an escape

    def take(self, char: str) -> str:
        """Reads the next character; returns the JSON text that it adds."""
        escape, self._escape = self._escape, ""
        if not escape:
            if char == "\\":
                self._escape = char
                return ""
            self.done = char == '"'
            return char if self.done else written(char)
        if escape == "\\" and char in _ESCAPES:
            return escape + char
        if char == "u" if escape == "\\" else char in string.hexdigits:
            whole = escape + char
            self._escape = whole if len(whole) < _UNICODE else ""
            return "" if self._escape else whole
        if escape == "\\" and (char == "'" or char < " "):  # JavaScript's escapes
            return written(char)
        return "\\" + escape + self.take(char)


class Value:
    """Reads one JSON value: `done` at its end, `broken` by a character that cannot belong to a value.

    `told` is the text that the last character adds; within quotes it is repaired (see `Quoted`).
    """

    def __init__(self) -> None:
        self.first = ""
        self.done = False
        self.broken = False
        self.told = ""
        self._taken: list[str] = []
        self._open: list[str] = []  # the closing brackets of the open objects and lists, the outermost first
        self._string: Quoted | None = None

    @property
    def text(self) -> str:
        """The value's JSON text so far."""
        return "".join(self._taken)

    @property
    def in_string(self) -> bool:
        """Whether the next character is within quotes."""
        return self._string is not None

    def take(self, char: str) -> bool:
        """Reads the next character; False if it does not belong to the value."""
        self.told = char
        if self._string is not None:
            self.told = self._string.take(char)
            if self._string.done:
                self._string = None
                self.done = not self._open
        elif self.first and not self._open and char in ",}]" + _SPACE:  # after a number, or true, false, null
            self.done = True
            return False
        elif char == '"':
            self._string = Quoted()
        elif char in _CLOSING:
            self._open.append(_CLOSING[char])
        elif self._open and char == self._open[-1]:
            self._open.pop()
            self.done = not self._open
        elif char not in _PLAIN:
            self.broken = True
            return False
        self.first = self.first or char
        self._taken.append(self.told)
        return True


class CallReader:
    """Reads one call, `{"name": …, "arguments": {…}}`, in any order; other fields are ignored.

    `state` is `failed` as soon as the text is not such an object, `done` after its last character.
    """

    def __init__(
        self,
        begin: Callable[[str], bool],
        arguments: Callable[[str], None],
        *,
        name_key: str = "name",
        only: Sequence[str] = (),
    ) -> None:
        """Reads nothing yet.

        Args:
            begin: called with the function's name before any arguments; returns False if this is not a call.
            arguments: called with pieces of the arguments' JSON text.
            name_key: the field with the function's name.
            only: the exact fields of a call, in their order; empty for any.
        """
        self.state: Literal["before", "key", "colon", "value", "done", "failed"] = "before"
        self._begin = begin
        self._arguments = arguments
        self._name_key = name_key
        self._only = list(only)
        self._fields = 0
        self._key = ""
        self._value = Value()
        self._name: str | None = None
        self._arguments_key = ""  # the field with the arguments; a second such field is ignored
        self._held: str | None = None  # arguments before the name, or arguments as a string
        self.begun = False
        self._told = False

    def take(self, char: str) -> None:
        """Reads the next character, while the state is neither `done` nor `failed`.

        Once the call has begun, a character that makes it fail does not belong to it.
        """
        match self.state:
            case "before":
                if char == "{":
                    self.state = "key"
                elif char not in _SPACE:
                    self.state = "failed"
            case "key":
                self._take_key(char)
            case "colon":
                if char == ":":
                    self.state, self._value = "value", Value()
                elif char not in _SPACE:
                    self.state = "failed"
            case "value":
                self._take_value(char)

    def _take_key(self, char: str) -> None:
        if self._value.first:
            self._value.take(char)
            if self._value.done:
                self._key = _string(self._value.text) or ""
                self.state = "colon"
                if self._only and self._only[self._fields : self._fields + 1] != [self._key]:
                    self.state = "failed"
                self._fields += 1
        elif char == '"':
            self._value.take(char)
        elif char == "}":
            self._end()
        elif char not in _SPACE and char != ",":
            self.state = "failed"

    def _take_value(self, char: str) -> None:
        value = self._value
        if not value.first and char in _SPACE:
            return
        if not value.first and not self._arguments_key and self._key in ("arguments", "parameters"):
            self._arguments_key = self._key
        mine = value.take(char)
        if value.broken:
            self.state = "failed"
            return
        if self._key == self._arguments_key and value.first == "{" and self._name is not None and not self._held:
            if not self._start():
                return
            self._arguments(value.told)
            self._told = True
        if value.done:
            self._take_whole(value.text)
        if value.done and self.state == "value":
            self.state, self._value = "key", Value()
            if not mine:
                self._take_key(char)

    def _take_whole(self, text: str) -> None:
        """Reads a complete field."""
        if self._key == self._name_key and self._name is None:
            self._name = _string(text)
            if not self._name:
                self.state = "failed"
        elif self._key == self._arguments_key and not self._told:
            if text.startswith('"'):
                text = mended((_string(text) or "").strip())
            if text in ("", "null"):
                text = "{}"
            if _is_object(text):
                self._held = text
            else:
                self.state = "failed"

    def _end(self) -> None:
        if self._name is None or self._fields < len(self._only) or not self._start():
            self.state = "failed"
            return
        if not self._told:
            self._arguments(self._held or "{}")
        self.state = "done"

    def _start(self) -> bool:
        """Begins the call once its name is known; False if this is not a call."""
        if not self.begun and self._name is not None:
            if not self._begin(self._name):
                self.state = "failed"
                return False
            self.begun = True
        return True


def mended(text: str) -> str:
    """Repairs the strings of a JSON text (see `Quoted`); text that is not JSON stays unchanged."""
    value = Value()
    return value.text if all(value.take(char) for char in text) else text


def written(text: str) -> str:
    """Escapes a text as JSON does within quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _string(text: str) -> str | None:
    """The value of a JSON string; None if the text is not one."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _is_object(text: str) -> bool:
    """Whether the text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def longest_beginning(text: str, marker: str) -> int:
    """The length of the longest suffix of `text` that is a prefix of `marker`, shorter than the marker."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0
