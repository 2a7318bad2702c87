"""Reads a call's arguments in each form that models write, character by character, and returns them as JSON.

One reader serves one call. Text that was returned is never changed later.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .argument_types import TEXT, meant, resolved, types_of
from .calls import Quoted, Value, longest_beginning, written
from .formats import Tags

_SPACE = " \t\r\n"
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_CALLED = re.compile(r"[\w.]+")


class ArgumentsReader(Protocol):
    """Reads the arguments of one call: `done` after the last character, `broken` by one that cannot belong to them."""

    done: bool
    broken: bool

    def take(self, char: str) -> str | None:
        """Reads the next character; returns the JSON text that it adds, None if it does not belong to the arguments."""


class JsonArguments:
    """Reads a JSON object."""

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._value = Value()

    def take(self, char: str) -> str | None:
        """Returns the character itself, repaired where JSON does not allow it."""
        if not self._value.first and char in _SPACE:
            return ""
        self.broken = not self._value.first and char != "{"
        taken = not self.broken and self._value.take(char)
        self.done, self.broken = self._value.done, self.broken or self._value.broken
        return self._value.told if taken else None


class TaggedArguments:
    """Reads arguments between tags; returns a string piece by piece, any other value when it is complete.

    Space between the tags is ignored, and once the arguments have begun, so is any other text there.
    """

    def __init__(self, tags: Tags, parameters: Mapping[str, Any], stop: str = "") -> None:
        """`parameters` is the schema of the arguments. `stop` also ends them, besides `tags.end`."""
        self.done = False
        self.broken = False
        self._tags = tags
        self._ends = tuple(filter(None, (tags.end, stop)))
        self._root = parameters
        whole = resolved(parameters, parameters)
        said = whole.get("properties") if isinstance(whole, Mapping) else None
        self._schemas: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
        head, _, tail = tags.middle.partition("><")
        self._after_key, self._before_value = (head + ">", "<" + tail) if tail else (tags.middle, "")
        self._take = self._between
        self._held = ""
        self._begun = False
        self._first = True  # no argument has begun
        self._types: frozenset[str] | None = None
        self._value: list[str] = []  # the characters of a value that is not a string
        self._scanned = Value()  # the same value, as far as it is JSON

    def take(self, char: str) -> str | None:
        """Reads the next character; returns the JSON text that it adds."""
        self._held += char
        return self._take()

    def _between(self) -> str | None:
        text = self._held = self._held.lstrip(_SPACE)
        if text == self._tags.open:
            self._held, self._take = "", self._key
            return self._begin()
        if text in self._ends:
            self.done = True
            return self._begin() + "}"
        marks = (self._tags.open, *self._ends)
        if any(mark.startswith(text) for mark in marks):
            return ""
        if not self._begun:
            self.broken = True
            return None
        self._held = next((text[at:] for at in range(len(text)) if any(m.startswith(text[at:]) for m in marks)), "")
        return ""

    def _begin(self) -> str:
        begun, self._begun = self._begun, True
        return "" if begun else "{"

    def _key(self) -> str:
        if not self._held.endswith(self._after_key):
            return ""
        name = self._held.removesuffix(self._after_key).strip()
        self._held, self._take = "", self._middle if self._before_value else self._value_start
        self._types = types_of(self._schemas.get(name, {}), self._root)
        comma, self._first = "" if self._first else ", ", False
        quote = '"' if self._types == TEXT else ""
        return f"{comma}{json.dumps(name, ensure_ascii=False)}: {quote}"

    def _middle(self) -> str:
        if self._held.lstrip(_SPACE) == self._before_value:
            self._held, self._take = "", self._value_start
        return ""

    def _value_start(self) -> str:
        self._value, self._scanned = [], Value()
        self._take = self._text if self._types == TEXT else self._other
        if self._tags.padded and self._held == "\n":
            self._held = ""
        return self._take()

    def _text(self) -> str:
        close = self._tags.close
        if self._held.endswith(close):
            told, self._held, self._take = self._unpadded(self._held.removesuffix(close)), "", self._between
            return f'{written(told)}"'
        keep = longest_beginning(self._held, close)
        if self._tags.padded:
            keep = max(keep, longest_beginning(self._held, f"\n{close}"))
        told, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return written(told)

    def _other(self) -> str:
        char, close = self._held[-1:], self._tags.close
        self._value.append(char)
        self._held = self._held[-len(close) :]
        scanned = self._scanned
        if char and not scanned.done and not scanned.broken and (scanned.first or char not in _SPACE):
            scanned.take(char)
        quoted = scanned.in_string and not scanned.broken and scanned.first in '{["'
        if self._held != close or quoted:  # a tag within a JSON string does not count
            return ""
        text = self._unpadded("".join(self._value).removesuffix(close))
        self._held, self._take = "", self._between
        return json.dumps(meant(text, self._types), ensure_ascii=False)

    def _unpadded(self, text: str) -> str:
        return text.removesuffix("\n") if self._tags.padded else text


class LaxArguments:
    """Reads an object in Gemma 4's form: keys without quotes, strings between its own marks; JSON is accepted too."""

    _QUOTE = '<|"|>'

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._open: list[str] = []
        self._held = ""  # a key, a word, or the beginning of a mark
        self._within = ""  # the mark that ends the present string
        self._quoted = Quoted()  # reads that string, if it is JSON's
        self._wants_key = False

    def take(self, char: str) -> str | None:
        """Reads the next character; returns the JSON text that it adds."""
        if self._within == '"':
            return self._in_json_text(char)
        if self._within:
            return self._in_text(char)
        if not self._open and char != "{":
            self.broken = char not in _SPACE
            return None if self.broken else ""
        self._held += char
        if self._held.lstrip(_SPACE) in (self._QUOTE, '"'):
            self._within, self._held, self._quoted = self._held.lstrip(_SPACE), "", Quoted()
            return '"'
        if char == ":" and self._wants_key:
            key, self._held, self._wants_key = self._held[:-1].strip(), "", False
            return f"{json.dumps(key, ensure_ascii=False)}: " if key else ": "
        if char in "{[":
            return self._opened(char)
        if char not in ",}]":
            return ""
        told, self._held = self._word(self._held[:-1].strip()), ""
        if char == ",":
            self._wants_key = self._open[-1] == "}"
            return f"{told}, "
        if self._open[-1] != char:
            self.broken = True
            return None
        self._open.pop()
        self.done, self._wants_key = not self._open, False
        return told + char

    def _opened(self, char: str) -> str | None:
        if self._held[:-1].strip():
            self.broken = True
            return None
        self._held, self._wants_key = "", char == "{"
        self._open.append("}" if char == "{" else "]")
        return char

    def _word(self, text: str) -> str:
        return json.dumps(meant(text, None), ensure_ascii=False) if text else ""

    def _in_text(self, char: str) -> str:
        self._held += char
        if self._held.endswith(self._QUOTE):
            told, self._held, self._within = self._held.removesuffix(self._QUOTE), "", ""
            return f'{written(told)}"'
        keep = longest_beginning(self._held, self._QUOTE)
        told, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return written(told)

    def _in_json_text(self, char: str) -> str:
        told = self._quoted.take(char)
        if self._quoted.done:
            self._within = ""
        return told


class PythonCalls:
    """Reads a list of calls in Python's syntax, `[f(a="x", b=1), g()]`; `calls` returns them when it is complete."""

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._taken: list[str] = []
        self._open: list[str] = []
        self._name = ""  # of the call that begins
        self._quote = ""
        self._escaped = False

    def take(self, char: str) -> str | None:
        """Reads the next character; always returns an empty text."""
        self._taken.append(char)
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == self._quote:
                self._quote = ""
        elif len(self._open) == 1 and char != "]":
            self._take_name(char)
        elif char in "'\"" and self._open:
            self._quote = char
        elif char in _CLOSING and (self._open or char == "["):
            self._open.append(_CLOSING[char])
        elif char in "])}":
            self.broken = bool(self._name.strip()) or not self._open or self._open.pop() != char
            self.done = not self._open and not self.broken
        elif not self._open:
            self.broken = char not in _SPACE
        return ""

    def _take_name(self, char: str) -> None:
        """Reads a character of the list outside of the calls' brackets."""
        if char == "(":
            self.broken = not _CALLED.fullmatch(self._name.strip())
            self._open.append(")")
            self._name = ""
        elif char == ",":
            self.broken = bool(self._name.strip())
        else:
            self._name += char
            self.broken = not _CALLED.fullmatch(self._name.strip() or "_")

    def calls(self) -> list[tuple[str, str]] | None:
        """The calls' names, each with its arguments as JSON; None if the text is not a list of calls."""
        found = []
        for text in _split("".join(self._taken).strip()[1:-1]):
            call = re.fullmatch(r"([\w.]+)\s*\((.*)\)", text, re.DOTALL)
            if call is None:
                return None
            arguments = {}
            for each in _split(call[2]):
                name, equals, value = each.partition("=")
                if not equals or not name.strip().isidentifier():
                    return None
                try:
                    arguments[name.strip()] = _literal(value.strip())
                except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                    return None
            found.append((call[1], json.dumps(arguments, ensure_ascii=False)))
        return found or None


def _split(text: str) -> Sequence[str]:
    """Splits a text at its commas outside of quotes and brackets."""
    parts, start, depth, quote, at = [], 0, 0, "", 0
    while at < len(text):
        char = text[at]
        if quote:
            at += char == "\\"
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[({":
            depth += 1
        elif char in "])}":
            depth -= 1
        elif char == "," and not depth:
            parts.append(text[start:at].strip())
            start = at + 1
        at += 1
    return [part for part in (*parts, text[start:].strip()) if part]


def _literal(text: str) -> Any:
    """Parses a value in JSON's or Python's syntax."""
    try:
        return json.loads(text, parse_constant=ast.literal_eval, strict=False)
    except ValueError:
        return json.loads(json.dumps(ast.literal_eval(_on_one_line(text)), allow_nan=False))


def _on_one_line(text: str) -> str:
    """Escapes the line breaks within quotes: models write them raw, which Python forbids."""
    result, quote, escaped = "", "", False
    for char in text:
        if quote and char in "\r\n" and not escaped:
            char = repr(char)[1:-1]
        elif char in "'\"" and not escaped and quote in ("", char):
            quote = "" if quote else char
        escaped = char == "\\" and bool(quote) and not escaped
        result += char
    return result
