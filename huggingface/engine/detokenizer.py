"""From tokens to text as they are made: whole characters only, and nothing that a stop string will take back.

One `TextStream` a sequence, on the engine's thread. Knows a tokenizer's `decode` and nothing of models or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # how a decoder shows bytes that are not a whole character yet


class _Window:
    """Decodes a growing list of tokens by looking at its last few: what the newest ones add to the text before them."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._start = 0  # tokens before it no longer change what the newest ones look like
        self._read = 0  # tokens before it are shown
        self._before = ""  # the text of tokens[start:read]

    def more(self, tokens: Sequence[int]) -> str:
        """The text that was added since the last call; empty while its last character is not complete."""
        text = self._decode(tokens[self._start :])
        if len(text) <= len(self._before) or text.endswith(_UNFINISHED):
            return ""
        added = text[len(self._before) :]
        self._start, self._read = self._read, len(tokens)
        self._before = self._decode(tokens[self._start : self._read])
        return added


class TextStream:
    """The text of one sequence, and whether one of its stop strings has come.

    A stop string counts where `transformers.StopStringCriteria` says so: as soon as it is complete within the newest
    token, special tokens and the end of the prompt included. It is left out of the text, and so is what follows it.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), prompt: Sequence[int] = (), special_tokens: Sequence[str] = ()
    ) -> None:
        """`prompt` are the prompt's token ids, needed where there are `stops`. Special tokens are left out of the text,
        but for `special_tokens`."""
        self._tokens: list[int] = []
        self._decode = decoder(tokenizer, special_tokens)
        self._window = _Window(self._decode)
        self._stops = tuple(stops)
        self._held = ""  # made, and not shown, because it may be the beginning of a stop string
        self._shown: list[str] = []
        self.stop: str | None = None  # the stop string that has come
        if stops:
            longest = max(map(len, stops))
            self._raw = _Window(lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=False)))
            tail: str = tokenizer.decode(list(prompt[-longest:]), skip_special_tokens=False)
            self._tail = tail[len(tail) - longest + 1 :] if longest > 1 else ""

    def add(self, token: int) -> str:
        """Take the next token; returns the text that may be shown now."""
        self._tokens.append(token)
        text = self._window.more(self._tokens)
        if not self._stops:
            if text:
                self._shown.append(text)
            return text
        self._look_for_stops()
        self._held += text
        if self.stop is not None:
            return ""
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if shown:
            self._shown.append(shown)
        return shown

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.stop is not None

    def finish(self) -> tuple[str, str]:
        """What is still to be shown, and the whole text: the tokens decoded at once, up to the first stop string."""
        whole = self._decode(self._tokens)
        cuts = [whole.index(stop) for stop in self._stops if stop in whole]
        if cuts:
            whole = whole[: min(cuts)]
        shown = "".join(self._shown)
        return whole[len(shown) :] if whole.startswith(shown) else "", whole

    def _look_for_stops(self) -> None:
        added = self._raw.more(self._tokens)
        if not added:
            return
        text = self._tail + added
        # Only what ends within the newest text: what ended before it would have been found then.
        places = [(text.find(stop, max(0, len(self._tail) - len(stop) + 1)), stop) for stop in self._stops]
        self.stop = min(((place, stop) for place, stop in places if place >= 0), default=(0, None))[1]
        longest = max(map(len, self._stops))
        self._tail = text[len(text) - longest + 1 :] if longest > 1 else ""


def decoder(tokenizer: Any, kept: Sequence[str]) -> Callable[[Sequence[int]], str]:
    """How tokens become text without the special ones that are not `kept`."""
    added = tokenizer.added_tokens_decoder if kept else {}
    special = {id_: token.content for id_, token in added.items() if token.special}
    if not set(kept) & set(special.values()):
        return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))
    left_out = {id_ for id_, text in special.items() if text not in kept}
    return lambda tokens: str(
        tokenizer.decode([token for token in tokens if token not in left_out], skip_special_tokens=False)
    )


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
