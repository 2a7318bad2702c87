"""Reads the headers of weights files: the tensors of a safetensors or GGUF file, and a GGUF file's keys.

A file is given as a function that reads bytes, so files on the Hub and on the disk are read alike, and never beyond the
header. Pure functions; any thread may call them. Must not know paths, the network, or what a model is.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# `read(start, length)`: the bytes from `start` on; fewer only where the file ends.
Read = Callable[[int, int], bytes]

_LONGEST_JSON = 100_000_000  # bytes of a safetensors header, the format's own limit
_MAX_ENTRIES = 1_000_000  # tensors or keys of a GGUF file: more mean damage
_FIRST_BLOCK, _LARGEST_BLOCK = 1 << 16, 1 << 22  # bytes of one read, doubled each time

# A type's name in a safetensors file: its name in torch, and the bits of one value.
SAFETENSORS_TYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}

# A type's number in a GGUF file: its name, the values in one block, and the block's bytes.
GGUF_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}

# The type of a GGUF value: its format for `struct`. Strings (8) and arrays (9) have code of their own.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")


class HeaderDamaged(ValueError):
    """The file has no valid header of its format."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor in a header: the file's name of its type, its shape, and its bytes (None: unknown)."""

    type: str
    shape: tuple[int, ...]
    bytes: int | None

    @property
    def count(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """The header of a GGUF file. `values` are its keys; of an array only the length is kept.

    `tensors` is None where the header is longer than the limit. `end` is the byte at which the last tensor ends.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor] | None
    end: int | None


def safetensors_header(read: Read, *, maximum: int = _LONGEST_JSON) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file by name, or None where its header is longer than `maximum` bytes.

    Raises:
        HeaderDamaged: it is not a safetensors file. Errors of `read` pass through.
    """
    start = read(0, 8)
    if len(start) < 8:
        raise HeaderDamaged("shorter than a header")
    (size,) = _LENGTH.unpack(start)
    if not 2 <= size <= _LONGEST_JSON:
        raise HeaderDamaged("no length of a header")
    if size > maximum:
        return None
    try:
        header = json.loads(read(8, size))
        return {name: _tensor(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HeaderDamaged("not the JSON of a header") from error


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    start, end = entry["data_offsets"]
    return Tensor(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), int(end) - int(start))


def gguf_header(read: Read, *, maximum: int) -> GGUFHeader:
    """The keys and the tensors of a GGUF file, as far as they lie within its first `maximum` bytes.

    Raises:
        HeaderDamaged: it is not a GGUF file of version 2 or 3. Errors of `read` pass through.
    """
    stream = _Stream(read, maximum)
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    ends: list[int | None] = []
    try:
        if stream.take(4) != b"GGUF":
            raise HeaderDamaged("not the mark of a GGUF file")
        version, tensor_count, value_count = stream.unpack("IQQ")
        if version not in (2, 3) or max(tensor_count, value_count) > _MAX_ENTRIES:
            raise HeaderDamaged("a GGUF file of another version")
        for _ in range(value_count):
            name = stream.text()
            (kind,) = stream.unpack("I")
            values[name] = _value(stream, kind)
        for _ in range(tensor_count):
            name = stream.text()
            (dimensions,) = stream.unpack("I")
            if dimensions > 8:
                raise HeaderDamaged("a tensor of too many dimensions")
            shape = stream.unpack(f"{dimensions}Q")
            kind, offset = stream.unpack("IQ")
            tensors[name] = _gguf_tensor(kind, shape)
            size = tensors[name].bytes
            ends.append(None if size is None else offset + size)
    except _TooFar:
        return GGUFHeader(values, None, None)
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise HeaderDamaged("no alignment")
    if not tensors:  # the first of several parts may hold keys only
        return GGUFHeader(values, tensors, stream.position)
    known = [end for end in ends if end is not None]
    data = -(-stream.position // alignment) * alignment
    return GGUFHeader(values, tensors, data + max(known) if len(known) == len(ends) else None)


def _gguf_tensor(kind: int, shape: tuple[int, ...]) -> Tensor:
    if kind not in GGUF_TYPES:
        return Tensor(f"type {kind}", shape, None)
    name, values, size = GGUF_TYPES[kind]
    return Tensor(name, shape, math.prod(shape) // values * size)


def _value(stream: _Stream, kind: int, depth: int = 0) -> Any:
    if kind in _SCALARS:
        return stream.unpack(_SCALARS[kind])[0]
    if kind == _STRING:
        return stream.text()
    if kind != _ARRAY or depth > 2:
        raise HeaderDamaged("a value of an unknown type")
    inner, length = stream.unpack("IQ")
    if inner in _SCALARS:
        stream.skip(length * struct.calcsize(f"<{_SCALARS[inner]}"))
    elif inner == _STRING:
        stream.skip_texts(length)
    else:
        for _ in range(length):
            _value(stream, inner, depth + 1)
    return length


class _TooFar(Exception):
    """The header is longer than the limit."""


class _Stream:
    """Reads bytes from the start in growing blocks; nothing is read twice."""

    def __init__(self, read: Read, maximum: int) -> None:
        self._read, self._maximum = read, maximum
        self._block = _FIRST_BLOCK
        self._buffer = bytearray()
        self.position = 0

    def _need(self, length: int) -> None:
        while self.position + length > len(self._buffer):
            have = len(self._buffer)
            if self.position + length > self._maximum:
                raise _TooFar
            block = self._read(have, min(self._block, self._maximum - have))
            if not block:
                raise HeaderDamaged("the file ends within its header")
            self._buffer += block
            self._block = min(2 * self._block, _LARGEST_BLOCK)

    def take(self, length: int) -> bytes:
        self._need(length)
        start, self.position = self.position, self.position + length
        return bytes(self._buffer[start : self.position])

    def skip(self, length: int) -> None:
        self._need(length)
        self.position += length

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def text(self) -> str:
        (length,) = self.unpack("Q")
        return self.take(length).decode("utf-8", "replace")

    def skip_texts(self, count: int) -> None:
        """Skips `count` strings: a vocabulary has hundreds of thousands, so this loop alone is written for speed."""
        for _ in range(count):
            try:
                (length,) = _LENGTH.unpack_from(self._buffer, self.position)
            except struct.error:
                self._need(8)
                (length,) = _LENGTH.unpack_from(self._buffer, self.position)
            self.position += 8 + length
        self._need(0)
