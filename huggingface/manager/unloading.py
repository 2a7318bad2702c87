"""Unloads models, and measures how much memory came back.

Any thread may call it. Must not know the loader or HTTP.
"""

from __future__ import annotations

import logging
import time

from ..errors import LocalLLMError
from ..host.devices import used_bytes
from ..host.memory import readable
from ..registry.records import LoadSettings
from ..registry.registry import ModelRegistry
from ..types import Unloaded
from .budget import Budget
from .leases import Place, Places
from .statistics import Statistics

logger = logging.getLogger(__name__)

_ALMOST_ALL = 0.9  # the part of a model's memory that should come back after an unload
_NOTICED = 64 * 2**20  # bytes that a model must have for the log to warn that they did not


class Unloader:
    """Empties places."""

    def __init__(self, registry: ModelRegistry, places: Places, budget: Budget, statistics: Statistics) -> None:
        self._registry = registry
        self._places = places
        self._budget = budget
        self._statistics = statistics

    def pinned(self) -> frozenset[str]:
        """The models that may not be evicted for another one."""
        try:
            return frozenset(record.model_id for record in self._registry.list() if record.pinned)
        except LocalLLMError:  # the registry cannot be read now, so no model is evicted
            return frozenset(self._places.loaded())

    def evict(self, model_id: str, why: str, *, expired: bool = False) -> bool:
        """Unloads a model if it is still idle and, with `expired`, its time is still over; returns whether it did."""
        with self._places.changed:
            place = self._places.of(model_id)
            if not place.idle or self._places.closed:
                return False
            if expired and (place.expires is None or place.expires > time.monotonic()):
                return False
            place.reserved = True
        try:
            logger.info("unloading %s: %s", model_id, why)
            place.overrides = LoadSettings()
            self.release(model_id, place)
            if not expired:
                self._statistics.evicted(model_id)
        finally:
            self._places.free(place)
        return True

    def release(self, model_id: str, place: Place) -> Unloaded:
        """Empties a place that this thread has exclusively; returns what the model had, and what came back."""
        with self._places.changed:
            model, place.model = place.model, None
            place.expires = None
        if model is None:
            return Unloaded(False, 0, 0)
        sizes, expected = model.sizes, model.expected_back
        resident = model.resident
        before = {device: used_bytes(device) for device in sizes.devices}
        self._budget.leave(model_id)
        model.close()
        self._budget.forget(model_id)
        freed = 0
        for device, used in before.items():
            after = used_bytes(device)
            if used is not None and after is not None:
                freed += max(0, used - after)
        text = f"{readable(freed)} of {readable(expected)}"
        if resident and expected >= _NOTICED and freed < _ALMOST_ALL * expected:
            logger.warning("unloaded %s, but only %s came back", model_id, text)
        else:
            logger.info("unloaded %s, %s came back", model_id, text)
        return Unloaded(True, sizes.total, freed)
