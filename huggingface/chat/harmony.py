"""Reads answers of gpt-oss: a sequence of messages, each in a channel ("OpenAI Harmony Response Format").

A message in `analysis` is reasoning, a message to a function is a call, everything else is content. One reader serves
one answer; the text may come in pieces of any size.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from .arguments import JsonArguments
from .calls import longest_beginning
from .parser import CallArguments, CallStart, Content, Part, Reasoning, random_id

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_BEGINS = ("<|start|>", "<|channel|>", _MESSAGE, "to=")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=(functions\.)?([\w.:/-]+)")
_SPACE = " \t\r\n"


class HarmonyReader:
    """Reads one answer."""

    def __init__(self, tools: Collection[str] | None = None, *, prompt_end: str = "") -> None:
        """`tools` are the functions' names; without them nothing counts as a call. `prompt_end` may hold the beginning
        of the answer's first message."""
        self._tools = frozenset(tools or ())
        self._parts: list[Part] = []
        self._calls = 0
        self._said = self._thought = False
        self._apart: str = ""  # the separator between this message and the one before
        self._kind: type[Content] | type[Reasoning] = Content
        self._arguments: JsonArguments | None = None
        self._name = ""
        self._begun = False
        self._raw = ""  # text of a call whose arguments have not begun
        self._mode = self._in_header
        self._buffer = prompt_end.rpartition("<|start|>assistant")[2] if "<|start|>assistant" in prompt_end else ""
        while self._buffer and self._mode():
            pass
        self._parts.clear()
        self._said = self._thought = False

    def feed(self, text: str) -> list[Part]:
        """Reads a piece of text; returns its parts."""
        self._buffer += text
        while self._buffer and self._mode():
            pass
        return self._take()

    def finish(self) -> list[Part]:
        """Ends the answer; returns its last parts."""
        if self._mode == self._in_message:
            self._tell(self._buffer)
            if self._arguments is not None and not self._begun:
                self._arguments = None
                self._tell(self._raw)
        self._buffer = ""
        return self._take()

    def _in_header(self) -> bool:
        text = self._buffer.lstrip(_SPACE)
        if not text:
            return False
        if not any(text.startswith(begin) for begin in _BEGINS):
            if any(begin.startswith(text) for begin in _BEGINS):
                return False
            self._begin_message("")
            return True
        head, found, rest = text.partition(_MESSAGE)
        if not found:
            return False
        self._buffer = rest
        self._begin_message(head)
        return True

    def _in_message(self) -> bool:
        found = [(place, end) for end in _ENDS if (place := self._buffer.find(end)) >= 0]
        if not found:
            keep = max(longest_beginning(self._buffer, end) for end in _ENDS)
            told, self._buffer = self._buffer[: len(self._buffer) - keep], self._buffer[len(self._buffer) - keep :]
            self._tell(told)
            return False
        place, end = min(found)
        self._tell(self._buffer[:place])
        self._buffer = self._buffer[place + (len(end) if end not in _BEGINS else 0) :]
        self._end_message()
        return True

    def _begin_message(self, head: str) -> None:
        channel, recipient = _CHANNEL.search(head), _RECIPIENT.search(head)
        self._kind = Reasoning if channel is not None and channel[1] == "analysis" else Content
        self._mode = self._in_message
        self._arguments = None
        if recipient is not None and self._tools and (recipient[1] or recipient[2] in self._tools):
            self._kind, self._name, self._begun, self._raw = Content, recipient[2], False, ""
            self._arguments = JsonArguments()
        self._apart = "\n\n" if (self._thought if self._kind is Reasoning else self._said) else ""

    def _end_message(self) -> None:
        if self._arguments is not None:
            if not self._begun and not self._raw.strip():  # a call without arguments
                self._call("{}")
            if self._begun:
                self._calls += 1
            else:
                self._arguments = None
                self._tell(self._raw)
        self._mode, self._arguments = self._in_header, None

    def _tell(self, text: str) -> None:
        if self._arguments is None:
            if not text:
                return
            self._parts.append(self._kind(self._apart + text))
            self._said, self._thought = self._said or self._kind is Content, self._thought or self._kind is Reasoning
            self._apart = ""
            return
        told = []
        for place, char in enumerate(text):
            if self._arguments.done or (self._arguments.broken and self._begun):
                break
            piece = self._arguments.take(char)
            if self._arguments.broken and not self._begun:  # not a call
                raw, self._arguments = self._raw, None
                self._tell(raw + text[place:])
                return
            self._raw += "" if self._begun else char
            told.append(piece or "")
            self._begun = self._begun or self._start("".join(told))
        self._call("".join(told))

    def _start(self, told: str) -> bool:
        if told:
            self._parts.append(CallStart(self._calls, random_id(24), self._name))
        return bool(told)

    def _call(self, arguments: str) -> None:
        self._begun = self._begun or self._start(arguments)
        if arguments:
            self._parts.append(CallArguments(self._calls, arguments))

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts
