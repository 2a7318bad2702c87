"""Reads answers by the `response_template` that a tokenizer ships, with transformers' own `ResponseParser`.

For models whose form is not in `formats`. A call is delivered when it is complete, since the parser gives no arguments
before. transformers is imported when the first such answer is read; the model's load has imported it already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .parser import CallArguments, CallStart, Content, Part, Reasoning, random_id

_REASONING = ("reasoning_content", "reasoning", "thinking")
_SPACE = " \t\r\n"


class RegionReader:
    """Reads one answer. What the parser cannot read becomes content, and so does everything after it."""

    def __init__(self, template: Mapping[str, Any], prompt_end: str, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """`prompt_end` holds the answer's first words, where the chat template has written some.

        Raises:
            ValueError: `template` is not a valid response template.
        """
        from transformers.utils.chat_parsing import ResponseParser
        from transformers.utils.chat_parsing.response_templates import load_response_template

        loaded = load_response_template(dict(template))
        prefix = prompt_end if loaded.start_anchor_re.search(prompt_end) else ""  # else it would read the user's words
        self._parser: Any = ResponseParser(loaded, prefix=prefix, tools=list(tools) or None)
        self._calls_count = bool(tools)
        self._calls = 0
        self._pending = ""  # text that was read and not delivered yet, with its marks
        self._space = ""  # space at the end of the last part, delivered before more text of the same kind
        self._last: type[Content] | type[Reasoning] | None = None
        self._broken = False

    def feed(self, text: str) -> list[Part]:
        """Reads a piece of text; returns its parts. The parser gets single characters: parts before an error stay."""
        parts: list[Part] = []
        for place, char in enumerate(text):
            if self._broken:
                return [*parts, *self._say(Content, text[place:])]
            self._pending += char
            parts += self._next(lambda char=char: self._parser.feed(char))  # type: ignore[misc]
            if self._broken:
                parts += self._say(Content, self._pending)
        return parts

    def finish(self) -> list[Part]:
        """Ends the answer; returns its last parts. An incomplete call is dropped."""
        if self._broken:
            return []
        parts = self._next(lambda: self._parser.feed("\n"))  # a region that ends by a pattern may end now
        if not self._broken:
            parts += [part for part in self._next(lambda: self._parser.finalize()[1]) if not _is_call(part)]
        return parts

    def _next(self, events: Callable[[], Sequence[Mapping[str, Any]]]) -> list[Part]:
        try:
            told = events()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._broken = True
            return []
        return [part for event in told for part in self._parts(event)]

    def _parts(self, event: Mapping[str, Any]) -> list[Part]:
        field, kind = event.get("field"), event["type"]
        if kind == "region_chunk" and not event.get("dirty"):
            self._pending = ""
            told = Reasoning if field in _REASONING else Content if field == "content" else None
            return self._say(told, event["text"]) if told is not None else []
        if kind != "region_close" or field == "content" or field in _REASONING:
            return []
        parts = self._call(event["value"]) if field == "tool_calls" else []
        self._pending = ""
        return parts

    def _call(self, value: Any) -> list[Part]:
        parts: list[Part] = []
        for each in value if isinstance(value, list) else [value]:
            function = each.get("function", each) if isinstance(each, dict) else {}
            arguments = function.get("arguments", {})
            if not self._calls_count or not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
                return self._say(Content, self._pending)
            parts.append(CallStart(self._calls, random_id(24), function["name"]))
            parts.append(CallArguments(self._calls, json.dumps(arguments, ensure_ascii=False)))
            self._calls += 1
        self._last, self._space = None, ""
        return parts

    def _say(self, kind: type[Content] | type[Reasoning], text: str) -> list[Part]:
        """Returns the text as a part, without the space around it."""
        if kind is not self._last:
            self._space, text = "", text.lstrip(_SPACE)
        text = self._space + text
        told = text.rstrip(_SPACE)
        self._space = text[len(told) :] if told or kind is self._last else ""
        if not told:
            return []
        self._last = kind
        return [kind(told)]


def _is_call(part: Part) -> bool:
    return isinstance(part, CallStart | CallArguments)
