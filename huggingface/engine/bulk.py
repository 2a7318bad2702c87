"""The prompts of one call as rows of the batch, a few of them at a time: their tokens are wanted, and no text.

Called on the caller's own thread, which waits here for them. Must not know tasks, pipelines or HTTP: how a prompt is
read, and what becomes of its tokens, the call knows.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from ..cancellation import LOOK_AGAIN, Cancellation
from ..errors import OutOfMemory, QueueFull
from .engine import Engine
from .input_processor import Settled, fits_a_row
from .sampling import Sampler
from .sequence import Sequence
from .ticket import Ticket

# How many prompts of a call wait in the engine's queue at once: the rest of it is for other callers.
_QUEUED = 8


class Call(Protocol):
    """What asks for the tokens: see `tasks.text_generation.TextGenerationCall`."""

    count: int
    stopped: Callable[[Many[int]], bool] | None

    def start(self, index: int, custom_generate: Callable[..., Any]) -> None:
        """Have the model's `generate` called for a prompt, with this in place of its loop."""

    def finish(self, index: int, tokens: Many[int]) -> None:
        """Take the tokens of a prompt, its own and the new ones."""


class _Tokens:
    """Stands where the text of a sequence would be made, and only looks whether it is to end."""

    def __init__(self, prompt: Many[int], stopped: Callable[[Many[int]], bool] | None) -> None:
        self.all = list(prompt)
        self.stopped = False
        self.stop = None  # which one, the task does not tell
        self._stopped = stopped

    def add(self, token: int) -> str:
        """No text, whatever comes."""
        self.all.append(token)
        if self._stopped is not None:
            self.stopped = self._stopped(self.all)
        return ""

    def finish(self) -> tuple[str, str]:
        """No text."""
        return "", ""


class _Told(Ticket):
    """A ticket that tells when it is admitted, and when it is done: its reader waits for many."""

    def __init__(self, prompt_tokens: int, cancellation: Cancellation, told: SimpleQueue[None]) -> None:
        super().__init__(prompt_tokens, cancellation=cancellation)
        self._told = told

    def admitted(self) -> None:
        """Say that it runs from now on."""
        super().admitted()
        self._told.put(None)

    def finish(self, error: BaseException | None = None) -> None:
        """Say that no chunk will follow."""
        super().finish(error)
        self._told.put(None)


@dataclass(frozen=True, slots=True)
class _Row:
    """A prompt on its way."""

    sequence: Sequence
    tokens: _Tokens

    @property
    def waits(self) -> bool:
        return self.sequence.ticket.position is not None


def run_in_batch(
    call: Call,
    engine: Engine,
    *,
    most: int,
    context: int | None,
    cancellation: Cancellation,
    check_vocabulary: Callable[[int, str], None] = lambda *_: None,
    adapter: str | None = None,
) -> bool:
    """Have the batch make the tokens of all prompts of `call`; False where it cannot, and the call is to be done whole.

    At most `most` of them are in the batch at once. It cannot where `generate` would do more than one plain row, nor
    beyond the `context`, a number of tokens, or the cache. `adapter` names one of the model's, None is itself.
    `check_vocabulary` refuses the highest token id of a field where the model has no row for it.

    Raises:
        QueueFull: as many wait as may; only before the first prompt, the others of a call wait for room.
        Cancelled: by `cancellation`, or the engine is being closed.
        LocalLLMError: what a prompt failed of; the others are given up.
    """
    told: SimpleQueue[None] = SimpleQueue()
    running: dict[int, _Row] = {}
    begun, ready = 0, None
    try:
        while begun < call.count or running:
            while begun < call.count and len(running) < most and sum(row.waits for row in running.values()) < _QUEUED:
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
                list(running[index].sequence.ticket)  # raises what ended it
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
    """The row that gives a prompt what `generate` would; None where the batch cannot."""
    settled, masked = _settle(call, index)
    config = settled.config
    if masked or _tells_more(config) or not fits_a_row(settled):
        return None
    # Beyond the context some models change how they count positions, for all rows of a step.
    if context is not None and config.max_length - 1 > context:
        return None
    prompt: list[int] = settled.input_ids[0].tolist()
    check_vocabulary(max(prompt, default=0), "inputs")
    ends = config._eos_token_tensor
    tokens = _Tokens(prompt, call.stopped)
    sequence = Sequence(
        tokens=prompt,
        prompt_tokens=len(prompt),
        most=config.max_length,
        ends=frozenset() if ends is None else frozenset(ends.tolist()),
        ticket=_Told(len(prompt), cancellation, told),
        text=tokens,
        sampler=Sampler(settled.input_ids, config.max_length, settled.processors, bool(config.do_sample), None),
        parameters={},
        max_time=config.max_time,
        adapter=adapter,
    )
    return _Row(sequence, tokens)


def _settle(call: Call, index: int) -> tuple[Settled, bool]:
    """What `generate` makes of its arguments just before it starts, and whether it leaves tokens out of the attention.

    See `input_processor.Preparer.settle`.
    """
    caught: list[tuple[Settled, bool]] = []

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
        caught.append((Settled(input_ids, logits_processor, generation_config), masked))
        return input_ids

    call.start(index, take)
    return caught[0]


def _tells_more(config: Any) -> bool:
    """Whether the model's own settings have `generate` give more than tokens."""
    more = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    return bool(config.return_dict_in_generate) and any(getattr(config, name, False) for name in more)
