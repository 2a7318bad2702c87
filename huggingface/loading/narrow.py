"""Layers whose weights have fewer bits in memory than in their products.

Where whole numbers are fast, values enter a product in 16 bits, each row with its own scale, and whole numbers add up
exactly. Elsewhere weights become floats a block at a time, which stays in the caches: widened as a whole, a layer takes
ten times as long. Either way a row's result does not depend on the rest of the batch. Any thread that computes may call
it. Must not know how weights are rounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

GROUP = 32  # weights of one output that share a step in 4 bits
SMALLEST = 1e-30  # so that a row of zeros has a scale

_HALF = 256  # the value of one unit in the upper half of a 16-bit number
_TOP = 127 * _HALF  # a row's largest value in 16 bits
_ROWS = 256  # rows computed at a time: their sums take 16 bytes an output
_BLOCK = 2**17  # weights that a thread makes floats at a time, so that they stay in its caches
_FEW = 8  # rows up to which they are a product's left factor, for the math library's sake
_RUNS = 5


class NarrowLinear(nn.Module):
    """A layer whose weights are floats of 16 bits, or whole numbers of 8 or 4 bits times one float per output."""

    codes: torch.Tensor
    scale: torch.Tensor | None
    steps: torch.Tensor | None
    middles: torch.Tensor | None

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor | None,
        steps: torch.Tensor | None,
        middles: torch.Tensor | None,
        bias: nn.Parameter | None,
        *,
        dtype: torch.dtype,
        whole: bool,
    ) -> None:
        """`codes` are (outputs, inputs) of floats or int8; with `steps` and `middles`, (groups, outputs), see `pack`.

        `whole`: multiplies in whole numbers; otherwise turns the weights into floats for each product.
        """
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("steps", steps)
        self.register_buffer("middles", middles)
        self.bias = bias
        self.dtype = dtype
        self.whole = whole
        if steps is None:
            self.out_features, self.in_features = codes.shape
        else:
            self.out_features, self.in_features = codes.shape[1], 2 * codes.shape[0]

    @property
    def weight(self) -> torch.Tensor:
        """The weight's dtype and shape, which models read, without its numbers."""
        return torch.empty((self.out_features, self.in_features), dtype=self.dtype, device="meta")

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(…, inputs) -> (…, outputs)"""
        rows = values.reshape(-1, self.in_features)
        weight = None
        if self.whole:
            weight = self.codes.t() if self.steps is None else _unpacked(self.codes, self.steps)
        products = [self._product(part, weight) for part in torch.split(rows, _ROWS)]
        product = products[0] if len(products) == 1 else torch.cat(products)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*values.shape[:-1], self.out_features)

    def _product(self, rows: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """(rows, inputs) -> (rows, outputs), without the bias; by `weight`, if it is there, in whole numbers."""
        if self.scale is None:
            return by_outputs(rows, self.codes)
        if weight is not None:
            product = whole_product(rows, weight, self.scale)
        elif rows.device.type != "cpu":
            product = torch.mm(rows, torch.mul(self.codes.t(), self.scale).to(rows.dtype))
        else:
            numbers = rows.float()
            if self.steps is None:
                product = by_outputs(numbers, self.codes)
            else:
                product = _by_groups(numbers, self.codes, self.steps)
            product = product.mul_(self.scale).to(rows.dtype)
        if self.middles is not None:
            middles = torch.mul(self.middles, self.scale).to(rows.dtype)
            product.addmm_(rows.view(rows.shape[0], -1, GROUP).sum(2), middles)
        return product

    def extra_repr(self) -> str:
        """The text in `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bits={8 * self.codes.itemsize if self.steps is None else 4}"


class NarrowEmbedding(nn.Module):
    """A table of embeddings of 16 bits, or of 8 bits that it shares with the model's output layer."""

    codes: torch.Tensor
    scale: torch.Tensor | None

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor | None, padding_idx: int | None, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.dtype = dtype
        self.padding_idx = padding_idx
        self.num_embeddings, self.embedding_dim = codes.shape

    @property
    def weight(self) -> torch.Tensor:
        """See `NarrowLinear.weight`."""
        return torch.empty(self.codes.shape, dtype=self.dtype, device="meta")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(…) -> (…, width)"""
        rows = self.codes[ids]
        return (rows if self.scale is None else rows * self.scale[ids].unsqueeze(-1)).to(self.dtype)


# Products in floats ---------------------------------------------------------------------------------------------------


def by_outputs(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(rows, inputs) of float32 by weights (outputs, inputs) of any dtype, which are widened some outputs at a time."""
    count, inputs = rows.shape
    outputs, block = weight.shape[0], max(1, _block() // inputs)
    few, turned = count <= _FEW, rows.t().contiguous()
    product = rows.new_empty((count, outputs) if few else (outputs, count))
    wide = rows.new_empty(min(block, outputs), inputs)
    for begin in range(0, outputs, block):
        part = weight[begin : begin + block]
        floats = wide[: part.shape[0]].copy_(part)
        if few:
            torch.mm(rows, floats.t(), out=product[:, begin : begin + block])
        else:
            torch.mm(floats, turned, out=product[begin : begin + block])
    return product if few else product.t().contiguous()


def _by_groups(rows: torch.Tensor, packed: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """(rows, inputs) of float32 by code * step of each weight, see `pack`: one group of some outputs at a time.

    Each group's sum is multiplied by its step, which is less work than each weight.
    """
    count, (half, outputs) = rows.shape[0], packed.shape
    unit = GROUP if half % GROUP == 0 else GROUP // 2  # as both halves of the inputs have whole ones
    block = _block() // unit
    parts = rows.view(count, -1, unit).transpose(0, 1).contiguous()
    factors, product = steps.float(), rows.new_zeros(count, outputs)
    for begin in range(0, outputs, block):
        strip = slice(begin, begin + block)
        width = min(block, outputs - begin)
        codes, wide, sums = packed.new_empty(unit, width), rows.new_empty(unit, width), rows.new_empty(count, width)
        for at in range(0, half, unit):
            both = packed[at : at + unit, strip]
            # The lower code stays in the upper bits, so it counts 16 times.
            for shift, first, share in (
                (torch.bitwise_left_shift, at, 1 / 16),
                (torch.bitwise_right_shift, half + at, 1),
            ):
                shift(both, 4, out=codes)
                torch.mm(parts[first // unit], wide.copy_(codes), out=sums)
                product[:, strip].addcmul_(sums, factors[first // GROUP, strip], value=share)
    return product


def _block() -> int:
    """How many weights all threads together make floats at a time."""
    return _BLOCK * torch.get_num_threads()


# Products in whole numbers --------------------------------------------------------------------------------------------


def whole_product(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(rows, inputs) by int8 weights (inputs, outputs): each value as two 8-bit numbers, in two rows.

    Sums of whole numbers are exact, so neither the other rows nor the order of additions matters.
    """
    count = rows.shape[0]
    step = rows.abs().amax(1, keepdim=True).float().clamp_min_(SMALLEST).div_(_TOP)
    values = torch.div(rows, step).to(torch.int16)
    halves = torch.empty((2 * count, rows.shape[1]), dtype=torch.int8)
    halves[count:] = values  # the lower half, -128 to 127, so the upper one is rounded to the nearest
    halves[:count] = values.add_(_HALF // 2).bitwise_right_shift_(8)
    sums = torch._int_mm(halves, weight).float()
    product = torch.add(sums[count:], sums[:count], alpha=_HALF).mul_(step).mul_(scale)
    return product if product.dtype is rows.dtype else product.to(rows.dtype)


def whole_products_are_exact() -> bool:
    """Whether this machine adds whole numbers in 32 bits.

    Without the instructions for it (AVX512-VNNI and the like) oneDNN's sums saturate at 16 bits, silently.
    """
    try:
        for rows, inputs, outputs in ((1, 576, 192), (2, 1536, 576), (64, 66, 33)):
            for value in (127, -128):
                left = torch.full((rows, inputs), value, dtype=torch.int8)
                right = torch.full((inputs, outputs), value, dtype=torch.int8)
                if not bool((torch._int_mm(left, right) == inputs * value * value).all()):
                    return False
    except (RuntimeError, NotImplementedError):
        return False
    return True


def whole_products_pay() -> bool:
    """Whether products of whole numbers are exact, and faster than floats: measured."""
    if not whole_products_are_exact():
        return False
    values, scale = torch.rand(4, 1024) - 0.5, torch.ones(1024)
    weight = torch.randint(-127, 128, (1024, 1024), dtype=torch.int8)
    with torch.inference_mode():
        return _seconds(whole_product, values, weight.t(), scale) < _seconds(by_outputs, values, weight)


def _seconds(way: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> float:
    shortest = float("inf")
    for _ in range(_RUNS):
        started = time.perf_counter()
        way(*arguments)
        shortest = min(shortest, time.perf_counter() - started)
    return shortest


# Two codes in a byte --------------------------------------------------------------------------------------------------


def pack(codes: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs) of 4 bits -> (inputs / 2, outputs): the first half of the inputs in the low bits, the second
    above."""
    below, above = codes.t().chunk(2)
    return ((above << 4) | (below & 15)).contiguous()


def _unpacked(packed: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """code * step of each weight, (inputs, outputs) of int8."""
    half, outputs = packed.shape
    weight = torch.empty((2 * half, outputs), dtype=torch.int8, device=packed.device)
    torch.bitwise_left_shift(packed, 4, out=weight[:half])
    weight[:half].bitwise_right_shift_(4)
    torch.bitwise_right_shift(packed, 4, out=weight[half:])
    weight.view(-1, GROUP, outputs).mul_(steps[:, None])
    return weight
