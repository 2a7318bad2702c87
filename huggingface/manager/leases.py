"""Leases: how a request gets its model, waits for its load, and gives it back.

Any thread may call this. No lock is held while a model is loaded or waited for. Must not know HTTP or torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..cancellation import LOOK_AGAIN, Cancellation, before_wait
from ..errors import Cancelled, LocalLLMError
from ..progress import Progress
from ..registry.records import ModelRecord
from ..registry.registry import ModelRegistry
from .conversions import Conversions
from .keep_alive import KeepAlive
from .loads import Loads, is_stale
from .statistics import Statistics
from .table import Loading, ModelEntry, ModelTable
from .takeover import Takeover
from .unloading import Unloader

if TYPE_CHECKING:
    from ..model.loaded import LoadedModel


class Leases:
    """The leases on all models."""

    def __init__(
        self,
        registry: ModelRegistry,
        table: ModelTable,
        loads: Loads,
        unloader: Unloader,
        keep_alive: KeepAlive,
        takeover: Takeover,
        conversions: Conversions,
        statistics: Statistics,
    ) -> None:
        self._registry = registry
        self._table = table
        self._loads = loads
        self._unloader = unloader
        self._keep_alive = keep_alive
        self._takeover = takeover
        self._conversions = conversions
        self._statistics = statistics

    def acquire(
        self, model_id: str, cancellation: Cancellation, watch: Callable[[Progress], None]
    ) -> tuple[ModelEntry, LoadedModel, ModelRecord]:
        """The model's entry, counted with one user more, the model in it, and its record."""
        asked = False
        while True:
            record = self._registry.usable(model_id)  # in every round: a wait may end with its removal
            with self._table.changed:
                if self._table.closed:
                    raise Cancelled("The server is shutting down")
                entry = self._table.of(model_id)
                loading = entry.loading
                if (
                    entry.reserved
                    or self._table.drains(model_id)
                    or (loading is not None and loading.progress.cancellation.cancelled)
                ):
                    before_wait()
                    self._table.changed.wait(LOOK_AGAIN)
                    cancellation.check()
                    continue
                stale = entry.model is not None and is_stale(entry.model, record)
                if entry.model is not None and not stale:
                    entry.users += 1
                    entry.expires = None
                    if not asked:
                        self._statistics.found(model_id)
                    return entry, entry.model, record
                mine = loading is None
                if loading is None and not stale:
                    loading = entry.loading = Loading()
                if loading is not None:
                    loading.waiting += 1
            if stale or loading is None:
                self._drop_stale(record)
                continue
            watch(loading.progress)
            if mine:
                name = f"load-{model_id}"
                threading.Thread(target=self._loads.fill, args=(record, entry, loading), name=name).start()
            if not asked:
                self._statistics.missed(model_id)
                asked = True
            self._wait_for(entry, loading, record, cancellation)
            model = loading.model  # only the server's end can unload it now
            assert model is not None  # noqa: S101 - the load has succeeded
            try:
                if not self._table.closed and not is_stale(model, self._registry.usable(model_id)):
                    return entry, model, record
            except LocalLLMError:
                self.leave(entry, model, record)
                raise
            self.leave(entry, model, record)

    def _wait_for(self, entry: ModelEntry, loading: Loading, record: ModelRecord, cancellation: Cancellation) -> None:
        """Waits for a load and then counts as a user of its model. If no request waits any more, the load is cancelled.

        Raises: as the load does; Cancelled.
        """
        try:
            cancellation.result(loading.done)
            cancellation.check()
        except BaseException:
            with self._table.changed:
                if loading.model is not None:
                    self.leave(entry, loading.model, record)
                else:
                    loading.waiting -= 1
                    if not loading.waiting and not loading.forced:
                        loading.progress.cancel()
            raise

    def leave(
        self, entry: ModelEntry, model: LoadedModel, record: ModelRecord, keep_alive: float | None = None
    ) -> None:
        """Counts one user less of a model."""
        with self._table.changed:
            last = entry.left(model)
            entry.used = time.monotonic()
            if entry.users == 0 and entry.model is not None:
                self._keep_alive.begin(entry, record, keep_alive)
            self._table.changed.notify_all()
        if last:  # on a thread of its own, so that the answer need not wait
            arguments = (record.model_id, model)
            threading.Thread(
                target=self._takeover.close_replaced, args=arguments, name=f"close-{record.model_id}"
            ).start()

    def _drop_stale(self, record: ModelRecord) -> None:
        """Unloads a model that a load must replace."""
        with self._table.exclusive(record.model_id) as entry:
            if entry.model is not None and is_stale(entry.model, record):
                self._conversions.cancel(record.model_id)
                self._unloader.release(record.model_id, entry)
