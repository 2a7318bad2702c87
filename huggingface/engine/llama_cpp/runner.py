"""Computes rows of tokens to logits by llama.cpp: the counterpart of `engine/torch/runner.py`.

All tokens of a step go to the library in one batch, prompts and decoding rows alike, each with its sequence and its
position. Engine's thread only. Must not know tickets, text or sampling.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

import torch
from torch.nn.functional import pad

from ..openvino.lazy_weights import Reserve
from ..slots import Lengths
from ..torch.runner import Piece
from . import library
from .cells import CellCache
from .team import Team


class LlamaRunner:
    """Computes rows from a GGUF file."""

    lengths = Lengths()
    copied_bytes = 0

    def __init__(
        self, path: Path, vocabulary: int, token_bytes: int, reserve: Reserve | None = None, *, half: bool = False
    ) -> None:
        """`vocabulary` is the number of the model's rows, `token_bytes` what one token's keys and values take.

        With `half`, keys and values are float16, else float32. `reserve` has the weights for what only the model's own
        modules can do.

        Raises:
            FileUnusable: llama.cpp cannot read or compute the file.
            LibraryUnusable: the library is missing, or of another version.
        """
        self._model = library.Model(path, half=half)
        self._team = Team(torch.get_num_threads())
        self._vocabulary = vocabulary
        self._known = min(self._model.vocabulary, vocabulary)  # a file may have fewer tokens, or more
        self._reserve = reserve
        self.cache = CellCache(self._model, token_bytes)

    def forward(
        self, pieces: Sequence[Piece], every: Callable[[int, torch.Tensor], None] = lambda *_: None
    ) -> torch.Tensor:
        """The logits that follow each row's last token, (rows, vocabulary), float32; the cache gets all rows' tokens.

        `every` is called with the index of each row that asks for all its logits, and with these: (tokens, vocabulary).
        """
        if self._reserve is not None:
            self._reserve.release_idle()
        banks: dict[int, list[int]] = defaultdict(list)
        for index, piece in enumerate(pieces):
            banks[piece.slot.bank.key].append(index)
        logits = torch.empty(len(pieces), self._vocabulary)
        logits[:, self._known :] = float("-inf")
        for bank, indices in banks.items():
            rows = self._compute(bank, [pieces[index] for index in indices])
            for index, row in zip(indices, rows, strict=True):
                logits[index, : self._known] = row[-1]
                if pieces[index].every:
                    every(index, pad(row, (0, self._vocabulary - self._known), value=float("-inf")))
        return logits

    def _compute(self, bank: int, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """The logits of each row's wanted tokens, (wanted, known), valid until the next call."""
        model, context = self._model, self.cache.context(bank)
        numbers = [self.cache.number(bank, piece.slot.row) for piece in pieces]
        # The library computes neighbours together if they come in their order.
        order = sorted(range(len(pieces)), key=numbers.__getitem__)
        work: list[tuple[int, int, int, bool]] = []  # token, place, sequence, whether its logits are wanted
        for index in order:
            piece, number = pieces[index], numbers[index]
            held = self.cache.hold(bank, number, piece.start)
            tokens = [*piece.slot.tokens[held : piece.start], *piece.tokens]
            kept = {piece.start + place for place in piece.kept}
            work += [(token, place, number, place in kept) for place, token in enumerate(tokens, held)]
        found, begin = [], 0
        while begin < len(work):
            end, outputs = begin, 0
            while end < min(len(work), begin + library.BATCH) and outputs + work[end][3] <= library.OUTPUTS:
                outputs += work[end][3]
                end += 1
            with self._team.step(end - begin) as threads:
                made = model.compute(context, work[begin:end], threads)
            if outputs:
                logits = torch.frombuffer(made, dtype=torch.float32).view(outputs, -1)[:, : self._known]
                found.append(logits if end == len(work) else logits.clone())
            begin = end
        rows = torch.split(found[0] if len(found) == 1 else torch.cat(found), [len(pieces[at].kept) for at in order])
        return [row for _, row in sorted(zip(order, rows, strict=True), key=itemgetter(0))]

    def restore_weights(self) -> None:
        """Loads the model's own weights, for use outside the batch.

        Raises:
            OutOfMemory: there is no room for them.
        """
        if self._reserve is not None:
            self._reserve.fetch()

    def release_idle(self) -> None:
        """Drops weights that were loaded on demand, after some time without requests."""
        if self._reserve is not None:
            self._reserve.unload()

    def close(self) -> None:
        """Drops the cache, the model and its own weights."""
        self.cache.drop_all()
        self.release_idle()
        self._model.close()
