"""Takeovers: a finished graph computes a model that another backend has computed so far.

The conversions' thread calls it. Must not know HTTP; torch only through the loader.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import ConversionFailed, ModelBusy
from ..registry.records import ModelRecord
from ..registry.registry import ModelRegistry
from .budget import Budget
from .conversions import Conversion
from .eviction import Evictor
from .forecasts import Forecasts
from .keep_alive import KeepAlive
from .loads import Loads, is_stale
from .table import Loading, ModelTable
from .unloading import Unloader

if TYPE_CHECKING:
    from ..model.loaded import LoadedModel

logger = logging.getLogger(__name__)

_PATIENCE = 32  # attempts to find a model idle before new requests wait for it


class Takeover:
    """Replaces models by models that a graph computes."""

    def __init__(
        self,
        registry: ModelRegistry,
        table: ModelTable,
        budget: Budget,
        evictor: Evictor,
        forecasts: Forecasts,
        loads: Loads,
        unloader: Unloader,
        keep_alive: KeepAlive,
    ) -> None:
        self._registry = registry
        self._table = table
        self._budget = budget
        self._evictor = evictor
        self._forecasts = forecasts
        self._loads = loads
        self._unloader = unloader
        self._keep_alive = keep_alive

    def may_convert(self, conversion: Conversion) -> bool:
        """Whether a model's load is over, so that its conversion does not disturb the load's measurements."""
        with self._table.changed:
            entry = self._table.of(conversion.model_id)
            return entry.loading is None and (entry.model is None or entry.model.preparation.settles(0))

    def stays(self, conversion: Conversion, reason: str) -> None:
        """Records why no graph computes a model."""
        with self._table.changed:
            model = self._table.of(conversion.model_id).model
            if model is not None and model.setup.pending == conversion.pending:
                model.backend_reason = reason

    def take_over(self, conversion: Conversion) -> bool:
        """Lets a graph compute a model from the next request on; requests that have begun end as they began.

        Where memory has no room for both, the weights in memory are unloaded first, as soon as no request uses them.
        Returns whether the takeover is settled.

        Raises: as a load does; torch goes on then.
        """
        model_id = conversion.model_id
        with self._table.changed:
            entry = self._table.of(model_id)
            model = entry.model
            if entry.reserved or entry.loading is not None:
                return False
        if model is None or model.setup.pending != conversion.pending or model.failed:
            return True  # the next load reads the graph
        record = self._registry.usable(model_id)
        if is_stale(model, record):
            return True
        settings = entry.overrides.over(record.settings)
        backend = conversion.pending.backend
        account = self._loads.account(f"{model_id} by {backend}", model_id)
        estimate = self._forecasts.estimate(record, replace(settings, backend=backend))
        self._evictor.lacking(model_id, estimate.devices)
        if not self._budget.reserve(account.owner, estimate.devices):
            return self._reload(conversion, record)
        after = None
        try:
            account.reserve_floor(estimate.device, estimate.kv_cache)
            after = self._loads.open(record, conversion, settings, account)
            conversion.spare = None  # the folder is deleted with the model
            after.prepared(conversion.cancellation)
            if after.effective["backend"] != backend:
                raise ConversionFailed(after.backend_reason or "its graph cannot be found")
            with self._table.changed:
                if entry.model is not model or entry.reserved or self._table.closed:
                    return entry.model is None
                assert entry.account is not None  # noqa: S101 - it came with the model
                entry.account.rename(_replaced(model_id))
                account.rename(model_id)
                unused, after = entry.replace(after, account), None
                self._table.changed.notify_all()
        finally:
            if after is not None:
                after.close()
            self._budget.forget(f"{model_id} by {backend}")
        logger.info("%s is computed by %s from now on", model_id, backend)
        if unused is not None:
            self.close_replaced(model_id, unused)
        return True

    def _reload(self, conversion: Conversion, record: ModelRecord) -> bool:
        """Reloads a model with its graph when it is idle. Returns whether the takeover is settled.

        Where the model is always in use, new leases wait now and then until earlier ones have ended, for as long as a
        load may wait for them.
        """
        conversion.tries += 1
        patient = conversion.tries >= _PATIENCE and not conversion.tries & (conversion.tries - 1)
        conversion.reason = "there is no room for both while it is in use"
        try:
            patience = self._evictor.timeout if patient else 0
            with self._table.exclusive(record.model_id, time.monotonic() + patience) as entry:
                if entry.model is None or entry.model.setup.pending != conversion.pending:
                    return True
                used, expires = entry.used, entry.expires
                self._unloader.release(record.model_id, entry)
                loading = entry.loading = Loading(forced=True)
                self._loads.fill(record, entry, loading, conversion.spare)
                with self._table.changed:
                    entry.used = used
                    if entry.model is not None:
                        self._keep_alive.expire(entry, expires)
        except ModelBusy:
            return False
        if entry.model is not None:
            if entry.model.setup.pending is not None:
                raise ConversionFailed("its graph cannot be found")
            conversion.spare = None  # the folder is deleted with the model
        return True

    def close_replaced(self, model_id: str, model: LoadedModel) -> None:
        """Closes a model that a takeover replaced."""
        self._budget.freeze(_replaced(model_id))
        model.close()
        self._budget.forget(_replaced(model_id))


def _replaced(model_id: str) -> str:
    """The name in the budget of a model that a takeover replaced."""
    return f"{model_id} before"
