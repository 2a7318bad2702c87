"""Which sequence has which row of the KV cache: in integers, what `cache.py` holds in tensors.

A bank is a block of rows of one capacity (tokens per row). Decoding rows come first in their bank, so that one view of
its tensors holds them all; then come prefilling rows, resting rows (their sequence has ended, and its tokens are kept
for the next prompt that begins alike), and free rows. Used on the engine's thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

SMALLEST = 256  # the least tokens per row: finer steps would only create more banks
_BANK_ROWS = 16  # rows of a bank, where a quarter of the cache has room for them
_SAME = 0.8  # a resting row is continued in place if this share of it is reused; otherwise the shared part is copied


class Store(Protocol):
    """Holds the rows: in tensors, or in a test anything that records the calls."""

    joint: bool  # whether rows of several banks are computed together

    def create(self, bank: int, rows: int, capacity: int) -> bool:
        """Creates an empty bank; False if there is no memory for it now."""

    def drop(self, bank: int) -> None:
        """Gives a bank's memory back."""

    def copy(self, source: tuple[int, int], target: tuple[int, int], tokens: int) -> None:
        """Copies the first `tokens` tokens of a row, named by bank and row, to another."""

    def swap(self, bank: int, one: int, other: int, tokens: int) -> None:
        """Exchanges the first `tokens` tokens of two rows of a bank."""

    def clear(self, bank: int, row: int) -> None:
        """Overwrites a row that may hold anything, NaN included, with zeros."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How a model depends on the length of a text, besides the positions of its tokens.

    `table` returns a key for the numbers with which one pass over so many tokens is computed: tokens of another key
    cannot be reused. A text that grows to `restart` tokens is computed again as a whole.
    """

    table: Callable[[int], Hashable] = lambda _: None
    restart: int | None = None


@dataclass(slots=True, eq=False)
class Bank:
    """A block of rows. Rows `[0, decoding)` belong to decoding sequences."""

    key: int
    capacity: int
    rows: list[Slot | None]
    decoding: int = 0

    @property
    def busy(self) -> bool:
        """Whether a row belongs to a sequence that is not done."""
        return any(slot is not None and slot.taken for slot in self.rows)


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence's row. `tokens` are those whose keys and values it holds, from position 0 on.

    They were computed with `adapter` (None for the model itself) and a `table` of `Lengths`; others cannot reuse them.
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
        """Whether the row is among the decoding ones."""
        return self.row < self.bank.decoding


class SlotTable:
    """Hands out slots within a limit of tokens, least recently used ones first, and finds prefixes to reuse."""

    def __init__(self, store: Store, limit: int, lengths: Lengths | None = None) -> None:
        """`limit` is the most tokens that all banks together have room for."""
        self.lengths = lengths or Lengths()
        self._store = store
        self._limit = limit
        self._banks: list[Bank] = []
        self._next_key = 0
        self._tick = 0

    def fits(self, need: int) -> bool:
        """Whether a sequence of `need` tokens could be served at all, alone."""
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
        """A slot for a sequence of at most `need` tokens, with as much of `prompt` in it as can be reused; or None.

        Tokens of another adapter cannot be reused, nor tokens of a pass whose length has another `table` than
        `at_once`. At least one token of the prompt remains to be computed: the first new token is sampled from its
        logits.
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
                slot = source  # nothing else can be evicted
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
        """The most tokens that a sequence may need, alone."""
        return 1 << (self._limit.bit_length() - 1) if self._limit >= SMALLEST else 0

    def grow(self, slot: Slot, need: int) -> bool:
        """Gives a sequence's slot room for `need` tokens, in another row; False if there is none.

        Resting slots may be evicted for it, as in `take`.
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
        """Moves a slot to the decoding rows."""
        if not slot.decodes:
            self._exchange(slot, slot.bank.decoding)
            slot.bank.decoding += 1

    def release(self, slot: Slot, *, keep: bool = True, clean: bool = True) -> None:
        """Releases a slot; with `keep` its tokens rest there for reuse. `clean`: it holds finite numbers."""
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
        """Drops all resting slots, and the memory of unused banks."""
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
        """A free row, from a new bank or by evicting the least recently used slot; `keep` is not evicted."""
        for bank in self._banks:
            if bank.capacity == capacity and None in bank.rows:
                return self._place(bank)
        resting = [slot for slot in self._slots() if not slot.taken and slot is not keep]
        alike = [slot for slot in resting if slot.bank.capacity == capacity]
        # A further bank costs a pass over the weights where each bank has its own, so rows are rather evicted there.
        spared = keep is not None and not keep.taken and keep.bank.capacity == capacity
        if (self._store.joint or not (alike or spared)) and (made := self._create(capacity)) is not None:
            return self._place(made)
        if alike:
            victim = min(alike, key=lambda slot: slot.used)
            victim.bank.rows[victim.row] = None
            return self._place(victim.bank)
        if spared and not self._store.joint:
            return None
        # Unused banks of other capacities, the longest unused first, until there is room.
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
        """Creates a bank: of several rows, or of as many as the limit and the memory have room for."""
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
        """Moves a slot to another row of its bank, and the slot there, if any, to its old row."""
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
    """The tokens for which the first bank of a table of `limit` tokens has room, if short sequences come first."""
    return _rows(limit, SMALLEST) * SMALLEST if limit >= SMALLEST else 0


def _rows(limit: int, capacity: int) -> int:
    return max(1, min(_BANK_ROWS, limit // 4 // capacity))


def _capacity(need: int) -> int:
    """The capacity of the bank for `need` tokens: the next power of two, so that there are few kinds of banks."""
    return max(SMALLEST, 1 << (need - 1).bit_length())


def _shared(one: Sequence[int], other: Sequence[int], maximum: int) -> int:
    """How many first tokens both share, at most `maximum`; by halving, because Python compares slices fast."""
    low, high = 0, min(len(one), len(other), maximum)
    if not high or one[0] != other[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
