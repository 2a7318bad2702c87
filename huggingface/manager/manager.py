"""Which model is in memory, and who uses it.

`ModelManager` is the one owner of loaded models; any thread may call it. A model is loaded once however many ask for
it, is never taken away from whoever holds a lease, and no lock is held while one is loaded, waited for or let go.
Where memory is short, models that nobody uses go for one that is wanted. It knows the registry, the downloads and,
late, the loader; nothing of HTTP, and torch only through the loader.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import (
    Cancelled,
    ConversionFailed,
    DependencyMissing,
    FilesMissing,
    HubUnreachable,
    LocalLLMError,
    ModelBusy,
    ModelDisabled,
    OutOfMemory,
)
from ..host.devices import resolve_device, used_bytes
from ..host.imports import import_library
from ..host.memory import readable
from ..hub.downloads import Downloads
from ..progress import Progress
from ..registry.records import LoadSettings, ModelRecord
from ..registry.registry import ModelRegistry
from ..types import Estimate, Forecast, LoadOptions, Unloaded
from .budget import Account, Budget
from .conversions import Conversion, Conversions
from .leases import LOOK_AGAIN, Loading, Place, Places, Resident
from .loads import Heads, Loader
from .room import Room
from .statistics import Statistics

if TYPE_CHECKING:
    from ..loading.model import LoadedModel

logger = logging.getLogger(__name__)

_LOADER = "huggingface.loading.loader"

_ALMOST_ALL = 0.9  # of a model's memory, that should have come back after it was let go
_PATIENCE = 32  # looks for a moment in which nobody uses a model, before new users wait for one
_PLENTY = 2  # times what a load takes at most, in which case nobody need look closely
_NOTICED = 64 * 2**20  # bytes that a model has to have for the log to say that they did not


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
        self._keep_alive = keep_alive
        self._places = Places()
        self._changed = self._places.changed
        self._memory_timeout = memory_timeout
        self.conversions = Conversions(self.budget, self._may_convert, self._take_over, self._stays_with_torch)
        self._room = Room(
            self.budget, self._places, memory_timeout, self._pinned, self._evict, self.conversions.give_way
        )
        self._importing: threading.Timer | None = None
        self._reaper: threading.Thread | None = None
        self._warm = False
        self._warming_up = threading.Lock()
        self._forecasting = threading.Lock()

    def import_libraries(self, delay: float) -> None:
        """Import what loading needs, in the background, `delay` seconds from now: the first load need not wait for it.

        Where it cannot be imported, the first load says so.
        """
        self._importing = threading.Timer(delay, self._try_import)
        self._importing.name = "import-libraries"
        self._importing.start()

    # Lending ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def lease(
        self,
        model_id: str,
        gone: Callable[[], bool] = lambda: False,
        keep_alive: float | None = None,
        watch: Callable[[Progress], None] = lambda _: None,
    ) -> Iterator[LoadedModel]:
        """The model, loaded if it was not, and kept in memory until the block ends; then for `keep_alive` seconds.

        Raises:
            ModelNotFound, ModelDisabled: the registry says so.
            DependencyMissing, LoadError, InvalidRequest: it could not be loaded; all who waited for it are told so.
            Cancelled: the server is shutting down, or `gone()` turned true while it was loaded.
        """
        place, model, record = self._acquire(model_id, gone, watch)
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
        gone: Callable[[], bool] = lambda: False,
        watch: Callable[[Progress], None] = lambda _: None,
    ) -> LoadedModel:
        """Bring the model into memory, anew if `force_reload`, after those who use the old one are done.

        `settings` are in effect over the record's until the model is unloaded; where it is in memory with others, it
        is loaded anew. `wait_for_graph` waits until it is computed by its graph, or known that it will not be. `watch`
        gets the progress of what is waited for.

        Raises: as `lease`; ModelBusy when a reload's users do not end within the busy timeout.
        """
        if settings is None:
            return self._bring(model_id, force_reload, keep_alive, wait_for_graph, gone, watch)
        before = self._override(model_id, settings)
        try:
            return self._bring(model_id, force_reload, keep_alive, wait_for_graph, gone, watch)
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
        gone: Callable[[], bool],
        watch: Callable[[Progress], None],
    ) -> LoadedModel:
        if force_reload:
            self._usable_record(model_id)
            with self._places.alone(model_id, self._busy_deadline) as place:
                record = self._usable_record(model_id)
                self._release(model_id, place)
                loading = place.loading = Loading(forced=True)
                watch(loading.progress)
                self._load(record, place, loading)
                loading.done.result()
        with self.lease(model_id, gone, keep_alive, watch) as model:
            conversion = self.conversions.of(model_id) if wait_for_graph else None
        if conversion is None:
            return model
        told = None
        while not wait([conversion.settled], LOOK_AGAIN).done:
            if conversion.progress is not told:  # each try has its own
                told = conversion.progress
                watch(told)
            if gone():
                raise Cancelled
        with self.lease(model_id, gone, keep_alive, watch) as model:
            return model

    def _override(self, model_id: str, settings: LoadSettings) -> LoadSettings:
        """Have these settings in effect from the next load on, and none with others in memory; returns those before.

        Raises: what a load with them would, as far as that is known before weights are read; nothing is changed then.
        """
        record = self._usable_record(model_id)
        with self._changed:
            place = self._places.of(model_id)
            before = place.overrides
        if before == settings:
            return before
        loader = self._import_loader()
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
            reaper = self._reaper
        self.downloads.close()
        for model in models:
            model.close()
        self.conversions.close()
        if reaper is not None:
            reaper.join()
        if self._importing is not None:
            self._importing.cancel()
            self._importing.join()  # an interpreter that ends in the middle of an import may crash

    # Looking ---------------------------------------------------------------------------------------------------------

    def loaded(self) -> dict[str, LoadedModel]:
        """The models in memory, by id; a view of this moment."""
        return self._places.loaded()

    def residents(self) -> dict[str, Resident]:
        """The models in memory and who uses them, by id; a view of this moment."""
        return self._places.residents(self._pinned())

    def loading(self) -> dict[str, Progress]:
        """The loads under way, by id."""
        return self._places.loading()

    def forecast(
        self, model_id: str, settings: LoadSettings | None = None, gone: Callable[[], bool] = lambda: False
    ) -> Forecast:
        """What a load of the model would take, whether there is room for it, and who would go for it.

        Of a model that is not here yet no more than its config is fetched. One is told at a time: that is work for the
        interpreter, and many at once would leave nobody else his turn.

        Raises: as `lease`, but for what only comes out when weights are read.
        """
        while not self._forecasting.acquire(timeout=LOOK_AGAIN):
            if gone() or self._places.closed:
                raise Cancelled
        try:
            return self._forecast(model_id, settings)
        finally:
            self._forecasting.release()

    def _forecast(self, model_id: str, settings: LoadSettings | None) -> Forecast:
        record = self._registry.get(model_id)
        loader = self._import_loader()
        wanted = (settings or LoadSettings()).over(record.settings)
        return self._room.forecast(model_id, self._estimate(loader, record, wanted))

    def _estimate(self, loader: Loader, record: ModelRecord, settings: LoadSettings) -> Estimate:
        """What a load of a model would take, whether its weights are here or not.

        Raises: as `lease`.
        """
        try:
            folder = self.downloads.present(record)
        except (FilesMissing, HubUnreachable):
            if record.gguf_file is not None:
                raise
            folder = self.downloads.described(record)
            heads = self.downloads.adapter_heads(record)
            estimate: Estimate = loader.estimate(
                record, self._options, folder, settings, described=True, adapters=heads
            )
        else:
            heads = self.downloads.adapter_heads(record)
            estimate = loader.estimate(record, self._options, folder, settings, adapters=heads)
        return estimate

    def _refuse_at_once(self, loader: Loader, record: ModelRecord, settings: LoadSettings) -> None:
        """Refuse a model that is not here and could never fit, before it is downloaded.

        Raises:
            NeverFits: it is so; whatever else is wrong with it, the load will say.
        """
        with suppress(FilesMissing, HubUnreachable):
            self.downloads.present(record)
            return
        try:
            estimate = self._estimate(loader, record, settings)
        except LocalLLMError:
            return
        self._room.lacking(record.model_id, estimate.devices)

    # Going for others -------------------------------------------------------------------------------------------------

    def _pinned(self) -> frozenset[str]:
        try:
            return frozenset(record.model_id for record in self._registry.list() if record.pinned)
        except LocalLLMError:  # the registry cannot be read just now: nobody loses his model for that
            return frozenset(self._places.loaded())

    def _evict(self, model_id: str, why: str, *, expired: bool = False) -> bool:
        """Take a model out of memory if still nobody uses it, and its time still is up where it `expired`; tells
        whether it went."""
        with self._changed:
            place = self._places.of(model_id)
            if not place.idle or self._places.closed:
                return False
            if expired and (place.expires is None or place.expires > time.monotonic()):
                return False
            place.reserved = True
        try:
            logger.info("taking %s out of memory: %s", model_id, why)
            place.overrides = LoadSettings()
            self._release(model_id, place)
            if not expired:
                self.statistics.evicted(model_id)
        finally:
            self._places.free(place)
        return True

    def _clear(self, model_id: str, place: Place) -> Unloaded:
        """Empty a place that this thread has alone, of what was asked for at the last load too."""
        self.conversions.cancel(model_id)
        place.overrides = LoadSettings()
        return self._release(model_id, place)

    def _release(self, model_id: str, place: Place) -> Unloaded:
        """Empty a place that this thread has alone; tells what the model had, and what came back."""
        with self._changed:
            model, place.model = place.model, None
            place.expires = None
        if model is None:
            return Unloaded(False, 0, 0)
        sizes, expected = model.sizes, model.expected_back
        resident = model.resident
        before = {device: used_bytes(device) for device in sizes.devices}
        self.budget.leave(model_id)
        model.close()
        self.budget.forget(model_id)
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

    # Going by themselves ---------------------------------------------------------------------------------------------

    def _let_expire(self, place: Place, record: ModelRecord, keep_alive: float | None) -> None:
        """Have a model that nobody uses go when its time is up; with the lock held."""
        if keep_alive is None:
            keep_alive = record.keep_alive if record.keep_alive is not None else self._keep_alive
        self._expire(place, None if keep_alive < 0 else place.used + keep_alive)

    def _expire(self, place: Place, when: float | None) -> None:
        """Have a model go then, a reading of `time.monotonic`, if nobody uses it; with the lock held."""
        place.expires = when
        if place.expires is not None and self._reaper is None and not self._places.closed:
            self._reaper = threading.Thread(target=self._reap, name="keep-alive")
            self._reaper.start()

    def _reap(self) -> None:
        """Take out of memory what has expired, until nothing will."""
        while True:
            with self._changed:
                waiting = {name: place.expires for name, place in self._places.all() if place.expires is not None}
                if not waiting or self._places.closed:
                    self._reaper = None
                    return
                now = time.monotonic()
                due = [name for name, expires in waiting.items() if expires <= now and self._places.of(name).idle]
                if not due:
                    soonest = min(waiting.values())
                    self._changed.wait(min(soonest - now, 60.0) if soonest > now else LOOK_AGAIN)
                    continue
            for model_id in due:
                self._evict(model_id, "its time is up", expired=True)

    # Loading ---------------------------------------------------------------------------------------------------------

    def _acquire(
        self, model_id: str, gone: Callable[[], bool], watch: Callable[[Progress], None]
    ) -> tuple[Place, LoadedModel, ModelRecord]:
        """The model's place, counted as in use, the model in it, and its record."""
        asked = False
        while True:
            record = self._usable_record(model_id)  # looked up in every round: a wait may have been for its removal
            with self._changed:
                if self._places.closed:
                    raise Cancelled("The server is shutting down")
                place = self._places.of(model_id)
                loading = place.loading
                if (
                    place.reserved
                    or self._places.drains(model_id)
                    or (loading is not None and loading.progress.cancelled)
                ):
                    self._changed.wait(LOOK_AGAIN)
                    if gone():
                        raise Cancelled
                    continue
                stale = place.model is not None and _is_stale(place.model, record)
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
                threading.Thread(target=self._load, args=(record, place, loading), name=name).start()
            if not asked:
                self.statistics.missed(model_id)
                asked = True
            self._wait_for(place, loading, record, gone)
            model = loading.model  # which cannot go now, except with the server
            assert model is not None  # noqa: S101 - the load has succeeded
            try:
                if not self._places.closed and not _is_stale(model, self._usable_record(model_id)):
                    return place, model, record
            except LocalLLMError:
                self._leave(place, model, record)
                raise
            self._leave(place, model, record)

    def _wait_for(self, place: Place, loading: Loading, record: ModelRecord, gone: Callable[[], bool]) -> None:
        """Wait for a load, and count as a user of its model then. Once nobody waits any more, the load is cancelled.

        Raises: as the load does; Cancelled where `gone()`.
        """
        try:
            while not wait([loading.done], LOOK_AGAIN).done:
                if gone():
                    raise Cancelled
            loading.done.result()
            if gone():
                raise Cancelled
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
                self._let_expire(place, record, keep_alive)
            self._changed.notify_all()
        if last:  # the answer is not to wait for that
            arguments = (record.model_id, model)
            threading.Thread(target=self._close_replaced, args=arguments, name=f"close-{record.model_id}").start()

    def _load(self, record: ModelRecord, place: Place, loading: Loading, spare: Path | None = None) -> None:
        """Fill `place`, and settle `loading` for all who wait for it; `spare` as `loader.load` has it."""
        model, failure = None, None
        account = Account(self.budget, record.model_id, partial(self._room.relieve, record.model_id))
        started = time.monotonic()
        try:
            model = self._read(record, place.overrides.over(record.settings), loading.progress, account, spare)
        except BaseException as error:  # noqa: BLE001 - it is raised by `loading` for everyone who waits
            failure = error
        seconds = time.monotonic() - started
        with self._changed:
            late = self._places.closed
            place.model, place.account = None if late else model, account
            place.loading = None
            if place.model is not None:
                place.users += loading.waiting
                loading.model = place.model
            place.used, place.load_seconds = time.monotonic(), seconds
            self._changed.notify_all()
        if late and model is not None:
            model.close()
        if failure is None:
            loading.progress.end("ready")
            self.statistics.loaded(record.model_id, seconds)
            loading.done.set_result(None)
        else:
            cancelled = isinstance(failure, Cancelled)
            loading.progress.end("cancelled" if cancelled else "failed", str(failure))
            if not cancelled:
                self.statistics.failed(record.model_id, type(failure).__name__)
            loading.done.set_exception(failure)

    def _read(
        self, record: ModelRecord, settings: LoadSettings, progress: Progress, account: Account, spare: Path | None
    ) -> LoadedModel:
        model_id = record.model_id
        loader = self._import_loader()
        started = time.monotonic()
        self._refuse_at_once(loader, record, settings)
        folder = self.downloads.folder(record, progress, lambda: progress.cancelled)
        adapters = self.downloads.adapters(record, progress)
        heads = self.downloads.adapter_heads(record)
        if not self._has_plenty(loader, record, settings, folder, heads):
            estimate: Estimate = loader.estimate(record, self._options, folder, settings, adapters=heads)
            self._room.make(model_id, estimate.devices, progress)
            account.keep(estimate.device, estimate.kv_cache)
        try:
            read = partial(
                loader.load,
                record,
                self._options,
                folder,
                settings=settings,
                adapters=adapters,
                progress=progress,
                memory=account,
                make=lambda key, told: self.conversions.wait(self._conversion(record, settings, folder, key), told),
                spare=spare,
            )
            model = self._read_or_relieve(model_id, read)
        except BaseException:
            self.budget.forget(model_id)
            raise
        if (key := model.setup.converts) is not None:
            conversion = self.conversions.add(self._conversion(record, settings, folder, key))
            if conversion.state == "failed" and conversion.reason is not None:
                model.engine_reason = conversion.reason
        logger.info("loaded %s on %s in %.1f s", model_id, model.device, time.monotonic() - started)
        return model

    # Graphs ----------------------------------------------------------------------------------------------------------

    def _conversion(self, record: ModelRecord, settings: LoadSettings, folder: Path, key: str) -> Conversion:
        """What makes the graph of a model that is loaded, or is being loaded, with these settings."""
        loader = self._import_loader()

        def make(progress: Progress, aside: bool) -> Path | None:
            made: Path | None = loader.convert(record, self._options, folder, settings, progress, aside=aside)
            return made

        def need() -> int:
            estimate: Estimate = loader.estimate(record, self._options, folder, settings)
            return estimate.conversion

        return Conversion(record.model_id, key, make, need)

    def _may_convert(self, conversion: Conversion) -> bool:
        """Whether a model's load is over, so that its conversion does not disturb what is measured there."""
        with self._changed:
            place = self._places.of(conversion.model_id)
            return place.loading is None and (place.model is None or place.model.settles(0))

    def _stays_with_torch(self, conversion: Conversion, reason: str) -> None:
        """Say why a model has no graph."""
        with self._changed:
            model = self._places.of(conversion.model_id).model
            if model is not None and model.setup.converts == conversion.key:
                model.engine_reason = reason

    def _take_over(self, conversion: Conversion) -> bool:
        """Have a model computed by its graph from the next request on; those that torch has begun, torch ends. Where
        there is no room for both, torch's weights go first, as soon as nobody uses them. Tells whether that is settled.

        Raises: as a load does; torch goes on then.
        """
        model_id = conversion.model_id
        with self._changed:
            place = self._places.of(model_id)
            model = place.model
            if place.reserved or place.loading is not None:
                return False
        if model is None or model.setup.converts != conversion.key or model.failed:
            return True  # the next load reads the graph
        record = self._usable_record(model_id)
        if _is_stale(model, record):
            return True
        loader, folder = self._import_loader(), self.downloads.present(record)
        settings = place.overrides.over(record.settings)
        account = Account(self.budget, f"{model_id} by OpenVINO", partial(self._room.relieve, model_id))
        estimate: Estimate = loader.estimate(record, self._options, folder, replace(settings, engine="openvino"))
        self._room.lacking(model_id, estimate.devices)
        if not self.budget.reserve(account.owner, estimate.devices):
            return self._reload(conversion, record)
        after = None
        try:
            account.keep(estimate.device, estimate.kv_cache)
            after = loader.load(
                record,
                self._options,
                folder,
                settings=settings,
                progress=conversion.progress,
                memory=account,
                spare=conversion.spare,
            )
            conversion.spare = None  # it goes with the model
            after.prepared(lambda: conversion.cancelled)
            if after.effective["engine"] != "openvino":
                raise ConversionFailed(after.engine_reason or "its graph cannot be found")
            with self._changed:
                if place.model is not model or place.reserved or self._places.closed:
                    return place.model is None
                assert place.account is not None  # noqa: S101 - it came with the model
                place.account.rename(_replaced(model_id))
                account.rename(model_id)
                unused, after = place.replace(after, account), None
                self._changed.notify_all()
        finally:
            if after is not None:
                after.close()
            self.budget.forget(f"{model_id} by OpenVINO")
        logger.info("%s is computed by OpenVINO from now on", model_id)
        if unused is not None:
            self._close_replaced(model_id, unused)
        return True

    def _reload(self, conversion: Conversion, record: ModelRecord) -> bool:
        """Load a model anew, by its graph, when nobody uses it. Where it is always in use, new users wait now and then
        until those before have ended, for as long as a load may wait for them. Tells whether that is settled."""
        conversion.tries += 1
        patient = conversion.tries >= _PATIENCE and not conversion.tries & (conversion.tries - 1)
        conversion.reason = "there is no room for both while it is in use"
        try:
            with self._places.alone(
                record.model_id, time.monotonic() + (self._memory_timeout if patient else 0)
            ) as place:
                if place.model is None or place.model.setup.converts != conversion.key:
                    return True
                used, expires = place.used, place.expires
                self._release(record.model_id, place)
                loading = place.loading = Loading(forced=True)
                self._load(record, place, loading, conversion.spare)
                with self._changed:
                    place.used = used
                    if place.model is not None:
                        self._expire(place, expires)
        except ModelBusy:
            return False
        if place.model is not None:
            if place.model.setup.converts is not None:
                raise ConversionFailed("its graph cannot be found")
            conversion.spare = None  # it goes with the model
        return True

    def _close_replaced(self, model_id: str, model: LoadedModel) -> None:
        """Close a model that another has taken over from."""
        self.budget.leave(_replaced(model_id))
        model.close()
        self.budget.forget(_replaced(model_id))

    def _import_loader(self) -> Loader:
        """The loader, ready for work; what the process has then, it has for itself.

        Raises:
            DependencyMissing: torch or transformers cannot be imported.
        """
        loader = cast("Loader", import_library(_LOADER))
        with self._warming_up:
            if not self._warm:
                loader.warm_up()
                self.budget.begin()
                self._warm = True
        return loader

    def _try_import(self) -> None:
        with suppress(DependencyMissing):
            self._import_loader()

    def _has_plenty(
        self,
        loader: Loader,
        record: ModelRecord,
        settings: LoadSettings,
        folder: Path,
        adapters: Heads,
    ) -> bool:
        """Set memory aside without a closer look, where there is far more than the model could take."""
        if record.gguf_file is not None or settings.device_map is not None or settings.quantization is not None:
            return False
        device = resolve_device(settings.device or self._options.device)
        rough = loader.rough_bytes(record, self._options, folder, adapters)
        return self._room.take_if_plenty(record.model_id, device, rough, _PLENTY)

    def _read_or_relieve(self, model_id: str, read: Callable[[], LoadedModel]) -> LoadedModel:
        """Read a model; where memory runs out all the same, once more without the others that nobody uses."""
        try:
            return read()
        except OutOfMemory:
            relieved = False
            while self._room.relieve(model_id):
                relieved = True
            if not relieved:
                raise
            return read()

    def _drop_stale(self, record: ModelRecord) -> None:
        """Take a model out of memory that is to be loaded anew."""
        with self._places.alone(record.model_id, self._busy_deadline) as place:
            if place.model is not None and _is_stale(place.model, record):
                self.conversions.cancel(record.model_id)
                self._release(record.model_id, place)

    def _usable_record(self, model_id: str) -> ModelRecord:
        record = self._registry.get(model_id)
        if record.status == "disabled":
            raise ModelDisabled(model_id)
        return record


def _replaced(model_id: str) -> str:
    """The name in the budget of a model that another has taken over from."""
    return f"{model_id} by torch"


def _is_stale(model: LoadedModel, record: ModelRecord) -> bool:
    """Whether a model was loaded as another than it is registered as now, or its engine broke."""
    then = model.setup.record
    now = (record.model_type, record.revision, record.gguf_file, record.adapters, record.settings)
    return (then.model_type, then.revision, then.gguf_file, then.adapters, then.settings) != now or model.failed
