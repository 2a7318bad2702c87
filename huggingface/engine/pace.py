"""How large a chunk of prompts a step may take, from how long steps have taken so far.

A step with a chunk keeps those who decode waiting for their next token. So the chunk is measured to take about as long
as the decoding itself, or longer where more wait for their first token than for their next. Plain numbers; engine's
thread only.
"""

from __future__ import annotations

LARGEST = 512  # tokens: after so many, at the latest, a cancelled prompt is noticed
_SMALLEST = 16
_UNMEASURED = 64  # tokens, until there is something to go by
_SHARE = 0.9  # of the decoding's time
_WEIGHT = 0.2  # of a new measurement in the running mean


class Pace:
    """Running means of what a decoding step and a prompt's token cost, in seconds."""

    def __init__(self) -> None:
        self._decode: float | None = None
        self._token: float | None = None

    def budget(self, decoding: int, prefilling: int) -> int:
        """Tokens of prompts for the next step, where so many sequences decode and so many are still being read."""
        if not decoding:
            return LARGEST
        if self._decode is None or self._token is None:
            return _UNMEASURED
        seconds = self._decode * _SHARE * max(1.0, prefilling / decoding)
        return int(min(max(seconds / self._token, _SMALLEST), LARGEST))

    def decoded(self, seconds: float) -> None:
        """Note how long a decoding step took."""
        self._decode = _mean(self._decode, seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Note how long a chunk of so many tokens took."""
        if tokens >= _SMALLEST:  # a shorter one tells more of the step than of the token
            self._token = _mean(self._token, seconds / tokens)


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
