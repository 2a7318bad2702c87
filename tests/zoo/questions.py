"""What each model is asked: texts of all lengths, past every window, alone and in company; and how answers are read.

Plain data. Must not know servers or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tiny_tokenizers import TEXT

NEW_TOKENS = 20
SAMPLED: Mapping[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 11}
BEAMS: Mapping[str, Any] = {"num_beams": 3}

_WORDS = TEXT.split()
_SHORT, _MIDDLE, _LONG, _LONGER = (" ".join(_WORDS[a:b]) for a, b in ((0, 1), (20, 26), (30, 62), (60, 130)))
_CONTINUED = f"{_LONG} {' '.join(_WORDS[5:12])}"  # begins as another one


@dataclass(frozen=True)
class Case:
    """A prompt and how its text is written; `rounds` are when it is asked: `alone`, in `company`, or both."""

    name: str
    prompt: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rounds: tuple[str, ...] = ("alone", "company")


CASES = (
    Case("short", _SHORT),
    Case("middle", _MIDDLE),
    Case("long", _LONG),
    Case("longer", _LONGER),
    Case("continued", _CONTINUED, rounds=("company",)),
    Case("sampled", _LONG, SAMPLED),
    Case("beams", _MIDDLE, BEAMS, rounds=("alone",)),
)
LOGPROBS = _LONG

_TEXTS = (_SHORT, _MIDDLE, _LONG, _LONGER, " ".join(_WORDS[100:109]))
INPUTS: Mapping[str, tuple[Any, ...]] = {
    "masked": ("The<mask>", f"{_MIDDLE}<mask> and so", f"{_LONG}<mask> it {_SHORT}", f"<mask> {_LONGER}", "a<mask>"),
    "sequence": _TEXTS,
    "token": _TEXTS,
    "qa": tuple(
        {"question": question, "context": text}
        for question, text in zip(("Who?", "What is it?", "Why so?", "How many stairs?", "Where?"), _TEXTS, strict=True)
    ),
}
# What a task is asked besides its input, of the server and of transformers alike.
ANSWERS: Mapping[str, Mapping[str, Any]] = {
    "masked": {"top_k": 5},
    "sequence": {"top_k": None},
    "qa": {"align_to_words": False},
}


def seen(table: str, answer: Any) -> list[tuple[str, float]]:
    """A task's answer to one input as names and numbers."""
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], list):
        [answer] = answer
    if isinstance(answer, dict):
        answer = [answer]
    if table == "masked":
        return [(str(each["token"]), float(each["score"])) for each in answer]
    if table == "sequence":
        return sorted((str(each["label"]), float(each["score"])) for each in answer)
    if table == "token":
        return [(f"{each['index']} {each['entity']} {each['word']}", float(each["score"])) for each in answer]
    return [(f"{each['start']}-{each['end']}", float(each["score"])) for each in answer]


def apart(table: str, wanted: list[tuple[str, float]], found: list[tuple[str, float]]) -> float:
    """How far two answers' numbers lie apart at most; infinity where they name other things.

    Where two names have all but the same number, either may come first.
    """
    if table == "masked":
        wanted, found = ([("", number) for _, number in each] for each in (wanted, found)) if _tied(wanted) else (
            wanted, found)  # fmt: skip
    if [name for name, _ in wanted] != [name for name, _ in found]:
        return float("inf")
    return max((abs(a - b) for (_, a), (_, b) in zip(wanted, found, strict=True)), default=0.0)


def _tied(answer: list[tuple[str, float]]) -> bool:
    numbers = [number for _, number in answer]
    return any(a - b < 1e-6 for a, b in pairwise(numbers))
