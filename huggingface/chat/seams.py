"""Where an answer's text goes on behind a call, and a protocol has one text for both pieces.

One `Seams` an answer. Must not know protocols.
"""

from __future__ import annotations

from .parser import CallStart, Content, Part, Reasoning

_APART = "\n\n"


class Seams:
    """Puts a blank line between what is said (or thought) before a call and after it."""

    def __init__(self) -> None:
        self._calls = 0
        self._told: dict[type[Part], int] = {}  # after how many calls something of a kind was told last
        self._ends: dict[type[Part], str] = {}

    def of(self, part: Part) -> Part:
        """The part as it is to be joined to those before it."""
        if isinstance(part, CallStart):
            self._calls += 1
        if not isinstance(part, Content | Reasoning) or not part.text:
            return part
        kind, text = type(part), part.text
        apart = self._told.get(kind, self._calls) == self._calls or text[0] == "\n" or self._ends[kind] == "\n"
        self._told[kind], self._ends[kind] = self._calls, text[-1]
        return part if apart else kind(_APART + text)
