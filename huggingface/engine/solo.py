"""Generations that have the model to themselves: beams, several sequences, and models that cannot be batched.

They run through the model's own `generate`, on the engine's thread, between the steps of the batch. Must not know the
queue or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..errors import Cancelled
from ..records import Chunk, FinishReason, Timings, Usage
from .detokenizer import TextStream
from .failures import typed
from .prepare import Prepared, blaming
from .sampling import SeededDraws


class _EachToken(StoppingCriteria):  # type: ignore[misc]
    """Ends the work as soon as the caller has given up: by raising, because a beam search goes on past a stop.

    `seen` is called with the tokens so far, (rows, tokens).
    """

    def __init__(self, cancelled: Callable[[], bool], seen: Callable[[torch.Tensor], None]) -> None:
        self._cancelled = cancelled
        self._seen = seen

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if self._cancelled():
            raise Cancelled
        self._seen(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Solo:
    """Generates with a transformers model's own `generate`, one request at a time."""

    def __init__(self, model_id: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model_id = model_id
        self._model = model
        self._tokenizer = tokenizer
        self._reads_answer = not model.config.is_encoder_decoder

    def generate(
        self,
        prepared: Prepared,
        streams: bool,
        submitted: float,
        emit: Callable[[Chunk], None],
        cancelled: Callable[[], bool],
    ) -> None:
        """Generate; `emit` gets text as it is made where it `streams` and there is one sequence without beams, and at
        least one chunk for each returned sequence, the last one with the counts. `submitted` is when it was asked for,
        a reading of `time.monotonic`.

        Raises:
            InvalidRequest: a parameter is one that this model cannot honour.
            Cancelled: `cancelled()` turned true meanwhile.
            Others as `failures.typed`.
        """
        with typed(self._model_id):
            self._generate(prepared, streams, submitted, emit, cancelled)

    def _generate(
        self,
        prepared: Prepared,
        streams: bool,
        submitted: float,
        emit: Callable[[Chunk], None],
        cancelled: Callable[[], bool],
    ) -> None:
        parameters, prompt_tokens = prepared.parameters, prepared.prompt_tokens
        started, first = time.monotonic(), 0.0
        text = TextStream(self._tokenizer, prepared.stops) if streams and self._one_path(prepared) else None

        def seen(input_ids: torch.Tensor) -> None:
            nonlocal first
            first = first or time.monotonic()
            if text is not None and (shown := text.add(int(input_ids[0, -1]))):
                emit(Chunk(shown))

        criteria = StoppingCriteriaList([_EachToken(cancelled, seen)])
        with blaming(parameters), torch.inference_mode(), self._draws(prepared):
            output = self._model.generate(
                **prepared.inputs,
                **prepared.arguments,
                logits_processor=prepared.processors,
                stopping_criteria=criteria,
            )
        rows = [self._finish(self._new_tokens(row, prompt_tokens), prepared) for row in output.tolist()]
        made = sum(count for _, _, count in rows)
        timings = Timings.of(submitted, started, first or started, time.monotonic(), made)
        for index, (whole, reason, _) in enumerate(rows):
            rest = text.finish()[0] if text is not None else whole
            if index < len(rows) - 1:
                emit(Chunk(rest, index, reason, whole=whole))
            else:
                emit(Chunk(rest, index, reason, Usage(prompt_tokens, made), parameters, timings, whole))

    def _draws(self, prepared: Prepared) -> AbstractContextManager[Any]:
        seed = prepared.parameters.get("seed")
        return nullcontext() if seed is None else SeededDraws(seed, self._model.device)

    def _new_tokens(self, row: list[int], prompt_tokens: int) -> list[int]:
        """The ids of a returned row that were made, without the prompt or the one token that started it."""
        return row[prompt_tokens if self._reads_answer and prompt_tokens else 1 :]

    def _finish(self, ids: list[int], prepared: Prepared) -> tuple[str, FinishReason, int]:
        """Text, why it ended, and how many tokens were made (the end token included, padding after it not)."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        count = next((index + 1 for index, token in enumerate(ids) if token in prepared.ends), None)
        found = [text.index(stop) for stop in prepared.stops if stop in text]
        if found:
            text = text[: min(found)]
        reason: FinishReason = "stop" if found or count is not None else "length"
        return text, reason, len(ids) if count is None else count

    def _one_path(self, prepared: Prepared) -> bool:
        """Whether the text grows token by token: one sequence, and no beams that may still lose."""
        own = self._model.generation_config
        asked = prepared.arguments
        return all(
            (asked.get(name) or getattr(own, name, 1) or 1) == 1 for name in ("num_beams", "num_return_sequences")
        )
