"""One request's life in the batch: its tokens, its limits, where it stands, and why it ended.

Plain data and integers. Touched by the engine's thread only, once it is submitted; whoever waits for it holds its
ticket. Must not know torch: what draws its tokens and turns them into text is handed in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..types import Chunk, FinishReason, Timings, Token, Usage
from .slots import Slot
from .ticket import Ticket

_AHEAD = 128  # tokens that room is made for beyond those that are there


class Text(Protocol):
    """What turns tokens into text: see `detokenizer.TextStream`."""

    def add(self, token: int) -> str:
        """The text that may be shown now that `token` was made."""

    def finish(self) -> tuple[str, str]:
        """What is still to be shown, and the whole text."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""

    @property
    def stop(self) -> str | None:
        """The stop string that has come, where the text tells it."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what is made of it.

    `tokens` are the prompt's and the new ones; those that `slot.tokens` holds are computed. `most` is how many tokens
    there may be in all, `ends` are the token ids that end the text. `logprobs` is how many alternatives are to be told
    of each new token, None for no tokens at all; `prompt_logprobs` asks for the prompt's. Whoever draws puts these into
    `made_tokens` and `read_tokens`. `adapter` names whose numbers these are, None for the model's own. `at_once` is how
    many of the first tokens count as computed in one pass, whatever the chunks: the prompt's, or more since a restart.
    """

    tokens: list[int]
    prompt_tokens: int
    most: int
    ends: frozenset[int]
    ticket: Ticket
    text: Text
    sampler: Any
    parameters: Mapping[str, Any]
    streams: bool = False
    max_time: float | None = None  # seconds from its admission after which no further token is begun
    slot: Slot | None = None
    at_once: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    alone: bool = False  # whether its text begins without regard to the prompt's
    adapter: str | None = None
    made_tokens: list[Token] = field(default_factory=list)  # since the last chunk
    read_tokens: list[Token] = field(default_factory=list)
    told_prompt: bool = False
    unsaid: str | None = None  # what the last token shows, until its end of the text is known
    reused: int = 0  # tokens of the prompt that its first slot held already
    finished: FinishReason | None = None
    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first: float = 0.0

    def __post_init__(self) -> None:
        self.at_once = self.prompt_tokens

    @property
    def need(self) -> int:
        """Tokens that the cache must have room for: the last one made is never read back."""
        return max(self.most - 1, 1)

    @property
    def first_need(self) -> int:
        """Tokens that the cache must have room for to begin with; most texts end long before their limit."""
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
        """Whether its form has told what may follow the last token; it may do so at any moment."""
        return bool(self.sampler.settled)

    @property
    def ready(self) -> bool:
        """Whether its next token can be computed and drawn: the last one is said, and did not end the text."""
        return self.unsaid is None and self.settled

    def append(self, token: int) -> None:
        """Take the next token: show its text, and see whether it was the last one, as soon as its form tells."""
        if not self.first:
            self.first = time.monotonic()
        self.tokens.append(token)
        self.unsaid = self.text.add(token)
        if self.settled:
            self.settle()

    def settle(self) -> None:
        """Say what the last token shows, and end the text where that was the last one."""
        if self.unsaid is None:
            return
        now, shown, self.unsaid = time.monotonic(), self.unsaid, None
        token = self.tokens[-1]
        if token in self.ends or self.text.stopped or self.sampler.complete:
            self.finished = "stop"
        elif len(self.tokens) >= self.most or (self.max_time is not None and now - self.admitted > self.max_time):
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
        """The tokens that the next chunk tells of."""
        made, self.made_tokens = self.made_tokens, []
        prompt = [] if self.told_prompt else self.read_tokens
        self.told_prompt = True
        return {"tokens": made, "prompt": prompt}
