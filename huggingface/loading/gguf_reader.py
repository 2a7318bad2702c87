"""gguf's reader of GGUF files, made quick where no vocabulary is wanted, and for files in several parts.

transformers reads a file's keys by `gguf.GGUFReader` whenever it wants the config or the weights. The reader makes
numpy views of each of the hundred thousand entries of a vocabulary, which takes seconds, and transformers asks for the
table of tensors' names once a module, which takes seconds more. For some architectures it has a reader of its own. Both
read one file, so the tensors of its other parts are added here. Imports gguf, so it is imported late.
"""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderTensor
from transformers.integrations import gguf as transformers_gguf
from transformers.integrations.gguf.dequant import GGML_BLOCK
from transformers.integrations.gguf.reader import (
    GgufHeader,
    LazyGgufTensor,
    TensorInfo,
    load_gguf_state_dict,
    read_gguf_metadata,
)
from transformers.quantizers import quantizer_gguf

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
        self.tensors += _tensors_of_others(Path(path))

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


def _tensors_of_others(path: Path) -> list[ReaderTensor]:
    """The tensors in the other parts of the file whose first part is at `path`; none for a whole file."""
    first, *others = part_names(path.name)
    found: list[ReaderTensor] = []
    for name in others if first == path.name else ():
        found += GGUFReader(path.with_name(name)).tensors
    return found


class _Header(GgufHeader):  # type: ignore[misc]
    """transformers' own header of a file, with the tensors of all parts."""

    @classmethod
    def from_file(cls, gguf_path: str) -> _Header:
        header = GgufHeader.from_file(gguf_path)
        infos = [
            TensorInfo(each.name, tuple(each.shape.tolist()[::-1]), int(each.tensor_type), 0, each.n_bytes)
            for each in _tensors_of_others(Path(gguf_path))
        ]
        return cls(header.path, header.architecture, (*header.tensors, *infos), header.data_start)


def _load_tensors(header: GgufHeader) -> dict[str, LazyGgufTensor]:
    """transformers' own tensors, of all parts: blocks as bytes, numbers in their shape."""
    tensors: dict[str, LazyGgufTensor] = load_gguf_state_dict(GgufHeader.from_file(header.path))
    shapes = {info.name: info.shape for info in header.tensors}
    for each in _tensors_of_others(Path(header.path)):
        kind, content = int(each.tensor_type), each.data.reshape(-1).view(np.uint8)
        shape = each.data.shape if kind in GGML_BLOCK else shapes[each.name]
        tensors[each.name] = LazyGgufTensor(content, kind, shape)
    return tensors


def _read_keys(gguf_path: str, string_arrays: Container[str] = ()) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A file's keys, and the names of the tensors of all parts."""
    keys, names = read_gguf_metadata(gguf_path, string_arrays)
    return keys, (*names, *(each.name for each in _tensors_of_others(Path(gguf_path))))


def install() -> None:
    """Makes transformers use these readers, and each table of tensors' names once."""
    if gguf.GGUFReader is not _Reader:
        vars(gguf).update(GGUFReader=_Reader, get_tensor_name_map=lru_cache(maxsize=8)(gguf.get_tensor_name_map))
        vars(transformers_gguf).update(read_gguf_metadata=_read_keys)
        vars(quantizer_gguf).update(
            GgufHeader=_Header, load_gguf_state_dict=_load_tensors, read_gguf_metadata=_read_keys
        )


def numbers(path: Path, name: str) -> np.ndarray:
    """A tensor of a file, or of its other parts, in float32; the file holds one of this name."""
    with without_vocabulary():
        tensors = _Reader(path).tensors
    tensor = next(tensor for tensor in tensors if tensor.name == name)
    return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
