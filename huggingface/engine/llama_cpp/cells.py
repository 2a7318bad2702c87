"""The KV cache as llama.cpp keeps it: each bank is a context, whose sequences are the bank's rows.

In a context whose sequences have cells of their own, attention reads those of one sequence only. Engine's thread only.
Must not know text or sampling.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..torch.cache import take_if_free
from .library import Model

_HEAD = 8  # bytes before the number of sequences in a sequence's state


@dataclass(slots=True)
class _Bank:
    """A bank's context, the number of the sequence of each row, the bytes of its cells, and those of all of it."""

    context: Any
    sequences: list[int]
    cells: int
    size: int


class CellCache:
    """The contexts of a model; see `slots.Store` for the methods that move rows."""

    joint = False

    def __init__(self, model: Model, token_bytes: int) -> None:
        """A token's keys and values take `token_bytes`."""
        self.token_bytes = token_bytes
        # Asks for bytes on a device, or gives back a negative number; returns whether they may be allocated.
        self.take: Callable[[str, int], bool] = take_if_free
        self._model = model
        self._lib = model.lib
        self._banks: dict[int, _Bank] = {}
        # Sequences whose first tokens were not copied, by bank and number; they are computed again. A copy between
        # contexts leaves out what is behind a window, and a shorter text needs other tokens before its end.
        self._lost: set[tuple[int, int]] = set()

    def context(self, bank: int) -> Any:
        """A bank's context."""
        return self._banks[bank].context

    def number(self, bank: int, row: int) -> int:
        """The number of a row's sequence."""
        return self._banks[bank].sequences[row]

    def hold(self, bank: int, number: int, start: int) -> int:
        """Cuts a sequence after its first `start` tokens; returns how many of these it holds: all, or none."""
        if (bank, number) in self._lost:
            self._lost.discard((bank, number))
            start = 0
        self._cut(bank, number, start)
        return start

    def _cut(self, bank: int, number: int, start: int) -> None:
        self._lib.llama_memory_seq_rm(self._memory(bank), number, start, -1)

    def _memory(self, bank: int) -> Any:
        return self._lib.llama_get_memory(self._banks[bank].context)

    # For the slot table -----------------------------------------------------------------------------------------------

    def create(self, bank: int, rows: int, capacity: int) -> bool:
        """Makes a bank's context, if its memory is free."""
        cells = rows * capacity * self.token_bytes
        size = cells + self._model.context_bytes(capacity)
        if not self.take("cpu", size):
            return False
        context = self._model.context(rows, capacity)
        if not context:
            self.take("cpu", -size)
            return False
        self._banks[bank] = _Bank(context, list(range(rows)), cells, size)
        return True

    def drop(self, bank: int) -> None:
        """Gives a bank's memory back."""
        dropped = self._banks.pop(bank)
        self._lost = {lost for lost in self._lost if lost[0] != bank}
        self._lib.llama_free(dropped.context)
        self.take("cpu", -dropped.size)

    def drop_all(self) -> None:
        """Gives all memory back."""
        for bank in list(self._banks):
            self.drop(bank)

    def copy(self, source: tuple[int, int], target: tuple[int, int], tokens: int) -> None:
        """Makes a row, named by bank and row, begin with the first `tokens` tokens of another."""
        if source == target:
            return
        (bank, row), (other, place) = source, target
        old, new = self._banks[bank].sequences[row], self._banks[other].sequences[place]
        self._cut(other, new, -1)
        self._lost.discard((other, new))
        if (bank, old) in self._lost or (bank != other and self._model.windowed):
            self._lost.add((other, new))
        elif bank == other:
            self._lib.llama_memory_seq_cp(self._memory(bank), old, new, -1, -1)
            self._cut(other, new, tokens)
        else:
            whole = self._state(bank, old)
            self._cut(bank, old, tokens)  # all of it might not fit there
            self._set_state(other, new, self._state(bank, old))
            self._set_state(bank, old, whole)

    def _state(self, bank: int, number: int) -> bytes:
        """A sequence's keys and values, without the count of the context's sequences and of the others' cells."""
        whole, others = self._read(bank, number).raw, len(self._banks[bank].sequences) - 1
        return whole[:_HEAD] + whole[_HEAD + 4 * (1 + number) : len(whole) - 4 * (others - number)]

    def _set_state(self, bank: int, number: int, state: bytes) -> None:
        """Replaces a sequence's keys and values by those of a sequence of any context."""
        rows = len(self._banks[bank].sequences)
        self._write(bank, number, state[:_HEAD] + struct.pack("<I", rows) + state[_HEAD:] + bytes(4 * (rows - 1)))

    def _read(self, bank: int, number: int) -> ctypes.Array[ctypes.c_char]:
        """A sequence's state, as the library gives it; it fits any sequence of the same context."""
        state = ctypes.create_string_buffer(self._size(bank, number))
        self._lib.llama_state_seq_get_data(self._banks[bank].context, state, len(state), number)
        return state

    def _write(self, bank: int, number: int, state: bytes | ctypes.Array[ctypes.c_char]) -> None:
        """Replaces a sequence's state, or has it computed again where the library does not take it."""
        if not self._lib.llama_state_seq_set_data(self._banks[bank].context, state, len(state), number):
            self._lost.add((bank, number))

    def _size(self, bank: int, number: int) -> int:
        """Bytes of a sequence's state."""
        return int(self._lib.llama_state_seq_get_size(self._banks[bank].context, number))

    def swap(self, bank: int, one: int, other: int, tokens: int) -> None:  # noqa: ARG002 - the protocol's
        """Exchanges two rows of a bank.

        The library computes sequences together whose numbers follow each other; with a gap between them, it reads all
        weights once more. So the rows themselves are exchanged, and decoding rows, which are a bank's first, have the
        first numbers. Where there is no memory to hold both for a moment, or a row that is read out lacks what is
        behind a window, their numbers are exchanged.
        """
        numbers = self._banks[bank].sequences
        first, second = numbers[one], numbers[other]
        size = self._size(bank, first) + self._size(bank, second)
        if self._model.windowed or not self.take("cpu", size):
            numbers[one], numbers[other] = second, first
            return
        lost = {(bank, each) for each in (first, second)} & self._lost
        states = self._read(bank, first), self._read(bank, second)
        self._lost -= lost
        for source, target, state in ((first, second, states[0]), (second, first, states[1])):
            if (bank, source) in lost:
                self._lost.add((bank, target))
            else:
                self._write(bank, target, state)
        self.take("cpu", -size)

    def clear(self, bank: int, row: int) -> None:
        """Drops a row's cells: a cell without a token is never read."""
        self._lost.discard((bank, self._banks[bank].sequences[row]))
        self._cut(bank, self._banks[bank].sequences[row], -1)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all banks' cells."""
        return sum(bank.cells for bank in self._banks.values())
