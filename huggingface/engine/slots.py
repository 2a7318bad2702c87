"""Which sequence sits where in the KV cache: the bookkeeping, in integers, of what `cache.py` holds in tensors.

A bank is a block of rows of one capacity (tokens a row). The rows of sequences that decode stand first in their bank,
so that one view of its tensors holds them all; behind them come those that prefill, those that rest (their sequence has
ended, and its tokens are kept for the next prompt that begins alike), and free rows. Used on the engine's thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

SMALLEST = 256  # tokens a row, at least: finer steps would only make more banks
_BANK_ROWS = 16  # rows that a bank gets, where a quarter of the cache has room for them
_SAME = 0.8  # a resting row is continued in place if this share of it is shared; else the shared part is copied


class Store(Protocol):
    """What holds the rows: the tensors, or in a test anything that can tell what it was told."""

    def create(self, bank: int, rows: int, capacity: int) -> bool:
        """Make an empty bank; False if there is no memory for it just now."""

    def drop(self, bank: int) -> None:
        """Give a bank's memory back."""

    def copy(self, source: tuple[int, int], target: tuple[int, int], tokens: int) -> None:
        """Copy the first `tokens` tokens of a row, named by bank and row, to another."""

    def swap(self, bank: int, one: int, other: int, tokens: int) -> None:
        """Exchange the first `tokens` tokens of two rows of a bank."""

    def clear(self, bank: int, row: int) -> None:
        """Overwrite a row that may hold anything, NaN included, with zeros."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """What a model makes of the length of a text, besides the positions of its tokens.

    `table` names the numbers that tokens are computed with in one pass over so many of them: what was computed with
    others is of no use. From `restart` tokens on, a text that grows to them is computed again as a whole.
    """

    table: Callable[[int], Hashable] = lambda _: None
    restart: int | None = None


@dataclass(slots=True, eq=False)
class Bank:
    """A block of rows. Rows `[0, decoding)` are those of sequences that decode."""

    key: int
    capacity: int
    rows: list[Slot | None]
    decoding: int = 0

    @property
    def busy(self) -> bool:
        """Whether some row belongs to a sequence that is not done."""
        return any(slot is not None and slot.taken for slot in self.rows)


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence's row. `tokens` are those whose keys and values it holds, from position 0 on.

    They are the numbers of `adapter`, None for the model's own, and of a `table` of `Lengths`: of use to no others.
    """

    bank: Bank
    row: int
    tokens: list[int] = field(default_factory=list)
    taken: bool = True
    used: int = 0  # the tick of its last use
    adapter: str | None = None
    table: Hashable = None

    @property
    def decodes(self) -> bool:
        """Whether it stands among the rows that decode."""
        return self.row < self.bank.decoding


class SlotTable:
    """Hands out slots within a limit of tokens, least recently used ones first, and finds prefixes to reuse."""

    def __init__(self, store: Store, limit: int, lengths: Lengths | None = None) -> None:
        """`limit` is how many tokens all banks together may have room for."""
        self.lengths = lengths or Lengths()
        self._store = store
        self._limit = limit
        self._banks: list[Bank] = []
        self._next_key = 0
        self._tick = 0

    def fits(self, need: int) -> bool:
        """Whether a sequence of `need` tokens could be served at all, with nobody else there."""
        return _capacity(need) <= self._limit

    @property
    def allocated(self) -> int:
        """Tokens that the banks have room for."""
        return sum(bank.capacity * len(bank.rows) for bank in self._banks)

    @property
    def taken(self) -> int:
        """Slots of sequences that are not done."""
        return sum(1 for slot in self._slots() if slot.taken)

    @property
    def resting(self) -> int:
        """Slots that are kept for reuse."""
        return sum(1 for slot in self._slots() if not slot.taken)

    def take(self, prompt: Sequence[int], need: int, adapter: str | None = None, at_once: int = 0) -> Slot | None:
        """A slot for a sequence of at most `need` tokens, with as much of `prompt` in it as is to be had; or None.

        What other adapters have made of the prompt is not to be had, nor what was made of it in a pass that counts as
        one of another length than `at_once`.

        At least one token of the prompt is left to compute: its logits are what the first new token is drawn from.
        """
        self._tick += 1
        capacity = _capacity(need)
        table = self.lengths.table(at_once)
        source, shared = self._best_prefix(prompt, adapter, table)
        if source is not None and self._in_place(source, shared, capacity):
            slot: Slot | None = source
        else:
            slot = self._free_slot(capacity, keep=source)
            if slot is None and source is not None and not source.taken and source.bank.capacity >= capacity:
                slot = source  # nothing else is left to give up
            if slot is None:
                slot = self._free_slot(capacity, keep=None)
        if slot is None:
            return None
        if slot is source:
            del slot.tokens[shared:]
        elif source is not None and self._holds(source):
            self._store.copy((source.bank.key, source.row), (slot.bank.key, slot.row), shared)
            slot.tokens = list(prompt[:shared])
            source.used = self._tick
        slot.taken, slot.used, slot.adapter, slot.table = True, self._tick, adapter, table
        return slot

    @property
    def longest(self) -> int:
        """The most tokens that a sequence may need, with nobody else there."""
        return 1 << (self._limit.bit_length() - 1) if self._limit >= SMALLEST else 0

    def grow(self, slot: Slot, need: int) -> bool:
        """Give a sequence's slot room for `need` tokens, in another row; False if there is none.

        What rests may have to go for it, as in `take`.
        """
        target = self._free_slot(_capacity(need), keep=None)
        if target is None:
            return False
        bank, decodes = slot.bank, slot.decodes
        if decodes:
            self._exchange(slot, bank.decoding - 1)
            bank.decoding -= 1
        self._store.copy((bank.key, slot.row), (target.bank.key, target.row), len(slot.tokens))
        bank.rows[slot.row] = None
        slot.bank, slot.row = target.bank, target.row
        slot.bank.rows[slot.row] = slot
        if decodes:
            self.promote(slot)
        return True

    def promote(self, slot: Slot) -> None:
        """Put a slot among those that decode."""
        if not slot.decodes:
            self._exchange(slot, slot.bank.decoding)
            slot.bank.decoding += 1

    def release(self, slot: Slot, *, keep: bool = True, clean: bool = True) -> None:
        """Let go of a slot; its tokens rest there for reuse if `keep`. `clean` tells that it holds finite numbers."""
        bank = slot.bank
        if slot.decodes:
            self._exchange(slot, bank.decoding - 1)
            bank.decoding -= 1
        self._tick += 1
        slot.taken, slot.used = False, self._tick
        if not clean:
            self._store.clear(bank.key, slot.row)
        if not keep or not clean or not slot.tokens:
            bank.rows[slot.row] = None

    def forget(self) -> None:
        """Give up everything that rests, and the memory of banks that nobody uses."""
        for slot in list(self._slots()):
            if not slot.taken:
                slot.bank.rows[slot.row] = None
        for bank in [bank for bank in self._banks if not bank.busy]:
            self._drop(bank)

    # Finding a row ---------------------------------------------------------------------------------------------------

    def _slots(self) -> Iterator[Slot]:
        return (slot for bank in self._banks for slot in bank.rows if slot is not None)

    def _holds(self, slot: Slot) -> bool:
        return slot.bank in self._banks and slot.bank.rows[slot.row] is slot

    def _best_prefix(self, prompt: Sequence[int], adapter: str | None, table: Hashable) -> tuple[Slot | None, int]:
        best, longest = None, 0
        for slot in self._slots():
            if (slot.adapter, slot.table) != (adapter, table):
                continue
            shared = _shared(slot.tokens, prompt, max(len(prompt) - 1, 0))
            if shared > longest or (shared == longest and best is not None and best.taken and not slot.taken):
                best, longest = slot, shared
        return (best, longest) if longest else (None, 0)

    def _in_place(self, source: Slot, shared: int, capacity: int) -> bool:
        """Whether the resting `source` itself is continued, rather than copied from."""
        return not source.taken and source.bank.capacity >= capacity and shared >= _SAME * len(source.tokens)

    def _free_slot(self, capacity: int, keep: Slot | None) -> Slot | None:
        """A free row, by making a bank or by giving up what was used least recently, `keep` only if nothing else."""
        for bank in self._banks:
            if bank.capacity == capacity and None in bank.rows:
                return self._place(bank)
        if (made := self._create(capacity)) is not None:
            return self._place(made)
        resting = [slot for slot in self._slots() if not slot.taken and slot is not keep]
        alike = [slot for slot in resting if slot.bank.capacity == capacity]
        if alike:
            victim = min(alike, key=lambda slot: slot.used)
            victim.bank.rows[victim.row] = None
            return self._place(victim.bank)
        # Banks of other capacities that nobody works in, the longest unused first, until there is room.
        idle = [bank for bank in self._banks if not bank.busy and (keep is None or keep.bank is not bank)]
        for bank in sorted(
            idle, key=lambda bank: max((slot.used for slot in bank.rows if slot is not None), default=0)
        ):
            self._drop(bank)
            if (made := self._create(capacity)) is not None:
                return self._place(made)
        return None

    def _place(self, bank: Bank) -> Slot:
        slot = Slot(bank, bank.rows.index(None))
        bank.rows[slot.row] = slot
        return slot

    def _create(self, capacity: int) -> Bank | None:
        """A new bank: of several rows, or of the one row that the limit and the memory still have room for."""
        room = self._limit - self.allocated
        rows = _rows(self._limit, capacity)
        while rows:
            if rows * capacity <= room and self._store.create(self._next_key, rows, capacity):
                bank = Bank(self._next_key, capacity, [None] * rows)
                self._next_key += 1
                self._banks.append(bank)
                return bank
            rows //= 2
        return None

    def _drop(self, bank: Bank) -> None:
        self._banks.remove(bank)
        self._store.drop(bank.key)

    def _exchange(self, slot: Slot, row: int) -> None:
        """Put a slot into another row of its bank, and whoever is there into its own."""
        bank, old = slot.bank, slot.row
        if old == row:
            return
        other = bank.rows[row]
        if other is None:
            self._store.copy((bank.key, old), (bank.key, row), len(slot.tokens))
        else:
            self._store.swap(bank.key, old, row, max(len(slot.tokens), len(other.tokens)))
            other.row = old
        bank.rows[old], bank.rows[row] = other, slot
        slot.row = row


def first_bank(limit: int) -> int:
    """Tokens that the first bank of a table of `limit` tokens has room for, where short sequences come first."""
    return _rows(limit, SMALLEST) * SMALLEST if limit >= SMALLEST else 0


def _rows(limit: int, capacity: int) -> int:
    return max(1, min(_BANK_ROWS, limit // 4 // capacity))


def _capacity(need: int) -> int:
    """The capacity of the bank for `need` tokens: the next power of two, so that few kinds of banks are needed."""
    return max(SMALLEST, 1 << (need - 1).bit_length())


def _shared(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many tokens both begin with, at most `most`; by halving, for comparing slices is what Python is fast at."""
    low, high = 0, min(len(one), len(other), most)
    if not high or one[0] != other[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
