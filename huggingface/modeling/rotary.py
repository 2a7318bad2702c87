"""Reads rotary embeddings from a config: their kinds, the length at which they change, and how far they are stretched.

Standard library only; any thread may call it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Kinds whose values change from some length on.
_CHANGING = frozenset({"dynamic", "longrope"})

# Kinds whose factor says how many times longer texts may be than in training.
_STRETCHED = _CHANGING | {"linear", "yarn"}


def changing(config: Any) -> tuple[str, ...]:
    """The kinds of a text config's rotary embeddings that change with the text's length."""
    return tuple(sorted({kind for kind, _ in _parts(config)} & _CHANGING))


def borders(config: Any) -> list[tuple[str, int]]:
    """The changing kinds, each with the length in tokens beyond which it changes."""
    own = config.max_position_embeddings
    return [
        (kind, own if kind == "dynamic" else part.get("original_max_position_embeddings") or own)
        for kind, part in _parts(config)
        if kind in _CHANGING
    ]


def _parts(config: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Each kind of rotary embeddings in a config with its parameters, for all layers or for one kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    each = [found, *(part for part in found.values() if isinstance(part, dict))]
    return [(str(part["rope_type"]), part) for part in each if part.get("rope_type")]


def context(positions: int, scaling: Any) -> int:
    """The longest text in tokens for a config with so many `positions` and this `scaling` of them.

    Some models are published with the positions of their training and a scaling that stretches them, others with
    positions that are stretched already; `original_max_position_embeddings` says which, where it is given. Where each
    kind of layer has its own scaling (`linear` in Gemma 3), `linear` does not count: the positions are stretched.
    """
    if not isinstance(scaling, Mapping):
        return positions
    kinds = _STRETCHED
    if isinstance(scaling.get("full_attention"), Mapping):
        scaling, kinds = scaling["full_attention"], _STRETCHED - {"linear"}
    if scaling.get("rope_type", scaling.get("type")) not in kinds:
        return positions
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 < factor < float("inf"):
        return positions
    trained = original if isinstance(original, int) and not isinstance(original, bool) and original > 0 else positions
    return max(positions, int(factor * trained))
