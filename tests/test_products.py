"""The products of a batch: by whichever way this machine is fastest at, with the same numbers laid out alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from causal_models import _SHAPE, build
from transformers import AutoModelForCausalLM

from huggingface.engine.parity import _all_expected, batch_runner, compare
from huggingface.engine.products import _SIZES, _linear, _transposed
from huggingface.engine.runner import BatchRunner

# Families whose modules take views of what their products give.
VIEWING: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v2": (
        "DeepseekV2Config",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": None,
            "head_dim": 8,
            "v_head_dim": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 64},
    ),
}


@pytest.mark.parametrize("name", VIEWING)
def test_whichever_product_is_fastest_here_a_model_can_take_views_of_it(name: str) -> None:
    """A model's numbers, and whether it is batched, do not depend on which product is the fastest here."""
    kind, extra = VIEWING[name]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**_SHAPE, **extra})).eval()
    runner = batch_runner(model)
    assert runner.products is not None
    for product in runner.products._all:
        product.ways = (_transposed,) * len(_SIZES)
    [expected] = _all_expected(model, None)
    for logits, wanted in zip(compare(expected, runner), expected, strict=True):
        torch.testing.assert_close(logits, wanted.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_segments", [True, False])
def test_the_check_at_load_tries_products_of_every_size(by_segments: bool) -> None:
    """Whatever way a product of some size takes, the check at load has seen what it gives."""
    model, _ = build("llama")
    runner = BatchRunner(model, by_segments=by_segments)
    runner.use_fastest_products()
    assert runner.products is not None
    tried: set[int] = set()

    def way(size: int) -> Callable[..., torch.Tensor]:
        def linear(*arguments: Any) -> torch.Tensor:
            tried.add(size)
            return _linear(*arguments)

        return linear

    for product in runner.products._all:
        product.ways = tuple(way(size) for size in _SIZES)
    compare(_all_expected(model, None)[0], runner)
    assert tried == {*_SIZES}
