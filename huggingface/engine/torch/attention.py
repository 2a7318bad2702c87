"""A twin of a model: modules of its own around the same weights, set up for the engine.

The engine changes how the twin attends and multiplies; the model itself stays as it was loaded, for `generate` and the
tasks. Built once, used on the engine's thread only. Must not know sequences or the scheduler.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .cache import SlotCache

# The name by which transformers finds `slot_attention`; it refers to no state, so it is registered at import.
_ATTENTION = "local_llm_slots"


def make_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copies the model's modules and settings; the copy shares all parameters and buffers.

    Raises: any error of the model's own code that prevents a copy.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: PreTrainedModel = copy.deepcopy(model, shared)
    return twin


def attend_by_segments(twin: PreTrainedModel, cache: SlotCache) -> bool:
    """Makes the twin attend by `slot_attention`; False if its attention does not use transformers' interface."""
    if not getattr(twin, "_supports_attention_backend", False) or _implementation(twin) != "sdpa":
        return False
    for module in twin.modules():
        module.slot_cache = cache
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation_internal = _ATTENTION
    return True


def wants_float_masks(twin: PreTrainedModel) -> bool:
    """Whether the twin adds masks to the scores instead of selecting by them."""
    return _implementation(twin) == "eager"


def _implementation(model: PreTrainedModel) -> str:
    name: str = model.config.get_text_config()._attn_implementation
    return name


def slot_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,  # noqa: ARG001 - the signature that models call
    value: torch.Tensor,  # noqa: ARG001
    attention_mask: Any,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' own attention in a packed pass: each segment over its own rows, up to its own length.

    `query` is (1, heads, tokens, width), the tokens of all segments one after the other; returns (1, tokens, heads,
    width). `attention_mask` only identifies the kind of the layer; keys and values come from the cache.
    """
    cache: SlotCache = module.slot_cache
    kind = _kind(cache, attention_mask)
    outputs = []
    for segment in cache.segments:
        keys, values = cache.view(segment, cache.layer)
        part = query[:, :, segment.tokens]
        if segment.start is None:  # (1, heads, rows, width) -> (rows, heads, 1, width)
            part = part.transpose(0, 2)
        output, _ = sdpa_attention_forward(module, part, keys, values, segment.masks[kind], **options)
        outputs.append(output.transpose(0, 1) if segment.start is None else output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _kind(cache: SlotCache, mask: Any) -> str:
    """The kind of layer to which a model gives this mask."""
    for kind, known in cache.handles.items():
        if mask is known:
            return kind
    raise ValueError("the model attends with a mask of its own making")


AttentionInterface.register(_ATTENTION, slot_attention)
