"""Products with a model's weights, each by the routine that is fastest on this machine, as measured at load.

On a CPU a decoding step takes the time of reading the weights, and none of torch's routines for the same product is
fastest for every number of rows. Weights in oneDNN's own layout are fastest of all. Those weights are then in memory
only in that layout, except a table of embeddings that is a product's too: the model's own parameters are emptied, and
filled again with exactly the same numbers before the model itself is used. Engine's thread only. Must not know
sequences or the cache.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ...cancellation import NEVER, Cancellation
from ...host.memory import release_freed

# (rows, inputs), (outputs, inputs), (outputs,) or None -> (rows, outputs), contiguous: some models take views of it.
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# Numbers of rows for which routines are measured; each size stands for those up to the next. `parity` computes a chunk
# of each.
_SIZES = (1, 4, 16, 64)
_SAMPLE_BYTES = 48 * 2**20  # weights to measure one shape with (fewer outputs of a larger one): more than caches hold
_RUNS = 2
_WORTH = 0.95  # torch's own routine stays unless another takes at most this share of its time
_PACK_FOR = 16  # rows for which oneDNN lays weights out; the layout works for any number
_PACK_WORTH = 1.1  # weights are packed for oneDNN unless steps would be clearly slower, which is rare
_PACK_AT_LEAST = 32 * 2**20  # bytes of weights; fewer stay in the caches in any layout
_GIVE_BACK = 16  # how often memory goes back to the system while all weights are packed
_REST = 32  # steps without use of the model itself before its weights are packed again


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(rows, weight, bias)


def _transposed(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The weights as the left factor: BLAS libraries do that well for a few rows."""
    product = torch.mm(weight, rows.t()).t().contiguous()
    return product if bias is None else product.add_(bias)


def _onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """oneDNN's inner product, on plain or packed weights."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


# All routines, torch's own first.
WAYS: tuple[Way, ...] = (_linear, _transposed, _onednn)


class Product(nn.Module):
    """An `nn.Linear`, or transformers' `Conv1D`, by the fastest routine for its number of rows."""

    def __init__(self, module: nn.Module, *, shared: bool) -> None:
        """`shared`: other modules use the same parameter, so it must stay as it is."""
        super().__init__()
        self.parameter: nn.Parameter = module.weight  # type: ignore[assignment]
        self.bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
        self.shared = shared
        self._is_transposed = isinstance(module, Conv1D)
        self.packed: torch.Tensor | None = None
        self.ways: tuple[Way, ...] = (_linear,) * len(_SIZES)
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs), in its current layout."""
        return self.parameter.t() if self._is_transposed else self.parameter

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(…, inputs) -> (…, outputs)"""
        rows = values.reshape(-1, self.in_features)
        if self.packed is not None:
            product = _onednn(rows, self.packed, self.bias)
        else:
            way = self.ways[min((rows.shape[0].bit_length() + 1) // 2, len(self.ways)) - 1]
            product = way(rows, self.weight, self.bias)
        return product.view(*values.shape[:-1], self.out_features)

    def pack(self) -> None:
        """Packs the weights for oneDNN, and drops the parameter's, unless other modules use it too."""
        if self.packed is None:
            self.packed = _packed(self.weight)
            if not self.shared:
                self.parameter.data = torch.empty(0, dtype=self.parameter.dtype)

    def unpack(self) -> None:
        """Restores the parameter's weights, and drops oneDNN's."""
        if self.packed is not None and not self.shared:
            dense = self.packed.to_dense()
            self.parameter.data = dense.t().contiguous() if self._is_transposed else dense
        self.packed = None


class Products:
    """All products of a twin, and the layout of their weights."""

    def __init__(
        self,
        twin: nn.Module,
        findings: MutableMapping[Hashable, Any] | None = None,
        cancellation: Cancellation = NEVER,
    ) -> None:
        """Replaces the twin's products by the fastest ones; changes nothing where there is no choice.

        `findings` keep the measurements of this machine for the next model.

        Raises:
            Cancelled: by `cancellation`.
        """
        uses = Counter(id(parameter) for module in twin.modules() for parameter in module._parameters.values())
        found = [
            (parent, name, Product(child, shared=uses[id(child.weight)] > 1))
            for parent in list(twin.modules())
            for name, child in parent.named_children()
            if _replaceable(child)
        ]
        self._all = [product for _, _, product in found]
        alike: dict[_Kind, list[Product]] = defaultdict(list)
        for product in self._all:
            alike[_kind(product.weight, product.bias)].append(product)

        def some(kind: _Kind, count: int, outputs: int) -> list[torch.Tensor]:
            return [product.weight[:outputs] for product in alike[kind][:count]]

        counts = {kind: len(products) for kind, products in alike.items()}
        tried = _found_out(counts, some, findings, cancellation)
        for kind, products in alike.items():
            for product in products:
                product.ways = tried[kind].ways
        self._weights_bytes = _bytes(counts)
        self._worth_packing = _worth_packing(counts, tried)
        for parent, name, product in found:
            setattr(parent, name, product)
        self._packed = False
        self._rested = _REST

    def step(self) -> None:
        """Counts a step; packs the weights if the model itself has not been used for a while."""
        self._rested += 1
        if self._worth_packing and not self._packed and self._rested >= _REST:
            self._packed = True
            with torch.inference_mode(False), torch.no_grad():  # the parameters must stay ordinary ones
                self._for_each(Product.pack)
            release_freed()

    def restore_weights(self) -> None:
        """Unpacks the weights, for use of the model itself."""
        self._rested = 0
        if self._packed:
            self._packed = False
            with torch.inference_mode(False), torch.no_grad():
                self._for_each(Product.unpack)
            release_freed()

    def _for_each(self, change: Callable[[Product], None]) -> None:
        """Changes all products; gives freed memory back now and then, because it may be in another heap than new
        memory."""
        changed = 0
        for product in self._all:
            change(product)
            changed += product.out_features * product.in_features * 4
            if changed * _GIVE_BACK >= self._weights_bytes:
                changed = 0
                release_freed()

    @property
    def copied_bytes(self) -> int:
        """Bytes of weights that are in memory twice, because other modules than a product use them too."""
        shared = [product.weight for product in self._all if product.shared]
        return sum(weight.numel() * weight.itemsize for weight in shared) if self._worth_packing else 0


def copies(model: nn.Module, findings: MutableMapping[Hashable, Any] | None = None) -> int:
    """Bytes of weights that would be in memory twice if a twin of this model used its products.

    The model may be on the meta device: measurements use other numbers. `findings` keep them for the load.
    """
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    counts: Counter[_Kind] = Counter()
    shared: dict[int, int] = {}
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D):
            weight: torch.Tensor = module.weight.t() if type(module) is Conv1D else module.weight  # type: ignore[assignment, operator]
            counts[_kind(weight, module.bias)] += 1  # type: ignore[arg-type]
            if uses[id(module.weight)] > 1:
                shared[id(module.weight)] = weight.numel() * torch.float32.itemsize
    if not shared or _bytes(counts) < _PACK_AT_LEAST:
        return 0

    def some(kind: _Kind, count: int, outputs: int) -> list[torch.Tensor]:
        # With dtype and device: torch's defaults may be others while a model is built.
        made = [torch.rand(outputs * kind.inputs, dtype=torch.float32, device="cpu") - 0.5 for _ in range(count)]
        if kind.contiguous:
            return [numbers.view(outputs, kind.inputs) for numbers in made]
        return [numbers.view(kind.inputs, outputs).t() for numbers in made]

    worth = _worth_packing(counts, _found_out(counts, some, findings))
    release_freed()
    return sum(shared.values()) if worth else 0


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """What similar products share: the shape and layout of their weights, and whether there is a bias."""

    outputs: int
    inputs: int
    contiguous: bool
    bias: bool


@dataclass(frozen=True, slots=True)
class _Finding:
    """The fastest routines for products of a kind, by size, and one product's seconds, summed over all sizes.

    `lying`: with plain weights. `packed`: with oneDNN's.
    """

    ways: tuple[Way, ...]
    lying: float
    packed: float


# Returns up to so many weights of a kind, cut to so many outputs.
_Some = Callable[[_Kind, int, int], list[torch.Tensor]]


def _kind(weight: torch.Tensor, bias: torch.Tensor | None) -> _Kind:
    return _Kind(int(weight.shape[0]), int(weight.shape[1]), weight.is_contiguous(), bias is not None)


def _bytes(counts: Mapping[_Kind, int]) -> int:
    return sum(kind.outputs * kind.inputs * torch.float32.itemsize * count for kind, count in counts.items())


def _worth_packing(counts: Mapping[_Kind, int], found: Mapping[_Kind, _Finding]) -> bool:
    """Whether it pays to pack the weights for oneDNN."""
    lying = sum(found[kind].lying * count for kind, count in counts.items())
    packed = sum(found[kind].packed * count for kind, count in counts.items())
    return _bytes(counts) >= _PACK_AT_LEAST and packed < _PACK_WORTH * lying


def _found_out(
    counts: Mapping[_Kind, int],
    some: _Some,
    findings: MutableMapping[Hashable, Any] | None,
    cancellation: Cancellation = NEVER,
) -> dict[_Kind, _Finding]:
    """The fastest routines for products of each kind; `counts` is how many products there are."""
    known: MutableMapping[Hashable, Any] = {} if findings is None else findings
    found = {}
    for kind in counts:
        row = kind.inputs * torch.float32.itemsize
        outputs = min(kind.outputs, max(1, _SAMPLE_BYTES // row))
        count = min(counts[kind], max(1, _SAMPLE_BYTES // (outputs * row)))
        key = ("products", replace(kind, outputs=outputs), count, torch.get_num_threads())
        if key not in known:
            with torch.inference_mode():
                known[key] = _try(kind, some(kind, count, outputs), cancellation)
        tried: _Finding = known[key]
        share = kind.outputs / outputs
        found[kind] = replace(tried, lying=tried.lying * share, packed=tried.packed * share)
    return found


def _try(kind: _Kind, weights: Sequence[torch.Tensor], cancellation: Cancellation) -> _Finding:
    packed = _try_to_pack(weights)
    # With its dtype: while a model of half precision is read, transformers makes that torch's default.
    bias = torch.zeros(weights[0].shape[0], dtype=torch.float32, device="cpu") if kind.bias else None
    ways = []
    as_they_lie = laid_out = 0.0
    for size in _SIZES:
        cancellation.check()
        rows = torch.rand(size, kind.inputs, dtype=torch.float32, device="cpu") - 0.5
        way, seconds = _fastest(rows, weights, bias)
        ways.append(way)
        as_they_lie += seconds
        if packed is not None:
            seconds = _seconds(_onednn, rows, packed, bias)
        laid_out += seconds
    return _Finding(tuple(ways), as_they_lie, laid_out)


def _replaceable(module: nn.Module) -> bool:
    """Whether a module is exactly one of these classes, in float32 on a CPU, without hooks."""
    if type(module) not in (nn.Linear, Conv1D) or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not hasattr(module, "_hf_hook")


def _packed(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_FOR)
    return packed


def _try_to_pack(weights: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """The weights in oneDNN's layout, if this build of torch supports it and restores exactly the same numbers."""
    try:
        packed = [_packed(weight) for weight in weights]
        return packed if torch.equal(packed[0].to_dense(), weights[0]) else None
    except (RuntimeError, AttributeError, NotImplementedError):
        return None


def _fastest(rows: torch.Tensor, weights: Sequence[torch.Tensor], bias: torch.Tensor | None) -> tuple[Way, float]:
    """The fastest routine for products of one shape, and its seconds per product."""
    wanted = _linear(rows, weights[0], bias)
    best: Way = _linear
    shortest = plain = _seconds(_linear, rows, weights, bias)
    for way in WAYS[1:]:
        try:
            product = way(rows, weights[0], bias)
            if product.stride() != wanted.stride() or not torch.allclose(product, wanted, rtol=1e-3, atol=1e-4):
                continue
            seconds = _seconds(way, rows, weights, bias)
        except (RuntimeError, AttributeError, NotImplementedError):  # not in this build, or not for these weights
            continue
        if seconds < min(shortest, plain * _WORTH):
            best, shortest = way, seconds
    return best, shortest


def _seconds(way: Way, rows: torch.Tensor, weights: Sequence[torch.Tensor], bias: torch.Tensor | None) -> float:
    """Seconds per product, over all the weights, so that caches help as little as in a model."""
    shortest = float("inf")
    for _ in range(_RUNS):
        started = time.perf_counter()
        for weight in weights:
            way(rows, weight, bias)
        shortest = min(shortest, time.perf_counter() - started)
    return shortest / len(weights)
