"""How large a chunk of prompts a step may take, from how long steps have taken so far.

A step with a chunk keeps those who decode waiting for their next token. So the chunk is measured to take less than the
decoding itself, or longer where many wait for their first token. Plain numbers; engine's thread
only.
"""

from __future__ import annotations

LARGEST = 256  # tokens: after so many, at the latest, a cancelled prompt is noticed
_SMALLEST = 16
_UNMEASURED = 32  # tokens, until there is something to go by
_SHARE = 0.75  # of the decoding's time
_HURRY = 4  # a short prompt counts as so many sequences that decode
_WEIGHT = 0.2  # of a new measurement in the running mean


class Pace:
    """Running means of what a decoding step costs, and a prompt's token on top of it, in seconds."""

    def __init__(self) -> None:
        self._decode: float | None = None
        self._token: float | None = None

    def budget(self, decoding: int, short: int) -> int:
        """Tokens of prompts for the next step, where so many sequences decode and so many short prompts are being read.

        The latter have their first token soon, and then the batch is larger; a long prompt is no reason to hurry.
        """
        if not decoding:
            return LARGEST
        if self._decode is None or self._token is None:
            return _UNMEASURED * max(1, _HURRY * short // decoding)
        seconds = self._decode * _SHARE * max(1.0, _HURRY * short / decoding)
        return int(min(max(seconds / self._token, _SMALLEST), LARGEST))

    def took(self, seconds: float, *, decoding: int, prompt_tokens: int) -> None:
        """Note how long a step took in which so many sequences decoded and so many tokens of prompts were read."""
        if not prompt_tokens:
            self._decode = _mean(self._decode, seconds)
        elif not decoding:
            if prompt_tokens >= LARGEST // 2:  # of less, most is what any step takes
                self._token = _mean(self._token, seconds / prompt_tokens)
        elif self._decode is not None:
            more = max(seconds - self._decode, seconds / 10)
            self._token = _mean(self._token, more / prompt_tokens)


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
