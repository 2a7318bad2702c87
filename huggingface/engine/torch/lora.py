"""LoRA adapters in the batch: the adapter of each token of a forward pass, and what it adds to each product.

In place of a twin's adapted layers stand layers with the factors of all adapters side by side, so that rows of many
adapters, and of none, share one pass: the factors of other adapters count zero for a token. Engine's thread only. Knows
peft's names for the parts of such a layer; must not know files, sequences or the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional


class Adapters(Protocol):
    """The adapters of one model: see `loading.lora.AttachedAdapters`."""

    keys: Mapping[str, str]  # the name in the model's layers for each name in requests

    def check(self, name: str | None) -> None:
        """Refuses a name that no adapter of the model has."""

    def active(self, name: str | None) -> AbstractContextManager[None]:
        """Makes the model itself answer as this adapter in the block, and as the base (None) afterwards."""

    def activate(self, model: Any, name: str | None) -> None:
        """Makes the model or its twin answer as this adapter from now on."""


class NotMixable(Exception):
    """A layer's adapters add more than a product of two factors, so their rows cannot share a pass."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The place of each adapter's factors among those of a layer; many layers have the same layout.

    Adapter `n` has the columns from `starts[n]` to `starts[n + 1]`, none if it does not change the layer.
    """

    starts: tuple[int, ...]
    owners: torch.Tensor  # (columns,), each column's adapter
    scales: torch.Tensor  # (columns,)


@dataclass(slots=True)
class Mix:
    """The adapter of each token in the current pass: its number, -1 for the base."""

    first: int = 0  # the pass uses adapters from `first` up to `last`
    last: int = -1
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    kept: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    _weights: dict[tuple[Layout, bool], torch.Tensor] = field(default_factory=dict)

    def begin(self, tokens: Sequence[int], kept: Sequence[int], device: torch.device) -> None:
        """Sets the adapters of the next pass's tokens, in order, and of the tokens whose logits are kept."""
        named = [number for number in set(tokens) if number >= 0]
        self.first, self.last = min(named, default=0), max(named, default=-1)
        self._weights.clear()
        if named:
            self.tokens = torch.tensor(tokens, device=device)
            self.kept = torch.tensor(kept, device=device)

    def weights(self, layout: Layout, rows: int, *, head: bool) -> torch.Tensor:
        """Each column's factor for each row, (rows, columns): the adapter's scale if it is the row's own, else 0.

        Raises:
            ValueError: the layer got neither all tokens nor all kept ones, so the rows cannot be matched.
        """
        at_kept = head and rows == len(self.kept)
        owners = self.kept if at_kept else self.tokens
        if rows != len(owners):
            raise ValueError(f"a layer with adapters was given {rows} of {len(owners)} tokens")
        if (layout, at_kept) not in self._weights:
            columns = slice(layout.starts[self.first], layout.starts[self.last + 1])
            own = owners[:, None] == layout.owners[columns]
            self._weights[layout, at_kept] = own * layout.scales[columns]
        return self._weights[layout, at_kept]


class Adapted(nn.Module):
    """A product, plus what each token's adapter adds to it."""

    def __init__(
        self, base: nn.Module, down: torch.Tensor, up: torch.Tensor, layout: Layout, mix: Mix, *, head: bool
    ) -> None:
        """`down` is (columns, inputs), `up` (outputs, columns). `head`: it may get only the kept tokens."""
        super().__init__()
        self.base = base
        self._down, self._up = down, up
        self._layout, self._mix, self._head = layout, mix, head

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(…, inputs) -> (…, outputs)"""
        result: torch.Tensor = self.base(values)
        begin, end = self._layout.starts[self._mix.first], self._layout.starts[self._mix.last + 1]
        if begin >= end:
            return result
        rows = values.reshape(-1, values.shape[-1])
        weights = self._mix.weights(self._layout, rows.shape[0], head=self._head)
        inner = functional.linear(rows.to(self._down.dtype), self._down[begin:end]) * weights
        added = functional.linear(inner, self._up[:, begin:end])
        return (result + added.view(result.shape)).to(result.dtype)


def mix_adapters(twin: Any, keys: Sequence[str]) -> Mix:
    """Replaces each adapted layer of the twin by an `Adapted`; the adapters are numbered as in `keys`.

    Raises:
        NotMixable: a layer's adapters are more than two plain factors; the twin is unusable then.
    """
    mix = Mix()
    layouts: dict[Any, Layout] = {}
    head = twin.get_output_embeddings()
    for parent, name, layer in list(_adapted_layers(twin)):
        setattr(parent, name, _mixed(layer, keys, mix, layouts, head=layer is head))
    return mix


def _adapted_layers(twin: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in twin.modules():
        for name, child in parent.named_children():
            if hasattr(child, "base_layer"):
                yield parent, name, child


def _mixed(layer: Any, keys: Sequence[str], mix: Mix, layouts: dict[Any, Layout], *, head: bool) -> Adapted:
    present = [(number, key) for number, key in enumerate(keys) if key in layer.lora_A]
    downs, ups = [layer.lora_A[key] for _, key in present], [layer.lora_B[key] for _, key in present]
    kinds = {(factor.weight.dtype, factor.weight.device) for factor in (*downs, *ups)}
    if len(kinds) != 1 or layer.lora_variant or any(factor.bias is not None for factor in (*downs, *ups)):
        raise NotMixable(type(layer).__name__)
    ranks = {number: down.weight.shape[0] for (number, _), down in zip(present, downs, strict=True)}
    scales = {number: float(layer.scaling[key]) for number, key in present}
    [(_, device)] = kinds
    alike = (tuple(ranks.items()), tuple(scales.items()), device)
    if alike not in layouts:
        owners = [number for number, rank in ranks.items() for _ in range(rank)]
        layouts[alike] = Layout(
            starts=tuple(accumulate((ranks.get(number, 0) for number in range(len(keys))), initial=0)),
            owners=torch.tensor(owners, device=device),
            scales=torch.tensor([scales[number] for number in owners], dtype=torch.float32, device=device),
        )
    with torch.no_grad():
        down, up = torch.cat([each.weight for each in downs]), torch.cat([each.weight for each in ups], dim=1)
        begin = 0
        # In memory once: the adapters' own parameters, which the model shares, become parts of these tensors.
        for one, other in zip(downs, ups, strict=True):
            end = begin + one.weight.shape[0]
            one.weight.data, other.weight.data = down[begin:end], up[:, begin:end]
            begin = end
    return Adapted(layer.base_layer, down, up, layouts[alike], mix, head=head)
