"""Plans the next step: which waiting sequences are admitted, whose prompt goes on, and which sequences decode.

Integers only: sequences, slots, counts of tokens. Used on the engine's thread, under its lock where it changes the
queue. Must not know torch, text or HTTP.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from .sequence import Sequence
from .slots import SlotTable

_SHORT = 256  # tokens


@dataclass(frozen=True, slots=True)
class Row:
    """`tokens` of a sequence to compute, the first of them at position `start`."""

    sequence: Sequence
    tokens: tuple[int, ...]
    start: int

    @property
    def complete(self) -> bool:
        """Whether the sequence's next token can be sampled from this row's last logits."""
        return self.start + len(self.tokens) == len(self.sequence.tokens)


class Scheduler:
    """First come, first served, in a batch of bounded size."""

    def __init__(self, slots: SlotTable, max_batch: int) -> None:
        self._slots = slots
        self._max_batch = max_batch
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have a slot."""
        return [*self.decoding, *self.prefilling]

    @property
    def places(self) -> int:
        """How many more sequences the batch has room for."""
        return self._max_batch - len(self.decoding) - len(self.prefilling)

    @property
    def short_prompts(self) -> int:
        """How many short prompts are being read, not counting reused tokens.

        The end of a long prompt does not count: the decoding sequences have waited long enough for it.
        """
        return sum(1 for sequence in self.prefilling if len(sequence.tokens) - sequence.reused <= _SHORT)

    def admit(self) -> None:
        """Admits waiting sequences in order, as far as there are places and room in the cache."""
        self._restart()
        while self.waiting and self.places > 0:
            sequence = self.waiting[0]
            # Log-probabilities of the prompt need all of it computed.
            known = () if sequence.prompt_logprobs else sequence.tokens
            sequence.slot = self._slots.take(known, sequence.first_need, sequence.adapter, sequence.at_once)
            if sequence.slot is None:
                return
            self.waiting.popleft()
            if not sequence.admitted:  # otherwise it was put back, and continues
                sequence.admitted, sequence.reused = time.monotonic(), sequence.computed
            sequence.ticket.admitted()
            self.prefilling.append(sequence)

    def _restart(self) -> None:
        """Puts back the sequences that the model computes again from their first token on."""
        border = self._slots.lengths.restart
        if border is None:
            return
        for sequence in list(self.decoding):
            if sequence.at_once < border <= len(sequence.tokens):
                sequence.at_once = len(sequence.tokens)
                self._put_back(sequence)

    def make_room(self) -> Sequence | None:
        """Gives larger slots to the sequences that fill theirs. Where memory is short, the latest sequence has to wait.

        It is computed again as soon as there is room. Returns a sequence for which there is no room even alone.
        """
        for sequence in list(self.decoding):
            while sequence.cramped and sequence.slot is not None:
                if self._slots.grow(sequence.slot, sequence.first_need):
                    break
                latest = max(self.running, key=lambda each: each.admitted)
                if latest is sequence and len(self.running) == 1:
                    return sequence
                self._put_back(latest)
        return None

    def _put_back(self, sequence: Sequence) -> None:
        assert sequence.slot is not None  # noqa: S101 - it runs
        self._slots.release(sequence.slot)
        sequence.slot = None
        (self.decoding if sequence in self.decoding else self.prefilling).remove(sequence)
        self.waiting.appendleft(sequence)

    def plan(self, budget: int) -> tuple[Row, ...]:
        """The next step: a token for every decoding row, in the order of banks and rows, then chunks of prompts.

        The chunks have at most `budget` tokens together. The oldest prompt gets at least half of it; the shortest ones
        share the rest, so that a short prompt need not wait for a long one. Sequences that are not ready have no part
        in the step.
        """
        decoding = [sequence for sequence in self.decoding if sequence.ready]
        prefilling = [sequence for sequence in self.prefilling if sequence.ready]
        decode = sorted(decoding, key=lambda sequence: (sequence.slot.bank.key, sequence.slot.row))  # type: ignore[union-attr]
        rows = [Row(sequence, (sequence.tokens[-1],), len(sequence.tokens) - 1) for sequence in decode]
        chunks: dict[Sequence, int] = {}
        if prefilling:
            oldest = prefilling[0]
            chunks[oldest] = min(_left(oldest), budget if len(prefilling) == 1 else max(budget // 2, 1))
            budget -= chunks[oldest]
            for sequence in sorted(prefilling, key=_left):
                more = min(_left(sequence) - chunks.get(sequence, 0), budget)
                if more > 0:
                    chunks[sequence] = chunks.get(sequence, 0) + more
                    budget -= more
        return (*rows, *(_row(sequence, count) for sequence, count in chunks.items()))

    def computed(self, rows: Iterable[Row]) -> None:
        """Records that the rows' tokens are in the cache; prompts that are read decode from now on."""
        rows = list(rows)
        for row in rows:
            if row.sequence.slot is not None:
                row.sequence.slot.tokens.extend(row.tokens)
        # Only now: a row that makes way for another is moved with all its recorded tokens.
        for row in rows:
            if row.complete and row.sequence.slot is not None and not row.sequence.slot.decodes:
                self.prefilling.remove(row.sequence)
                self.decoding.append(row.sequence)
                self._slots.promote(row.sequence.slot)

    def drop(self, sequence: Sequence, *, clean: bool = True) -> None:
        """Removes a sequence from the batch or the queue; its slot is free from now on, and rests for reuse if `clean`.

        `clean` is false where the numbers in its slot cannot be trusted.
        """
        for group in (self.decoding, self.prefilling, self.waiting):
            if sequence in group:
                group.remove(sequence)
        if sequence.slot is not None:
            self._slots.release(sequence.slot, clean=clean)
            sequence.slot = None
        sequence.sampler.close()


def _left(sequence: Sequence) -> int:
    """Tokens of the prompt that are not computed yet."""
    return len(sequence.tokens) - sequence.computed


def _row(sequence: Sequence, count: int) -> Row:
    start = sequence.computed
    return Row(sequence, tuple(sequence.tokens[start : start + count]), start)
