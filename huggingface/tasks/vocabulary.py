"""Which token ids a model has a row for: a tokenizer may know more tokens than its model's table has rows.

Gemma 3's tokenizer has one more than its text models, and tokens that are added by hand are often forgotten in the
model. An id beyond the table is an IndexError of torch's on a CPU, undefined under OpenVINO, and on CUDA a failed
assertion, after which the process cannot use CUDA again: so ids are checked before they are looked up. Any thread. Must
not know tasks, JSON or HTTP.
"""

from __future__ import annotations

from typing import Any

from ..errors import InvalidRequest


def vocabulary_rows(model: Any) -> int | None:
    """The rows of a model's table of embeddings; None where it has none (CANINE hashes characters)."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    rows = getattr(getattr(table, "base_layer", table), "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def check_vocabulary(highest: int, rows: int | None, field: str | None = None) -> None:
    """Refuse token ids up to `highest` where that is beyond the `rows` of the table.

    Raises:
        InvalidRequest: for the `field` that the ids come from.
    """
    if rows is not None and highest >= rows:
        where = "The text" if field is None else f"Invalid value for field '{field}': it"
        raise InvalidRequest(
            f"{where} holds a token that the model has no row for: its tokenizer gives it the id {highest}, and the "
            f"model's vocabulary has {rows} tokens",
            field,
        )


def guard_vocabulary(model: Any, tokenizer: Any) -> None:
    """Have the model itself refuse ids beyond its table, where its tokenizer can give such: in every task, and in what
    any library does with the model. Other models are left alone, since the check waits for the device.
    """
    rows = vocabulary_rows(model)
    known = tokenizer.get_vocab() if rows is not None else {}
    if rows is None or max(known.values(), default=0) < rows:
        return

    def check(_: Any, arguments: tuple[Any, ...]) -> None:
        if arguments and arguments[0].numel():
            check_vocabulary(int(arguments[0].max()), rows)

    table = model.get_input_embeddings()
    for module in model.modules():  # encoders and decoders have modules of their own around the same table
        if module is table or (hasattr(module, "num_embeddings") and module.weight is table.weight):
            module.register_forward_pre_hook(check)
