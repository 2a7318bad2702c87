"""Runs the prompts of one call as rows of the batch, a few at a time; it needs their tokens, not their text.

Called on the caller's own thread, which waits here. Must not know tasks, pipelines or HTTP: the call reads the prompts
and uses the tokens.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from ..cancellation import LOOK_AGAIN, Cancellation
from ..errors import OutOfMemory, QueueFull
from .engine import Engine
from .input_processor import Resolved, fits_a_row
from .sampling import Sampler
from .sequence import Sequence
from .ticket import Ticket

# How many prompts of a call wait in the engine's queue at once: the rest of the queue is for other callers.
_QUEUED = 8


class Call(Protocol):
    """A call that needs the tokens: see `tasks.text_generation.TextGenerationCall`."""

    count: int
    stopped: Callable[[abc.Sequence[int]], bool] | None

    def start(self, index: int, custom_generate: Callable[..., Any]) -> None:
        """Calls the model's `generate` for a prompt, with `custom_generate` in place of its loop."""

    def finish(self, index: int, tokens: abc.Sequence[int]) -> None:
        """Takes a prompt's tokens: its own and the new ones."""


class _Tokens:
    """Stands in for a sequence's text, and only checks whether the text ends."""

    def __init__(self, prompt: abc.Sequence[int], stopped: Callable[[abc.Sequence[int]], bool] | None) -> None:
        self.all = list(prompt)
        self.stopped = False
        self.stop = None  # the task does not report which one
        self._stopped = stopped

    def add(self, token: int) -> str:
        """Takes a token; returns no text."""
        self.all.append(token)
        if self._stopped is not None:
            self.stopped = self._stopped(self.all)
        return ""

    def finish(self) -> tuple[str, str]:
        """No text."""
        return "", ""


class _Told(Ticket):
    """A ticket that notifies its reader, which waits for many, when it is admitted and when it is done."""

    def __init__(self, prompt_tokens: int, cancellation: Cancellation, told: SimpleQueue[None]) -> None:
        super().__init__(prompt_tokens, cancellation=cancellation)
        self._told = told

    def admitted(self) -> None:
        """Marks the request as running."""
        super().admitted()
        self._told.put(None)

    def finish(self, error: BaseException | None = None) -> None:
        """Marks the end of the chunks."""
        super().finish(error)
        self._told.put(None)


@dataclass(frozen=True, slots=True)
class _Row:
    """A prompt in the batch."""

    sequence: Sequence
    tokens: _Tokens

    @property
    def waits(self) -> bool:
        return self.sequence.ticket.position is not None


def run_in_batch(
    call: Call,
    engine: Engine,
    *,
    maximum: int,
    context: int | None,
    cancellation: Cancellation,
    check_vocabulary: Callable[[int, str], None] = lambda *_: None,
    adapter: str | None = None,
) -> bool:
    """Generates the tokens of all prompts of `call` in the batch; False if the call must be computed whole instead.

    At most `maximum` prompts are in the batch at once. The batch cannot do what needs more than one plain row of
    `generate`, or goes beyond the `context` (tokens) or the cache. `adapter` is one of the model's adapters, None the
    model itself. `check_vocabulary` refuses a field's highest token id if the model has no row for it.

    Raises:
        QueueFull: the queue is full; only before the first prompt, later prompts wait for room.
        Cancelled: by `cancellation`, or the engine is being closed.
        LocalLLMError: the error of a prompt; the other prompts are cancelled.
    """
    told: SimpleQueue[None] = SimpleQueue()
    running: dict[int, _Row] = {}
    begun, ready = 0, None
    try:
        while begun < call.count or running:
            while (
                begun < call.count and len(running) < maximum and sum(row.waits for row in running.values()) < _QUEUED
            ):
                ready = ready or _row(call, begun, context, cancellation, told, check_vocabulary, adapter)
                if ready is None:
                    return False
                try:
                    engine.submit(ready.sequence)
                except OutOfMemory:
                    return False
                except QueueFull:
                    if not begun:
                        raise
                    break
                running[begun], ready = ready, None
                begun += 1
            with suppress(Empty):
                told.get(timeout=LOOK_AGAIN)
            cancellation.check()
            for index in [index for index, row in running.items() if row.sequence.ticket.done]:
                list(running[index].sequence.ticket)  # raises the error that ended it
                call.finish(index, running.pop(index).tokens.all)
        return True
    finally:
        for row in running.values():
            row.sequence.ticket.cancel()


def _row(
    call: Call,
    index: int,
    context: int | None,
    cancellation: Cancellation,
    told: SimpleQueue[None],
    check_vocabulary: Callable[[int, str], None],
    adapter: str | None,
) -> _Row | None:
    """Creates the row that gives a prompt what `generate` would; None where the batch cannot."""
    resolved, masked = _resolve(call, index)
    config = resolved.config
    if masked or _tells_more(config) or not fits_a_row(resolved):
        return None
    # Beyond the context some models count positions differently, for all rows of a step.
    if context is not None and config.max_length - 1 > context:
        return None
    prompt: list[int] = resolved.input_ids[0].tolist()
    check_vocabulary(max(prompt, default=0), "inputs")
    ends = config._eos_token_tensor
    tokens = _Tokens(prompt, call.stopped)
    sequence = Sequence(
        tokens=prompt,
        prompt_tokens=len(prompt),
        maximum=config.max_length,
        ends=frozenset() if ends is None else frozenset(ends.tolist()),
        ticket=_Told(len(prompt), cancellation, told),
        text=tokens,
        sampler=Sampler(resolved.input_ids, config.max_length, resolved.processors, bool(config.do_sample), None),
        parameters={},
        max_time=config.max_time,
        adapter=adapter,
    )
    return _Row(sequence, tokens)


def _resolve(call: Call, index: int) -> tuple[Resolved, bool]:
    """What `generate` makes of its arguments just before its loop, and whether its mask hides tokens.

    See `input_processor.Preparer.resolve`.
    """
    caught: list[tuple[Resolved, bool]] = []

    def take(
        model: Any,  # noqa: ARG001 - the signature that `generate` calls
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,  # noqa: ARG001
        generation_config: Any,
        **others: Any,
    ) -> Any:
        mask = others.get("attention_mask")
        masked = mask is not None and not bool((mask == 1).all())
        caught.append((Resolved(input_ids, logits_processor, generation_config), masked))
        return input_ids

    call.start(index, take)
    return caught[0]


def _tells_more(config: Any) -> bool:
    """Whether the model's own settings make `generate` return more than tokens."""
    more = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    return bool(config.return_dict_in_generate) and any(getattr(config, name, False) for name in more)
