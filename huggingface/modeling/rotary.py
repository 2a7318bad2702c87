"""What a config says of rotary embeddings: their kinds, where these change with the length of a text, and how far they
are stretched. Standard library only; any thread may call it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Kinds that are others from some length on.
_CHANGING = frozenset({"dynamic", "longrope"})

# Kinds whose factor tells how many times longer texts may be than those that the model was trained with.
_STRETCHED = _CHANGING | {"linear", "yarn"}


def changing(config: Any) -> tuple[str, ...]:
    """The kinds of a text config's rotary embeddings that change with the length of what is read."""
    return tuple(sorted({kind for kind, _ in _parts(config)} & _CHANGING))


def borders(config: Any) -> list[tuple[str, int]]:
    """The changing kinds, and the length of text beyond which each of them changes."""
    own = config.max_position_embeddings
    return [
        (kind, own if kind == "dynamic" else part.get("original_max_position_embeddings") or own)
        for kind, part in _parts(config)
        if kind in _CHANGING
    ]


def _parts(config: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """The kinds of rotary embeddings that a config names, for all layers or for each kind of them, and what it says of
    each."""
    found = getattr(config, "rope_parameters", None) or {}
    each = [found, *(part for part in found.values() if isinstance(part, dict))]
    return [(str(part["rope_type"]), part) for part in each if part.get("rope_type")]


def context(positions: int, scaling: Any) -> int:
    """How many tokens a model reads whose config gives so many `positions` and this scaling of them, if any.

    Models are published with the positions of their training beside a scaling that stretches these, and with positions
    that are stretched already; `original_max_position_embeddings` tells which, where it is there. Where each kind of
    layers has a scaling of its own (`linear` in Gemma 3), that one alone tells nothing: the positions are stretched.
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
