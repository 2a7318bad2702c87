"""How much memory models may take on each device, and who has taken how much.

A ledger, not an allocator: whoever takes memory says so before, and says what it really was after. What is free is
asked of the system each time, because others live on this machine too; and what the process has beyond all that anybody
noted is measured, because it comes with the models' work. Standard library only; any thread may call anything here.
Must not know models, only their names.
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
_LENIENT = 0.1  # of a limit in bytes, which the process may have besides before a load is refused for it
_KV_CACHE = "kv cache"  # the part of a model that grows
_WINDOW = 60.0  # seconds for which the most that was taken besides counts: it comes and goes with the work


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
    """The ledger. Devices are named as torch does; `cuda` is `cuda:0`.

    What counts as an owner's on a device is the most of three: what it has noted, that with the part of it that was set
    aside whole (`keep`), and, until it settles, what it reserved.
    """

    def __init__(
        self,
        limits: Mapping[str, Limit] | None = None,
        free: Callable[[str], int | None] = free_bytes,
        resident: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`free` tells how many bytes could be taken on a device just now, None where that cannot be told; `resident`
        how many this process has on the CPU, None where nobody is to ask.
        """
        self._limits = dict(limits or {})
        self._free = free
        self._resident = resident
        self._lock = threading.Lock()
        self._held: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
        self._kept: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
        self._coming: dict[str, dict[str, int]] = defaultdict(dict)
        self._idle_process: int | None = None
        self._unnoted: deque[tuple[float, int]] = deque()  # readings of the clock, and bytes that only become fewer

    def begin(self) -> None:
        """Say that no model is there yet, but all that they need in common: what the process has now is its own.

        Only the first time counts.
        """
        with self._lock:
            if self._idle_process is None:
                self._idle_process = self._resident()

    def reserve(self, owner: str, needs: Mapping[str, int]) -> bool:
        """Set memory aside that `owner` is about to take, all of it or, where there is no room, nothing.

        It counts as taken until `settle`.
        """
        needs = by_index(needs)
        with self._lock:
            if any(self._lacking(owner, device, need) > 0 for device, need in needs.items()):
                return False
            for device, need in needs.items():
                self._coming[device][owner] = need
            return True

    def lacking(self, owner: str, device: str, need: int) -> int:
        """How many bytes others would have to give back, so that `owner` could have as many as it needs."""
        with self._lock:
            return max(0, self._lacking(owner, indexed(device), need))

    def settle(self, owner: str) -> None:
        """What `owner` had reserved is not needed any more: it has been taken and noted, or will not be."""
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
                    self._held[indexed(device)][owner, part] = size

    def keep(self, owner: str, part: str, device: str, size: int) -> bool:
        """Set `size` bytes aside, in place of before, that a part of `owner` may have at any time, if they are there to
        be had."""
        with self._lock:
            return self._set(self._kept, owner, part, indexed(device), size)

    def take(self, owner: str, part: str, device: str, size: int) -> bool:
        """Note `size` bytes more for a part of `owner`, if there is room for them or they were set aside; a negative
        size gives back."""
        device = indexed(device)
        with self._lock:
            before = self._held[device].get((owner, part), 0)
            return self._set(self._held, owner, part, device, max(0, before + size))

    def leave(self, owner: str) -> None:
        """Have all that `owner` has count as its own, whatever it gives back, until it is forgotten: what is let go of
        comes back to the system later."""
        with self._lock:
            for device in list(self._held):
                if size := self._counted(device).get(owner, 0):
                    self._coming[device][owner] = size

    def rename(self, owner: str, name: str) -> None:
        """Have all that is an owner's be under another name from now on."""
        with self._lock:
            for parts in (*self._held.values(), *self._kept.values()):
                for key in [key for key in parts if key[0] == owner]:
                    parts[name, key[1]] = parts.pop(key)
            for reserved in self._coming.values():
                if owner in reserved:
                    reserved[name] = reserved.pop(owner)

    def forget(self, owner: str) -> None:
        """Note that `owner` has nothing any more."""
        with self._lock:
            for parts in (*self._held.values(), *self._kept.values()):
                for key in [key for key in parts if key[0] == owner]:
                    del parts[key]
            for reserved in self._coming.values():
                reserved.pop(owner, None)

    def held(self, owner: str | None = None) -> dict[str, int]:
        """Bytes by device that count as `owner`'s, or all together."""
        with self._lock:
            sums = {
                device: sum(size for name, size in self._counted(device).items() if owner in (None, name))
                for device in {*self._held, *self._kept, *self._coming}
            }
        return {device: size for device, size in sums.items() if size}

    def holders(self, device: str) -> dict[str, int]:
        """Bytes on a device that count as each owner's."""
        with self._lock:
            return self._counted(indexed(device))

    def room(self, device: str) -> int | None:
        """Bytes that a load could take on a device now; None where nothing limits them."""
        with self._lock:
            return self._room(indexed(device))

    def most(self, device: str) -> int | None:
        """Bytes that models could have on a device if all of them went; None where nothing limits them."""
        device = indexed(device)
        with self._lock:
            room = self._room(device, 0)
            return None if room is None else room + self._taken(device)

    def besides(self, device: str) -> int:
        """Bytes of a limit that models cannot have now, as the process has them besides what is noted."""
        with self._lock:
            return self._besides(indexed(device), _LENIENT)

    def _set(
        self, ledger: dict[str, dict[tuple[str, str], int]], owner: str, part: str, device: str, size: int
    ) -> bool:
        parts, key = ledger[device], (owner, part)
        before, counted = parts.get(key, 0), self._counted(device).get(owner, 0)
        # What grows with the work is held back earlier than what is loaded for it: it cannot be taken away again.
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
        # What is set aside is not taken yet, and so is still among what is free.
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
        # Whoever has it all to himself is let in whatever the process has besides: else he might be kept out for ever.
        return max(need - alone - own, min(need - room - own, others))

    def _limit(self, device: str) -> Limit:
        return self._limits.get(device) or self._limits.get(device.split(":")[0]) or self._limits.get("*") or Limit()

    def _besides(self, device: str, lenient: float = 0.0) -> int:
        """What the process has had on a device lately besides what is noted, as far as that is more than a share of the
        limit."""
        limit = self._limit(device).bytes
        if device != "cpu" or limit is None or self._idle_process is None:
            return 0
        now, resident = time.monotonic(), self._resident()
        # While somebody takes what he has reserved, or gives it back, nobody can tell whose it is.
        if resident is not None and not self._coming[device]:
            size = resident - self._idle_process - sum(self._held[device].values())
            while self._unnoted and self._unnoted[-1][1] <= size:
                self._unnoted.pop()
            self._unnoted.append((now, size))
        while len(self._unnoted) > 1 and self._unnoted[0][0] < now - _WINDOW:
            self._unnoted.popleft()
        most = self._unnoted[0][1] if self._unnoted else 0
        return max(0, most - int(lenient * limit))


class Account:
    """Where one model asks for memory: see `loading.model.Memory`."""

    def __init__(self, budget: Budget, owner: str, relieve: Callable[[], bool]) -> None:
        """`owner` is its name in the budget; `relieve` has others give memory up."""
        self.relieve = relieve
        self._budget = budget
        self._owner = owner
        self._naming = threading.Lock()  # under one name or the other, never in between

    @property
    def owner(self) -> str:
        """Its name in the budget."""
        return self._owner

    def rename(self, owner: str) -> None:
        """Have another name in the budget from now on."""
        with self._naming:
            self._budget.rename(self._owner, owner)
            self._owner = owner

    def note(self, part: str, sizes: Mapping[str, int]) -> None:
        """Say how many bytes a part of the model has on each device."""
        with self._naming:
            self._budget.note(self._owner, part, sizes)

    def keep(self, device: str, size: int) -> None:
        """Have so many bytes of KV cache to itself, if they are there."""
        with self._naming:
            self._budget.keep(self._owner, _KV_CACHE, device, size)

    def take(self, part: str, device: str, size: int) -> bool:
        """Ask for bytes more, or give them back where they are negative."""
        with self._naming:
            return self._budget.take(self._owner, part, device, size)

    def settle(self) -> None:
        """Say that all is taken that a load takes."""
        with self._naming:
            self._budget.settle(self._owner)

    def most(self, device: str) -> int | None:
        """How many bytes the owner could have if all others went; None where nothing limits them."""
        return self._budget.most(device)
