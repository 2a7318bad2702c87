"""Finds how many tokens a model can read: the size of its table of positions, if it has one.

A position beyond the table is an IndexError on a CPU and ends the process on a GPU, so it is checked first. Called on
the engine's thread. Must not know tasks, JSON or HTTP.
"""

from __future__ import annotations

from typing import Any

from ..modeling.rotary import context

# Names in transformers' models of the module with a vector for each position.
_NAMES = frozenset(
    {"wpe", "position_embeddings", "position_embedding", "embed_positions", "positions_embed", "embed_position"}
)

# Kinds of models that keep their positions in a plain tensor as long as the config says.
_PLAIN_TABLES = frozenset({"codegen", "ctrl", "gptj"})

# In models that also see or hear, positions in a picture are not positions in a text.
_NOT_TEXT = ("vision", "visual", "image", "audio")


def max_positions(model: Any) -> int | None:
    """The longest sequence in tokens for which `model` (a `PreTrainedModel`) has positions.

    None where positions are computed (rotary, relative, ALiBi) and so unlimited by the weights. For an encoder-decoder
    model it is the encoder's, the first in module order.
    """
    from torch import nn

    config = getattr(model, "config", None)  # a part of a model may have none, as FSMT's decoder
    if getattr(config, "reset_position_index_per_cell", False):  # TAPAS counts from zero in each cell
        return None
    text = config and config.get_text_config()
    if text is not None and text.model_type in _PLAIN_TABLES:
        return int(text.max_position_embeddings)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in _NAMES:
            continue
        if type(module).__name__ == "QuantEmbedding":  # I-BERT's own, like RoBERTa
            return int(module.weight.shape[0]) - int(module.padding_idx) - 1
        if not isinstance(module, nn.Embedding) or hasattr(module, "make_weight"):  # FSMT's table grows on demand
            continue
        if any(other in name for other in _NOT_TEXT):
            continue
        rows = module.num_embeddings
        if type(module).__name__.startswith("ProphetNet"):  # positions begin after the padding index
            return rows - int(module.padding_idx or 0) - 1
        if type(module) is not nn.Embedding:  # BART, OPT: `offset` rows precede the first position
            return rows - int(getattr(module, "offset", 0))
        if module.padding_idx is not None:  # RoBERTa: positions begin after the padding index
            return rows - module.padding_idx - 1
        return rows
    return None


def contexts(model: Any, maximum: int | None) -> tuple[int | None, int | None]:
    """The most tokens that the model can read, and can write: the least of its weights, its config and a setting
    (`maximum`)."""
    reads = max_positions(model)
    if reads is None:
        config = model.config.get_text_config()
        said = getattr(config, "max_position_embeddings", None)
        # XLNet says -1: no limit
        reads = context(said, getattr(config, "rope_parameters", None)) if said and said > 0 else None
    writes = max_positions(model.get_decoder()) if model.config.is_encoder_decoder else reads
    if maximum is None:
        return reads, writes
    return min(reads or maximum, maximum), min(writes or maximum, maximum)
