"""Reads a model's answer while it is generated: its reasoning, its content, and its tool calls.

The text may come in pieces of any size; the parts are the same. The reader holds back only what may be the beginning
of a marker, or of a call that has no name yet. What looks like a call but is not one becomes content.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .arguments import ArgumentsReader, JsonArguments, LaxArguments, PythonCalls, TaggedArguments
from .calls import CallReader, longest_beginning
from .formats import JSON, ReasoningTags, ToolFormat
from .heads import match_head

_SPACE = " \t\r\n"
_FENCE = re.compile(r"\A```(?:json)?[ \t\r\n]*")
_MARK = re.compile(r"```|<[^<>\s]+>")  # a mark after a call's arguments
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The beginning of a call; `index` is its place among the answer's calls, from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments


class AnswerReader(Protocol):
    """Reads one answer, piece by piece."""

    def feed(self, text: str) -> list[Part]:
        """Reads a piece of text; returns its parts."""

    def finish(self) -> list[Part]:
        """Ends the answer; returns its last parts."""


class AnswerParser:
    """Reads one answer whose calls and reasoning stand between marks."""

    def __init__(
        self,
        tool_format: ToolFormat | None,
        reasoning: ReasoningTags | None,
        *,
        inside_reasoning: bool = False,
        tools: Collection[str] | None = None,
        exact: bool = False,
    ) -> None:
        """Reads nothing yet.

        Args:
            tool_format: how the model writes calls.
            reasoning: the tags around the model's reasoning.
            inside_reasoning: whether the prompt ends within the reasoning.
            tools: the functions' names, or their schemas by name; without tools nothing counts as a call.
            exact: an unmarked object is a call only if it holds a name and arguments, in this order, and nothing else:
                for answers that may be other JSON.
        """
        self._format = tool_format or JSON
        self._calls_count = tool_format is not None and bool(tools)
        self._tools = frozenset(tools or ())
        self._schemas: Mapping[str, Any] = tools if isinstance(tools, Mapping) else {}
        self._exact = exact
        self._tags = reasoning
        self._parts: list[Part] = []
        self._told: list[str] = []  # pieces of arguments that are not in `_parts` yet
        self._buffer = ""
        self._calls = 0
        self._raw = ""  # text of a call that has not begun yet, kept in case it is not a call
        self._reader: CallReader | None = None
        self._arguments: ArgumentsReader | None = None  # for a call whose name comes before its arguments
        self._named = ""  # that call's name, until its arguments begin
        self._python: PythonCalls | None = None
        self._listed = False  # the whole answer may be a list of calls
        self._begun = False  # whether the present call's start was delivered
        self._calls_here = 0  # calls since the last marker
        self._blank = True  # no content but space since the last call, or since the reasoning
        self._mode: Callable[[], bool] = self._in_reasoning if inside_reasoning and reasoning else self._at_start
        self._thought = False  # whether reasoning was delivered

    def feed(self, text: str) -> list[Part]:
        """Reads a piece of text; returns its parts."""
        self._buffer += text
        while self._buffer and self._mode():
            pass
        return self._take()

    def finish(self) -> list[Part]:
        """Ends the answer; returns its last parts."""
        if self._mode == self._in_reasoning:
            self._tell(Reasoning(self._buffer.rstrip(_SPACE)))
        elif self._mode in (self._at_start, self._in_content):
            self._say(self._buffer)
        elif (
            self._mode in (self._in_call, self._in_python)
            and not self._begun
            and (self._reader is not None or self._arguments is not None or not self._calls_here)
        ):
            self._say(self._raw + self._buffer)  # else the rest is the beginning of a closing mark
        self._buffer = self._raw = ""
        return self._take()

    # The modes. Each reads some of the buffer, and returns whether reading can continue -------------------------------

    def _at_start(self) -> bool:
        text = self._buffer.lstrip(_SPACE)
        if self._tags is not None and not self._thought:
            if text.startswith(self._tags.open):
                self._buffer = text[len(self._tags.open) :]
                self._mode = self._in_reasoning
                return True
            if self._tags.open.startswith(text):
                return False
        if not (self._calls_count and self._format.bare):
            self._mode = self._in_content
            return True
        rest = _FENCE.sub("", text) if self._format.name == "json" else text
        if not rest or (self._format.name == "json" and "```json".startswith(text)):
            return False
        if rest[0] in ("[" if self._format.python else "{["):
            self._begin_call(self._buffer[: len(self._buffer) - len(rest)], rest, listed=True)
        else:
            self._mode = self._in_content
        return True

    def _in_reasoning(self) -> bool:
        assert self._tags is not None  # noqa: S101 - the mode is only entered with tags
        if not self._thought:
            self._buffer = self._buffer.lstrip(_SPACE)
            if self._tags.open.startswith(self._buffer):
                return False
            if self._buffer.startswith(self._tags.open):  # the model repeats the prompt's tag
                self._buffer = self._buffer[len(self._tags.open) :]
                return True
        before, found, after = self._buffer.partition(self._tags.close)
        if found:
            self._tell(Reasoning(before.rstrip(_SPACE)))
            self._thought = True
            self._buffer = after.lstrip(_SPACE)
            self._mode = self._after_reasoning
            return True
        keep = longest_beginning(self._buffer, self._tags.close)
        shown = self._buffer[: len(self._buffer) - keep].rstrip(_SPACE)
        self._tell(Reasoning(shown))
        self._thought = self._thought or bool(shown)
        self._buffer = self._buffer[len(shown) :]
        return False

    def _after_reasoning(self) -> bool:
        self._buffer = self._buffer.lstrip(_SPACE)
        if self._buffer:
            self._mode = self._at_start
        return bool(self._buffer)

    def _in_content(self) -> bool:
        begin = self._format.begin if self._calls_count else ""
        if not begin:
            self._say(self._buffer)
            self._buffer = ""
            return False
        before, found, after = self._buffer.partition(begin)
        if found:
            said = before.rstrip(_SPACE)
            if said:
                self._say(said)
            self._begin_call(before[len(said) :] + begin, after, listed=False)
            return True
        keep = longest_beginning(self._buffer, begin)
        shown = self._buffer[: len(self._buffer) - keep].rstrip(_SPACE)
        self._say(shown)
        self._buffer = self._buffer[len(shown) :]
        return False

    def _in_call(self) -> bool:
        """Reads a call, or what may stand between calls."""
        if self._reader is None and self._arguments is None:
            return self._between_calls()
        text = self._buffer
        cut = "" if self._format.tags or self._format.lax or not self._format.end else "\n" + self._format.end
        for place, char in enumerate(text):
            if char == "\n" and self._begun and cut:  # valid JSON strings never hold `cut`
                if text.startswith(cut, place):
                    self._buffer = text[place:]
                    self._end_call()
                    return True
                if cut.startswith(text[place:]):
                    self._buffer = text[place:]
                    return False
            ended, taken = self._take_char(char)
            if ended:
                self._buffer = text[place + taken :]
                if self._begun:
                    self._end_call()
                else:
                    self._raw += text[: place + 1]
                    self._give_up()
                return True
        self._buffer = ""
        if not self._begun:
            self._raw += text
        return False

    def _take_char(self, char: str) -> tuple[bool, bool]:
        """Reads the next character of a call; returns whether the call has ended or failed, and whether the character
        belongs to it."""
        if self._arguments is not None:
            told = self._arguments.take(char)
            if told and not self._begun:
                self._start_call(self._named)
            if told:
                self._told.append(told)
            return self._arguments.done or self._arguments.broken, told is not None or not self._begun
        assert self._reader is not None  # noqa: S101 - one of the two
        self._reader.take(char)
        failed = self._reader.state == "failed"
        return failed or self._reader.state == "done", not (failed and self._begun)

    def _in_python(self) -> bool:
        """Reads a list of Python's calls, which are delivered when the list is complete."""
        assert self._python is not None  # noqa: S101 - the mode is only entered with it
        for place, char in enumerate(self._buffer):
            self._python.take(char)
            if not (self._python.done or self._python.broken):
                continue
            self._raw += self._buffer[: place + 1]
            self._buffer = self._buffer[place + 1 :]
            calls = self._python.calls() if self._python.done else None
            if calls is None or (self._listed and any(name not in self._tools for name, _ in calls)):
                self._give_up()
                return True
            for name, arguments in calls:
                self._start_call(name)
                self._told.append(arguments)
                self._end_call()
            self._mode = self._in_call  # reads the closing mark
            return True
        self._raw += self._buffer
        self._buffer = ""
        return False

    def _between_calls(self) -> bool:
        closing = self._buffer.lstrip(_SPACE + (",;]}" if self._calls_here else "["))
        if not closing:
            if not self._calls_here:  # it may still be content
                return False
            self._buffer = ""
            return False
        taken = self._buffer[: len(self._buffer) - len(closing)]
        for mark in self._closing_marks() if self._calls_here else ():
            if closing.startswith(mark):
                self._buffer = closing[len(mark) :]
                if mark == self._format.end or self._format.name == "json":
                    self._mode = self._in_content
                return True
            if mark.startswith(closing):
                self._buffer = closing
                return False
        if closing[0] == "{" and (self._format.as_object or self._format.name == "mistral"):
            self._raw += "" if self._calls_here else taken
            self._buffer = closing
            found = re.search(r'"(\w+)": \$name.*"(\w+)": \$arguments', self._format.call)
            exact = self._exact and self._format.bare and found is not None
            self._reader = CallReader(
                self._start_call,
                self._told.append,
                name_key=found[1] if found else "name",
                only=found.groups() if found and exact else (),
            )
            return True
        if not self._format.as_object and not (self._calls_here and self._format.each):
            return self._named_call(closing)
        if self._format.name == "mistral" and not self._calls_here:
            return self._named_call(closing)
        return self._no_call(closing)

    def _no_call(self, closing: str) -> bool:
        """No call begins here."""
        if self._calls_here:
            self._buffer = closing
            self._mode = self._in_content
        else:
            self._give_up()
        return True

    def _closing_marks(self) -> list[str]:
        """The marks that may follow a call: the end of the call, and the end of all calls."""
        if self._format.name == "json":
            return ["```"]
        behind = "" if self._format.as_object else self._format.call.partition("$arguments")[2]
        return [*filter(None, [self._format.end]), *_MARK.findall(behind)]

    def _named_call(self, closing: str) -> bool:
        """Begins a call that is a name between marks, followed by the arguments."""
        form, taken = self._format, self._buffer[: len(self._buffer) - len(closing)]
        name, end = match_head(form, closing)
        if end < 0:  # more text may complete the head
            return False
        if not end:
            return self._no_call(closing)
        self._raw += "" if self._calls_here else taken + closing[:end]
        self._buffer = closing[end:]
        self._named = name
        if form.tags is not None:
            self._arguments = TaggedArguments(form.tags, self._schemas.get(name) or {}, form.end)
        else:
            self._arguments = LaxArguments() if form.lax else JsonArguments()
        return True

    # Calls -----------------------------------------------------------------------------------------------------------

    def _begin_call(self, raw: str, rest: str, *, listed: bool) -> None:
        self._raw, self._buffer, self._listed = raw, rest, listed
        self._calls_here = 0
        self._begun = False
        self._python = PythonCalls() if self._format.python else None
        self._mode = self._in_call if self._python is None else self._in_python

    def _start_call(self, name: str) -> bool:
        if self._listed and name not in self._tools:  # the answer is JSON but not a call
            return False
        self._begun = True
        self._raw = ""
        self._tell(CallStart(self._calls, random_id(self._format.id_length), name))
        return True

    def _end_call(self) -> None:
        self._tell_arguments()
        self._calls += 1
        self._calls_here += 1
        self._reader = self._arguments = None
        self._begun = False
        self._raw = ""
        self._blank = True

    def _give_up(self) -> None:
        """Ends the attempt to read a call: the held text becomes content, and reading continues after it."""
        self._reader = self._arguments = None
        self._say(self._raw)
        self._raw = ""
        self._mode = self._in_content

    # Parts ------------------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        """Delivers content; space after a call or after the reasoning is dropped."""
        if self._blank and (self._calls or self._thought):
            text = text.lstrip(_SPACE)
        if text:
            self._blank = False
            self._tell(Content(text))

    def _tell_arguments(self) -> None:
        self._tell(CallArguments(self._calls, "".join(self._told)))
        self._told.clear()

    def _tell(self, part: Part) -> None:
        if isinstance(part, CallStart) or part.text:
            self._parts.append(part)

    def _take(self) -> list[Part]:
        self._tell_arguments()
        parts, self._parts = self._parts, []
        return parts


def random_id(length: int) -> str:
    text = "".join(secrets.choice(_LETTERS) for _ in range(length))
    return text if length == 9 else f"call_{text}"
