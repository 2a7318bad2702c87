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
from .statistics import Statistics
from .table import ModelEntry, ModelTable

logger = logging.getLogger(__name__)

_ALMOST_ALL = 0.9  # the part of a model's memory that should come back after an unload
_NOTICED = 64 * 2**20  # bytes that a model must have for the log to warn that they did not


class Unloader:
    """Empties table."""

    def __init__(self, registry: ModelRegistry, table: ModelTable, budget: Budget, statistics: Statistics) -> None:
        self._registry = registry
        self._table = table
        self._budget = budget
        self._statistics = statistics

    def pinned(self) -> frozenset[str]:
        """The models that may not be evicted for another one."""
        try:
            return frozenset(record.model_id for record in self._registry.list() if record.pinned)
        except LocalLLMError:  # the registry cannot be read now, so no model is evicted
            return frozenset(self._table.loaded())

    def evict(self, model_id: str, why: str, *, expired: bool = False) -> bool:
        """Unloads a model if it is still idle and, with `expired`, its time is still over; returns whether it did."""
        with self._table.changed:
            entry = self._table.of(model_id)
            if not entry.idle or self._table.closed:
                return False
            if expired and (entry.expires is None or entry.expires > time.monotonic()):
                return False
            entry.reserved = True
        try:
            logger.info("unloading %s: %s", model_id, why)
            entry.overrides = LoadSettings()
            self.release(model_id, entry)
            if not expired:
                self._statistics.evicted(model_id)
        finally:
            self._table.free(entry)
        return True

    def release(self, model_id: str, entry: ModelEntry) -> Unloaded:
        """Empties an entry that this thread has exclusively; returns what the model had, and what came back."""
        with self._table.changed:
            model, entry.model = entry.model, None
            entry.expires = None
        if model is None:
            return Unloaded(False, 0, 0)
        sizes, expected = model.sizes, model.expected_back
        resident = model.preparation.resident
        before = {device: used_bytes(device) for device in sizes.devices}
        self._budget.freeze(model_id)
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
