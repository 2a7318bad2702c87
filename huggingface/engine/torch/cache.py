"""The KV cache in tensors: banks of rows, each row a sequence at positions of its own.

A transformers model gets it as `past_key_values`: for each layer the model passes new keys and values to `update` and
gets back those to attend to. `slots.py` decides which sequence has which row, and calls this cache as its store.
Engine's thread only. Must not know sequences, sampling or text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from ...host.devices import free_bytes
from ...host.memory import ran_out_of_memory, release_freed

# One layer's keys or values for one token: number of heads and width of a head.
Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer keeps of a token."""

    keys: Shape
    values: Shape
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return (self.keys[0] * self.keys[1] + self.values[0] * self.values[1]) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows of one bank with one new token each, or one row with several new tokens.

    `rows` and `index` are the rows in their bank, `tokens` the places of the new tokens in a packed forward pass,
    `positions` (rows, new tokens) their positions in the sequences. Attention reaches up to `length`. `start` is the
    position of a single row's first new token, None for several rows. `masks` are added to the scores, or select them,
    by kind of layer: (rows, 1, new tokens, length).
    """

    bank: int
    rows: slice
    tokens: slice
    length: int
    start: int | None
    positions: torch.Tensor
    index: torch.Tensor
    masks: Mapping[str, torch.Tensor]


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values of all banks and layers; see `slots.Store` for the methods that move rows."""

    joint = True

    def __init__(self, layers: Sequence[LayerShape | None]) -> None:
        """`layers` are the model's, None for a layer that keeps nothing."""
        super().__init__(layers=[])
        self._shapes = list(layers)
        self._banks: dict[int, list[tuple[torch.Tensor, torch.Tensor] | None]] = {}
        self.segments: Sequence[Segment] = ()
        self.packed = False  # whether the tokens of all segments are in one row
        self.handles: Mapping[str, torch.Tensor] = {}  # the masks that the model is given, by kind of layer
        self.layer = 0  # the layer of the last `update`
        # Asks for bytes on a device, or gives back a negative number; returns whether they may be allocated.
        self.take: Callable[[str, int], bool] = take_if_free
        self._bank_bytes: dict[int, dict[str, int]] = {}
        self.token_bytes = sum(shape.token_bytes for shape in self._shapes if shape is not None)

    # For the model ----------------------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps a layer's new keys and values, each (batch, heads, new tokens, width).

        Where each row of the batch is a sequence, they belong to one segment; returns the keys and values to attend to:
        (batch, heads, length, width). In a packed pass, with the tokens of all segments in one row, returns its
        arguments, and the attention calls `view` for each segment.
        """
        self.layer = layer_idx
        if not self.packed:
            [segment] = self.segments
            self._write(segment, key_states, value_states, layer_idx)
            return self.view(segment, layer_idx)
        for segment in self.segments:
            keys, values = key_states[:, :, segment.tokens], value_states[:, :, segment.tokens]
            if segment.start is None:  # (1, heads, rows, width) -> (rows, heads, 1, width)
                keys, values = keys.transpose(0, 2), values.transpose(0, 2)
            self._write(segment, keys, values, layer_idx)
        return key_states, value_states

    def view(self, segment: Segment, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A segment's keys and values up to its length, without a copy."""
        pair = self._banks[segment.bank][layer_idx]
        assert pair is not None  # noqa: S101 - the layer has just been written to
        return pair[0][segment.rows, :, : segment.length], pair[1][segment.rows, :, : segment.length]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """No single number is right; models ask only if they are given no positions."""
        return 0

    def _write(self, segment: Segment, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> None:
        pair = self._banks[segment.bank][layer_idx]
        if pair is None:
            raise ValueError(f"layer {layer_idx} was not expected to keep anything")
        for kept, new in zip(pair, (keys, values), strict=True):
            if segment.start is None:
                kept[segment.index, :, segment.positions[:, 0]] = new[:, :, 0]
            else:
                kept[segment.rows, :, segment.start : segment.length] = new

    # For the slot table -----------------------------------------------------------------------------------------------

    def create(self, bank: int, rows: int, capacity: int) -> bool:
        """Allocates a bank if its memory is free: asks for it, and fills it with zeros at once."""
        needs: dict[str, int] = {}
        for shape in self._shapes:
            if shape is not None:
                device = str(shape.device)
                needs[device] = needs.get(device, 0) + rows * capacity * shape.token_bytes
        taken: dict[str, int] = {}
        try:
            for device, need in needs.items():
                if not self.take(device, need):
                    return False
                taken[device] = need
            self._banks[bank] = [self._layer(shape, rows, capacity) for shape in self._shapes]
            self._bank_bytes[bank], taken = taken, {}
        except (MemoryError, RuntimeError) as error:
            if ran_out_of_memory(error):
                return False
            raise
        finally:
            self._give(taken)
        return True

    def _give(self, taken: Mapping[str, int]) -> None:
        for device, size in taken.items():
            self.take(device, -size)

    def drop(self, bank: int) -> None:
        """Frees a bank, also to the system, before others may have its memory."""
        del self._banks[bank]
        release_freed()
        self._give(self._bank_bytes.pop(bank))

    def drop_all(self) -> None:
        """Gives all memory back."""
        for bank in list(self._banks):
            self.drop(bank)
        self.segments, self.handles = (), {}

    def copy(self, source: tuple[int, int], target: tuple[int, int], tokens: int) -> None:
        """Copies the first `tokens` tokens of a row, named by bank and row, to another."""
        for old, new in zip(self._banks[source[0]], self._banks[target[0]], strict=True):
            if old is not None and new is not None:
                for kept, copied in zip(old, new, strict=True):
                    copied[target[1], :, :tokens] = kept[source[1], :, :tokens]

    def swap(self, bank: int, one: int, other: int, tokens: int) -> None:
        """Exchanges the first `tokens` tokens of two rows of a bank."""
        for pair in self._banks[bank]:
            for kept in pair or ():
                aside = kept[one, :, :tokens].clone()
                kept[one, :, :tokens] = kept[other, :, :tokens]
                kept[other, :, :tokens] = aside

    def clear(self, bank: int, row: int) -> None:
        """Overwrites a row with zeros: a NaN would spread even from masked positions."""
        for pair in self._banks[bank]:
            for kept in pair or ():
                kept[row].zero_()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all banks."""
        tensors = [kept for bank in list(self._banks.values()) for pair in bank for kept in pair or ()]
        return sum(kept.numel() * kept.itemsize for kept in tensors)

    def _layer(self, shape: LayerShape | None, rows: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if shape is None:
            return None
        keys, values = (
            torch.empty((rows, heads, capacity, width), dtype=shape.dtype, device=shape.device).zero_()
            for heads, width in (shape.keys, shape.values)
        )
        return keys, values


def take_if_free(device: str, size: int) -> bool:
    """Whether `size` bytes are free on a device: for a cache without an account."""
    free = free_bytes(device)
    return free is None or size <= free


def layer_shapes(cache: Any) -> list[LayerShape | None]:
    """What each layer of a model keeps, read from a cache that the model itself has filled.

    Raises:
        ValueError: a layer keeps something other than keys and values, token by token.
    """
    shapes: list[LayerShape | None] = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        kind = type(layer).__name__
        if kind == "DummyLayer":
            shapes.append(None)
        elif kind not in ("DynamicLayer", "DynamicSlidingWindowLayer") or keys is None or values is None:
            raise ValueError(f"a layer keeps its state in a {kind}")
        else:
            of_keys, of_values = (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])
            shapes.append(LayerShape(of_keys, of_values, keys.dtype, keys.device))
    if not any(shapes):
        raise ValueError("no layer keeps keys and values")
    return shapes
