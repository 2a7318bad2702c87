"""Chooses the models to evict for another model, from numbers alone.

Standard library only; no state, no lock, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Idle:
    """A model that no request uses: when it was last used (any clock), and its bytes on each device."""

    model_id: str
    used: float
    held: Mapping[str, int]


def choose(idle: Sequence[Idle], lacking: Mapping[str, int]) -> list[Idle]:
    """The models of `idle` whose eviction frees `lacking` bytes on each device; none if all of them do not suffice.

    Least recently used first; a model that a larger one makes superfluous stays.
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
    for model in sorted(chosen, key=lambda model: -model.used):  # the most recently used has the best claim to stay
        others = [other for other in chosen if other is not model]
        if all(sum(other.held.get(device, 0) for other in others) >= size for device, size in lacking.items()):
            chosen = others
    return chosen


def _without(rest: Mapping[str, int], model: Idle) -> dict[str, int]:
    less = {device: size - model.held.get(device, 0) for device, size in rest.items()}
    return {device: size for device, size in less.items() if size > 0}
