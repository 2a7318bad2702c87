"""The most memory that models may take on each device, and how much each owner has.

A ledger, not an allocator: owners record memory before they allocate it, and correct the number afterwards. Free memory
is read from the system each time, because other programs use this machine too; memory of the process beyond all records
is measured, because it comes with the models' work. Standard library only; any thread may call anything here. Must not
know models, only their names.
"""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..host.devices import by_index, free_bytes, indexed
from ..types import PASSING

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_LEAST = 1000  # bytes
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
_LENIENT = 0.1  # share of a limit in bytes that the process may use unrecorded before a load is refused
_KV_CACHE = "kv cache"  # the part of a model that grows
_WINDOW = 60.0  # seconds for which the largest unrecorded use counts: it comes and goes with the work


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that models may take on a device: `bytes`, or a `share` of what they have and what is free."""

    bytes: int | None = None
    share: float = 0.9


def parse_limits(text: str) -> dict[str, Limit]:
    """Parses a setting's limits: `12GB`, `0.8`, or `cpu=12GB,cuda:0=0.9`; `*` is every device not named.

    Raises:
        ValueError: a part is invalid; the message names it, and the allowed forms.
    """
    limits = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        device, _, amount = part.rpartition("=")
        device = device.strip() or "*"
        found = _AMOUNT.fullmatch(amount.strip())
        if (device != "*" and not _DEVICE.fullmatch(device)) or not found or found[2].upper() not in _UNITS:
            raise ValueError(f"'{part}' is not an amount of memory (12GB, 0.8) or a device with one (cuda:0=20GB)")
        number, unit = float(found[1]), found[2].upper()
        size = int(number * _UNITS[unit])
        if indexed(device) in limits:
            raise ValueError(f"'{text}' names the memory of {'a device' if device == '*' else device} twice")
        if not unit and 0 < number <= 1:
            limits[indexed(device)] = Limit(share=number)
        elif size >= _LEAST:
            limits[indexed(device)] = Limit(bytes=size)
        else:
            raise ValueError(f"'{part}' is less memory than any model needs")
    return limits


class Budget:
    """The ledger. Devices are named as in torch; `cuda` means `cuda:0`.

    An owner's bytes on a device count as the largest of three: the bytes that it recorded, these with a floor for the
    part that has one (`reserve_floor`), and, until `commit`, the bytes that it reserved.
    """

    def __init__(
        self,
        limits: Mapping[str, Limit] | None = None,
        free: Callable[[str], int | None] = free_bytes,
        resident: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`free` returns how many bytes are free on a device, None if unknown; `resident` how many bytes this process
        has on the CPU, None if they are not measured."""
        self._limits = dict(limits or {})
        self._free = free
        self._resident = resident
        self._lock = threading.Lock()
        self._held: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
        self._kept: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
        self._coming: dict[str, dict[str, int]] = defaultdict(dict)
        self._idle_process: int | None = None
        self._unnoted: deque[tuple[float, int]] = deque()  # times and bytes; the bytes only decrease

    def begin(self) -> None:
        """Records what the process has before the first model is loaded; these bytes count for no model.

        Only the first call counts.
        """
        with self._lock:
            if self._idle_process is None:
                self._idle_process = self._resident()

    def reserve(self, owner: str, needs: Mapping[str, int]) -> bool:
        """Reserves memory on all devices for `owner`, or nothing where it does not fit; returns whether it fits.

        It counts as allocated until `commit`.
        """
        needs = by_index(needs)
        with self._lock:
            if any(self._lacking(owner, device, need) > 0 for device, need in needs.items()):
                return False
            for device, need in needs.items():
                self._coming[device][owner] = need
            return True

    def lacking(self, owner: str, device: str, need: int) -> int:
        """The bytes that other owners must give back, so that `owner` can have `need` bytes."""
        with self._lock:
            return max(0, self._lacking(owner, indexed(device), need))

    def commit(self, owner: str) -> None:
        """Ends an owner's reservation: its memory is allocated and recorded, or will not be."""
        with self._lock:
            for reserved in self._coming.values():
                reserved.pop(owner, None)

    def record(self, owner: str, part: str, sizes: Mapping[str, int]) -> None:
        """Records how many bytes a part of `owner` (its weights, its KV cache) has on each device, in place of earlier
        ones."""
        with self._lock:
            for parts in self._held.values():
                parts.pop((owner, part), None)
            for device, size in sizes.items():
                if size:
                    self._held[indexed(device)][owner, part] = size

    def reserve_floor(self, owner: str, part: str, device: str, size: int) -> bool:
        """Reserves a floor of `size` bytes for a part of `owner`, in place of an earlier one; returns whether they are
        free."""
        with self._lock:
            return self._set(self._kept, owner, part, indexed(device), size)

    def allocate(self, owner: str, part: str, device: str, size: int) -> bool:
        """Records `size` bytes more for a part of `owner`, if they are free or within its floor; may be negative.

        Returns whether the bytes may be allocated.
        """
        device = indexed(device)
        with self._lock:
            before = self._held[device].get((owner, part), 0)
            return self._set(self._held, owner, part, device, max(0, before + size))

    def freeze(self, owner: str) -> None:
        """Freezes the owner's byte count until `forget`: freed memory reaches the system later."""
        with self._lock:
            for device in list(self._held):
                if size := self._counted(device).get(owner, 0):
                    self._coming[device][owner] = size

    def rename(self, owner: str, name: str) -> None:
        """Moves all that an owner has to another name."""
        with self._lock:
            for parts in (*self._held.values(), *self._kept.values()):
                for key in [key for key in parts if key[0] == owner]:
                    parts[name, key[1]] = parts.pop(key)
            for reserved in self._coming.values():
                if owner in reserved:
                    reserved[name] = reserved.pop(owner)

    def forget(self, owner: str) -> None:
        """Removes an owner with all that it has."""
        with self._lock:
            for parts in (*self._held.values(), *self._kept.values()):
                for key in [key for key in parts if key[0] == owner]:
                    del parts[key]
            for reserved in self._coming.values():
                reserved.pop(owner, None)

    def held(self, owner: str | None = None) -> dict[str, int]:
        """The bytes that count as `owner`'s, or as all owners', by device."""
        with self._lock:
            sums = {
                device: sum(size for name, size in self._counted(device).items() if owner in (None, name))
                for device in {*self._held, *self._kept, *self._coming}
            }
        return {device: size for device, size in sums.items() if size}

    def holders(self, device: str) -> dict[str, int]:
        """The bytes on a device that count as each owner's."""
        with self._lock:
            return self._counted(indexed(device))

    def available(self, device: str) -> int | None:
        """The bytes that a load could take on a device now; None for no limit."""
        with self._lock:
            return self._room(indexed(device))

    def maximum(self, device: str) -> int | None:
        """The bytes that models could have on a device if all of them were evicted; None for no limit."""
        device = indexed(device)
        with self._lock:
            room = self._room(device, 0)
            return None if room is None else room + self._taken(device)

    def unrecorded(self, device: str) -> int:
        """The bytes of a limit that models cannot have now, because the process uses them beyond the records."""
        with self._lock:
            return self._besides(indexed(device), _LENIENT)

    def _set(
        self, ledger: dict[str, dict[tuple[str, str], int]], owner: str, part: str, device: str, size: int
    ) -> bool:
        parts, key = ledger[device], (owner, part)
        before, counted = parts.get(key, 0), self._counted(device).get(owner, 0)
        # Memory that grows with the work is refused earlier than a load: it cannot be taken away again.
        room = self._room(device, self._besides(device)) if size > before else None
        parts[key] = size
        if room is not None and self._counted(device).get(owner, 0) - counted > room:
            parts[key] = before
            return False
        return True

    def _counted(self, device: str) -> dict[str, int]:
        sums: dict[str, int] = defaultdict(int)
        held, kept = self._held[device], self._kept[device]
        for key in dict.fromkeys((*held, *kept)):
            sums[key[0]] += max(held.get(key, 0), kept.get(key, 0))
        for owner, size in self._coming[device].items():
            sums[owner] = max(sums[owner], size)
        return {owner: size for owner, size in sums.items() if size}

    def _taken(self, device: str) -> int:
        return sum(self._counted(device).values())

    def _room(self, device: str, besides: int | None = None) -> int | None:
        limit = self._limit(device)
        free = self._free(device)
        # Reserved memory is not allocated yet, so it still counts as free.
        taken, held = self._taken(device), self._held[device]
        coming = taken - sum(size for (_, part), size in held.items() if part != PASSING)
        if limit.bytes is not None:
            allowed = limit.bytes - taken - (self._besides(device, _LENIENT) if besides is None else besides)
            return max(0, allowed if free is None else min(allowed, free - coming))
        if free is None:
            return None
        return max(0, int(limit.share * (free + taken - coming)) - taken)

    def _lacking(self, owner: str, device: str, need: int) -> int:
        room, alone = self._room(device), self._room(device, 0)
        if room is None or alone is None:
            return 0
        own = self._counted(device).get(owner, 0)
        others = self._taken(device) - own
        # An owner without others is admitted whatever the process uses besides: otherwise it could be refused for ever.
        return max(need - alone - own, min(need - room - own, others))

    def _limit(self, device: str) -> Limit:
        return self._limits.get(device) or self._limits.get(device.split(":")[0]) or self._limits.get("*") or Limit()

    def _besides(self, device: str, lenient: float = 0.0) -> int:
        """The process's largest recent unrecorded use of a device, less a share of the limit that it may have."""
        limit = self._limit(device).bytes
        if device != "cpu" or limit is None or self._idle_process is None:
            return 0
        now, resident = time.monotonic(), self._resident()
        # While an owner allocates what it has reserved, or frees it, the difference has no certain owner.
        if resident is not None and not self._coming[device]:
            size = resident - self._idle_process - sum(self._held[device].values())
            while self._unnoted and self._unnoted[-1][1] <= size:
                self._unnoted.pop()
            self._unnoted.append((now, size))
        while len(self._unnoted) > 1 and self._unnoted[0][0] < now - _WINDOW:
            self._unnoted.popleft()
        maximum = self._unnoted[0][1] if self._unnoted else 0
        return max(0, maximum - int(lenient * limit))


class Account:
    """The account of one model in the budget: see `model.memory.Memory`."""

    def __init__(self, budget: Budget, owner: str, evict_one: Callable[[], bool]) -> None:
        """`owner` is the model's name in the budget; `evict_one` evicts another model."""
        self.evict_one = evict_one
        self._budget = budget
        self._owner = owner
        self._naming = threading.Lock()  # so that each call uses one name, before or after `rename`

    @property
    def owner(self) -> str:
        """The model's name in the budget."""
        return self._owner

    def rename(self, owner: str) -> None:
        """Changes the model's name in the budget."""
        with self._naming:
            self._budget.rename(self._owner, owner)
            self._owner = owner

    def record(self, part: str, sizes: Mapping[str, int]) -> None:
        """Records how many bytes a part of the model has on each device."""
        with self._naming:
            self._budget.record(self._owner, part, sizes)

    def reserve_floor(self, device: str, size: int) -> None:
        """Reserves `size` bytes of KV cache for the model, if they are free."""
        with self._naming:
            self._budget.reserve_floor(self._owner, _KV_CACHE, device, size)

    def allocate(self, part: str, device: str, size: int) -> bool:
        """Asks for `size` bytes more, or gives back a negative `size`; returns whether they may be allocated."""
        with self._naming:
            return self._budget.allocate(self._owner, part, device, size)

    def commit(self) -> None:
        """Ends the load's reservation: all that the load takes is allocated."""
        with self._naming:
            self._budget.commit(self._owner)

    def maximum(self, device: str) -> int | None:
        """The most bytes that the owner could have if all others were evicted; None for no limit."""
        return self._budget.maximum(device)
