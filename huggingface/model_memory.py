"""How much memory a model in memory takes: what its parts have, what it asks for, and what comes back after it.

Counts may be asked for by any thread. Must not know what computes the model, the manager or HTTP.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import torch

from .cancellation import NEVER, Cancellation
from .host.devices import free_bytes, indexed
from .host.memory import drop_pages, mapped_files, release_freed
from .types import PASSING, Sizes


class Memory(Protocol):
    """Where a model asks for memory, and says how much it has."""

    def note(self, part: str, sizes: Mapping[str, int]) -> None:
        """Say how many bytes a part of the model has on each device."""

    def take(self, part: str, device: str, size: int) -> bool:
        """Ask for bytes more, or give them back where they are negative; tells whether they may be taken."""

    def keep(self, device: str, size: int) -> None:
        """Reserve so many bytes of KV cache for the model, if they are available, before they are taken."""

    def settle(self) -> None:
        """Say that all is taken and noted that a load takes: what was reserved for it may go to others."""

    def relieve(self) -> bool:
        """Have others give memory up; tells whether some did."""

    def most(self, device: str) -> int | None:
        """How many bytes the model could have if all others went; None where nothing limits them."""


class Unlimited:
    """Memory that nothing counts: for a model outside of a manager."""

    def note(self, part: str, sizes: Mapping[str, int]) -> None:
        """Nothing is noted."""

    def take(self, part: str, device: str, size: int) -> bool:  # noqa: ARG002 - the protocol's
        """Whether it is free."""
        free = free_bytes(device)
        return free is None or size <= free

    def keep(self, device: str, size: int) -> None:
        """Nothing is kept."""

    def settle(self) -> None:
        """Nothing was reserved."""

    def relieve(self) -> bool:
        """There are no others."""
        return False

    def most(self, device: str) -> int | None:  # noqa: ARG002 - the protocol's
        """All that is free."""
        return None


class ModelMemory:
    """The bytes of one model: of its weights, of copies of some, of its KV cache, and of what comes for a while."""

    def __init__(self, device: str, memory: Memory | None = None) -> None:
        """`device` is where the model computes, `memory` the account that it asks; without one nothing is limited."""
        self.account = memory or Unlimited()
        # Bytes that count as the model's and do not lie in memory.
        self.unwritten: Callable[[], int] = lambda: 0
        self._device = indexed(device)
        self._weights: dict[str, int] = {}
        self._kv: dict[str, int] = {}
        self._copied = 0
        self._own = 0  # bytes of weights that are there beside the graph's
        self._peak = 0
        self._counting = threading.Lock()

    def set_weights(self, sizes: Mapping[str, int]) -> None:
        """Note what the weights take on each device from now on."""
        with self._counting:
            self._weights = dict(sizes)
        self.account.note("weights", sizes)
        self._note_peak()

    def set_copied(self, size: int) -> None:
        """Note how many bytes of weights have a copy in another layout, on the model's device."""
        with self._counting:
            self._copied = size
        if size:
            self.account.note("copies", {self._device: size})
        self._note_peak()

    def take_cache(self, device: str, size: int) -> bool:
        """Ask for memory for keys and values, or give it back where `size` is negative; tells whether it is there."""
        return self._take("kv cache", device, size)

    def take_passing(self, size: int) -> bool:
        """The same for what one request needs for a while beside the batch, on the model's device."""
        return self._take(PASSING, self._device, size)

    def take_own(self, size: int) -> bool:
        """The same for weights that are there beside a graph's for a while."""
        if not self.account.take("own weights", "cpu", size):
            return False
        with self._counting:
            self._own += size
        self._note_peak()
        return True

    def most_beside(self) -> int | None:
        """How many bytes there could ever be beside the weights; None where nothing limits them."""
        most = self.account.most(self._device)
        return None if most is None else max(0, most - self._weights.get(self._device, 0) - self._copied)

    @property
    def sizes(self) -> Sizes:
        """How much memory the model takes at this moment."""
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
        """Bytes that the system should have back once the model is closed: what was promised and never used is there
        now."""
        return self.sizes.total - self.unwritten()

    def forget(self) -> None:
        """Note that the weights have gone."""
        self.unwritten = lambda: 0
        with self._counting:
            self._weights = {}

    def _take(self, part: str, device: str, size: int) -> bool:
        if not self.account.take(part, device, size):
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
    """Copy weights that lie in a mapped file into memory of their own.

    Mapped, a load takes next to no time; but a file that another program overwrites in place would take the whole
    process with it, and its pages would count for no one. Tensors are changed one by one, and what computes meanwhile
    is not disturbed.

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
    """Give unused memory back: models and pipelines refer to each other in circles, and allocators keep memory."""
    gc.collect()
    with suppress(torch.AcceleratorError):  # a device that has failed gives its memory back when the process ends
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    release_freed()
