"""The batch of one transformers model: its runner, its slots, and the sampling of tokens.

The part of the engine that knows tensors; only the engine's thread uses it. Must not know queues, tickets or HTTP.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..errors import LocalLLMError
from ..types import EngineOptions
from .constraints import settle
from .detokenizer import TextStream
from .failures import typed
from .input_processor import Prepared, Resolved
from .logprobs import TokenTexts
from .sampling import Sampler, sample
from .scheduler import Row
from .sequence import Sequence
from .slots import Lengths, SlotTable, Store
from .ticket import Ticket
from .torch.runner import Piece


class Cache(Store, Protocol):
    """The store of a runner's rows."""

    token_bytes: int  # bytes of one token's keys and values
    take: Callable[[str, int], bool]  # asks for bytes on a device, or gives back a negative number

    def drop_all(self) -> None:
        """Gives all memory back."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all banks."""


class Runner(Protocol):
    """Computes rows: `runner.BatchRunner` with torch, `openvino.runner.OpenVINORunner` with OpenVINO."""

    @property
    def cache(self) -> Cache:
        """The store of the rows."""

    @property
    def lengths(self) -> Lengths:
        """How results depend on the lengths of texts."""

    def forward(
        self, pieces: abc.Sequence[Piece], every: Callable[[int, torch.Tensor], None] = lambda *_: None
    ) -> torch.Tensor:
        """The logits that follow each row's last token, (rows, vocabulary), float32, valid until the next call."""

    @property
    def copied_bytes(self) -> int:
        """Bytes of weights that have a copy in another layout."""

    def restore_weights(self) -> None:
        """Restores the model itself for use outside the batch."""

    def release_idle(self) -> None:
        """Drops weights that were loaded on demand."""

    def close(self) -> None:
        """Drops the model and the cache."""


class TransformersBatch:
    """Turns rows into tokens."""

    def __init__(self, model_id: str, runner: Runner, texts: TokenTexts, options: EngineOptions) -> None:
        self._model_id = model_id
        self._texts = texts
        self._runner = runner
        self.slots = SlotTable(runner.cache, options.kv_cache_bytes // runner.cache.token_bytes, runner.lengths)

    def forward(self, rows: abc.Sequence[Row]) -> torch.Tensor:
        """The logits that follow each row's last token, (rows, vocabulary), float32.

        Raises: as `failures.typed`.
        """
        pieces = [
            Piece(sequence.slot, row.tokens, row.start, _wants_prompt(row), sequence.adapter, sequence.at_once)
            for row in rows
            if (sequence := row.sequence).slot is not None
        ]
        with typed(self._model_id):
            logits = self._runner.forward(pieces, lambda index, logits: self._note_prompt(rows[index], logits))
            if logits.is_cuda and not any(row.complete for row in rows):
                # No token is sampled, which would wait for the device, but the engine measures each step's time.
                torch.cuda.synchronize(logits.device)
            return logits

    def sample(self, rows: abc.Sequence[Row], logits: torch.Tensor) -> list[int | LocalLLMError]:
        """The next token of each complete row, or an error; 0 for rows that are not complete."""
        complete = [index for index, row in enumerate(rows) if row.complete]
        if len(complete) < len(rows):
            logits = logits[complete]
        sampled: list[int | LocalLLMError] = [0] * len(rows)
        samplers = [rows[index].sequence.sampler for index in complete]
        for index, token in zip(complete, sample(logits, samplers, self._model_id), strict=True):
            sampled[index] = token
        for index, row_logits in zip(complete, logits, strict=True):
            sequence, made = rows[index].sequence, sampled[index]
            if sequence.logprobs is not None and isinstance(made, int):
                opens = sequence.alone and not self._texts.shows(sequence.tokens[sequence.prompt_tokens :])
                sequence.made_tokens += self._texts.tokens([made], row_logits[None], sequence.logprobs, opens=opens)
        return sampled

    def settle(self, sequences: abc.Sequence[Sequence], seconds: float) -> None:
        """Waits until the constraints of all sequences are settled, or for `seconds`."""
        settle((each.sampler.constrained for each in sequences if each.sampler.constrained is not None), seconds)

    def _note_prompt(self, row: Row, logits: torch.Tensor) -> None:
        """Records how likely the model found the prompt's tokens that follow a chunk's: `logits`, (chunk, vocabulary).

        A chunk that is computed again, because another row failed, is recorded once.
        """
        sequence = row.sequence
        noted = sequence.read_tokens
        if not noted:
            noted.append(self._texts.token(sequence.tokens[0], opens=self._texts.shows(sequence.tokens[:1])))
        following = sequence.tokens[len(noted) : min(row.start + len(row.tokens) + 1, sequence.prompt_tokens)]
        first = len(noted) - 1 - row.start  # index of the logits for the first of them
        if following:
            opens = not self._texts.shows(sequence.tokens[: len(noted)])
            logits = logits[first : first + len(following)]
            noted += self._texts.tokens(following, logits, sequence.logprobs or 0, opens=opens)

    def restore_weights(self) -> None:
        """Restores the model itself for use outside the batch."""
        self._runner.restore_weights()

    def release_idle(self) -> None:
        """Drops weights that were loaded on demand."""
        self._runner.release_idle()

    def close(self) -> None:
        """Drops the model and the cache."""
        self._runner.close()

    @property
    def allocated_bytes(self) -> int:
        """Allocated bytes of the KV cache."""
        return self._runner.cache.allocated_bytes


def _wants_prompt(row: Row) -> bool:
    sequence = row.sequence
    return sequence.prompt_logprobs and len(sequence.read_tokens) < sequence.prompt_tokens


def sequence_of(prepared: Prepared, resolved: Resolved, tokenizer: Any, ticket: Ticket, streams: bool) -> Sequence:
    """Creates the sequence with which the batch gives a request what `generate` would."""
    config = resolved.config
    tokens: list[int] = resolved.input_ids[0].tolist()
    ends = config._eos_token_tensor
    seed = prepared.parameters.get("seed")
    return Sequence(
        tokens=tokens,
        prompt_tokens=len(tokens),
        maximum=config.max_length,
        ends=frozenset() if ends is None else frozenset(ends.tolist()),
        ticket=ticket,
        text=TextStream(tokenizer, prepared.stops, tokens, prepared.special_tokens, prepared.begin),
        sampler=Sampler(resolved.input_ids, config.max_length, resolved.processors, bool(config.do_sample), seed),
        parameters=prepared.parameters,
        streams=streams,
        max_time=config.max_time,
        logprobs=prepared.logprobs,
        prompt_logprobs=prepared.prompt_logprobs,
        alone=prepared.begin == "alone",
        adapter=prepared.adapter,
    )
