"""The models that are tried, made in place: random weights in folders as the Hub has them.

Small ones of eight families, whose every token is a character, so that a text tells its tokens; tiny ones of the tasks;
and one large Llama. Imports torch. Must not know servers or sections.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .scale import Shape

ORG = "gpu"
CHARACTERS = "".join(char for char in string.printable if char.isprintable())
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "[MASK]")
_ROWS = len(_SPECIAL) + len(CHARACTERS)  # a small model's vocabulary has no other token
NOT_CHARACTERS = (0, 1, 3, 4)  # ids that leave no trace in a text, the end token apart
_SHAPE = {
    "vocab_size": _ROWS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.35,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Each adds to the common shape; among them a window, layers of two kinds, learned positions, parallel blocks.
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": 24}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "phi3": ("Phi3Config", {}),
}

ADAPTERS = ("terse", "formal")


def family(root: Path, name: str) -> str:
    """A small model of a family; returns its id."""
    import transformers

    kind, extra = FAMILIES[name]
    config = getattr(transformers, kind)(**{**_SHAPE, **extra, **_IDS})
    return _save(root, name, lambda: transformers.AutoModelForCausalLM.from_config(config))


def adapters(root: Path, base: str) -> dict[str, str]:
    """LoRA adapters of a small model, large enough to change what it says; returns their ids by name."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = {}
    for number, name in enumerate(ADAPTERS):
        torch.manual_seed(100 + number)
        model = AutoModelForCausalLM.from_pretrained(root / base)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_" in parameter_name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.5)
        made[name] = f"{ORG}/{name}"
        adapted.save_pretrained(root / made[name])
    return made


def tasks(root: Path) -> dict[str, str]:
    """A model for each task that is tried; returns their ids by the task's name."""
    import transformers

    bert = {**{name: value for name, value in _SHAPE.items() if "key_value" not in name}, "pad_token_id": 0}
    names = ("bad", "fair", "good")
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    bart = {"vocab_size": _ROWS, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
    bart |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "init_std": 0.35}
    bart |= {**_IDS, "decoder_start_token_id": 2, "forced_eos_token_id": None, "max_position_embeddings": 512}
    kinds: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "text-classification": (transformers.BertConfig, "AutoModelForSequenceClassification", {**bert, **labels}),
        "feature-extraction": (transformers.BertConfig, "AutoModel", bert),
        "question-answering": (transformers.BertConfig, "AutoModelForQuestionAnswering", bert),
        "summarization": (transformers.BartConfig, "AutoModelForSeq2SeqLM", bart),
    }
    made = {}
    for task, (kind, auto, values) in kinds.items():
        config, reader = kind(**values), getattr(transformers, auto)
        made[task] = _save(root, task, lambda reader=reader, config=config: reader.from_config(config))
    return made


def large(root: Path, name: str, shape: Shape, dtype: str, device: str) -> str:
    """A Llama of this shape, in this type, made on the device and written once; returns its id."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        dtype=dtype,
        **_IDS,
    )

    def build() -> Any:
        # Numbers by chance in the size that training leaves; transformers' own way to fill them takes a minute.
        with no_init_weights(), torch.device(device):
            model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
        model.tie_weights()
        generator = torch.Generator(device).manual_seed(7)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("norm.weight"):
                    parameter.fill_(1)
                else:
                    parameter.normal_(0, 0.02, generator=generator)
        return model

    return _save(root, name, build, tokens=shape.vocabulary)


def _save(root: Path, name: str, build: Callable[[], Any], tokens: int = _ROWS) -> str:
    import torch

    folder = root / ORG / name
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    model = build().eval()
    model.save_pretrained(folder)
    _tokenizer(folder, tokens)
    return f"{ORG}/{name}"


def _tokenizer(folder: Path, tokens: int) -> None:
    """Write a tokenizer that makes a token of each character; further tokens are words that no text is read as."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {" ": "Ġ"}  # as byte-level tokenizers write it
    words = [*_SPECIAL, *(alphabet.get(char, char) for char in CHARACTERS)]
    words += [f"Ġword{number}" for number in range(tokens - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), _SPECIAL, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
