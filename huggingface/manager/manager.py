"""The manager: which model is in memory, and which requests use it.

`ModelManager` owns all loaded models; any thread may call it. A model is loaded once for all requests that wait for it,
and never unloaded while a lease on it lasts. No lock is held while a model is loaded, waited for or unloaded. Where
memory is short, idle models are evicted for a requested one. It knows the registry, the downloads and, imported late,
the loader; it must not know HTTP, and knows torch only through the loader.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..cancellation import LOOK_AGAIN, NEVER, Cancellation
from ..errors import FilesMissing, HubUnreachable, LocalLLMError, ModelBusy
from ..hub.downloads import Downloads
from ..progress import Progress
from ..registry.records import LoadSettings
from ..registry.registry import ModelRegistry
from ..types import Forecast, LoadOptions, Unloaded
from .budget import Budget
from .conversions import Conversions
from .eviction import Evictor
from .keep_alive import KeepAlive
from .leases import Leases
from .loader import LateLoader
from .loads import Loads, usable
from .statistics import Statistics
from .table import Loading, ModelEntry, ModelTable, Resident
from .takeover import Takeover
from .unloading import Unloader

if TYPE_CHECKING:
    from ..model.loaded import LoadedModel


class ModelManager:
    """Loads, leases and unloads models."""

    def __init__(
        self,
        registry: ModelRegistry,
        options: LoadOptions,
        *,
        busy_timeout: float = 30.0,
        keep_alive: float = -1.0,
        memory_timeout: float = 5.0,
        budget: Budget | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """Loads no model yet.

        Args:
            busy_timeout: seconds that an unload waits for the model's requests.
            keep_alive: seconds that a model stays after its last use, where neither record nor request says; -1: for
                ever.
            memory_timeout: seconds that a load waits for the requests of models that it evicts.
        """
        self.budget = budget or Budget()
        self.downloads = Downloads(options)
        self.statistics = statistics or Statistics()
        self._registry = registry
        self._options = options
        self._busy_timeout = busy_timeout
        self._table = table = ModelTable()
        self._changed = table.changed
        self._loader = LateLoader(self.budget.begin)
        self._unloader = unloader = Unloader(registry, table, self.budget, self.statistics)
        self._keep_alive = KeepAlive(
            table, keep_alive, lambda model_id: unloader.evict(model_id, "its keep-alive is over", expired=True)
        )
        self.conversions = Conversions(
            self.budget,
            lambda conversion: self._takeover.may_convert(conversion),
            lambda conversion: self._takeover.take_over(conversion),
            lambda conversion, reason: self._takeover.stays(conversion, reason),
        )
        self._evictor = Evictor(
            self.budget, table, memory_timeout, unloader.pinned, unloader.evict, self.conversions.give_way
        )
        self._loads = Loads(
            self._loader,
            options,
            self.downloads,
            table,
            self.budget,
            self._evictor,
            self.conversions,
            self.statistics,
        )
        self._takeover = Takeover(
            registry,
            table,
            self.budget,
            self._evictor,
            self._loads,
            unloader,
            self._keep_alive,
            memory_timeout,
        )
        self._leases = Leases(
            registry,
            table,
            self._loads,
            unloader,
            self._keep_alive,
            self._takeover,
            self.conversions,
            self.statistics,
            busy_timeout,
        )
        self._forecasting = threading.Lock()

    def import_libraries(self, delay: float) -> None:
        """Imports the loader's libraries in the background, `delay` seconds from now.

        The first load then need not wait for them. If the import fails, the first load reports it.
        """
        self._loader.begin(delay)

    # Leases -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def lease(
        self,
        model_id: str,
        cancellation: Cancellation = NEVER,
        keep_alive: float | None = None,
        watch: Callable[[Progress], None] = lambda _: None,
    ) -> Iterator[LoadedModel]:
        """Leases the model until the block ends; loads it first if it is not in memory.

        Afterwards it stays for `keep_alive` seconds. `watch` gets the load's progress.

        Raises:
            ModelNotFound, ModelDisabled: the registry says so.
            DependencyMissing, LoadError, InvalidRequest: the load failed; all requests that waited for it get the
                error.
            Cancelled: by `cancellation` while the model was loaded, or the server is shutting down.
        """
        entry, model, record = self._leases.acquire(model_id, cancellation, watch)
        try:
            yield model
        finally:
            self._leases.leave(entry, model, record, keep_alive)

    def load(
        self,
        model_id: str,
        *,
        force_reload: bool = False,
        settings: LoadSettings | None = None,
        keep_alive: float | None = None,
        wait_for_graph: bool = False,
        cancellation: Cancellation = NEVER,
        watch: Callable[[Progress], None] = lambda _: None,
    ) -> LoadedModel:
        """Brings the model into memory; with `force_reload` loads it again, once the leases on the old one have ended.

        `settings` apply over the record's until the model is unloaded; a model in memory with other settings is loaded
        again. `wait_for_graph` waits until a graph computes the model, or never will. `watch` gets the progress of each
        wait.

        Raises: as `lease`; ModelBusy when a reload's users do not end within the busy timeout.
        """
        if settings is None:
            return self._bring(model_id, force_reload, keep_alive, wait_for_graph, cancellation, watch)
        before = self._override(model_id, settings)
        try:
            return self._bring(model_id, force_reload, keep_alive, wait_for_graph, cancellation, watch)
        except LocalLLMError:
            with self._changed:  # the settings of a failed load must not affect the next request
                entry = self._table.of(model_id)
                if entry.overrides == settings and entry.model is None:
                    entry.overrides = before
            raise

    def _bring(
        self,
        model_id: str,
        force_reload: bool,
        keep_alive: float | None,
        wait_for_graph: bool,
        cancellation: Cancellation,
        watch: Callable[[Progress], None],
    ) -> LoadedModel:
        if force_reload:
            usable(self._registry, model_id)
            with self._table.exclusive(model_id, self._busy_deadline) as entry:
                record = usable(self._registry, model_id)
                self._unloader.release(model_id, entry)
                loading = entry.loading = Loading(forced=True)
                watch(loading.progress)
                self._loads.fill(record, entry, loading)
                loading.done.result()
        with self.lease(model_id, cancellation, keep_alive, watch) as model:
            conversion = self.conversions.of(model_id) if wait_for_graph else None
        if conversion is None:
            return model
        told = None
        while not wait([conversion.settled], LOOK_AGAIN).done:
            if conversion.progress is not told:  # each attempt has its own
                told = conversion.progress
                watch(told)
            cancellation.check()
        with self.lease(model_id, cancellation, keep_alive, watch) as model:
            return model

    def _override(self, model_id: str, settings: LoadSettings) -> LoadSettings:
        """Applies these settings from the next load on, and unloads a model with others; returns the earlier settings.

        Raises: as a load with them, as far as that is known before weights are read; then nothing changes.
        """
        record = usable(self._registry, model_id)
        with self._changed:
            entry = self._table.of(model_id)
            before = entry.overrides
        if before == settings:
            return before
        loader = self._loader.get()
        with suppress(FilesMissing, HubUnreachable):  # without the files nothing can be checked yet
            folder = self.downloads.present(record)
            loader.check(record, self._options, folder, settings.over(record.settings))
        with self._table.exclusive(model_id, self._busy_deadline) as entry:
            self._clear(model_id, entry)
            entry.overrides = settings
        return before

    @property
    def _busy_deadline(self) -> float:
        """When an unload that begins now stops waiting for the model's requests, a reading of `time.monotonic`."""
        return time.monotonic() + self._busy_timeout

    # Unloading -------------------------------------------------------------------------------------------------------

    def unload(self, model_id: str) -> Unloaded:
        """Unloads the model, if it is in memory, after the requests that use it.

        Raises:
            ModelBusy: they did not end within the busy timeout; the model stays.
        """
        with self._table.exclusive(model_id, self._busy_deadline) as entry:
            return self._clear(model_id, entry)

    def unload_all(self) -> None:
        """Unloads all models, after the requests that use them.

        Raises:
            ModelBusy: some were in use for longer than the busy timeout and stay; the message names them.
        """
        deadline = self._busy_deadline
        busy = []
        with self._changed:
            present = [
                name for name, entry in self._table.all() if entry.model is not None or entry.loading is not None
            ]
        present += [name for name in self.conversions.shown() if name not in present]
        for model_id in present:
            try:
                with self._table.exclusive(model_id, deadline) as entry:
                    self._clear(model_id, entry)
            except ModelBusy:
                busy.append(f"'{model_id}'")
        if busy:
            raise ModelBusy(f"In use, and still in memory: {', '.join(busy)}. The other models were unloaded")

    def remove(self, model_id: str) -> dict[str, Any]:
        """Removes the model from the registry and from memory; returns the registry's new content.

        Raises:
            ModelNotFound: no such model is registered.
            ModelBusy: the requests that use it did not end within the busy timeout; nothing was changed.
        """
        self._registry.check_present(model_id)
        with self._table.exclusive(model_id, self._busy_deadline) as entry:
            content = self._registry.remove(model_id)
            self.downloads.cancel(model_id)
            self._clear(model_id, entry)
            self.statistics.removed(model_id)
        return content

    def _clear(self, model_id: str, entry: ModelEntry) -> Unloaded:
        """Empties an entry that this thread has exclusively, and drops the settings of its last load."""
        self.conversions.cancel(model_id)
        entry.overrides = LoadSettings()
        return self._unloader.release(model_id, entry)

    def close(self) -> None:
        """Cancels all work and empties the memory; no model is leased or loaded afterwards."""
        with self._changed:
            self._table.closed = True
            models = [entry.model for _, entry in self._table.all() if entry.model is not None]
            for _, entry in self._table.all():
                models.extend(entry.replaced)
                entry.replaced.clear()
                entry.model = None
                if entry.loading is not None:
                    entry.loading.progress.cancel()
            self._changed.notify_all()
        self.downloads.close()
        for model in models:
            model.close()
        self.conversions.close()
        self._keep_alive.close()
        self._loader.close()

    # Snapshots --------------------------------------------------------------------------------------------------------

    def loaded(self) -> dict[str, LoadedModel]:
        """The models in memory, by id, at this moment."""
        return self._table.loaded()

    def residents(self) -> dict[str, Resident]:
        """The models in memory and how many requests use each, by id, at this moment."""
        return self._table.residents(self._unloader.pinned())

    def loading(self) -> dict[str, Progress]:
        """The loads that run, by id."""
        return self._table.loading()

    def forecast(
        self, model_id: str, settings: LoadSettings | None = None, cancellation: Cancellation = NEVER
    ) -> Forecast:
        """Estimates a load of the model, whether it fits, and which models it would evict.

        Fetches only the config of a model that is not here. Computes one forecast at a time: it keeps the interpreter
        busy, and many at once would stop other threads.

        Raises: as `lease`, except errors that only reading the weights shows.
        """
        cancellation = cancellation.child(lambda: self._table.closed)
        cancellation.until(lambda seconds: self._forecasting.acquire(timeout=seconds))
        try:
            return self._forecast(model_id, settings)
        finally:
            self._forecasting.release()

    def _forecast(self, model_id: str, settings: LoadSettings | None) -> Forecast:
        record = self._registry.get(model_id)
        wanted = (settings or LoadSettings()).over(record.settings)
        return self._evictor.forecast(model_id, self._loads.fitting(record, wanted)[1])
