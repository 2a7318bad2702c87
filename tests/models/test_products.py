"""The products of a batch: by whichever way this machine is fastest at, with the same numbers laid out alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from causal_models import SHAPE, build
from loaded_parts import Findings
from transformers import AutoModelForCausalLM

from huggingface.engine.torch.matmul import WAYS, Way
from huggingface.engine.torch.parity import batch_runner, compare, expect, some_prompts

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


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.removeprefix("_"))
@pytest.mark.parametrize("name", VIEWING)
def test_whichever_product_is_fastest_here_a_model_can_take_views_of_it(name: str, way: Way) -> None:
    """A model's numbers, and whether it is batched, do not depend on which product is the fastest here."""
    kind, extra = VIEWING[name]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**SHAPE, **extra})).eval()
    expected = [expect(model, prompt) for prompt in some_prompts(model, (80, 5, 22))]
    used: set[str] = set()

    def product(*arguments: Any) -> torch.Tensor:
        used.add(name)
        return way(*arguments)

    runner = batch_runner(model, Findings(lambda finding: {"ways": (product,) * len(finding.ways)}))
    used.clear()
    for logits, wanted in zip(compare(expected, runner), expected, strict=True):
        torch.testing.assert_close(logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert used


@pytest.mark.parametrize(("name", "by_segments"), [("llama", True), ("gemma2-eager", False)])
def test_the_check_at_load_tries_products_of_every_size(name: str, by_segments: bool) -> None:
    """Whatever way a product of some size takes, the check at load has seen what it gives."""
    model, _ = build(name)
    tried: set[int] = set()
    sizes: set[int] = set()

    def noted(size: int, way: Way) -> Way:
        def product(*arguments: Any) -> torch.Tensor:
            tried.add(size)
            return way(*arguments)

        sizes.add(size)
        return product

    findings = Findings(lambda finding: {"ways": tuple(noted(size, way) for size, way in enumerate(finding.ways))})
    assert batch_runner(model, findings).by_segments is by_segments
    assert len(sizes) > 1
    assert tried == sizes
