"""Computes the shortfall of a load, evicts idle models for it, and reports what holds the rest.

`Room` counts with the budget and chooses among the models that nobody uses; how one is taken out of memory is handed
in. Any thread may call it. Must not know the registry, the loader or HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from ..cancellation import LOOK_AGAIN
from ..errors import MemoryHeld, NeverFits
from ..host.devices import by_index
from ..host.memory import readable
from ..progress import Progress
from ..types import Estimate, Forecast
from .budget import Budget
from .eviction import Idle, choose
from .leases import Places


class Room:
    """Makes room for models."""

    def __init__(
        self,
        budget: Budget,
        places: Places,
        timeout: float,
        pinned: Callable[[], Collection[str]],
        evict: Callable[[str, str], bool],
        give_way: Callable[[], bool] = lambda: False,
    ) -> None:
        """`timeout` is how many seconds a load waits for the users of models that are to go for it.

        `pinned` tells which models may not go. `evict` takes one out of memory if nobody uses it, and is told why; it
        tells whether the model went. `give_way` has work that can wait give its memory up, and tells whether it did.
        """
        self._budget = budget
        self._places = places
        self._timeout = timeout
        self._pinned = pinned
        self._evict = evict
        self._give_way = give_way
        self._making = threading.Lock()  # two loads must not count on the same memory, or on the same victims

    def take_if_plenty(self, model_id: str, device: str, size: int, times: float) -> bool:
        """Set so many bytes aside for a model, if there is room for so many times as much; tells whether."""
        with self._making:
            room = self._budget.room(device)
            return (room is None or room >= times * size) and self._budget.reserve(model_id, {device: size})

    def make(self, model_id: str, needs: Mapping[str, int], progress: Progress) -> None:
        """Set memory aside for a model, in bytes by device; others may have to go for it.

        Who has waited longest is next. Where the others are in use, nobody new gets them, so that the turn comes.

        Raises:
            NeverFits: it is more than all models together may have.
            MemoryHeld: the others are pinned, or still in use after the memory timeout. Cancelled: `progress` was.
        """
        deadline, needs, told = time.monotonic() + self._timeout, by_index(needs), False
        with self._places.claim(model_id) as claim:
            while True:
                first = self._places.is_first(claim)
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
                if time.monotonic() >= deadline or not (victims or self._places.others_come(model_id)):
                    raise self._held(model_id, needs)
                self._places.drain(claim, [model.model_id for model in victims] if first else [])
                if not told:
                    progress.begin("waiting")
                    told = True
                self._places.wait_for_turn(claim, deadline, progress.cancellation)

    def relieve(self, model_id: str) -> bool:
        """Take the model that was used longest ago out of memory for the sake of another; False if there is none."""
        while not self._making.acquire(timeout=LOOK_AGAIN):
            if self._places.goes(model_id):  # and whoever waits for that may hold the lock
                return False
        try:
            for idle in sorted(self._idle(model_id), key=lambda idle: idle.used):
                if self._evict(idle.model_id, f"'{model_id}' needs its memory"):
                    return True
            return False
        finally:
            self._making.release()

    def forecast(self, model_id: str, estimate: Estimate) -> Forecast:
        """Whether there is room for what a load takes, and who would go for it."""
        own, estimate = self._budget.held(model_id), replace(estimate, devices=by_index(estimate.devices))
        lacking, rooms, most = {}, {}, {}
        for device, need in estimate.devices.items():
            room, limit = self._budget.room(device), self._budget.most(device)
            if room is not None and limit is not None:
                rooms[device], most[device] = room + own.get(device, 0), limit
                lacking[device] = self._budget.lacking(model_id, device, need)
        goes = choose(self._idle(model_id), lacking) if any(lacking.values()) else []
        possible = all(estimate.devices[device] <= limit for device, limit in most.items())
        fits = possible and (not any(lacking.values()) or bool(goes))
        return Forecast(estimate, rooms, most, fits, possible, [model.model_id for model in goes])

    def lacking(self, model_id: str, needs: Mapping[str, int]) -> dict[str, int]:
        """How many bytes more are needed on each device than there are.

        Raises:
            NeverFits: there could never be as many.
        """
        lacking = {}
        for device, need in by_index(needs).items():
            most = self._budget.most(device)
            if most is None:
                continue
            if need > most:
                raise NeverFits(
                    f"Model '{model_id}' needs {readable(need)} of memory on {device} ({need} bytes), and models may "
                    f"have {readable(most)} there ({most} bytes)"
                )
            lacking[device] = self._budget.lacking(model_id, device, need)
        return lacking

    def _held(self, model_id: str, needs: Mapping[str, int]) -> MemoryHeld:
        """Who has the memory that a model needs."""
        pinned, idle = self._pinned(), self._places.last_used()
        texts = []
        for device, need in needs.items():
            room = self._budget.room(device)
            if room is not None and need > room:
                holders = []
                for name, size in self._budget.holders(device).items():
                    if name != model_id:
                        state = "pinned" if name in pinned else "idle" if name in idle else "in use"
                        holders.append(f"'{name}' ({readable(size)}, {state})")
                if (besides := self._budget.besides(device)) > 0:
                    holders.append(f"the process itself ({readable(besides)})")
                texts.append(
                    f"needs {readable(need)} on {device}, {readable(room)} is available; the rest is held by "
                    + (", ".join(holders) or "other programs")
                )
        return MemoryHeld(f"No room for model '{model_id}' now: {'; '.join(texts) or 'its memory was taken meanwhile'}")

    def _idle(self, but: str, *, busy: bool = False) -> list[Idle]:
        """The models that may go for another one; those that are in use too where `busy`."""
        stay = (but, *self._pinned())
        found = self._places.last_used(busy=busy)
        return [Idle(name, used, self._budget.held(name)) for name, used in found.items() if name not in stay]
