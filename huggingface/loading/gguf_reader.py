"""gguf's reader of GGUF files, made quick where no vocabulary is wanted, and for files in several parts.

transformers reads a file's keys by `gguf.GGUFReader` whenever it wants the config or the weights. The reader makes
numpy views of each of the hundred thousand entries of a vocabulary, which takes seconds, and transformers asks for the
table of tensors' names once a module, which takes seconds more. It reads one file, so the tensors of other parts are
added here. Imports gguf, so it is imported late.
"""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType

from ..inspection.gguf_parts import part_names

LONG = 4096  # entries up to which an array is read in any case: of numbers that layers differ in

_reading = threading.local()


@contextmanager
def without_vocabulary() -> Iterator[None]:
    """Makes files that this thread opens in the block leave out their long arrays, as if they were empty."""
    _reading.short = True
    try:
        yield
    finally:
        _reading.short = False


class _Reader(GGUFReader):
    """The reader, with that option. The first of several parts has the tensors of all."""

    def __init__(self, path: Any, mode: Any = "r") -> None:
        super().__init__(path, mode)
        first, *others = part_names(Path(path).name)
        if first == Path(path).name:
            for name in others:
                self.tensors += GGUFReader(Path(path).with_name(name), mode).tensors

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        is_plain = self.byte_order == "I" and sys.byteorder == "little"
        if is_plain and getattr(_reading, "short", False) and raw_type == GGUFValueType.ARRAY:
            kind, count = struct.unpack("<IQ", self.data[orig_offs : orig_offs + 12].tobytes())
            if count > LONG and (size := self._length(orig_offs + 12, kind, count)) is not None:
                parts = [self.data[orig_offs : orig_offs + 4], self.data[orig_offs + 4 : orig_offs + 12]]
                return 12 + size, parts, [], [GGUFValueType.ARRAY, GGUFValueType(kind)]
        found: tuple[int, list[Any], list[int], list[GGUFValueType]] = super()._get_field_parts(orig_offs, raw_type)
        return found

    def _length(self, start: int, kind: int, count: int) -> int | None:
        """The bytes of an array's entries; None for arrays of arrays."""
        if kind == GGUFValueType.STRING:
            place, data = start, memoryview(self.data)  # type: ignore[arg-type]
            for _ in range(count):
                (length,) = struct.unpack_from("<Q", data, place)
                place += 8 + length
            return place - start
        of_numbers = self.gguf_scalar_to_np.get(GGUFValueType(kind))
        return None if of_numbers is None else count * of_numbers(0).itemsize


def install() -> None:
    """Makes transformers use this reader, and each table of tensors' names once."""
    if gguf.GGUFReader is not _Reader:
        vars(gguf).update(GGUFReader=_Reader, get_tensor_name_map=lru_cache(maxsize=8)(gguf.get_tensor_name_map))


def numbers(path: Path, name: str) -> np.ndarray:
    """A tensor of a file, or of its other parts, in float32; the file holds one of this name."""
    with without_vocabulary():
        tensors = _Reader(path).tensors
    tensor = next(tensor for tensor in tensors if tensor.name == name)
    return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
