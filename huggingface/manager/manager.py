"""Which model is in memory, and who uses it.

`ModelManager` is the one owner of loaded models; any thread may call it. A model is loaded once however many ask for
it, is never taken away from whoever holds a lease, and no lock is held while one is loaded, waited for or let go.
Where memory is short, models that nobody uses go for one that is wanted. It knows the registry, the downloads and,
late, the loader; nothing of HTTP, and torch only through the loader.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..cancellation import LOOK_AGAIN, NEVER, Cancellation
from ..errors import Cancelled, FilesMissing, HubUnreachable, LocalLLMError, ModelBusy
from ..hub.downloads import Downloads
from ..progress import Progress
from ..registry.records import LoadSettings, ModelRecord
from ..registry.registry import ModelRegistry
from ..types import Forecast, LoadOptions, Unloaded
from .budget import Budget
from .conversions import Conversions
from .keep_alive import KeepAlive
from .leases import Loading, Place, Places, Resident
from .loader import LateLoader
from .loads import Loads, is_stale, usable
from .room import Room
from .statistics import Statistics
from .takeover import Takeover
from .unloading import Unloader

if TYPE_CHECKING:
    from ..model import LoadedModel


class ModelManager:
    """Loads, lends and unloads models."""

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
        """`keep_alive` is how many seconds a model stays after its last use, where nobody says otherwise; -1: for ever.

        `busy_timeout` is how many seconds an unload waits for the model's users, and `memory_timeout` how many a load
        waits for those of models that are to go for it.
        """
        self.budget = budget or Budget()
        self.downloads = Downloads(options)
        self.statistics = statistics or Statistics()
        self._registry = registry
        self._options = options
        self._busy_timeout = busy_timeout
        self._places = places = Places()
        self._changed = places.changed
        self._loader = LateLoader(self.budget.begin)
        self._unloader = unloader = Unloader(registry, places, self.budget, self.statistics)
        self._keep_alive = KeepAlive(
            places, keep_alive, lambda model_id: unloader.evict(model_id, "its time is up", expired=True)
        )
        self.conversions = Conversions(
            self.budget,
            lambda conversion: self._takeover.may_convert(conversion),
            lambda conversion: self._takeover.take_over(conversion),
            lambda conversion, reason: self._takeover.stays(conversion, reason),
        )
        self._room = Room(
            self.budget, places, memory_timeout, unloader.pinned, unloader.evict, self.conversions.give_way
        )
        self._loads = Loads(
            self._loader,
            options,
            self.downloads,
            places,
            self.budget,
            self._room,
            self.conversions,
            self.statistics,
        )
        self._takeover = Takeover(
            registry,
            places,
            self.budget,
            self._room,
            self._loads,
            unloader,
            self._keep_alive,
            memory_timeout,
        )
        self._forecasting = threading.Lock()

    def import_libraries(self, delay: float) -> None:
        """Import what loading needs, in the background, `delay` seconds from now: the first load need not wait for it.

        Where it cannot be imported, the first load says so.
        """
        self._loader.begin(delay)

    # Lending ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def lease(
        self,
        model_id: str,
        cancellation: Cancellation = NEVER,
        keep_alive: float | None = None,
        watch: Callable[[Progress], None] = lambda _: None,
    ) -> Iterator[LoadedModel]:
        """The model, loaded if it was not, and kept in memory until the block ends; then for `keep_alive` seconds.

        Raises:
            ModelNotFound, ModelDisabled: the registry says so.
            DependencyMissing, LoadError, InvalidRequest: it could not be loaded; all who waited for it are told so.
            Cancelled: the server is shutting down, or by `cancellation` while it was loaded.
        """
        place, model, record = self._acquire(model_id, cancellation, watch)
        try:
            yield model
        finally:
            self._leave(place, model, record, keep_alive)

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
        """Brings the model into memory; with `force_reload` again, once the leases on the old one have ended.

        `settings` are in effect over the record's until the model is unloaded; where it is in memory with others, it
        is loaded again. `wait_for_graph` waits until it is computed by its graph, or known that it will not be. `watch`
        gets the progress of what is waited for.

        Raises: as `lease`; ModelBusy when a reload's users do not end within the busy timeout.
        """
        if settings is None:
            return self._bring(model_id, force_reload, keep_alive, wait_for_graph, cancellation, watch)
        before = self._override(model_id, settings)
        try:
            return self._bring(model_id, force_reload, keep_alive, wait_for_graph, cancellation, watch)
        except LocalLLMError:
            with self._changed:  # what failed is not to be in the way of whoever asks next
                place = self._places.of(model_id)
                if place.overrides == settings and place.model is None:
                    place.overrides = before
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
            with self._places.alone(model_id, self._busy_deadline) as place:
                record = usable(self._registry, model_id)
                self._unloader.release(model_id, place)
                loading = place.loading = Loading(forced=True)
                watch(loading.progress)
                self._loads.fill(record, place, loading)
                loading.done.result()
        with self.lease(model_id, cancellation, keep_alive, watch) as model:
            conversion = self.conversions.of(model_id) if wait_for_graph else None
        if conversion is None:
            return model
        told = None
        while not wait([conversion.settled], LOOK_AGAIN).done:
            if conversion.progress is not told:  # each try has its own
                told = conversion.progress
                watch(told)
            cancellation.check()
        with self.lease(model_id, cancellation, keep_alive, watch) as model:
            return model

    def _override(self, model_id: str, settings: LoadSettings) -> LoadSettings:
        """Have these settings in effect from the next load on, and none with others in memory; returns those before.

        Raises: what a load with them would, as far as that is known before weights are read; nothing is changed then.
        """
        record = usable(self._registry, model_id)
        with self._changed:
            place = self._places.of(model_id)
            before = place.overrides
        if before == settings:
            return before
        loader = self._loader.get()
        with suppress(FilesMissing, HubUnreachable):  # files that are not here yet say nothing
            folder = self.downloads.present(record)
            loader.check(record, self._options, folder, settings.over(record.settings))
        with self._places.alone(model_id, self._busy_deadline) as place:
            self._clear(model_id, place)
            place.overrides = settings
        return before

    @property
    def _busy_deadline(self) -> float:
        """Until when an unload that begins now waits for the model's users, as `time.monotonic` tells it."""
        return time.monotonic() + self._busy_timeout

    # Unloading -------------------------------------------------------------------------------------------------------

    def unload(self, model_id: str) -> Unloaded:
        """Take the model out of memory, if it is there, after those who use it are done.

        Raises:
            ModelBusy: they did not end within the busy timeout; the model stays.
        """
        with self._places.alone(model_id, self._busy_deadline) as place:
            return self._clear(model_id, place)

    def unload_all(self) -> None:
        """Take every model out of memory, after those who use it are done.

        Raises:
            ModelBusy: some were in use for longer than the busy timeout, and stay; it names them.
        """
        deadline = self._busy_deadline
        busy = []
        with self._changed:
            present = [
                name for name, place in self._places.all() if place.model is not None or place.loading is not None
            ]
        present += [name for name in self.conversions.shown() if name not in present]
        for model_id in present:
            try:
                with self._places.alone(model_id, deadline) as place:
                    self._clear(model_id, place)
            except ModelBusy:
                busy.append(f"'{model_id}'")
        if busy:
            raise ModelBusy(f"In use, and still in memory: {', '.join(busy)}. The other models were cleared")

    def remove(self, model_id: str) -> dict[str, Any]:
        """Remove the model from the registry and from memory; returns the registry's new content.

        Raises:
            ModelNotFound: no such model is registered.
            ModelBusy: those who use it did not end within the busy timeout; nothing was changed.
        """
        self._registry.check_present(model_id)
        with self._places.alone(model_id, self._busy_deadline) as place:
            content = self._registry.remove(model_id)
            self.downloads.cancel(model_id)
            self._clear(model_id, place)
            self.statistics.removed(model_id)
        return content

    def _clear(self, model_id: str, place: Place) -> Unloaded:
        """Empty a place that this thread has alone, of what was asked for at the last load too."""
        self.conversions.cancel(model_id)
        place.overrides = LoadSettings()
        return self._unloader.release(model_id, place)

    def close(self) -> None:
        """Cancel all work and empty the memory; no model is lent or loaded afterwards."""
        with self._changed:
            self._places.closed = True
            models = [place.model for _, place in self._places.all() if place.model is not None]
            for _, place in self._places.all():
                models.extend(place.replaced)
                place.replaced.clear()
                place.model = None
                if place.loading is not None:
                    place.loading.progress.cancel()
            self._changed.notify_all()
        self.downloads.close()
        for model in models:
            model.close()
        self.conversions.close()
        self._keep_alive.close()
        self._loader.close()

    # Looking ---------------------------------------------------------------------------------------------------------

    def loaded(self) -> dict[str, LoadedModel]:
        """The models in memory, by id; a view of this moment."""
        return self._places.loaded()

    def residents(self) -> dict[str, Resident]:
        """The models in memory and who uses them, by id; a view of this moment."""
        return self._places.residents(self._unloader.pinned())

    def loading(self) -> dict[str, Progress]:
        """The loads under way, by id."""
        return self._places.loading()

    def forecast(
        self, model_id: str, settings: LoadSettings | None = None, cancellation: Cancellation = NEVER
    ) -> Forecast:
        """What a load of the model would take, whether there is room for it, and who would go for it.

        Of a model that is not here yet no more than its config is fetched. One is told at a time: that is work for the
        interpreter, and many at once would leave nobody else his turn.

        Raises: as `lease`, but for what only comes out when weights are read.
        """
        cancellation = cancellation.child(lambda: self._places.closed)
        cancellation.until(lambda seconds: self._forecasting.acquire(timeout=seconds))
        try:
            return self._forecast(model_id, settings)
        finally:
            self._forecasting.release()

    def _forecast(self, model_id: str, settings: LoadSettings | None) -> Forecast:
        record = self._registry.get(model_id)
        wanted = (settings or LoadSettings()).over(record.settings)
        return self._room.forecast(model_id, self._loads.estimate(record, wanted))

    # Loading ---------------------------------------------------------------------------------------------------------

    def _acquire(
        self, model_id: str, cancellation: Cancellation, watch: Callable[[Progress], None]
    ) -> tuple[Place, LoadedModel, ModelRecord]:
        """The model's place, counted as in use, the model in it, and its record."""
        asked = False
        while True:
            record = usable(self._registry, model_id)  # looked up in every round: a wait may have been for its removal
            with self._changed:
                if self._places.closed:
                    raise Cancelled("The server is shutting down")
                place = self._places.of(model_id)
                loading = place.loading
                if (
                    place.reserved
                    or self._places.drains(model_id)
                    or (loading is not None and loading.progress.cancellation.cancelled)
                ):
                    self._changed.wait(LOOK_AGAIN)
                    cancellation.check()
                    continue
                stale = place.model is not None and is_stale(place.model, record)
                if place.model is not None and not stale:
                    place.users += 1
                    place.expires = None
                    if not asked:
                        self.statistics.found(model_id)
                    return place, place.model, record
                mine = loading is None
                if loading is None and not stale:
                    loading = place.loading = Loading()
                if loading is not None:
                    loading.waiting += 1
            if stale or loading is None:
                self._drop_stale(record)
                continue
            watch(loading.progress)
            if mine:
                name = f"load-{model_id}"
                threading.Thread(target=self._loads.fill, args=(record, place, loading), name=name).start()
            if not asked:
                self.statistics.missed(model_id)
                asked = True
            self._wait_for(place, loading, record, cancellation)
            model = loading.model  # which cannot go now, except with the server
            assert model is not None  # noqa: S101 - the load has succeeded
            try:
                if not self._places.closed and not is_stale(model, usable(self._registry, model_id)):
                    return place, model, record
            except LocalLLMError:
                self._leave(place, model, record)
                raise
            self._leave(place, model, record)

    def _wait_for(self, place: Place, loading: Loading, record: ModelRecord, cancellation: Cancellation) -> None:
        """Wait for a load, and count as a user of its model then. Once nobody waits any more, the load is cancelled.

        Raises: as the load does; Cancelled.
        """
        try:
            cancellation.result(loading.done)
            cancellation.check()
        except BaseException:
            with self._changed:
                if loading.model is not None:
                    self._leave(place, loading.model, record)
                else:
                    loading.waiting -= 1
                    if not loading.waiting and not loading.forced:
                        loading.progress.cancel()
            raise

    def _leave(self, place: Place, model: LoadedModel, record: ModelRecord, keep_alive: float | None = None) -> None:
        """Count as a user of a model no longer."""
        with self._changed:
            last = place.left(model)
            place.used = time.monotonic()
            if place.users == 0 and place.model is not None:
                self._keep_alive.begin(place, record, keep_alive)
            self._changed.notify_all()
        if last:  # the answer is not to wait for that
            arguments = (record.model_id, model)
            threading.Thread(
                target=self._takeover.close_replaced, args=arguments, name=f"close-{record.model_id}"
            ).start()

    def _drop_stale(self, record: ModelRecord) -> None:
        """Takes a model out of memory that a load must replace."""
        with self._places.alone(record.model_id, self._busy_deadline) as place:
            if place.model is not None and is_stale(place.model, record):
                self.conversions.cancel(record.model_id)
                self._unloader.release(record.model_id, place)
