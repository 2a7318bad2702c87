"""Counts the memory of a model: what its parts use, what it asks for, and what a close gives back.

Any thread may read the counts. Must not know what computes the model, the manager or HTTP.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import torch

from ..cancellation import NEVER, Cancellation
from ..host.devices import free_bytes, indexed
from ..host.memory import drop_pages, mapped_files, release_freed
from ..types import PASSING, Sizes


class Memory(Protocol):
    """The account where a model asks for memory and reports what it uses."""

    def record(self, part: str, sizes: Mapping[str, int]) -> None:
        """Records how many bytes a part of the model has on each device."""

    def allocate(self, part: str, device: str, size: int) -> bool:
        """Asks for `size` bytes more, or gives back a negative `size`; returns whether they may be allocated."""

    def reserve_floor(self, device: str, size: int) -> None:
        """Reserves `size` bytes of KV cache for the model, if they are free, before they are allocated."""

    def commit(self) -> None:
        """Ends a load's reservation: all that the load takes is allocated and recorded."""

    def evict_one(self) -> bool:
        """Evicts another model; returns whether one was evicted."""

    def maximum(self, device: str) -> int | None:
        """The most bytes that the model could have if all others were evicted; None for no limit."""


class Unlimited:
    """An account without a budget: for a model outside of a manager."""

    def record(self, part: str, sizes: Mapping[str, int]) -> None:
        """Records nothing."""

    def allocate(self, part: str, device: str, size: int) -> bool:  # noqa: ARG002 - the protocol's
        """Whether `size` bytes are free."""
        free = free_bytes(device)
        return free is None or size <= free

    def reserve_floor(self, device: str, size: int) -> None:
        """Reserves nothing."""

    def commit(self) -> None:
        """Ends no reservation."""

    def evict_one(self) -> bool:
        """Evicts nothing: there are no other models."""
        return False

    def maximum(self, device: str) -> int | None:  # noqa: ARG002 - the protocol's
        """No limit."""
        return None


class ModelMemory:
    """The bytes of one model: weights, copies of weights, KV cache, and memory that single requests take."""

    def __init__(self, device: str, memory: Memory | None = None) -> None:
        """`device` is where the model computes. `memory` is its account; None for no limit."""
        self.account = memory or Unlimited()
        # Bytes that count as the model's but are not in memory.
        self.unwritten: Callable[[], int] = lambda: 0
        self._device = indexed(device)
        self._weights: dict[str, int] = {}
        self._kv: dict[str, int] = {}
        self._copied = 0
        self._own = 0  # bytes of torch weights that are in memory beside the graph's
        self._peak = 0
        self._counting = threading.Lock()

    def set_weights(self, sizes: Mapping[str, int]) -> None:
        """Records the weights' bytes on each device, in place of earlier ones."""
        with self._counting:
            self._weights = dict(sizes)
        self.account.record("weights", sizes)
        self._note_peak()

    def set_copied(self, size: int) -> None:
        """Records how many bytes of weights have a copy in another layout, on the model's device."""
        with self._counting:
            self._copied = size
        if size:
            self.account.record("copies", {self._device: size})
        self._note_peak()

    def take_cache(self, device: str, size: int) -> bool:
        """Asks for `size` bytes of KV cache, or gives back a negative `size`; returns whether they may be allocated."""
        return self._take("kv cache", device, size)

    def take_passing(self, size: int) -> bool:
        """Does the same for memory that one request takes beside the batch, on the model's device."""
        return self._take(PASSING, self._device, size)

    def take_own(self, size: int) -> bool:
        """Does the same for torch weights that are in memory beside a graph's for a while."""
        if not self.account.allocate("own weights", "cpu", size):
            return False
        with self._counting:
            self._own += size
        self._note_peak()
        return True

    def max_beside(self) -> int | None:
        """The most bytes that could ever be free beside the weights; None for no limit."""
        maximum = self.account.maximum(self._device)
        return None if maximum is None else max(0, maximum - self._weights.get(self._device, 0) - self._copied)

    @property
    def sizes(self) -> Sizes:
        """How much memory the model takes now."""
        with self._counting:
            weights, kv, copied = dict(self._weights), dict(self._kv), self._copied + self._own
        devices = {**weights, self._device: weights.get(self._device, 0) + copied}
        for device, size in kv.items():
            devices[device] = devices.get(device, 0) + size
        return Sizes(
            sum(weights.values()),
            copied,
            sum(kv.values()),
            self._peak,
            {device: size for device, size in devices.items() if size},
        )

    @property
    def expected_back(self) -> int:
        """Bytes that a close should give back to the system: promised bytes that were never used do not count."""
        return self.sizes.total - self.unwritten()

    def forget(self) -> None:
        """Records that the weights are gone."""
        self.unwritten = lambda: 0
        with self._counting:
            self._weights = {}

    def _take(self, part: str, device: str, size: int) -> bool:
        if not self.account.allocate(part, device, size):
            return False
        with self._counting:
            self._kv[device] = self._kv.get(device, 0) + size
        self._note_peak()
        return True

    def _note_peak(self) -> None:
        with self._counting:
            present = sum(self._weights.values()) + sum(self._kv.values()) + self._own + self._copied
            self._peak = max(self._peak, present)


def detach(model: Any, cancellation: Cancellation = NEVER) -> None:
    """Copies weights that lie in a mapped file into memory of their own.

    With a mapped file a load takes almost no time, but a program that overwrites the file in place would crash the
    process, and its pages would count for no model. Tensors are replaced one by one, so a computation that runs
    meanwhile is not disturbed.

    Raises:
        Cancelled: by `cancellation`.
    """
    files = mapped_files()
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            address = tensor.data_ptr()
            if tensor.device.type != "cpu" or not any(start <= address < end for start, end in files):
                continue
            cancellation.check()
            key = (address, tensor.shape)
            if key not in copies:
                copies[key] = tensor.data.clone()
                if tensor.is_contiguous():
                    drop_pages(address, tensor.numel() * tensor.itemsize)
            tensor.data = copies[key]


def free() -> None:
    """Gives unused memory back: models and pipelines are reference cycles, and allocators keep memory."""
    gc.collect()
    with suppress(torch.AcceleratorError):  # a device that has failed gives its memory back when the process ends
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    release_freed()
