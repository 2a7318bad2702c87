"""Counts the tokens of a long text before a tokenizer reads it whole.

For millions of characters a tokenizer takes seconds and gigabytes, and cannot be interrupted. So a long text is counted
in pieces: a client that leaves ends the count, and a text far beyond the limit is refused. Few long texts are read at
once. Any thread; must not know models or requests.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..cancellation import Cancellation

_PIECE = 2**16  # characters; a text with no more is read at once
_EDGE = 8  # tokens that a piece may have more than its share, because it was cut out of the text
_AT_ONCE = 2  # long texts

# The least limit in tokens where a task cuts a text or reads it in pieces, or where it is only counted.
_LEAST = 2**18


class TooLong(Exception):
    """A text has too many tokens: at least `tokens`."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class Asked(list[Any]):
    """Messages that check the cancellation before a template reads each of them."""

    def __init__(self, messages: Iterable[Any], cancellation: Cancellation) -> None:
        super().__init__(messages)
        self._cancellation = cancellation

    def __iter__(self) -> Iterator[Any]:
        for message in super().__iter__():
            self._cancellation.check()
            yield message

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        return copy.deepcopy(list(self), memo)  # the cancellation is no part of a chat

    @property
    def long(self) -> bool:
        """Whether the messages are too long to be read at once."""
        return _characters(list(self)) > _PIECE


class TextLengths:
    """Counts long texts for one tokenizer."""

    def __init__(self, tokenizer: Any, context: int | None) -> None:
        """`context` is the most tokens that the model can read, None for no limit."""
        self._tokenizer = tokenizer
        self._places = threading.BoundedSemaphore(_AT_ONCE)
        # A text just beyond the context is read whole, so that its refusal has its exact length.
        self.of_prompt = _LEAST if context is None else 2 * context
        self.of_text = max(self.of_prompt, _LEAST)

    @contextmanager
    def reading(self, text: str, maximum: int, cancellation: Cancellation) -> Iterator[None]:
        """Checks a text before the block reads it whole; a long text holds one of the few places until the block ends.

        Raises:
            TooLong: the text has more than `maximum` tokens, however it is read.
            Cancelled: by `cancellation`.
        """
        if len(text) <= _PIECE:
            yield
            return
        cancellation.until(lambda seconds: self._places.acquire(timeout=seconds))
        try:
            tokens = 0
            for piece in _pieces(text):
                cancellation.check()
                ids = self._tokenizer(piece, add_special_tokens=False, return_attention_mask=False)["input_ids"]
                tokens += max(0, len(ids) - _EDGE)
                if tokens > maximum:
                    raise TooLong(tokens)
            cancellation.check()
            yield
        finally:
            self._places.release()

    def check(self, value: Any, field: str, cancellation: Cancellation) -> str | None:
        """The name of a text in JSON values that has more than `of_text` tokens; None where there is none.

        Raises:
            Cancelled: by `cancellation`.
        """
        for name, text in _long_texts(value, field):
            try:
                with self.reading(text, self.of_text, cancellation):
                    pass
            except TooLong:
                return name
        return None


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that begin with white space where possible: a tokenizer cuts there too."""
    start = 0
    while len(text) - start > _PIECE:
        end = start + _PIECE
        cut = max(text.rfind(" ", start + _PIECE // 2, end), text.rfind("\n", start + _PIECE // 2, end))
        end = cut if cut > start else end
        yield text[start:end]
        start = end
    yield text[start:]


def _characters(value: Any) -> int:
    """How many characters of text JSON values hold."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_characters, parts))


def _long_texts(value: Any, field: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        if len(value) > _PIECE:
            yield field, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _long_texts(item, f"{field}.{name}" if field else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _long_texts(item, f"{field}.{index}")
