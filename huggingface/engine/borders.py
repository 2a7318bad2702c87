"""Lengths at which a model changes (windows, chunks, indices, rotary embeddings), and a small model that changes early.

A check on a short text says nothing beyond them. Where they are too far for a test with the model itself, the same code
is tested with small numbers: a model of the same class and config, narrow, with few layers and random weights, whose
borders are near. Must not know rows, slots or files.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import rotary

# Names of settings that are lengths of text, and of settings that only look so.
_LENGTHS = re.compile(
    r"window|chunk|block_size|index_topk|index_block|floor_scale|local_attention|original_max_position|compress|horizon"
)
_OTHERS = re.compile(r"pattern|layer|mamba|kernel|feed_forward|lm_head|vision|audio|speech|theta|probs|use_|_step")

# Settings of rotary embeddings that do not depend on the text's length.
_SETTLED = frozenset(
    {
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
        *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        *("low_freq_factor", "high_freq_factor", "mrope_section"),
    }
)

_PAST = 9  # tokens by which a prompt goes beyond a border
_SCORES = 1e8  # the most attention scores of one layer
_SMALL = 16  # tokens up to the nearest border of a small model
_WORDS = 512  # the vocabulary of a small model
_WIDTH = 64  # the width of a small model's feed-forward layers
_WIDTHS = ("hidden_size", "_dim", "n_embd", "d_model")
_EXPERTS = 4


@dataclass(frozen=True, slots=True)
class _Border:
    """A setting that is a length: its path in the config as a dictionary, and its number of tokens."""

    place: tuple[str, ...]
    tokens: int


def nearest(config: Any) -> int:
    """The shortest length in tokens at which a text config says that the model changes; 0 if its context has none."""
    maximum = _context(config)
    return min((border.tokens for border in _borders(config) if border.tokens < maximum), default=0)


def past(config: Any) -> int:
    """The length in tokens of a prompt that goes past the nearest border; 0 where there is none."""
    border = nearest(config)
    return int(max(border + 1, min(border + _PAST, _context(config) - _PAST))) if border else 0


def beyond(model: PreTrainedModel, maximum: float) -> int:
    """As `past`; 0 where the prompt would take more than `maximum` products."""
    config = model.config.get_text_config()
    tokens = past(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    scores = getattr(config, "num_attention_heads", 1) * tokens**2
    return tokens if weights * tokens <= maximum and scores <= _SCORES else 0


def _context(config: Any) -> float:
    own = getattr(config, "max_position_embeddings", None) or 0
    return rotary.context(own, getattr(config, "rope_parameters", None)) if own > 0 else float("inf")


def _borders(config: Any) -> list[_Border]:
    found = [border for border in _walk(vars(config), ()) if border.tokens > 1]
    own = getattr(config, "max_position_embeddings", None)
    if own and any(kind == "dynamic" for kind, _ in rotary.borders(config)):
        found.append(_Border(("max_position_embeddings",), own))
    return found


def _walk(said: Mapping[str, Any], place: tuple[str, ...]) -> Iterator[_Border]:
    settled = place and "rope_theta" in said and not set(said) - _SETTLED
    for name, value in said.items():
        if not isinstance(name, str) or name.startswith("_"):
            continue
        if isinstance(value, Mapping):
            yield from _walk(value, (*place, name))
        elif _LENGTHS.search(name) and not _OTHERS.search(name) and not settled:
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, int) and not isinstance(each, bool):
                    yield _Border((*place, name), each)


def small(model: PreTrainedModel) -> PreTrainedModel:
    """Creates a model of the same code whose borders are near.

    Raises: any error of the code with small numbers in its config.
    """
    config = _narrow(copy.deepcopy(model.config))
    draws = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        made = type(model)(config).to(torch.float32).eval()
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5, generator=draws)
            else:  # parameters that start as zeros or ones have other values in trained models
                parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.1)
    return made


def _narrow(config: Any) -> Any:
    text = config.get_text_config()
    found, near = _borders(text), nearest(text)
    for border in found:
        _change(text, border.place, lambda tokens: max(2, tokens * _SMALL // near) if tokens > 1 else tokens)
    lengths = {border.place[0] for border in found}
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig) and part is not text:  # the part that sees or hears
            for name in {"num_hidden_layers", "num_blocks", "depth"} & vars(part).keys():
                setattr(part, name, 1)
    layers = _few_layers(text)
    heads, kept = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    shared = max(1, heads // kept)
    fewer = min(kept, 2) * min(shared, 2)
    width = text.hidden_size * fewer // heads
    numbers = {text.hidden_size: width, heads: fewer, kept: min(kept, 2)}
    for name, value in list(vars(text).items()):
        if isinstance(value, bool) or name in lengths or name.startswith("_") or not isinstance(value, int | list):
            continue
        if isinstance(value, list):
            if len(value) == layers and name not in lengths:
                setattr(text, name, value[: text.num_hidden_layers])
        elif "position" in name or "layers" in name:
            continue
        elif name.endswith("token_id"):
            setattr(text, name, min(value, _WORDS - 1))
        elif "vocab" in name:
            setattr(text, name, min(value, _WORDS))
        elif "intermediate" in name or "ffn_dim" in name or name == "n_inner":
            setattr(text, name, min(value, _WIDTH))
        elif re.search(r"(num|n)_(\w+_)?experts$", name):
            setattr(text, name, min(value, _EXPERTS))
        elif re.search(r"experts_per_tok|moe_top_?k|top_k_experts", name):
            setattr(text, name, min(value, 2))
        elif name in ("n_group", "topk_group"):
            setattr(text, name, 1)
        elif ("head" in name or name.endswith(_WIDTHS)) and "head_dim" not in name:
            setattr(text, name, numbers.get(value, value))
    return config


def _few_layers(text: Any) -> int:
    """Cuts a config's layers down to as many as each kind of them needs; returns the earlier number."""
    layers: int = text.num_hidden_layers
    kinds = [value for value in vars(text).values() if isinstance(value, list) and len(value) == layers and layers > 1]
    kinds = [value for value in kinds if all(isinstance(kind, str | int) for kind in value)]
    needed = [max(value.index(kind) for kind in set(value)) + 1 for value in kinds]
    text.num_hidden_layers = min(layers, max([2, *needed]))
    return layers


def _change(config: Any, place: tuple[str, ...], change: Any) -> None:
    """Changes a number, or a list of numbers, at its place in a config."""
    *outer, name = place
    target = config
    for step in outer:
        target = target[step] if isinstance(target, dict) else getattr(target, step)
    value = target[name] if isinstance(target, dict) else getattr(target, name)
    changed = [change(each) for each in value] if isinstance(value, list) else change(value)
    if isinstance(target, dict):
        target[name] = changed
    else:
        setattr(target, name, changed)
