"""The manager: which model is in memory, and which requests use it.

`ModelManager` owns all loaded models; any thread may call it. A model is loaded once for all requests that wait for it,
and never unloaded while a lease on it lasts. No lock is held while a model is loaded, waited for or unloaded. Where
memory is short, idle models are evicted for a requested one. It knows the registry, the downloads and, imported late,
the loader; it must not know HTTP, and knows torch only through the loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..cancellation import NEVER, Cancellation
from ..errors import LocalLLMError, ModelBusy
from ..hub.downloads import Downloads
from ..progress import Progress
from ..registry.records import LoadSettings
from ..registry.registry import ModelRegistry
from ..types import Forecast, LoadOptions, Unloaded
from .budget import Budget
from .conversions import Conversions
from .eviction import Evictor
from .forecasts import Forecasts
from .keep_alive import KeepAlive
from .leases import Leases
from .loader import LateLoader
from .loads import Loads
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
        self.budget = budget = budget or Budget()
        self.downloads = downloads = Downloads(options)
        self.statistics = statistics = statistics or Statistics()
        self._registry = registry
        self._table = table = ModelTable(busy_timeout)
        self._changed = table.changed
        self._loader = loader = LateLoader(budget.begin)
        self._unloader = unloader = Unloader(registry, table, budget, statistics)
        self._keep_alive = KeepAlive(
            table, keep_alive, lambda model_id: unloader.evict(model_id, "its keep-alive is over", expired=True)
        )
        self.conversions = conversions = Conversions(
            budget,
            lambda conversion: takeover.may_convert(conversion),
            lambda conversion: takeover.take_over(conversion),
            lambda conversion, reason: takeover.stays(conversion, reason),
        )
        evictor = Evictor(budget, table, memory_timeout, unloader.pinned, unloader.evict, conversions.give_way)
        self._forecasts = forecasts = Forecasts(registry, loader, options, downloads, table, evictor)
        self._loads = loads = Loads(
            loader, options, downloads, table, budget, evictor, forecasts, conversions, statistics
        )
        takeover = Takeover(registry, table, budget, evictor, forecasts, loads, unloader, self._keep_alive)
        self._leases = Leases(registry, table, loads, unloader, self._keep_alive, takeover, conversions, statistics)

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
        with self._overriding(model_id, settings):
            if force_reload:
                self._registry.usable(model_id)
                with self._table.exclusive(model_id) as entry:
                    record = self._registry.usable(model_id)
                    self._unloader.release(model_id, entry)
                    loading = entry.loading = Loading(forced=True)
                    watch(loading.progress)
                    self._loads.fill(record, entry, loading)
                    loading.done.result()
            with self.lease(model_id, cancellation, keep_alive, watch) as model:
                conversion = self.conversions.of(model_id) if wait_for_graph else None
            if conversion is not None:
                conversion.wait_until_settled(watch, cancellation)
                with self.lease(model_id, cancellation, keep_alive, watch) as model:
                    pass
            return model

    @contextmanager
    def _overriding(self, model_id: str, settings: LoadSettings | None) -> Iterator[None]:
        """Applies these settings from the next load on, unloads a model with others, and goes back if the block fails.

        Raises: as a load with them, as far as that is known before weights are read; then nothing changes.
        """
        if settings is None:
            yield
            return
        record = self._registry.usable(model_id)
        with self._changed:
            before = self._table.of(model_id).overrides
        if before != settings:
            self._forecasts.check(record, settings.over(record.settings))
            with self._table.exclusive(model_id) as entry:
                self._clear(model_id, entry)
                entry.overrides = settings
        try:
            yield
        except LocalLLMError:
            with self._changed:  # the settings of a failed load must not affect the next request
                entry = self._table.of(model_id)
                if entry.overrides == settings and entry.model is None:
                    entry.overrides = before
            raise

    # Unloading -------------------------------------------------------------------------------------------------------

    def unload(self, model_id: str) -> Unloaded:
        """Unloads the model, if it is in memory, after the requests that use it.

        Raises:
            ModelBusy: they did not end within the busy timeout; the model stays.
        """
        with self._table.exclusive(model_id) as entry:
            return self._clear(model_id, entry)

    def unload_all(self) -> None:
        """Unloads all models, after the requests that use them.

        Raises:
            ModelBusy: some were in use for longer than the busy timeout and stay; the message names them.
        """
        deadline = self._table.busy_deadline
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
        with self._table.exclusive(model_id) as entry:
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
        """Estimates a load of the model: see `Forecasts.forecast`."""
        return self._forecasts.forecast(model_id, settings, cancellation)
