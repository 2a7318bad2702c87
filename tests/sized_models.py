"""Models of a size that can be seen in a process's resident memory: a hundred megabytes of weights, quick to build.

Each is a complete folder, saved as any model is; the weights are random, and differ from model to model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models

_SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
}


def build(root: Path, model_id: str, **changes: Any) -> str:
    """A Llama of about 90 MB in float32, at `root/model_id`; `changes` are of its config. Returns its id."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = root / model_id
    if (folder / "model.safetensors").is_file():
        return model_id
    source = root / tiny_models.build(root, "llama")
    tokenizer = AutoTokenizer.from_pretrained(source)
    own = LlamaConfig.from_pretrained(source)
    config = LlamaConfig(
        **{**_SHAPE, **changes},
        vocab_size=own.vocab_size,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        tie_word_embeddings=False,  # else a processor with weights laid out anew has one of them twice
    )
    torch.manual_seed(len(model_id) + sum(map(ord, model_id)))
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model_id
