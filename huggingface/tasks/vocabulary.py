"""Checks token ids against a model's vocabulary: a tokenizer may know more tokens than the model has embeddings.

Gemma 3's tokenizer has one more than its text models, and tokens that are added by hand are often forgotten in the
model. An id beyond the table is torch's IndexError on a CPU, undefined under OpenVINO, and on CUDA a failed assertion,
after which the process cannot use CUDA again. So ids are checked before they are looked up. Any thread. Must not know
tasks, JSON or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InvalidRequest


class NoRow(Exception):
    """A token id beyond the rows of a model's table, whatever text it came from."""

    def __init__(self, token: int, rows: int) -> None:
        super().__init__(f"token {token} is beyond the {rows} rows of the table")
        self.token, self.rows = token, rows

    def refusal(self, field: str) -> InvalidRequest:
        """The error for a caller whose `field` holds the token."""
        return InvalidRequest(
            f"Invalid value for field '{field}': it holds a token that the model has no row for: its tokenizer gives "
            f"it the id {self.token}, and the model's vocabulary has {self.rows} tokens",
            field,
        )


def vocabulary_rows(model: Any) -> int | None:
    """The rows of a model's table of embeddings; None where it has none (CANINE hashes characters)."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    rows = getattr(getattr(table, "base_layer", table), "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def check_vocabulary(highest: int, rows: int | None, field: str | None = None) -> None:
    """Refuses token ids up to `highest` if it is beyond the table's `rows`.

    Raises:
        InvalidRequest: names the `field` that the ids come from.
        NoRow: if `field` is None.
    """
    if rows is not None and highest >= rows:
        error = NoRow(highest, rows)
        raise error if field is None else error.refusal(field)


def guard_vocabulary(model: Any, tokenizer: Any) -> None:
    """Lets the model itself refuse ids beyond its table, if its tokenizer can produce such ids.

    That covers every task, and whatever libraries do with the model. Other models are not checked, because the check
    waits for the device.
    """
    rows = vocabulary_rows(model)
    known = tokenizer.get_vocab() if rows is not None else {}
    if rows is None or max(known.values(), default=0) < rows:
        return

    def check(_: Any, arguments: tuple[Any, ...]) -> None:
        if arguments and arguments[0].numel():
            check_vocabulary(int(arguments[0].max()), rows)

    table = model.get_input_embeddings()
    for module in model.modules():  # encoders and decoders may have modules of their own around the same table
        if module is table or (hasattr(module, "num_embeddings") and module.weight is table.weight):
            module.register_forward_pre_hook(check)


def field_of(token: int, task: str, inputs: Any, parameters: Mapping[str, Any], tokenizer: Any) -> str:
    """The field of a task's call whose text holds a token: a parameter, a part of the inputs, or the inputs."""
    own = {"sentence-embeddings": "input", "rerank": "documents"}.get(task, "inputs")
    parts = inputs if isinstance(inputs, Mapping) else {}
    places = {name if task == "rerank" else f"{own}.{name}": value for name, value in parts.items()}
    for field, value in {**parameters, **places}.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and token in tokenizer.encode(text, add_special_tokens=False):
                return field
    return own
