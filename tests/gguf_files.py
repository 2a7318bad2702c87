"""GGUF files of tiny models, laid out as llama.cpp does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from huggingface.loading import gguf as loading

# The families of `causal_models` that transformers and llama.cpp read from such files, and their architectures.
ARCHITECTURES = {"llama": "llama", "gpt2": "gpt2", "qwen3": "qwen3", "phi3": "phi3"}


# Of the kinds that gguf cannot write: the bytes of a block of 256 numbers, and where its 16-bit factors lie.
BLOCKS = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    arch: str,
    *,
    quantize: str | None = None,
    part: int = 0,
    keys_apart: bool = False,
    **keys: Any,
) -> list[Path]:
    """A model as a GGUF file, laid out as llama.cpp does; `keys` are more of them, or in the place of others.

    It is split into parts of up to `part` tensors, where that is given; with `keys_apart` the first has none. Returns
    the paths of the files.
    """
    config = model.config
    before = set(path.parent.iterdir())
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=part, small_first_shard=keys_apart)
    writer.add_name("tiny")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {f"{arch}.{key}": width for key in ("attention.key_length", "attention.value_length")}
    values |= {f"{arch}.context_length": 512, f"{arch}.rope.dimension_count": width}
    if arch == "gpt2":
        values["gpt2.feed_forward_length"] = config.n_inner or 4 * config.n_embd
    for key, name in GGUF_CONFIG_MAPPING[arch].items():
        found = getattr(config, name or "", None)
        if name == "rope_theta":
            found = config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]
        if isinstance(found, int | float):
            values[f"{arch}.{key}"] = found
    kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in {**values, **keys}.items():
        add = kinds[type(value)]
        add(key, value)
    if tokenizer is not None:
        _write_tokenizer(writer, tokenizer)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _write_tensor(writer, f"{names.get_name(stem)}.{suffix}", _as_llama_cpp(name, tensor, config, arch), quantize)
    if "rope" in config.__dict__.get("divided", ""):
        writer.add_tensor("rope_freqs.weight", config.divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(set(path.parent.iterdir()) - before)


def read(folder: Path, gguf_file: str = "model.gguf") -> tuple[Any, Any]:
    """The unpacked model of a file and its tokenizer, as the server reads them."""
    model_id = "tiny/gguf"
    header = loading.check(model_id, folder, gguf_file)
    config = loading.read_config(model_id, folder, gguf_file, header)
    tokenizer = loading.read_tokenizer(model_id, folder, gguf_file, header)
    kind = transformers.AutoModelForCausalLM
    model, info = loading.read_model(model_id, folder, gguf_file, header, kind, config, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model, tokenizer


def _write_tokenizer(writer: Any, tokenizer: Any) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _write_tensor(writer: Any, name: str, values: np.ndarray, quantize: str | None) -> None:
    if quantize is not None and values.ndim == 2 and not name.startswith("position") and ".conv." not in name:
        kind = gguf.GGMLQuantizationType[quantize]
        packed = _blocks(values, quantize) if quantize in BLOCKS else gguf.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    else:
        writer.add_tensor(name, values)


def _as_llama_cpp(name: str, tensor: torch.Tensor, config: Any, arch: str) -> np.ndarray:
    """Llama's queries and keys are interleaved, GPT-2's products lie the other way, Gemma's norms begin at one, and
    LFM2's convolutions have one dimension less.
    """
    values = tensor.float().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    part = name.split(".")[-2]
    if arch == "llama" and part in heads:
        rows = values.shape[0] // heads[part] // 2
        values = values.reshape(heads[part], 2, rows, -1).swapaxes(1, 2).reshape(values.shape)
    if arch == "gpt2" and part in ("c_attn", "c_proj", "c_fc") and values.ndim == 2:
        values = values.T
    if part == "conv":
        values = values.squeeze(1)
    if arch.startswith("gemma") and part.endswith("norm"):
        values = values + 1
    return np.ascontiguousarray(values)


def _blocks(values: np.ndarray, kind: str) -> np.ndarray:
    """Some matrix of a kind that gguf cannot write: its blocks hold anything, with factors of a usual size."""
    size, factors = BLOCKS[kind]
    rows, columns = values.shape
    draws = np.random.default_rng(rows * columns)
    blocks = draws.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
    for place in factors:
        factor = np.full((rows, columns // 256, 1), 2e-4, np.float16)
        blocks[:, :, place : place + 2] = factor.view(np.uint8)
    if kind == "Q6_K":  # signed scales, which are larger
        blocks[:, :, 192:208] = draws.integers(0, 40, (rows, columns // 256, 16), dtype=np.uint8)
    return blocks.reshape(rows, -1)
