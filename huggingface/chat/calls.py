"""Reads one call as it is written: a JSON object with a name and arguments, character by character."""

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
    """The rest of a JSON string behind its quote, as it comes in; models write raw line breaks in it, and backslashes
    that escape nothing, which JSON does not allow."""

    def __init__(self) -> None:
        self.done = False
        self._escape = ""  # that has begun

    def take(self, char: str) -> str:
        """What the next character makes of the string, as JSON has it."""
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
        if escape == "\\" and (char == "'" or char < " "):  # as JavaScript has it
            return written(char)
        return "\\" + escape + self.take(char)


class Value:
    """One JSON value, as it comes in. It tells where the value ends; it is `broken` by what can be no part of one.

    `told` is what the last character makes of its text, which is JSON within quotes: see `Quoted`.
    """

    def __init__(self) -> None:
        self.first = ""
        self.done = False
        self.broken = False
        self.told = ""
        self._taken: list[str] = []
        self._open: list[str] = []  # what closes the objects and lists that are open, the outermost first
        self._string: Quoted | None = None

    @property
    def text(self) -> str:
        """What was taken, as JSON."""
        return "".join(self._taken)

    @property
    def in_string(self) -> bool:
        """Whether what comes next is within quotes."""
        return self._string is not None

    def take(self, char: str) -> bool:
        """Take the next character; False if it is not the value's."""
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
    """One call, `{"name": …, "arguments": {…}}`, in any order, other fields aside.

    `state` is `failed` as soon as it is no such object, `done` after its last character.
    """

    def __init__(
        self,
        begin: Callable[[str], bool],
        arguments: Callable[[str], None],
        *,
        name_key: str = "name",
        only: Sequence[str] = (),
    ) -> None:
        """`begin` is called with the function's name, which stands under `name_key`, before `arguments` gets pieces of
        the arguments' JSON text. It may return False: it is no call. With `only`, nothing but an object of exactly
        these fields in this order is one.
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
        self._arguments_key = ""  # under which the arguments stand; a second one would be no more of them
        self._held: str | None = None  # arguments that came before the name, or as a string
        self.begun = False
        self._told = False

    def take(self, char: str) -> None:
        """Take the next character, while the state is neither `done` nor `failed`.

        Once the call is begun, one that makes it fail is not taken.
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
        """A field is complete."""
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
        """Begin the call, once its name is known; False if it is none."""
        if not self.begun and self._name is not None:
            if not self._begin(self._name):
                self.state = "failed"
                return False
            self.begun = True
        return True


def mended(text: str) -> str:
    """JSON text whose strings hold nothing that JSON does not allow; what is no JSON, is left."""
    value = Value()
    return value.text if all(value.take(char) for char in text) else text


def written(text: str) -> str:
    """A text as it stands within quotes in JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _string(text: str) -> str | None:
    """What a JSON string says; None if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _is_object(text: str) -> bool:
    """Whether it is the JSON text of an object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def longest_beginning(text: str, marker: str) -> int:
    """The length of the longest end of `text` that `marker` begins with."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0
