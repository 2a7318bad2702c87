"""Reads what a model's layers keep of a token and how far they attend: each runner needs it first.

Must not know rows, slots or the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .torch.cache import LayerShape, layer_shapes

# The kinds of layers that runners support, by their names in configs.
KINDS = ("full_attention", "sliding_attention", "chunked_attention")


class NotBatchable(Exception):
    """The model's forward pass cannot serve rows at different positions; the message says why."""


@dataclass(frozen=True, slots=True)
class LayerKinds:
    """The kinds of a model's layers, and whether it takes a mask for each kind, by name."""

    names: tuple[str, ...]
    by_kind: bool


def probe(model: PreTrainedModel) -> list[LayerShape | None]:
    """What each layer keeps of a token, found by running the model on one.

    Raises:
        NotBatchable: the model keeps something other than keys and values.
    """
    inputs = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            cache = model(input_ids=inputs, use_cache=True, return_dict=True).past_key_values
        return layer_shapes(cache)
    except Exception as error:
        raise NotBatchable(f"its cache is not one of keys and values for each token ({error})") from error


def layer_kinds(config: Any) -> LayerKinds:
    """The kinds of layers in a text config, by the rules of `create_masks_for_generate`.

    Raises:
        NotBatchable: a kind is not in `KINDS`, or attends to tokens that depend on neighbouring rows.
    """
    named = getattr(config, "layer_types", None)
    if named is not None:
        kinds = LayerKinds(tuple(sorted(set(named))), by_kind=True)
    elif getattr(config, "sliding_window", None) is not None:
        kinds = LayerKinds(("sliding_attention",), by_kind=False)
    elif getattr(config, "attention_chunk_size", None) is not None:
        kinds = LayerKinds(("chunked_attention",), by_kind=False)
    else:
        kinds = LayerKinds(("full_attention",), by_kind=False)
    kept = getattr(config, "keep_window_size", None)
    if kept is not None and kept < (getattr(config, "max_position_embeddings", None) or kept + 1):
        # A word that occurs twice has the same score in the first layer: the order in memory decides.
        raise NotBatchable(f"its attention keeps the {kept} tokens of largest score, and which of equal ones is chance")
    if unknown := [kind for kind in kinds.names if kind not in KINDS]:
        raise NotBatchable(f"it has layers of the kind {', '.join(unknown)}")
    return kinds
