"""Joins the pieces of an answer's text before and after a call, for protocols that have one text for both.

One `Seams` for each answer. Must not know protocols.
"""

from __future__ import annotations

from .parser import CallStart, Content, Part, Reasoning

_APART = "\n\n"


class Seams:
    """Puts a blank line between the content (or reasoning) before a call and after it."""

    def __init__(self) -> None:
        self._calls = 0
        self._told: dict[type[Part], int] = {}  # the number of calls before the last part of each kind
        self._ends: dict[type[Part], str] = {}

    def of(self, part: Part) -> Part:
        """The part with the blank line that joins it to earlier parts, where one is needed."""
        if isinstance(part, CallStart):
            self._calls += 1
        if not isinstance(part, Content | Reasoning) or not part.text:
            return part
        kind, text = type(part), part.text
        apart = self._told.get(kind, self._calls) == self._calls or text[0] == "\n" or self._ends[kind] == "\n"
        self._told[kind], self._ends[kind] = self._calls, text[-1]
        return part if apart else kind(_APART + text)
