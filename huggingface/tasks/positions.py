"""How many tokens a model can read: the size of its table of positions, for models that have one.

A position beyond the table is an IndexError on a CPU and the end of the process on a GPU, so it is looked up before.
Called on the model's worker thread. Must not know tasks, JSON or HTTP.
"""

from __future__ import annotations

from typing import Any

from ..modeling.rotary import context

# What transformers' models call the module that holds a vector for each position.
_NAMES = frozenset(
    {"wpe", "position_embeddings", "position_embedding", "embed_positions", "positions_embed", "embed_position"}
)

# Kinds of models that keep their positions in a plain tensor, as long as their config says.
_PLAIN_TABLES = frozenset({"codegen", "ctrl", "gptj"})

# Where a model also sees or hears, the places in a picture are not those in a text.
_NOT_TEXT = ("vision", "visual", "image", "audio")


def max_positions(model: Any) -> int | None:
    """The longest sequence, in tokens, that `model` (a `PreTrainedModel`) has positions for.

    None where positions are computed and so have no end in the weights (rotary, relative, ALiBi). Of an encoder-decoder
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
        if type(module).__name__ == "QuantEmbedding":  # I-BERT's own, a RoBERTa
            return int(module.weight.shape[0]) - int(module.padding_idx) - 1
        if not isinstance(module, nn.Embedding) or hasattr(module, "make_weight"):  # FSMT's table grows as it is needed
            continue
        if any(other in name for other in _NOT_TEXT):
            continue
        rows = module.num_embeddings
        if type(module).__name__.startswith("ProphetNet"):  # positions begin after the padding index
            return rows - int(module.padding_idx or 0) - 1
        if type(module) is not nn.Embedding:  # BART, OPT: `offset` rows stand before the first position
            return rows - int(getattr(module, "offset", 0))
        if module.padding_idx is not None:  # RoBERTa: positions begin after the padding index
            return rows - module.padding_idx - 1
        return rows
    return None


def contexts(model: Any, most: int | None) -> tuple[int | None, int | None]:
    """How many tokens the model can read, and how many it can have in what it writes: its weights, its config or a
    setting (`most`) say, whichever is least."""
    reads = max_positions(model)
    if reads is None:
        config = model.config.get_text_config()
        said = getattr(config, "max_position_embeddings", None)
        # XLNet says -1: no limit
        reads = context(said, getattr(config, "rope_parameters", None)) if said and said > 0 else None
    writes = max_positions(model.get_decoder()) if model.config.is_encoder_decoder else reads
    if most is None:
        return reads, writes
    return min(reads or most, most), min(writes or most, most)
