"""Which models go, where another one needs their memory: a choice among numbers.

Standard library only; no state, no lock, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Idle:
    """A model that nobody uses: when it was last used (any clock), and how many bytes it has on each device."""

    model_id: str
    used: float
    held: Mapping[str, int]


def choose(idle: Sequence[Idle], lacking: Mapping[str, int]) -> list[Idle]:
    """Those of `idle` that make up for what is lacking on each device, or nobody where all of them would not.

    Least recently used first; whoever turns out not to be needed, because a larger one went as well, stays.
    """
    rest = {device: size for device, size in lacking.items() if size > 0}
    chosen: list[Idle] = []
    for model in sorted(idle, key=lambda model: model.used):
        if not rest:
            break
        if any(model.held.get(device) for device in rest):
            chosen.append(model)
            rest = _without(rest, model)
    if rest:
        return []
    for model in sorted(chosen, key=lambda model: -model.used):  # the latest used has the best claim to stay
        others = [other for other in chosen if other is not model]
        if all(sum(other.held.get(device, 0) for other in others) >= size for device, size in lacking.items()):
            chosen = others
    return chosen


def _without(rest: Mapping[str, int], model: Idle) -> dict[str, int]:
    less = {device: size - model.held.get(device, 0) for device, size in rest.items()}
    return {device: size for device, size in less.items() if size > 0}
