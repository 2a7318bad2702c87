"""From tokens to text as they are made: whole characters only, and nothing that a stop string will take back.

One `TextStream` a sequence, on the engine's thread. Knows a tokenizer's `decode` and nothing of models or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

_UNFINISHED = "\ufffd"  # how a decoder shows bytes that are not a whole character yet
_NEAR = 8  # of a prompt's last tokens: enough to show something, nearly always

Begin = Literal["behind", "alone", "exact"]
Decode = Callable[[Sequence[int]], str]


class _Window:
    """Decodes a growing list of tokens by looking at its last few: what the newest ones add to the text before them."""

    def __init__(self, decode: Decode, behind: Sequence[int]) -> None:
        """The tokens begin with those of `behind`, whose text is not told."""
        self._decode = decode
        self._start = 0  # tokens before it no longer change what the newest ones look like
        self._read = len(behind)  # tokens before it are shown
        self._before = decode(behind)  # the text of tokens[start:read]

    def more(self, tokens: Sequence[int]) -> str:
        """The text that was added since the last call; empty while its last character is not complete."""
        text = self._decode(tokens[self._start :])
        added = _added(self._before, text)
        if not added or text.endswith(_UNFINISHED):
            return ""
        if not self._before.endswith(_UNFINISHED):  # else a part of a character would stand first
            self._start = self._read
        self._read = len(tokens)
        self._before = self._decode(tokens[self._start : self._read])
        return added


class TextStream:
    """The text of one sequence, and whether one of its stop strings has come.

    Decoders of SentencePiece's kind drop the space before the first word that they are given, so that tokens are
    decoded behind others. Where the text begins, `begin` says: `behind` the prompt, which it continues; `alone`, as
    `transformers` decodes an answer, without such a space; or `exact`, with every character that its tokens stand for.

    A stop string counts where `transformers.StopStringCriteria` says so: as soon as it is complete within the newest
    token, special tokens and the end of the prompt included. It is left out of the text, and so is what follows it.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        prompt: Sequence[int] = (),
        special_tokens: Sequence[str] = (),
        begin: Begin = "behind",
    ) -> None:
        """`prompt` are the prompt's token ids. Special tokens are left out of the text, but for `special_tokens`."""
        self._decode = decoder(tokenizer, special_tokens)
        behind = _end(self._decode, prompt)
        self._alone = begin == "alone" or (begin == "behind" and not behind)
        self._behind = behind or plain_tokens(tokenizer)
        self._tokens = list(self._behind)
        self._window = _Window(self._decode, self._behind)
        self._dropped: int | None = None  # characters of the text that it lacks alone; None before its first
        self._stops = tuple(stops)
        self._held = ""  # made, and not shown, because it may be the beginning of a stop string
        self._shown: list[str] = []
        self.stop: str | None = None  # the stop string that has come
        if stops:
            longest = max(map(len, stops))
            self._raw = _Window(lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=False)), self._behind)
            tail: str = tokenizer.decode(list(prompt[-longest:]), skip_special_tokens=False)
            self._tail = tail[len(tail) - longest + 1 :] if longest > 1 else ""

    def add(self, token: int) -> str:
        """Take the next token; returns the text that may be shown now."""
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
        """Whether a stop string has come."""
        return self.stop is not None

    def finish(self) -> tuple[str, str]:
        """What is still to be shown, and the whole text: the tokens decoded at once, up to the first stop string."""
        whole, _ = self.whole(self._made)
        shown = "".join(self._shown)
        return whole[len(shown) :] if whole.startswith(shown) else "", whole

    def whole(self, made: Sequence[int]) -> tuple[str, str | None]:
        """The text of all tokens that were made, decoded at once, up to the first stop string; and that."""
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
        """Take text as shown, but for what it lacks alone."""
        if text and self._dropped:
            dropped = min(self._dropped, len(text))
            self._dropped -= dropped
            text = text[dropped:]
        if text:
            self._shown.append(text)
        return text

    def _drops(self, text: str, made: Sequence[int]) -> int:
        """How many characters tokens lack at their beginning when they are decoded alone; `text` is theirs behind
        others."""
        alone = self._decode(made)
        return len(text) - len(alone) if text.endswith(alone) else 0

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


def decoder(tokenizer: Any, kept: Sequence[str]) -> Decode:
    """How tokens become text without the special ones that are not `kept`."""
    added = tokenizer.added_tokens_decoder if kept else {}
    special = {id_: token.content for id_, token in added.items() if token.special}
    if not set(kept) & set(special.values()):
        return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))
    left_out = {id_ for id_, text in special.items() if text not in kept}
    return lambda tokens: str(
        tokenizer.decode([token for token in tokens if token not in left_out], skip_special_tokens=False)
    )


def plain_tokens(tokenizer: Any) -> list[int]:
    """Tokens that show something by themselves, for others to be decoded behind; none if there are no such."""
    special = frozenset(tokenizer.all_special_ids)
    for text in "a0.":
        ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        plain = [token for token in ids if token not in special]
        if tokenizer.decode(plain):
            return plain
    return []


def text_behind(decode: Decode, before: Sequence[int], tokens: Sequence[int]) -> str:
    """What tokens add to the text of those before them."""
    return _added(decode(before), decode([*before, *tokens]))


def _added(before: str, text: str) -> str:
    """What `text` has beyond `before`, of which the last character may not have been complete."""
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
    # Bytes of a character whose first one is missing would spoil those that follow.
    while text.startswith(_UNFINISHED) and (shorter := decode(end[1:])):
        end, text = end[1:], shorter
    return end if text else []


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
