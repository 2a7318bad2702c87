"""One request's life in the batch: its tokens, its limits, its state, and why it ended.

Plain data and integers. Only the engine's thread uses it once it is submitted; its caller holds the ticket. Must not
know torch: a sampler and a text object of the caller sample tokens and decode them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..types import Chunk, FinishReason, Timings, Token, Usage
from .slots import Slot
from .ticket import Ticket

_AHEAD = 128  # tokens for which room is made beyond the present ones


class Text(Protocol):
    """Turns tokens into text: see `detokenizer.TextStream`."""

    def add(self, token: int) -> str:
        """The text that may be shown after `token`."""

    def finish(self) -> tuple[str, str]:
        """The text still to be shown, and the whole text."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""

    @property
    def stop(self) -> str | None:
        """The stop string that was found, if the text reports it."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and the text generated from it.

    Attributes:
        tokens: the prompt's and the new ones; those in `slot.tokens` are computed.
        maximum: the most tokens in all.
        ends: the token ids that end the text.
        logprobs: how many alternatives each new token is reported with; None reports no tokens.
        prompt_logprobs: the prompt's tokens are reported too.
        made_tokens, read_tokens: the reported new tokens, and the prompt's; the batch adds them.
        adapter: the adapter that computes the sequence; None for the model itself.
        at_once: how many of the first tokens count as computed in one pass, whatever the chunks: the prompt's, or more
            since a restart.
    """

    tokens: list[int]
    prompt_tokens: int
    maximum: int
    ends: frozenset[int]
    ticket: Ticket
    text: Text
    sampler: Any
    parameters: Mapping[str, Any]
    streams: bool = False
    max_time: float | None = None  # seconds from its admission after which no further token is started
    slot: Slot | None = None
    at_once: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    alone: bool = False  # whether its text begins without the prompt's
    adapter: str | None = None
    made_tokens: list[Token] = field(default_factory=list)  # since the last chunk
    read_tokens: list[Token] = field(default_factory=list)
    told_prompt: bool = False
    unsaid: str | None = None  # the last token's text, until it is known whether it ends the text
    reused: int = 0  # tokens of the prompt that its first slot held already
    finished: FinishReason | None = None
    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first: float = 0.0

    def __post_init__(self) -> None:
        self.at_once = self.prompt_tokens

    @property
    def need(self) -> int:
        """Tokens for which the cache must have room: the last one is never read back."""
        return max(self.maximum - 1, 1)

    @property
    def first_need(self) -> int:
        """Tokens for which the cache must have room at first; most texts end long before their limit."""
        return min(self.need, len(self.tokens) + _AHEAD)

    @property
    def cramped(self) -> bool:
        """Whether its slot has no room for the next token."""
        return self.slot is not None and len(self.slot.tokens) >= self.slot.bank.capacity

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return len(self.slot.tokens) if self.slot is not None else 0

    @property
    def made(self) -> int:
        """New tokens so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def settled(self) -> bool:
        """Whether its constraint has computed which tokens may follow; that may happen at any moment."""
        return bool(self.sampler.settled)

    @property
    def ready(self) -> bool:
        """Whether its next token can be computed and sampled: the last one is delivered, and did not end the text."""
        return self.unsaid is None and self.settled

    def append(self, token: int) -> None:
        """Takes the next token; delivers its text once the constraint says whether it was the last one."""
        if not self.first:
            self.first = time.monotonic()
        self.tokens.append(token)
        self.unsaid = self.text.add(token)
        if self.settled:
            self.settle()

    def settle(self) -> None:
        """Delivers the last token's text, and ends the sequence if that token ends it."""
        if self.unsaid is None:
            return
        now, shown, self.unsaid = time.monotonic(), self.unsaid, None
        token = self.tokens[-1]
        if token in self.ends or self.text.stopped or self.sampler.complete:
            self.finished = "stop"
        elif len(self.tokens) >= self.maximum or (self.max_time is not None and now - self.admitted > self.max_time):
            self.finished = "length"
        self.ticket.made = self.made
        if self.finished:
            self._finish(now, shown)
        elif self.streams and (shown or self.logprobs is not None):
            so_far = Usage(self.prompt_tokens, self.made, self.reused)
            self.ticket.put(Chunk(shown, so_far=so_far, **self._tokens()))

    def _finish(self, now: float, shown: str) -> None:
        rest, whole = self.text.finish()
        usage = Usage(self.prompt_tokens, self.made, self.reused)
        timings = Timings.of(self.submitted, self.admitted, self.first, now, self.made)
        text = shown + rest if self.streams else whole
        self.ticket.put(
            Chunk(text, 0, self.finished, usage, self.parameters, timings, whole, stop=self.text.stop, **self._tokens())
        )
        self.ticket.finish()

    def _tokens(self) -> dict[str, Any]:
        """The tokens that the next chunk reports."""
        made, self.made_tokens = self.made_tokens, []
        prompt = [] if self.told_prompt else self.read_tokens
        self.told_prompt = True
        return {"tokens": made, "prompt": prompt}
