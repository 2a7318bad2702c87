"""Chooses the size of a step's chunk of prompts from the duration of earlier steps.

A step with a chunk delays the next token of the decoding sequences, so a long prompt's chunk should take less time than
the decoding itself. Short prompts are read in as few steps as possible: to spread them would shorten no wait, and
sequences that could decode already would wait longer. Plain numbers; engine's thread only.
"""

from __future__ import annotations

LARGEST = 256  # tokens: after so many, at the latest, a cancelled prompt ends
_SMALLEST = 16
_UNMEASURED = 32  # tokens, until there are measurements
_SHARE = 0.75  # of the decoding's time
_HURRY = 64  # a short prompt counts as so many decoding sequences
_WEIGHT = 0.2  # of a new measurement in the running mean


class Pace:
    """Running means of the cost of a decoding step, and of a prompt's token on top of it, in seconds."""

    def __init__(self) -> None:
        self._decode: float | None = None
        self._spent = self._read = 0.0  # seconds, and tokens of prompts read in them; older ones count less

    def budget(self, decoding: int, short: int) -> int:
        """The tokens of prompts for the next step, with so many decoding sequences and short prompts being read.

        Short prompts soon have their first token, and then the batch is larger; a long prompt is no reason to hurry.
        """
        if not decoding:
            return LARGEST
        if self._decode is None or not self._spent:
            return min(_UNMEASURED * max(1, _HURRY * short // decoding), LARGEST)
        seconds = self._decode * _SHARE * max(1.0, _HURRY * short / decoding)
        return int(min(max(seconds * self._read / self._spent, _SMALLEST), LARGEST))

    def took(self, seconds: float, *, decoding: int, prompt_tokens: int) -> None:
        """Records the duration of a step, its decoding sequences, and its tokens of prompts."""
        if not prompt_tokens:
            self._decode = _mean(self._decode, seconds)
        elif not decoding:
            if prompt_tokens >= LARGEST // 2:  # with fewer tokens, most of it is the cost of any step
                self._note(seconds, prompt_tokens)
        elif self._decode is not None:
            self._note(max(seconds - self._decode, seconds / 10), prompt_tokens)

    def _note(self, seconds: float, tokens: int) -> None:
        # Sums rather than a mean of quotients: in a small chunk the step's own cost would count as the tokens'.
        self._spent += seconds - _WEIGHT * self._spent
        self._read += tokens - _WEIGHT * self._read


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
