"""Tiny models that change somewhere along a text, in memory, and what each gives a text alone.

The borders are small, so that prompts of a few dozen tokens lie on both sides. `LENGTHS` are prompts around a border of
64 tokens, and how many new tokens carry some of them across.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from huggingface.model.loaded import LoadedModel
from huggingface.types import GenerationRequest

BORDER = 64
LENGTHS: Sequence[tuple[int, int]] = ((12, 20), (40, 40), (60, 12), (64, 8), (65, 8), (110, 12), (230, 8), (16, 30))

_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": BORDER,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
_PHI = {"rope_parameters": _LONG, "original_max_position_embeddings": BORDER, "max_position_embeddings": 256}

# Rotary embeddings that change with the length of a text. Phi-3 computes a text again when it grows beyond the border.
ROTARY: Mapping[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("LlamaConfig", {"rope_parameters": _LONG, "max_position_embeddings": 256}),
    "dynamic": ("LlamaConfig", {"rope_parameters": _DYNAMIC, "max_position_embeddings": BORDER}),
    "phi3-longrope": ("Phi3Config", _PHI),
    "phimoe-longrope": (
        "PhimoeConfig",
        {**_PHI, "rope_parameters": {**_LONG, "short_mscale": 1.1, "long_mscale": 1.3}, "num_local_experts": 4},
    ),
    "gemma3-mixed": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "sliding_window": 32,
            "max_position_embeddings": 256,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": _LONG,
            },
        },
    ),
}


def tokens(seed: int, count: int) -> list[int]:
    """A prompt."""
    return torch.randint(3, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def own(model: Any, tokenizer: Any, prompt: Sequence[int], **parameters: Any) -> str:
    """What `generate` makes of a prompt, greedily, on a model that has read nothing before."""
    ids = torch.tensor([list(prompt)])
    made = copy.deepcopy(model).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=-2, **parameters
    )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def served(loaded: LoadedModel, prompt: Sequence[int], **parameters: Any) -> str:
    """What the server makes of it."""
    parameters = {"do_sample": False, "ignore_eos": True, **parameters}
    return list(loaded.generate(GenerationRequest(parameters, tokens=list(prompt))))[-1].whole or ""


def together(loaded: LoadedModel, prompts: Sequence[tuple[list[int], int]]) -> list[str]:
    """What the server makes of prompts that all come at once, each with its number of new tokens."""
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(lambda each: served(loaded, each[0], max_new_tokens=each[1]), prompts))


# Windows, chunks and the like: what a class of configs says of one, and whether such a model is served in a batch.
CHANGING: Mapping[str, tuple[str, dict[str, Any], bool]] = {
    "mistral": ("MistralConfig", {"sliding_window": 100, "head_dim": 8}, True),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 100}, True),
    "gpt-neo": (
        "GPTNeoConfig",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        False,
    ),
    "moshi": ("MoshiConfig", {"sliding_window": 100, "head_dim": 8, "num_key_value_heads": 4}, False),
    "doge": ("DogeConfig", {"keep_window_size": 100}, False),
}
