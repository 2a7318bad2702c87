"""How much memory models may take on each device, and who has taken how much.

A ledger, not an allocator: whoever takes memory says so before, and says what it really was after. What is free is
asked of the system each time, because others live on this machine too. Standard library only; any thread may call
anything here. Must not know models, only their names.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .devices import free_bytes

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_LEAST = 1000  # bytes
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that models may take on a device: `bytes`, or a `share` of what they have and what is free."""

    bytes: int | None = None
    share: float = 0.9


def parse_limits(text: str) -> dict[str, Limit]:
    """The limits that a setting names: `12GB`, `0.8`, or `cpu=12GB,cuda:0=0.9`; `*` is every device not named.

    Raises:
        ValueError: the part that cannot be read, and what may stand there.
    """
    limits = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        device, _, amount = part.rpartition("=")
        device = device.strip() or "*"
        found = _AMOUNT.fullmatch(amount.strip())
        if (device != "*" and not _DEVICE.fullmatch(device)) or not found or found[2].upper() not in _UNITS:
            raise ValueError(f"'{part}' is no amount of memory (12GB, 0.8) or device with one (cuda:0=20GB)")
        number, unit = float(found[1]), found[2].upper()
        size = int(number * _UNITS[unit])
        if _same(device) in limits:
            raise ValueError(f"'{text}' names the memory of {'a device' if device == '*' else device} twice")
        if not unit and 0 < number <= 1:
            limits[_same(device)] = Limit(share=number)
        elif size >= _LEAST:
            limits[_same(device)] = Limit(bytes=size)
        else:
            raise ValueError(f"'{part}' is less memory than any model needs")
    return limits


class Budget:
    """The ledger. Devices are named as torch does; `cuda` is `cuda:0`."""

    def __init__(
        self, limits: Mapping[str, Limit] | None = None, free: Callable[[str], int | None] = free_bytes
    ) -> None:
        """`free` tells how many bytes could be taken on a device just now, None where that cannot be told."""
        self._limits = dict(limits or {})
        self._free = free
        self._lock = threading.Lock()
        self._held: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
        self._coming: dict[str, dict[str, int]] = defaultdict(dict)

    def reserve(self, owner: str, needs: Mapping[str, int]) -> bool:
        """Set memory aside that `owner` is about to take, all of it or, where there is no room, nothing.

        It counts as taken until `settle`.
        """
        needs = {_same(device): need for device, need in needs.items()}
        with self._lock:
            if any(room is not None and need > room for device, need in needs.items() for room in [self._room(device)]):
                return False
            for device, need in needs.items():
                self._coming[device][owner] = need
            return True

    def settle(self, owner: str) -> None:
        """What `owner` had set aside is not needed any more: it has been taken and noted, or will not be."""
        with self._lock:
            for reserved in self._coming.values():
                reserved.pop(owner, None)

    def note(self, owner: str, part: str, sizes: Mapping[str, int]) -> None:
        """Note how many bytes a part of `owner` (its weights, its KV cache) has on each device, in place of before."""
        with self._lock:
            for parts in self._held.values():
                parts.pop((owner, part), None)
            for device, size in sizes.items():
                if size:
                    self._held[_same(device)][owner, part] = size

    def take(self, owner: str, part: str, device: str, size: int) -> bool:
        """Note `size` bytes more for a part of `owner`, if there is room for them; a negative size gives back."""
        device = _same(device)
        with self._lock:
            room = self._room(device)
            if size > 0 and room is not None and size > room:
                return False
            parts = self._held[device]
            parts[owner, part] = max(0, parts.get((owner, part), 0) + size)
            return True

    def forget(self, owner: str) -> None:
        """Note that `owner` has nothing any more."""
        with self._lock:
            for parts in self._held.values():
                for key in [key for key in parts if key[0] == owner]:
                    del parts[key]
            for reserved in self._coming.values():
                reserved.pop(owner, None)

    def held(self, owner: str | None = None) -> dict[str, int]:
        """Bytes by device that `owner` has, or all together."""
        with self._lock:
            sums = {
                device: sum(size for (name, _), size in parts.items() if owner in (None, name))
                for device, parts in self._held.items()
            }
        return {device: size for device, size in sums.items() if size}

    def holders(self, device: str) -> dict[str, int]:
        """Bytes on a device by owner, what is set aside included."""
        device = _same(device)
        sums: dict[str, int] = defaultdict(int)
        with self._lock:
            for (name, _), size in self._held[device].items():
                sums[name] += size
            for name, size in self._coming[device].items():
                sums[name] += size
        return dict(sums)

    def room(self, device: str) -> int | None:
        """Bytes that could be taken on a device now; None where nothing limits them."""
        with self._lock:
            return self._room(_same(device))

    def most(self, device: str) -> int | None:
        """Bytes that models could have on a device if all of them went; None where nothing limits them."""
        device = _same(device)
        with self._lock:
            room = self._room(device)
            return None if room is None else room + self._taken(device)

    def _taken(self, device: str) -> int:
        return sum(self._held[device].values()) + sum(self._coming[device].values())

    def _room(self, device: str) -> int | None:
        limit = self._limits.get(device) or self._limits.get(device.split(":")[0]) or self._limits.get("*") or Limit()
        free = self._free(device)
        # What is set aside is not taken yet, and so is still among what is free.
        coming = sum(self._coming[device].values())
        taken = self._taken(device)
        if limit.bytes is not None:
            allowed = limit.bytes - taken
            return max(0, allowed if free is None else min(allowed, free - coming))
        if free is None:
            return None
        return max(0, int(limit.share * (free + taken - coming)) - taken)


def _same(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def readable(size: float) -> str:
    """A size for people: `1.25 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
