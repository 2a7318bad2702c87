"""Reads one call as it is written: a JSON object with a name and arguments, character by character."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Literal

_SPACE = " \t\r\n"


class Value:
    """One JSON value, as it comes in. It tells where the value ends, not whether it is sound."""

    def __init__(self) -> None:
        self.text = ""
        self.done = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def take(self, char: str) -> bool:
        """Take the next character; False if it is no longer the value's."""
        if not self.text:
            self._in_string = char == '"'
            self._depth = 1 if char in "{[" else 0
        elif self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                self.done = not self._depth
        elif not self._depth:  # a number, or true, false, null
            if char in ",}]" or char in _SPACE:
                self.done = True
                return False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = not self._depth
        self.text += char
        return True


class CallReader:
    """One call, `{"name": …, "arguments": {…}}`, in any order, other fields aside.

    `state` is `failed` as soon as it is no such object, `done` after its last character.
    """

    def __init__(self, begin: Callable[[str], bool], arguments: Callable[[str], None]) -> None:
        """`begin` is called with the function's name before `arguments` gets pieces of the arguments' JSON text.

        `begin` may return False: it is no call.
        """
        self.state: Literal["before", "key", "colon", "value", "done", "failed"] = "before"
        self._begin = begin
        self._arguments = arguments
        self._key = ""
        self._value = Value()
        self._name: str | None = None
        self._held: str | None = None  # arguments that came before the name
        self.begun = False
        self._told = False

    def take(self, char: str) -> None:
        """Take the next character, while the state is neither `done` nor `failed`."""
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
        if self._value.text:
            self._value.take(char)
            if self._value.done:
                self._key = _string(self._value.text) or ""
                self.state = "colon"
        elif char == '"':
            self._value.take(char)
        elif char == "}":
            self._end()
        elif char not in _SPACE and char != ",":
            self.state = "failed"

    def _take_value(self, char: str) -> None:
        value = self._value
        if not value.text and char in _SPACE:
            return
        mine = value.take(char)
        if self._key in ("arguments", "parameters") and value.text[0] == "{" and self._name is not None:
            if not self._start():
                return
            self._arguments(char)
            self._told = True
        if value.done:
            self._take_whole(value.text)
        if value.done and self.state == "value":
            self.state, self._value = "key", Value()
            if not mine:
                self._take_key(char)

    def _take_whole(self, text: str) -> None:
        """A field is complete."""
        if self._key == "name" and self._name is None:
            self._name = _string(text)
            if not self._name:
                self.state = "failed"
        elif self._key in ("arguments", "parameters") and not self._told:
            if text.startswith('"'):
                text = (_string(text) or "").strip() or "{}"
            if text == "null":
                text = "{}"
            if not text.startswith("{"):
                self.state = "failed"
            else:
                self._held = text

    def _end(self) -> None:
        if self._name is None or not self._start():
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


def _string(text: str) -> str | None:
    """What a JSON string says; None if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
