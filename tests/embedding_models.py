"""Tiny sentence-transformers folders and a cross-encoder, saved by that library itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

# What makes one vector of a text's, by the name of the model.
POOLINGS: dict[str, dict[str, object]] = {
    "mean": {"mode": "mean"},
    "cls": {"mode": "cls"},
    "max": {"mode": "max"},
    "last": {"mode": "lasttoken"},
    "weighted": {"mode": "weightedmean"},
    "unit": {"mode": "mean", "unit": True},
    "dense": {"mode": "mean", "dense": True, "unit": True},
    "prompts": {"mode": "mean", "prompts": {"query": "the cat ", "passage": "a dog "}, "default": "passage"},
    "outside": {"mode": "mean", "prompts": {"query": "the cat "}, "include_prompt": False},
    "short": {"mode": "mean", "most": 8},
}


def build_embedding(models_dir: Path, tiny: Callable[[str], str], name: str) -> str:
    """The id of a model that pools as `POOLINGS[name]` says, made once."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    model_id = f"tiny/st-{name}"
    folder = models_dir / model_id
    if not folder.is_dir():
        how = POOLINGS[name]
        torch.manual_seed(5)
        transformer = Transformer(str(models_dir / tiny("bert-embed")))
        if "most" in how:
            transformer.max_seq_length = how["most"]
        width = transformer.get_embedding_dimension()
        include = bool(how.get("include_prompt", True))
        modules: list[torch.nn.Module] = [
            transformer,
            Pooling(width, pooling_mode=how["mode"], include_prompt=include),
        ]
        if how.get("dense"):
            modules.append(Dense(width, 12))
        if how.get("unit"):
            modules.append(Normalize())
        model = SentenceTransformer(
            modules=modules, prompts=how.get("prompts"), default_prompt_name=how.get("default"), device="cpu"
        )
        model.save(str(folder), create_model_card=False)
    return model_id


def build_cross_encoder(models_dir: Path, tiny: Callable[[str], str], *, plain: bool = False) -> str:
    """The id of a cross-encoder, with the usual sigmoid or, if `plain`, with none."""
    from sentence_transformers import CrossEncoder

    model_id = f"tiny/cross-{'plain' if plain else 'sigmoid'}"
    folder = models_dir / model_id
    if not folder.is_dir():
        torch.manual_seed(6)
        activation = torch.nn.Identity() if plain else None
        model = CrossEncoder(
            str(models_dir / tiny("bert-embed")), num_labels=1, activation_fn=activation, device="cpu", max_length=64
        )
        for parameter in model.model.classifier.parameters():
            torch.nn.init.normal_(parameter, std=2.0)
        model.save(str(folder))
    return model_id
