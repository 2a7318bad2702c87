"""The KV cache in blocks, as OpenVINO's paged attention reads it.

A row is a list of blocks of 32 tokens. Rows that begin alike share the blocks of their common tokens; a shared block is
copied before it is written to. The banks that `slots.py` creates are promises of so many blocks. Engine's thread only.
Must not know sequences, sampling or text.
"""

from __future__ import annotations

import heapq
import mmap
from collections.abc import Callable, Sequence

import numpy as np

from ..torch.cache import LayerShape, take_if_free

BLOCK = 32  # tokens, as in OpenVINO's kernels for CPUs

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class BlockCache:
    """Keys and values of all layers; see `slots.Store` for the methods that move rows.

    Its memory is one reserved range per layer, of which only written blocks take memory.
    """

    joint = True

    def __init__(self, layers: Sequence[LayerShape], tokens: int) -> None:
        """`tokens` is the most tokens that all banks together have room for."""
        self.token_bytes = sum(shape.token_bytes for shape in layers)
        # Asks for bytes on a device, or gives back a negative number; returns whether they may be allocated.
        self.take: Callable[[str, int], bool] = take_if_free
        blocks = max(1, tokens // BLOCK)
        self._pools = [(_Pool(blocks, *shape.keys), _Pool(blocks, *shape.values)) for shape in layers]
        self._maximum = blocks
        self._rows: dict[tuple[int, int], list[int]] = {}  # the blocks of each row, by bank and row
        self._readers: dict[int, int] = {}  # how many rows have a block
        self._free: list[int] = []  # a heap: the lowest are used first, so that the highest can be given back
        self._promised = 0  # blocks
        self._banks: dict[int, int] = {}  # blocks promised to each bank
        self._written = 0  # blocks that have taken memory: all before this one

    @property
    def tensors(self) -> list[tuple[Array, Array]]:
        """The keys and values of each layer, (blocks, heads, 32, width)."""
        return [(keys.array, values.array) for keys, values in self._pools]

    def blocks(self, bank: int, row: int, start: int, count: int) -> list[int]:
        """The blocks of a row that gets `count` tokens from position `start` on, ready for writing."""
        table = self._rows.setdefault((bank, row), [])
        last = (start + count - 1) // BLOCK
        for place in range(start // BLOCK, min(last + 1, len(table))):
            if self._readers[table[place]] > 1:
                table[place] = self._own(table[place])
        while len(table) <= last:
            table.append(self._get())
        return table[: last + 1]

    def _own(self, block: int) -> int:
        """Copies a shared block into one of the row's own."""
        own = self._get()
        self._copy(block, own)
        self._leave(block)
        return own

    def _get(self) -> int:
        block = heapq.heappop(self._free)
        self._readers[block] = 1
        self._written = max(self._written, block + 1)
        return block

    def _leave(self, block: int) -> None:
        self._readers[block] -= 1
        if not self._readers[block]:
            del self._readers[block]
            heapq.heappush(self._free, block)

    def _copy(self, source: int, target: int) -> None:
        for pair in self._pools:
            for pool in pair:
                pool.array[target] = pool.array[source]

    # For the slot table -----------------------------------------------------------------------------------------------

    def create(self, bank: int, rows: int, capacity: int) -> bool:
        """Promises a bank its blocks, if their memory is free."""
        blocks = rows * -(-capacity // BLOCK)
        if self._promised + blocks > self._maximum or not self.take("cpu", blocks * BLOCK * self.token_bytes):
            return False
        self._banks[bank] = blocks
        for block in range(self._promised, self._promised + blocks):
            heapq.heappush(self._free, block)
        self._promised += blocks
        return True

    def drop(self, bank: int) -> None:
        """Gives a bank's memory back."""
        for key in [key for key in self._rows if key[0] == bank]:
            self._forget(key)
        blocks = self._banks.pop(bank)
        self._promised -= blocks
        self._draw_together()
        self.take("cpu", -blocks * BLOCK * self.token_bytes)

    def drop_all(self) -> None:
        """Gives all memory back."""
        for bank in list(self._banks):
            self.drop(bank)

    def copy(self, source: tuple[int, int], target: tuple[int, int], tokens: int) -> None:
        """Makes a row, named by bank and row, begin with the first `tokens` tokens of another."""
        if source == target:
            return
        self._forget(target)
        shared, rest = divmod(tokens, BLOCK)
        theirs = self._rows.get(source, [])
        table = theirs[:shared]
        for block in table:
            self._readers[block] += 1
        self._rows[target] = table
        if rest:
            own = self._get()
            self._copy(theirs[shared], own)
            table.append(own)

    def swap(self, bank: int, one: int, other: int, tokens: int) -> None:  # noqa: ARG002 - the protocol's
        """Exchanges two rows of a bank."""
        first, second = self._rows.get((bank, one), []), self._rows.get((bank, other), [])
        self._rows[bank, one], self._rows[bank, other] = second, first

    def clear(self, bank: int, row: int) -> None:
        """Overwrites a row's own blocks with zeros: a NaN would spread even from masked positions."""
        for block in self._rows.get((bank, row), ()):
            if self._readers[block] == 1:
                for pair in self._pools:
                    for pool in pair:
                        pool.array[block] = 0
        self._forget((bank, row))

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all banks."""
        return self._promised * BLOCK * self.token_bytes

    @property
    def unwritten_bytes(self) -> int:
        """Bytes of all banks that have taken no memory yet."""
        return (self._promised - self._written) * BLOCK * self.token_bytes

    def _forget(self, key: tuple[int, int]) -> None:
        for block in self._rows.pop(key, ()):
            self._leave(block)

    def _draw_together(self) -> None:
        """Moves the blocks in use to the front, and gives back the memory behind the promised blocks."""
        self._free = [block for block in range(self._promised) if block not in self._readers]
        heapq.heapify(self._free)
        moved = {}
        for block in sorted(block for block in self._readers if block >= self._promised):
            target = heapq.heappop(self._free)
            self._copy(block, target)
            self._readers[target] = self._readers.pop(block)
            moved[block] = target
        if moved:
            for table in self._rows.values():
                table[:] = [moved.get(block, block) for block in table]
        for pair in self._pools:
            for pool in pair:
                pool.give_back(self._promised)
        self._written = min(self._written, self._promised)


class _Pool:
    """One layer's keys or values: room for the most blocks, which take memory when they are written."""

    def __init__(self, blocks: int, heads: int, width: int) -> None:
        shape = (blocks, heads, BLOCK, width)
        self._block_bytes = heads * BLOCK * width * 4
        flags = {}
        if hasattr(mmap, "MAP_PRIVATE"):
            flags["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self._map = mmap.mmap(-1, blocks * self._block_bytes, **flags)
        self.array: Array = np.frombuffer(self._map, dtype=np.float32).reshape(shape)

    def give_back(self, first: int) -> None:
        """Gives the memory of all blocks from `first` on back to the system; they become zeros."""
        begin = first * self._block_bytes
        whole = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(self._map, "madvise") and whole < len(self._map):
            self._map.madvise(mmap.MADV_DONTNEED, whole, len(self._map) - whole)
