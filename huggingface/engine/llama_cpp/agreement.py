"""Tests at load whether llama.cpp computes what a GGUF file's unpacked model does, alone and in company.

Its products round the values that go into them, and by the number of rows another routine may add them up in another
order: so logits are compared within a share of their spread. A wrong mask, position, sequence or key of the file is
far beyond that. Called on the thread that prepares a model. Must not know files or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from ...cancellation import Cancellation
from ...errors import OutOfMemory
from ..borders import nearest, past
from ..layers import NotBatchable
from ..slots import SlotTable
from ..torch.parity import Expected, compare, room_for
from ..torch.runner import Piece
from .runner import LlamaRunner

# The largest difference of logits, as a share of their spread: where products round what goes into them to 8 bits, and
# where all is computed in at least 16.
CLOSE = 0.1
CLOSE_WIDE = 0.01

_LENGTHS = (24, 6, 9)  # tokens of the prompts: each load computes them, so they are short
_LONGEST = 1100  # the most tokens of a prompt that is made longer to go past a window
_NEW = 3


def sequences(config: PreTrainedConfig, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and the tokens that follow them; one goes past the nearest length at which the model changes, if that is
    near enough. Special tokens, at either end of the vocabulary, are left out."""
    text = config.get_text_config()
    first = max(_LENGTHS[0], past(text)) if nearest(text) <= _LONGEST else _LENGTHS[0]
    draws = torch.Generator().manual_seed(0)
    low, high = vocabulary // 8, max(vocabulary - vocabulary // 8, vocabulary // 8 + 1)
    whole = [torch.randint(low, high, (count + _NEW,), generator=draws).tolist() for count in (first, *_LENGTHS[1:])]
    return [(tokens[:-_NEW], tokens[-_NEW:]) for tokens in whole]


def check(
    runner: LlamaRunner,
    expected: Sequence[Expected],
    columns: torch.Tensor,
    close: float,
    cancellation: Cancellation,
    *,
    alone: bool = True,
) -> None:
    """Compares the runner's logits, of rows in company and, with `alone`, by themselves, with the unpacked model's.

    `columns` are the tokens whose logits are `expected`. `close` is `CLOSE` or `CLOSE_WIDE`.

    Raises:
        NotBatchable: they differ by more than rounding does, or are no numbers.
        OutOfMemory: there is no memory for their cache.
        Cancelled: by `cancellation`.
    """
    together = compare(expected, runner)
    cancellation.check()
    for row, found in zip(expected, together, strict=True):
        _check_close(found[:, columns], row.logits, close, "the unpacked model's")
        if alone:
            _check_close(_alone(runner, row), found, close, "those of rows in company")
        cancellation.check()


def _alone(runner: LlamaRunner, row: Expected) -> torch.Tensor:
    """The logits of a row that is computed by itself, its prompt in one piece."""
    table = SlotTable(runner.cache, room_for([row]))
    slot = table.take([], len(row.prompt) + len(row.tokens))
    if slot is None:
        raise OutOfMemory("Not enough memory for the KV cache of a trial")
    try:
        logits = [runner.forward([Piece(slot, row.prompt, 0)])[0].clone()]
        for place, token in enumerate(row.tokens[:-1], len(row.prompt)):
            logits.append(runner.forward([Piece(slot, [token], place)])[0].clone())
    finally:
        runner.cache.drop_all()
    return torch.stack(logits)


def _check_close(logits: torch.Tensor, wanted: torch.Tensor, close: float, whose: str) -> None:
    known = wanted.isfinite()
    spread = (wanted[known].max() - wanted[known].min()).clamp_min(1e-3)
    apart = (logits[known] - wanted[known]).abs().max() / spread
    if not apart <= close:  # NaN too
        raise NotBatchable(f"its logits lie {apart:.1%} of their spread from {whose}")
