"""Turns tokens into text as they are generated: only complete characters, and nothing that a stop string takes back.

One `TextStream` per sequence, on the engine's thread. Knows a tokenizer's `decode`; must not know models or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

_UNFINISHED = "\ufffd"  # how a decoder shows bytes that are not a complete character yet
_NEAR = 8  # last tokens of a prompt: nearly always enough to show something

Begin = Literal["behind", "alone", "exact"]
Decode = Callable[[Sequence[int]], str]


class _Window:
    """Decodes a growing list of tokens from its last few: the text that the newest tokens add."""

    def __init__(self, decode: Decode, behind: Sequence[int]) -> None:
        """The tokens begin with `behind`, whose text is not returned."""
        self._decode = decode
        self._start = 0  # tokens before it no longer affect how the newest ones look
        self._read = len(behind)  # tokens before it are shown
        self._before = decode(behind)  # the text of tokens[start:read]

    def more(self, tokens: Sequence[int]) -> str:
        """The text added since the last call; empty while its last character is incomplete."""
        text = self._decode(tokens[self._start :])
        added = _added(self._before, text)
        if not added or text.endswith(_UNFINISHED):
            return ""
        if not self._before.endswith(_UNFINISHED):  # else a part of a character would come first
            self._start = self._read
        self._read = len(tokens)
        self._before = self._decode(tokens[self._start : self._read])
        return added


class TextStream:
    """The text of one sequence, and the stop string that ended it, if any.

    Decoders of SentencePiece's kind drop the space before the first word, so tokens are decoded after others. `begin`
    says where the text begins: `behind` the prompt, which it continues; `alone`, without such a space, as
    `transformers` decodes an answer; or `exact`, with every character of its tokens.

    A stop string counts as in `transformers.StopStringCriteria`: as soon as it is complete within the newest token,
    special tokens and the end of the prompt included. The text leaves it out, and all that follows it.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        prompt: Sequence[int] = (),
        special_tokens: Sequence[str] = (),
        begin: Begin = "behind",
    ) -> None:
        """`prompt` are the prompt's token ids. The text leaves special tokens out, except `special_tokens`."""
        self._decode = decoder(tokenizer, special_tokens)
        behind = _end(self._decode, prompt)
        self._alone = begin == "alone" or (begin == "behind" and not behind)
        self._behind = behind or plain_tokens(tokenizer)
        self._tokens = list(self._behind)
        self._window = _Window(self._decode, self._behind)
        self._dropped: int | None = None  # characters that the text alone lacks; None before its first
        self._stops = tuple(stops)
        self._held = ""  # generated but not shown, because it may begin a stop string
        self._shown: list[str] = []
        self.stop: str | None = None  # the stop string that was found
        if stops:
            longest = max(map(len, stops))
            self._raw = _Window(lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=False)), self._behind)
            tail: str = tokenizer.decode(list(prompt[-longest:]), skip_special_tokens=False)
            self._tail = tail[len(tail) - longest + 1 :] if longest > 1 else ""

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that may be shown now."""
        self._tokens.append(token)
        text = self._window.more(self._tokens)
        if text and self._dropped is None:
            self._dropped = self._drops(text, self._made) if self._alone else 0
        if not self._stops:
            return self._show(text)
        self._look_for_stops()
        self._held += text
        if self.stop is not None:
            return ""
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._show(shown)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stop is not None

    def finish(self) -> tuple[str, str]:
        """The text still to be shown, and the whole text: all tokens decoded together, up to the first stop string."""
        whole, _ = self.whole(self._made)
        shown = "".join(self._shown)
        return whole[len(shown) :] if whole.startswith(shown) else "", whole

    def whole(self, made: Sequence[int]) -> tuple[str, str | None]:
        """The text of all generated tokens, decoded together, up to the first stop string; and that stop string."""
        text = text_behind(self._decode, self._behind, made)
        found = min(((text.index(stop), stop) for stop in self._stops if stop in text), default=None)
        if found is None:
            return self._decode(made) if self._alone else text, None
        begin = self._drops(text, made) if self._alone else 0
        return text[begin : found[0]], found[1]

    @property
    def _made(self) -> list[int]:
        return self._tokens[len(self._behind) :]

    def _show(self, text: str) -> str:
        """Marks text as shown, without the characters that the text alone lacks."""
        if text and self._dropped:
            dropped = min(self._dropped, len(text))
            self._dropped -= dropped
            text = text[dropped:]
        if text:
            self._shown.append(text)
        return text

    def _drops(self, text: str, made: Sequence[int]) -> int:
        """How many first characters the tokens lose when they are decoded alone; `text` is theirs after others."""
        alone = self._decode(made)
        return len(text) - len(alone) if text.endswith(alone) else 0

    def _look_for_stops(self) -> None:
        added = self._raw.more(self._tokens)
        if not added:
            return
        text = self._tail + added
        # Only stop strings that end in the newest text: earlier ones would have been found before.
        places = [(text.find(stop, max(0, len(self._tail) - len(stop) + 1)), stop) for stop in self._stops]
        self.stop = min(((place, stop) for place, stop in places if place >= 0), default=(0, None))[1]
        longest = max(map(len, self._stops))
        self._tail = text[len(text) - longest + 1 :] if longest > 1 else ""


def decoder(tokenizer: Any, kept: Sequence[str]) -> Decode:
    """The function that decodes tokens to text without the special ones that are not `kept`."""
    added = tokenizer.added_tokens_decoder if kept else {}
    special = {id_: token.content for id_, token in added.items() if token.special}
    if not set(kept) & set(special.values()):
        return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))
    left_out = {id_ for id_, text in special.items() if text not in kept}
    return lambda tokens: str(
        tokenizer.decode([token for token in tokens if token not in left_out], skip_special_tokens=False)
    )


def plain_tokens(tokenizer: Any) -> list[int]:
    """Tokens that show something by themselves, to decode others after; none if there are no such tokens."""
    special = frozenset(tokenizer.all_special_ids)
    for text in "a0.":
        ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        plain = [token for token in ids if token not in special]
        if tokenizer.decode(plain):
            return plain
    return []


def text_behind(decode: Decode, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that tokens add to the text of those before them."""
    return _added(decode(before), decode([*before, *tokens]))


def _added(before: str, text: str) -> str:
    """The part of `text` beyond `before`, whose last character may have been incomplete."""
    if text.startswith(before):
        return text[len(before) :]
    return text[
        next((at for at, both in enumerate(zip(before, text, strict=False)) if both[0] != both[1]), len(text)) :
    ]


def _end(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, as many as show something; none where it shows nothing."""
    near = _NEAR
    while not (text := decode(end := list(prompt[-near:]))) and near < len(prompt):
        near *= 4
    # Bytes of a character whose first byte is missing would spoil the characters after it.
    while text.startswith(_UNFINISHED) and (shorter := decode(end[1:])):
        end, text = end[1:], shorter
    return end if text else []


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
