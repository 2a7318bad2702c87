"""Weights that a model has without holding them: a graph is made of blanks, and gets its numbers one weight at a time.

A blank is a float32 tensor of zeros, of which the system keeps no page until one is written. It stands for tensors that
lie in a file, as they are stored there. Tracing needs shapes and dtypes only, so a model of blanks gives the graph of
the float32 model; inside `filled`, torch computes with the numbers. One thread at a time. Must not know files or
graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ...host.memory import drop_pages

# A blank's first number: NaN, with the blank's place in its lower bits. What is computed of a blank is NaN too, and no
# two blanks are equal.
_NAN = 0x7FC00000
_MOST = 0x3FFFFF

_AT_ONCE = 2**20  # numbers that are widened to float32 at once


class NotBlank(Exception):
    """A graph holds numbers that were computed of a blank: the model must be read."""


class Blanks:
    """The blanks of one model, and what they stand for."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, tuple[torch.Tensor, ...]]] = {}  # by address
        self._mapped: set[int] = set()  # the addresses of tensors in files
        self._seen: dict[int, torch.Tensor] = {}  # of those that multiplied: their inputs' squares, summed by input

    def __bool__(self) -> bool:
        return bool(self._kept)

    def add(self, parts: Sequence[torch.Tensor], *, mapped: bool = False) -> Any:
        """A blank, as an array, for tensors one below the other; they differ in their first dimension only.

        `mapped` tensors lie in a file, and nothing writes to them.
        """
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        numbers = np.zeros(shape, np.float32)
        if numbers.size == 0 or len(self._kept) > _MOST:
            raise ValueError("there can be no such blank")
        numbers.reshape(-1).view(np.uint32)[0] = _NAN | len(self._kept)
        self._kept[numbers.ctypes.data] = (numbers, tuple(parts))
        if mapped:
            self._mapped |= {part.data_ptr() for part in parts}
        return numbers

    def drop(self, parts: Sequence[torch.Tensor]) -> None:
        """Drops the pages of tensors in files from memory; a later use reads them again."""
        for part in parts:
            if part.data_ptr() in self._mapped:
                drop_pages(part.data_ptr(), part.nbytes)

    def parts(self, numbers: Any) -> tuple[torch.Tensor, ...]:
        """What an array stands for: tensors one below the other; the array's own numbers if it is no blank."""
        kept = self._kept.get(numbers.ctypes.data)
        if kept is None or kept[0].size != numbers.size:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of arrays that are read-only: nothing writes to them
                return (torch.from_numpy(numbers),)
        blank, parts = kept
        if blank.shape == numbers.shape:
            return parts
        return (torch.cat([part.reshape(-1) for part in parts]).reshape(numbers.shape),)

    def has(self, numbers: Any) -> bool:
        """Whether an array is a blank."""
        kept = self._kept.get(numbers.ctypes.data)
        return kept is not None and kept[0].size == numbers.size

    def check(self, numbers: Any) -> None:
        """Checks that an array that is no blank was not computed of one.

        Raises:
            NotBlank: it has NaN, or is a matrix of zeros.
        """
        if not self._mapped or self.has(numbers) or not np.issubdtype(numbers.dtype, np.floating):
            return  # of a model that was read whole, numbers are merged only
        if np.isnan(numbers).any() or (sum(size > 1 for size in numbers.shape) > 1 and not numbers.any()):
            raise NotBlank(f"an array of {numbers.shape} was computed of weights that are not read")

    def of(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """What a parameter stands for; None if it is no blank."""
        kept = self._kept.get(tensor.data_ptr())
        return None if kept is None or kept[0].shape != tensor.shape else kept[1]

    def note(self, parts: Sequence[torch.Tensor], inputs: torch.Tensor) -> None:
        """Notes what weights are multiplied with: (…, inputs)."""
        squares = inputs.detach().flatten(0, -2).square().sum(0)
        for part in parts:
            if part.data_ptr() in self._mapped:
                self._seen[part.data_ptr()] = self._seen.get(part.data_ptr(), 0) + squares

    def seen(self, parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """How large the inputs of products with these weights were inside `filled`: the sum of their squares, for each.

        None if there was no product, or the weights lie in no file. All parts multiply the same inputs.
        """
        return self._seen.get(parts[0].data_ptr())

    def filled(self) -> TorchFunctionMode:
        """A context in which torch computes with the numbers in place of the blanks, on this thread."""
        return _Filled(self)


class _Filled(TorchFunctionMode):
    """Gives functions the numbers of the parameters that are blanks, in float32, a part at a time where that can be."""

    def __init__(self, blanks: Blanks) -> None:
        super().__init__()
        self._blanks = blanks

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # a shape, a dtype, or a view
            found = func(*args, **named)
            if not isinstance(found, torch.Tensor) or self._parts(args[0]) is None:
                return found
        if func in (torch.nn.functional.linear, torch.nn.functional.embedding) and len(args) > 1:
            parts = self._parts(args[1])
            if parts is not None and func is torch.nn.functional.linear:
                product = _multiplied(args[0], parts, *args[2:], **named)
                self._blanks.note(parts, args[0])
                self._blanks.drop(parts)
                return product
            if parts is not None and len(parts) == 1 and len(args) <= 3 and named.get("max_norm") is None:
                return func(args[0], parts[0], *args[2:], **named).float()
        args, named = _pytree.tree_map_only(torch.nn.Parameter, self._numbers, (args, named))
        return func(*args, **named)

    def _parts(self, value: Any) -> tuple[torch.Tensor, ...] | None:
        return self._blanks.of(value) if isinstance(value, torch.nn.Parameter) else None

    def _numbers(self, value: torch.nn.Parameter) -> torch.Tensor:
        parts = self._parts(value)
        return value if parts is None else torch.cat([part.float() for part in parts])


def rows(parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The rows of tensors one below the other, in float32, some at a time: each is valid until the next."""
    width = max(1, parts[0][0].numel())
    step = max(1, _AT_ONCE // width)
    room = torch.empty((min(step, max(map(len, parts))), *parts[0].shape[1:]))
    for part in parts:
        for start in range(0, len(part), step):
            some = part[start : start + step]
            yield room[: len(some)].copy_(some)


def _multiplied(inputs: torch.Tensor, parts: Sequence[torch.Tensor], bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product of the inputs and the weight that `parts` are: each output is the same sum as in one product."""
    outputs = torch.cat([torch.nn.functional.linear(inputs, some) for some in rows(parts)], dim=-1)
    return outputs if bias is None else outputs + bias
