"""Generations that have the model to themselves: beams, several sequences, and models that cannot be batched.

They run through the model's own `generate`, on the engine's thread, between the steps of the batch. Must not know the
queue or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..cancellation import Cancellation
from ..modeling.demand import MemoryClaims
from ..modeling.steps import SomeToken, watched
from ..modeling.stopping import each_token
from ..types import Chunk, FinishReason, Timings, Token, Usage
from .detokenizer import TextStream
from .failures import typed
from .input_processor import Prepared, blaming
from .logprobs import TokenTexts
from .sampling import SeededDraws


def unset(model: Any) -> list[tuple[dict[str, Any], str]]:
    """The attributes that the loaded modules have not set yet: some keep a state there beside the cache."""
    return [
        (vars(module), name)
        for module in model.modules()
        for name, value in vars(module).items()
        if value is None and not name.startswith("_")
    ]


class Solo:
    """Generates with a transformers model's own `generate`, one request at a time."""

    def __init__(
        self,
        model_id: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: TokenTexts,
        claims: MemoryClaims,
        active: Callable[[str | None], AbstractContextManager[Any]] = nullcontext,
        unset: Sequence[tuple[dict[str, Any], str]] = (),
    ) -> None:
        """`claims` claims the memory of a generation; `active` lets the model answer as one of its adapters, by name.
        The attributes in `unset` are reset before each generation, so that none continues another."""
        self._model_id = model_id
        self._texts = texts
        self._claims = claims
        self.model = model
        self._tokenizer = tokenizer
        self._active = active
        self._unset = unset
        self._reads_answer = not model.config.is_encoder_decoder

    def generate(
        self,
        prepared: Prepared,
        streams: bool,
        submitted: float,
        emit: Callable[[Chunk], None],
        cancellation: Cancellation,
    ) -> None:
        """Generates. `emit` gets text as it is generated where it `streams` and there is one sequence without beams.

        It gets at least one chunk for each returned sequence; the last chunk has the counts. `submitted` is when the
        request arrived, a reading of `time.monotonic`.

        Raises:
            InvalidRequest: this model cannot honour a parameter, or there is never enough memory for it.
            Cancelled: by `cancellation`.
            Otherwise as `failures.typed`.
        """
        with (
            typed(self._model_id),
            self._active(prepared.adapter),
            watched(self.model, self._model_id),
            self._claims.held(prepared.asked) as reached,
        ):
            self._generate(prepared, streams, submitted, emit, cancellation, reached)

    def _generate(
        self,
        prepared: Prepared,
        streams: bool,
        submitted: float,
        emit: Callable[[Chunk], None],
        cancellation: Cancellation,
        reached: Callable[[int], None],
    ) -> None:
        for attributes, name in self._unset:
            if isinstance(attributes.get(name), torch.Tensor):
                attributes[name] = None
        parameters, prompt_tokens = prepared.parameters, prepared.prompt_tokens
        started, first = time.monotonic(), 0.0
        text = None
        if streams and prepared.asked.rows == 1:  # otherwise it is one of several, or a beam that may still lose
            text = self._text(prepared)

        constrained = prepared.constrained

        def seen(input_ids: torch.Tensor) -> torch.Tensor | None:
            nonlocal first
            first = first or time.monotonic()
            reached(input_ids.shape[1])
            if text is not None and (shown := text.add(int(input_ids[0, -1]))):
                emit(Chunk(shown, so_far=Usage(prompt_tokens, len(self._new_tokens(input_ids[0], prompt_tokens)))))
            if constrained is None:
                return None
            constrained.catch_up(input_ids)
            return torch.tensor(constrained.complete)  # a row whose constrained text is complete ends

        processors = LogitsProcessorList([*prepared.processors, SomeToken(beams=prepared.asked.searches)])
        with blaming(parameters), torch.inference_mode(), self._draws(prepared):
            output = self.model.generate(
                **prepared.inputs,
                **prepared.arguments,
                logits_processor=processors,
                stopping_criteria=each_token(cancellation, seen),
                return_dict_in_generate=True,
                output_logits=prepared.logprobs is not None,
            )
            prompt = self._prompt_tokens(prepared)
        ids = [self._new_tokens(row, prompt_tokens) for row in output.sequences.tolist()]
        rows = [self._finish(new, prepared) for new in ids]
        made = sum(count for _, _, count, _ in rows)
        tokens: list[list[Token]] = [[] for _ in rows]
        if prepared.logprobs is not None:
            for index, (_, _, count, _) in enumerate(rows):
                logits = torch.stack([step[index] for step in output.logits[:count]])  # (new tokens, vocabulary)
                tokens[index] = self._texts.tokens(
                    ids[index][:count], logits, prepared.logprobs, opens=prepared.begin == "alone"
                )
        timings = Timings.of(submitted, started, first or started, time.monotonic(), made)
        for index, (whole, reason, _, stop) in enumerate(rows):
            rest = text.finish()[0] if text is not None else whole
            before = prompt if not index else ()
            chunk = Chunk(rest, index, reason, whole=whole, tokens=tokens[index], prompt=before, stop=stop)
            if index == len(rows) - 1:
                chunk = replace(chunk, usage=Usage(prompt_tokens, made), parameters=parameters, timings=timings)
            emit(chunk)

    def _prompt_tokens(self, prepared: Prepared) -> list[Token]:
        """The prompt's tokens and how likely the model finds them, where the request asks for them."""
        if not prepared.prompt_logprobs or not prepared.inputs:
            return []
        ids = prepared.inputs["input_ids"][0].tolist()
        logits = self.model(**prepared.inputs).logits[0, :-1]
        opens = not self._texts.shows(ids[:1])
        following = self._texts.tokens(ids[1:], logits, prepared.logprobs or 0, opens=opens)
        return [self._texts.token(ids[0], opens=not opens), *following]

    def _draws(self, prepared: Prepared) -> AbstractContextManager[Any]:
        seed = prepared.parameters.get("seed")
        return nullcontext() if seed is None else SeededDraws(seed, self.model.device)

    def _new_tokens(self, row: Any, prompt_tokens: int) -> Any:
        """The generated ids of a returned row, without the prompt or the one token that started it."""
        return row[prompt_tokens if self._reads_answer and prompt_tokens else 1 :]

    def _finish(self, ids: list[int], prepared: Prepared) -> tuple[str, FinishReason, int, str | None]:
        """Text, finish reason, count of generated tokens (with the end token, without padding), and stop string."""
        text, stop = self._text(prepared).whole(ids)
        count = next((index + 1 for index, token in enumerate(ids) if token in prepared.ends), None)
        whole = prepared.constrained is not None and any(prepared.constrained.complete)
        reason: FinishReason = "stop" if stop or count is not None or whole else "length"
        return text, reason, len(ids) if count is None else count, stop

    def _text(self, prepared: Prepared) -> TextStream:
        prompt = prepared.inputs["input_ids"][0].tolist() if self._reads_answer and prepared.inputs else []
        return TextStream(self._tokenizer, prepared.stops, prompt, prepared.special_tokens, prepared.begin)
