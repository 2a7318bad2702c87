"""Gives a graph's weights their numbers, one weight at a time: in float32, or rounded to 8 or 4 bits.

The numbers go into a file, which the graph's constants are mapped from, so memory holds a part of one weight. 8 bits
have a scale and a zero point per output, as nncf's `compress_weights` rounds (https://github.com/openvinotoolkit/nncf).
4 bits have them per 32 numbers, and lose the least for inputs as large as those that the weight multiplied; the first
and the last matrix, and those of an attention's values, stay in 8 bits. Must not know models.
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
from .fuse import value_products
from .library import openvino

GROUP = 32  # numbers of an output that share a scale in 4 bits; a weight that this does not divide has 8 bits
_SHARES = (1, 0.9, 0.8)  # of a group's span, which 4 bits may hold
_UNSEEN = 0.1  # how large each input is at least, as a share of their mean: those seen are few

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
        if rounding is None:
            made = _widened(parts, shape, file)
        else:
            made = _rounded(parts, shape, rounding, blanks.seen(parts), file)
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
    values = value_products(graph) if bits == 4 else set()
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
                if node.get_type_name() == "MatMul" and node.get_friendly_name() not in values:
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


def _rounded(
    parts: tuple[torch.Tensor, ...],
    shape: tuple[int, ...],
    rounding: _Rounding,
    seen: torch.Tensor | None,
    file: NumbersFile,
) -> Any:
    """A weight that is rounded; its 16-bit scales, its zero points and the sums that unpack it are nodes of the graph.

    `seen` is how large the inputs were that the weight multiplied, see `Blanks.seen`; None counts all alike.
    """
    from openvino import opset13 as ops

    types = openvino().Type
    summed = tuple(each for each in range(len(shape)) if each not in rounding.outputs)
    group = _group(shape[summed[0]]) if rounding.bits == 4 and len(summed) == 1 else 0
    cut = summed[0]
    whole = (*shape[:cut], shape[cut] // group, group, *shape[cut + 1 :]) if group else shape
    alone = tuple(1 if each in ((cut + 1,) if group else summed) else size for each, size in enumerate(whole))
    scales, zeros = torch.empty(alone, dtype=torch.half), torch.empty(alone, dtype=torch.uint8)
    weights = None
    if group and seen is not None and len(seen) == shape[cut] and bool(seen.isfinite().all()) and bool(seen.any()):
        weights = (seen / seen.mean() + _UNSEEN).reshape(-1, group, *(1,) * (len(shape) - cut - 1))

    def packed() -> Iterable[Any]:
        start = 0
        for some in rows(parts) if 0 in rounding.outputs else [torch.cat([part.float() for part in parts])]:
            if group:
                numbers, scale, zero = _four(some.reshape(-1, *whole[1:]), cut + 1, weights)
                numbers = _in_pairs(numbers)
            else:
                numbers, scale, zero = _eight(some, summed)
            scales[start : start + len(scale)] = scale
            zeros[start : start + len(scale)] = zero
            start += len(scale)
            yield numbers.numpy()

    kind, count = types.u4 if group else types.u8, math.prod(shape) // (2 if group else 1)
    codes = file.constant(file.keep(packed(), np.uint8, count), kind, whole)
    kept = (_in_pairs(zeros) if group else zeros.flatten()).numpy()
    zero = file.constant(file.keep([kept], np.uint8, len(kept)), kind, alone)
    scale = file.constant(file.keep([scales.numpy()], np.float16, scales.numel()), types.f16, alone)
    scaled = ops.multiply(ops.subtract(ops.convert(codes, types.f16), ops.convert(zero, types.f16)), scale)
    if group:
        scaled = ops.reshape(scaled, ops.constant(np.array(shape, np.int64)), special_zero=False)
    return ops.convert(scaled, types.f32)


def _group(numbers: int) -> int:
    """How many of an output's numbers share a scale; 0 if no group fits."""
    return GROUP if numbers % GROUP == 0 else 0


def _eight(weight: torch.Tensor, summed: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight in 8 bits, its scales and its zero points, which have one number where `weight` has its sums."""
    least, most = weight.amin(summed, keepdim=True).clamp(max=0), weight.amax(summed, keepdim=True).clamp(min=0)
    scale = ((most - least) / 255).clamp(min=_EPSILON)
    zero = (-(least / scale).round()).clamp(0, 255)
    return ((weight / scale).add_(zero).round_().clamp_(0, 255).byte(), scale, zero.byte())


def _four(
    weight: torch.Tensor, summed: int, seen: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight in codes of 4 bits, its scales and its zero points, which have one number where `weight` has its sums.

    The codes span a group's numbers, or a share of that span; the scale is that of least squares for the codes, and the
    share the one that leaves the least, each number counted by the square of its inputs, which were `seen`: that is the
    error that a group adds to its output if inputs are unrelated. As `make_qx_quants` of llama.cpp.
    """
    least, most = weight.amin(summed, keepdim=True).clamp(max=0), weight.amax(summed, keepdim=True).clamp(min=0)
    step = (most - least).div_(15).clamp_(min=_EPSILON)
    zero = least.div_(step).neg_().round_()
    best: list[torch.Tensor] = []
    for share in _SHARES:
        codes = torch.addcmul(zero, weight, 1 / (share * step)).round_().clamp_(0, 15).sub_(zero)
        counted = codes if seen is None else codes * seen
        product = (counted * weight).sum(summed, keepdim=True)
        scale = product / (counted * codes).sum(summed, keepdim=True).clamp(min=_EPSILON)
        found = [codes, scale, product * scale]  # the last is what the squares of the differences lack
        better = found[-1] > best[-1] if best else None
        best = (
            found if better is None else [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        )
    codes, scale, _ = best
    return codes.add_(zero).byte(), scale, zero.byte()


def _in_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Numbers of 4 bits, two in a byte; the last byte of an odd number of them has one."""
    pairs = torch.nn.functional.pad(codes.flatten(), (0, codes.numel() % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)
