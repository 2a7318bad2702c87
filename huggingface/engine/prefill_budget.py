"""How large a chunk of prompts a step may take, from how long steps have taken so far.

A step with a chunk keeps those who decode waiting for their next token. So the chunk of a long prompt is measured to
take less than the decoding itself. Short prompts are read at once, as far as a step goes: to spread them would keep
nobody waiting less, and those who could decode already would wait longer. Plain numbers; engine's thread only.
"""

from __future__ import annotations

LARGEST = 256  # tokens: after so many, at the latest, a cancelled prompt is noticed
_SMALLEST = 16
_UNMEASURED = 32  # tokens, until there is something to go by
_SHARE = 0.75  # of the decoding's time
_HURRY = 64  # a short prompt counts as so many sequences that decode
_WEIGHT = 0.2  # of a new measurement in the running mean


class Pace:
    """Running means of what a decoding step costs, and a prompt's token on top of it, in seconds."""

    def __init__(self) -> None:
        self._decode: float | None = None
        self._spent = self._read = 0.0  # seconds for so many tokens of prompts, those of long ago counted less

    def budget(self, decoding: int, short: int) -> int:
        """Tokens of prompts for the next step, where so many sequences decode and so many short prompts are being read.

        The latter have their first token soon, and then the batch is larger; a long prompt is no reason to hurry.
        """
        if not decoding:
            return LARGEST
        if self._decode is None or not self._spent:
            return min(_UNMEASURED * max(1, _HURRY * short // decoding), LARGEST)
        seconds = self._decode * _SHARE * max(1.0, _HURRY * short / decoding)
        return int(min(max(seconds * self._read / self._spent, _SMALLEST), LARGEST))

    def took(self, seconds: float, *, decoding: int, prompt_tokens: int) -> None:
        """Note how long a step took in which so many sequences decoded and so many tokens of prompts were read."""
        if not prompt_tokens:
            self._decode = _mean(self._decode, seconds)
        elif not decoding:
            if prompt_tokens >= LARGEST // 2:  # of less, most is what any step takes
                self._note(seconds, prompt_tokens)
        elif self._decode is not None:
            self._note(max(seconds - self._decode, seconds / 10), prompt_tokens)

    def _note(self, seconds: float, tokens: int) -> None:
        # Sums, and not a mean of quotients: in a small chunk the step's own cost would pass for the tokens'.
        self._spent += seconds - _WEIGHT * self._spent
        self._read += tokens - _WEIGHT * self._read


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
