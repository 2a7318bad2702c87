"""Gives a graph's weights their numbers, one weight at a time: in float32, or rounded to 8 or 4 bits.

The numbers go into a file, which the graph's constants are mapped from, so memory holds a part of one weight. Rounding
is that of nncf's `compress_weights` without data (https://github.com/openvinotoolkit/nncf): 8 bits have a scale and a
zero point per output, 4 bits a scale per 64 numbers, and the first and the last matrix stay in 8 bits. Must not know
models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...host.memory import release_freed
from .blanks import Blanks, rows
from .library import openvino

GROUP = 64  # numbers of an output that share a scale in 4 bits
_SMALLEST_GROUP = 32  # where 64 does not divide them; a weight that this does not divide has 8 bits

_EPSILON = torch.finfo(torch.float32).eps  # the smallest scale

# The dimensions of a weight along which its outputs lie, by the operation that reads it; a product's depend on it.
_OUTPUTS: Mapping[str, tuple[int, ...]] = {"Gather": (0,), "Convolution": (0,), "GroupConvolution": (0, 1)}

_ALIGNED = 64  # bytes


@dataclass(frozen=True, slots=True)
class _Rounding:
    """How a weight is rounded: its bits, and the dimensions along which its outputs lie."""

    bits: int
    outputs: tuple[int, ...]


class NumbersFile:
    """A file of arrays, written one part at a time and mapped into memory; without a path, memory itself.

    Constants of them share this object's memory, as long as it lives.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lent: list[Any] = []

    def keep(self, parts: Iterable[Any], dtype: Any, count: int) -> Any:
        """Writes `count` numbers, given as arrays, and maps them as one line.

        Raises:
            OSError: the disk lacks space.
        """
        if self.path is None:
            return np.concatenate([np.array(part, dtype).ravel() for part in parts])
        with self.path.open("ab") as file:
            file.write(b"\0" * (-file.tell() % _ALIGNED))
            start = file.tell()
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype).data)
        return np.memmap(self.path, dtype, mode="r", offset=start, shape=count)

    def constant(self, numbers: Any, kind: Any, shape: tuple[int, ...]) -> Any:
        """A constant of an array's bytes."""
        self._lent.append(numbers)
        return openvino().op.Constant(openvino().Tensor(numbers, openvino().Shape(shape), kind), shared_memory=True)


def settle(
    graph: Any,
    blanks: Blanks,
    quantization: str | None,
    file: NumbersFile,
    done: Callable[[int], None] = lambda _: None,
) -> None:
    """Gives the graph's weights their numbers, in place; `done` is called with how many a weight has.

    Raises:
        NotBlank: a constant was computed of a blank.
        OSError: the disk lacks space.
    """
    roundings = {} if quantization is None else _roundings(graph, int(quantization.removeprefix("int")))
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino().Type.f32:
            continue
        numbers = node.get_data()
        blanks.check(numbers)
        rounding = roundings.get(node.get_friendly_name())
        if rounding is None and not blanks.has(numbers):
            continue
        parts = blanks.parts(numbers)
        shape = tuple(numbers.shape)
        made = _widened(parts, shape, file) if rounding is None else _rounded(parts, shape, rounding, file)
        for reader in list(node.output(0).get_target_inputs()):
            reader.replace_source_output(made.output(0))
        blanks.drop(parts)
        release_freed()
        done(numbers.size)
    graph.validate_nodes_and_infer_types()


def _roundings(graph: Any, bits: int) -> dict[str, _Rounding]:
    """How each weight is rounded, by the name of its constant: by the first operation that reads it."""
    found: dict[str, _Rounding] = {}
    products: list[str] = []
    last = None
    for node in graph.get_ordered_ops():
        for port, value in enumerate(node.input_values()):
            outputs = _outputs(node, port, value)
            if outputs is None:
                continue
            name = value.get_node().get_friendly_name()
            last = None if name in found else name
            if last is not None:
                found[name] = _Rounding(8, outputs)
                if node.get_type_name() == "MatMul":
                    products.append(name)
    if bits == 4:
        for name in products if last is None else products[:-1]:
            found[name] = _Rounding(4, found[name].outputs)
    return found


def _outputs(node: Any, port: int, value: Any) -> tuple[int, ...] | None:
    """The dimensions along which the outputs of a weight lie; None if the value is no weight of the operation."""
    source, kind = value.get_node(), node.get_type_name()
    if source.get_type_name() != "Constant" or value.get_element_type() != openvino().Type.f32:
        return None
    rank = len(value.get_shape())
    if kind == "MatMul" and rank > 1:
        attributes = node.get_attributes()
        swapped = attributes["transpose_b"] if port == 1 else not attributes["transpose_a"]
        summed = rank - 1 if swapped else rank - 2
        return tuple(each for each in range(rank) if each != summed) if value.get_shape()[summed] > 1 else None
    place = 0 if kind == "Gather" else 1
    return _OUTPUTS[kind] if kind in _OUTPUTS and port == place and rank > 1 else None


def _widened(parts: tuple[torch.Tensor, ...], shape: tuple[int, ...], file: NumbersFile) -> Any:
    """A weight in float32: weights of 16 bits would be in memory twice when the graph is computed, as widened too."""
    if len(parts) == 1 and parts[0].dtype is torch.float32:
        return file.constant(parts[0].contiguous().numpy(), openvino().Type.f32, shape)
    numbers = file.keep((some.numpy() for some in rows(parts)), np.float32, math.prod(shape))
    return file.constant(numbers, openvino().Type.f32, shape)


def _rounded(parts: tuple[torch.Tensor, ...], shape: tuple[int, ...], rounding: _Rounding, file: NumbersFile) -> Any:
    """A weight that is rounded; its 16-bit scales and the sums that unpack it are nodes of the graph."""
    from openvino import opset13 as ops

    types = openvino().Type
    summed = tuple(each for each in range(len(shape)) if each not in rounding.outputs)
    group = _group(shape[summed[0]]) if rounding.bits == 4 and len(summed) == 1 else 0
    cut = summed[0]
    whole = (*shape[:cut], shape[cut] // group, group, *shape[cut + 1 :]) if group else shape
    alone = tuple(1 if each in ((cut + 1,) if group else summed) else size for each, size in enumerate(whole))
    scales, zeros = torch.empty(alone, dtype=torch.half), torch.empty(alone, dtype=torch.uint8)

    def packed() -> Iterable[Any]:
        start = 0
        for some in rows(parts) if 0 in rounding.outputs else [torch.cat([part.float() for part in parts])]:
            if group:
                numbers, scale = _four(some.reshape(-1, *whole[1:]), cut + 1)
            else:
                numbers, scale, zeros[start : start + len(some)] = _eight(some, summed)
            scales[start : start + len(scale)] = scale
            start += len(some)
            yield numbers.numpy()

    count = math.prod(shape) // (2 if group else 1)
    kept = file.constant(file.keep(packed(), np.uint8, count), types.i4 if group else types.u8, whole)
    unpacked = ops.convert(kept, types.f16)
    if not group:
        unpacked = ops.subtract(unpacked, ops.convert(_constant(zeros.numpy()), types.f16))
    scaled = ops.multiply(unpacked, _constant(scales.numpy()))
    if group:
        scaled = ops.reshape(scaled, ops.constant(np.array(shape, np.int64)), special_zero=False)
    return ops.convert(scaled, types.f32)


def _group(numbers: int) -> int:
    """How many of an output's numbers share a scale; 0 if no group fits."""
    if numbers % GROUP == 0:
        return GROUP
    largest = numbers & -numbers  # the largest power of two that divides them
    return largest if largest >= _SMALLEST_GROUP else 0


def _eight(weight: torch.Tensor, summed: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight in 8 bits, its scales and its zero points, which have one number where `weight` has its sums."""
    least, most = weight.amin(summed, keepdim=True).clamp(max=0), weight.amax(summed, keepdim=True).clamp(min=0)
    scale = ((most - least) / 255).clamp(min=_EPSILON)
    zero = (-(least / scale).round()).clamp(0, 255)
    return ((weight / scale).add_(zero).round_().clamp_(0, 255).byte(), scale, zero.byte())


def _four(weight: torch.Tensor, summed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in 4 bits, two in a byte, and its scales: the largest number of a group, of either sign, is -8."""
    least, most = weight.amin(summed, keepdim=True).abs(), weight.amax(summed, keepdim=True)
    scale = torch.where(least >= most, least, -most) / 8
    scale = torch.where(scale.abs() < _EPSILON, _EPSILON, scale)
    levels = (weight / scale).round_().clamp_(-8, 7).to(torch.int8).view(torch.uint8).flatten()
    return (levels[::2] & 15) | (levels[1::2] << 4), scale


def _constant(numbers: Any) -> Any:
    """A constant that shares this memory."""
    return openvino().op.Constant(numbers, shared_memory=True)
