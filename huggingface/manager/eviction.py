"""Computes the shortfall of a load, evicts idle models for it, and reports what holds the rest.

`Evictor` counts with the budget and chooses among idle models; a function of the caller evicts them. Any thread may
call it. Must not know the registry, the loader or HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ..cancellation import LOOK_AGAIN
from ..errors import MemoryHeld, NeverFits
from ..host.devices import by_index
from ..host.memory import readable
from ..progress import Progress
from ..types import Estimate, Forecast
from .budget import Budget
from .table import ModelTable


@dataclass(frozen=True, slots=True)
class Idle:
    """A model that no request uses: when it was last used (any clock), and its bytes on each device."""

    model_id: str
    used: float
    held: Mapping[str, int]


class Evictor:
    """Makes room for models."""

    def __init__(
        self,
        budget: Budget,
        table: ModelTable,
        timeout: float,
        pinned: Callable[[], Collection[str]],
        evict: Callable[[str, str], bool],
        give_way: Callable[[], bool] = lambda: False,
    ) -> None:
        """Makes room for nothing yet.

        Args:
            timeout: seconds that a load waits for the requests of models that it evicts.
            pinned: returns the models that are never evicted.
            evict: unloads a model, for a reason, if no request uses it; returns whether it did.
            give_way: interrupts work that can wait, so that it frees memory; returns whether it did.
        """
        self._budget = budget
        self._table = table
        self.timeout = timeout
        self._pinned = pinned
        self._evict = evict
        self._give_way = give_way
        self._making = threading.Lock()  # two loads must not count on the same free memory, or on the same victims

    def reserve_if_plenty(self, model_id: str, device: str, size: int, times: float) -> bool:
        """Reserves `size` bytes for a model if `times` as many are free; returns whether it did."""
        with self._making:
            room = self._budget.available(device)
            return (room is None or room >= times * size) and self._budget.reserve(model_id, {device: size})

    def reserve(self, model_id: str, needs: Mapping[str, int], progress: Progress) -> None:
        """Reserves memory for a model, in bytes by device; may evict other models.

        The load that has waited longest is next. While the other models are in use, they admit no new users, so that
        its turn comes.

        Raises:
            NeverFits: it is more than all models together may have.
            MemoryHeld: the others are pinned, or still in use after the memory timeout.
            Cancelled: `progress` was cancelled.
        """
        deadline, needs, told = time.monotonic() + self.timeout, by_index(needs), False
        with self._table.claim(model_id) as claim:
            while True:
                first = self._table.is_first(claim)
                with self._making:
                    while not self._budget.reserve(model_id, needs):
                        lacking = self.lacking(model_id, needs)
                        if lacking.get("cpu", 0) > 0 and self._give_way():
                            continue
                        victims = choose(self._idle(model_id), lacking) if first else []
                        if not victims:
                            break
                        for victim in victims:
                            self._evict(victim.model_id, f"'{model_id}' needs its memory")
                    else:
                        return
                going = self._idle(model_id, busy=True)
                victims = choose([model for model in going if model.model_id in claim.victims], lacking)
                victims = victims or choose(going, lacking)
                if time.monotonic() >= deadline or not (victims or self._table.others_come(model_id)):
                    raise self._held(model_id, needs)
                self._table.drain(claim, [model.model_id for model in victims] if first else [])
                if not told:
                    progress.begin("waiting")
                    told = True
                self._table.wait_for_turn(claim, deadline, progress.cancellation)

    def evict_one(self, model_id: str) -> bool:
        """Evicts the least recently used idle model for another model; returns whether there was one."""
        while not self._making.acquire(timeout=LOOK_AGAIN):
            if self._table.goes(model_id):  # the thread that waits for the unload may hold the lock
                return False
        try:
            for idle in sorted(self._idle(model_id), key=lambda idle: idle.used):
                if self._evict(idle.model_id, f"'{model_id}' needs its memory"):
                    return True
            return False
        finally:
            self._making.release()

    def forecast(self, model_id: str, estimate: Estimate) -> Forecast:
        """Whether a load would fit, and which models it would evict."""
        own, estimate = self._budget.held(model_id), replace(estimate, devices=by_index(estimate.devices))
        lacking, rooms, maximum = {}, {}, {}
        for device, need in estimate.devices.items():
            room, limit = self._budget.available(device), self._budget.maximum(device)
            if room is not None and limit is not None:
                rooms[device], maximum[device] = room + own.get(device, 0), limit
                lacking[device] = self._budget.lacking(model_id, device, need)
        goes = choose(self._idle(model_id), lacking) if any(lacking.values()) else []
        possible = all(estimate.devices[device] <= limit for device, limit in maximum.items())
        fits = possible and (not any(lacking.values()) or bool(goes))
        return Forecast(estimate, rooms, maximum, fits, possible, [model.model_id for model in goes])

    def lacking(self, model_id: str, needs: Mapping[str, int]) -> dict[str, int]:
        """The bytes that are missing on each device.

        Raises:
            NeverFits: it is more than models may ever have.
        """
        lacking = {}
        for device, need in by_index(needs).items():
            maximum = self._budget.maximum(device)
            if maximum is None:
                continue
            if need > maximum:
                raise NeverFits(
                    f"Model '{model_id}' needs {readable(need)} of memory on {device} ({need} bytes), and models may "
                    f"have {readable(maximum)} there ({maximum} bytes)"
                )
            lacking[device] = self._budget.lacking(model_id, device, need)
        return lacking

    def _held(self, model_id: str, needs: Mapping[str, int]) -> MemoryHeld:
        """The error that says what holds the memory that a model needs."""
        pinned, idle = self._pinned(), self._table.last_used()
        texts = []
        for device, need in needs.items():
            room = self._budget.available(device)
            if room is not None and need > room:
                holders = []
                for name, size in self._budget.holders(device).items():
                    if name != model_id:
                        state = "pinned" if name in pinned else "idle" if name in idle else "in use"
                        holders.append(f"'{name}' ({readable(size)}, {state})")
                if (besides := self._budget.unrecorded(device)) > 0:
                    holders.append(f"the process itself ({readable(besides)})")
                texts.append(
                    f"needs {readable(need)} on {device}, {readable(room)} is available; the rest is held by "
                    + (", ".join(holders) or "other programs")
                )
        return MemoryHeld(f"No room for model '{model_id}' now: {'; '.join(texts) or 'its memory was taken meanwhile'}")

    def _idle(self, but: str, *, busy: bool = False) -> list[Idle]:
        """The models that may be evicted for another one; with `busy` those in use too."""
        stay = (but, *self._pinned())
        found = self._table.last_used(busy=busy)
        return [Idle(name, used, self._budget.held(name)) for name, used in found.items() if name not in stay]


def choose(idle: Sequence[Idle], lacking: Mapping[str, int]) -> list[Idle]:
    """The models of `idle` whose eviction frees `lacking` bytes on each device; none if all of them do not suffice.

    Least recently used first; a model that a larger one makes superfluous stays.
    """
    rest = {device: size for device, size in lacking.items() if size > 0}
    chosen: list[Idle] = []
    for model in sorted(idle, key=lambda model: model.used):
        if not rest:
            break
        if any(model.held.get(device) for device in rest):
            chosen.append(model)
            rest = _without(rest, model)
    if rest:
        return []
    for model in sorted(chosen, key=lambda model: -model.used):  # the most recently used has the best claim to stay
        others = [other for other in chosen if other is not model]
        if all(sum(other.held.get(device, 0) for other in others) >= size for device, size in lacking.items()):
            chosen = others
    return chosen


def _without(rest: Mapping[str, int], model: Idle) -> dict[str, int]:
    less = {device: size - model.held.get(device, 0) for device, size in rest.items()}
    return {device: size for device, size in less.items() if size > 0}
