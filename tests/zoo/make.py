"""Tiny models with random weights, as folders that a server and transformers read alike.

The weights are large, so that texts differ by prompt and position; tokens are ASCII, so that a text tells its tokens.
Imports torch. Must not know servers.
"""

from __future__ import annotations

import json
import string
import zlib
from pathlib import Path
from typing import Any

import families
import shrink
import torch
from tiny_tokenizers import TEXT

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>", "<media>")
_MAX_PARAMETERS = 6_000_000


class Unbuildable(Exception):
    """There is no tiny model of the family; the message says why."""


def build(folder: Path, table: str, family: str) -> str:
    """Write the model of a family's class in a table, and its tokenizer; returns the class's name.

    Raises:
        Unbuildable: transformers itself cannot make one here.
    """
    if reason := families.unbuildable(table, family):
        raise Unbuildable(reason)
    try:
        config = families.config(table, family)
        model_class = families.model_class(table, family, config)
        with torch.device("meta"):
            size = sum(tensor.numel() for tensor in model_class._from_config(config).parameters())
        if size > _MAX_PARAMETERS:
            raise Unbuildable(f"its smallest form has {size:,} parameters")
        torch.manual_seed(7)
        model = model_class._from_config(config).eval()
    except Unbuildable:
        raise
    except Exception as error:
        raise Unbuildable(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    fill(model, zlib.crc32(family.encode()))
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer(folder, table, model)
    return type(model).__name__


@torch.no_grad()
def fill(model: Any, seed: int) -> None:
    """Give all weights numbers by chance, large ones: each token makes something different of what came before.

    Factors of norms have either sign, so that no model favours the token that it has just read, whose row its last
    product may share.
    """
    draw = torch.Generator().manual_seed(seed)
    norms = {
        id(module.weight) for module in model.modules() if "Norm" in type(module).__name__ and _has_factors(module)
    }
    for tensor in model.parameters():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim > 1:
            spread = 0.2 if tensor.shape[0] == shrink.ROWS else 1.5 / tensor.shape[-1] ** 0.5
            tensor.normal_(0, spread, generator=draw)
            continue
        if id(tensor) in norms:
            signs = torch.randint(0, 2, tensor.shape, generator=draw) * 2 - 1
            tensor.copy_(signs - 1 if tensor.abs().mean() < 0.5 else signs)  # some count from 1
        tensor.add_(torch.randn(tensor.shape, generator=draw), alpha=0.2)


def _has_factors(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 1


def tokenizer(folder: Path, table: str, model: Any) -> None:
    """Write a byte-level tokenizer whose tokens are pieces of ASCII text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = sorted({"Ġ", *(char for char in string.printable if char.isprintable() and char != " ")})
    trainer = trainers.BpeTrainer(
        vocab_size=shrink.ROWS, special_tokens=list(SPECIAL), initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator([line for line in TEXT.strip().splitlines() if line.isascii()], trainer)
    made.add_special_tokens([AddedToken(text, lstrip=text == "<mask>") for text in SPECIAL])
    if table not in ("causal", "seq2seq"):
        marks = [("<s>", 1), ("</s>", 2)]
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B:1 </s>:1", special_tokens=marks
        )
    made.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= {"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    settings["model_max_length"] = families.longest(model.config)
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    if (getattr(model.config, "type_vocab_size", 0) or 0) > 1 and families.takes(model, "token_type_ids"):
        settings["model_input_names"].insert(1, "token_type_ids")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
