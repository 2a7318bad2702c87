"""Tiny decoder-only models of many families, in memory, for the engine's tests.

Large random weights make greedy text differ by prompt and position. Each comes with a tokenizer of the same vocabulary.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf_files import ARCHITECTURES, write_gguf
from tiny_tokenizers import ROWS, byte_level
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from huggingface.engine.openvino.lazy_weights import make_shell
from huggingface.errors import InvalidRequest
from huggingface.loading.llama_cpp.load import LlamaCompute, LlamaCpp
from huggingface.loading.openvino import decoder
from huggingface.loading.openvino.graph_store import GraphPlace
from huggingface.loading.openvino.load import GraphCompute
from huggingface.loading.plan import look
from huggingface.loading.shell import Shell, open_shell
from huggingface.loading.torch import TorchCompute
from huggingface.model.loaded import LoadedModel
from huggingface.model.memory import Memory
from huggingface.model.parts import Compute, Setup
from huggingface.registry.records import LoadSettings, ModelRecord
from huggingface.types import EngineOptions, LoadOptions

END = "<|endoftext|>"

SHAPE = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
}
# Enough weights that it matters which way they lie.
LARGE = {"hidden_size": 256, "intermediate_size": 6144, "initializer_range": 0.1}
_GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512}

# Families that are served in a batch: what each adds to the common shape.
BATCHED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "gpt2": ("GPT2Config", _GPT),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral-window": ("MistralConfig", {"sliding_window": 8, "head_dim": 8}),
    "gemma3-mixed": (
        "Gemma3TextConfig",
        {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma2-eager": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8}),
    "falcon": ("FalconConfig", {}),
    "phi3": ("Phi3Config", {}),
}

# Those of them that OpenVINO does not compute: their attention has no paged form.
UNPAGED = frozenset({"gemma2-eager"})

# Families that cannot be: recurrent state, and mask code of their own.
ALONE: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {"state_size": 4}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
}


def build(name: str) -> tuple[Any, Any]:
    """The model, in eval mode, and its tokenizer."""
    return build_config(*{**BATCHED, **ALONE}[name])


def build_config(kind: str, extra: Mapping[str, Any]) -> tuple[Any, Any]:
    """A model of a class of configs, with what its own config adds to the common shape, and its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = byte_level(Path(folder), [END], lambda _: processors.ByteLevel(trim_offsets=False))
        names = {"bos_token": END, "eos_token": END, "unk_token": END}
        loaded = AutoTokenizer.from_pretrained(folder, **names)
    end = tokenizer.token_to_id(END)
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = getattr(transformers, kind)(**{**SHAPE, **extra, **ids})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).eval()
    return model, loaded


def serve(
    name: str, model: Any, tokenizer: Any, engine: str = "torch", memory: Memory | None = None, **options: Any
) -> LoadedModel:
    """The model as the server has it in memory; `model` itself stays as it is."""
    record = ModelRecord(f"tiny/{name}", name, "text-generation")
    folder = Path(tempfile.mkdtemp(prefix="graph-")) if engine == "openvino" else None
    made = EngineOptions(**options)
    compute: Compute = TorchCompute("causal-lm", model, findings=made.findings)
    if engine == "llama.cpp":
        compute = _from_gguf(name, model, tokenizer, made)
    if folder is not None:
        place = GraphPlace(folder, name, None)
        decoder.make(copy.deepcopy(model), place, None, folder)
        graph = decoder.find(place)
        assert graph is not None
        size = sum(tensor.nbytes for tensor in model.parameters())
        shell = Shell(make_shell(copy.deepcopy(model)), lambda: copy.deepcopy(model), size)

        def refuse(reason: str) -> None:
            """As where OpenVINO is asked for by name."""
            place.refuse(reason)
            raise InvalidRequest(reason, "backend")

        compute = GraphCompute("causal-lm", graph, shell, made.kv_cache_bytes, refuse)
    setup = Setup(record, "causal-lm", "cpu", {}, folder=folder)
    loaded = LoadedModel(setup, compute, tokenizer, made, memory=memory)
    loaded.prepared()
    assert loaded.effective["backend"] == engine
    return loaded


def _from_gguf(name: str, model: Any, tokenizer: Any, options: EngineOptions) -> LlamaCompute:
    """A model as llama.cpp computes it, from a GGUF file."""
    folder = Path(tempfile.mkdtemp(prefix="gguf-"))
    write_gguf(folder / "model.gguf", model, tokenizer, ARCHITECTURES[name])
    record = ModelRecord(f"tiny/{name}", name, "text-generation", gguf_file="model.gguf")
    load_options = LoadOptions(folder, device="cpu", engine=options)
    plan = look(record, load_options, folder, LoadSettings(backend="llama.cpp"))
    backend = LlamaCpp()
    estimate = backend.estimate(plan, load_options, None)
    return LlamaCompute(plan, open_shell(plan, load_options), estimate.token_bytes)
