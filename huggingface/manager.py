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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .budget import Budget, readable
from .devices import resolve_device, used_bytes
from .downloads import Downloads
from .errors import (
    Cancelled,
    DependencyMissing,
    FilesMissing,
    HubUnreachable,
    LocalLLMError,
    MemoryHeld,
    ModelBusy,
    ModelDisabled,
    NeverFits,
    OutOfMemory,
)
from .eviction import Idle, choose
from .libraries import import_library
from .progress import Progress
from .records import Estimate, Forecast, LoadOptions, LoadSettings, ModelRecord, Unloaded
from .registry import ModelRegistry
from .statistics import Statistics

if TYPE_CHECKING:
    from .loaded import LoadedModel

logger = logging.getLogger(__name__)

_LOADER = f"{__package__}.loader"

_LOOK_AGAIN = 0.1  # seconds between two looks at whether the one who waits is still there
_ALMOST_ALL = 0.9  # of a model's memory, that should have come back after it was let go
_PLENTY = 2  # times what a load takes at most, in which case nobody need look closely
_KV_CACHE = "kv cache"  # the part of a model that grows
_NOTICED = 64 * 2**20  # bytes that a model has to have for the log to say that they did not


class _Loading:
    """A load under way: everyone who asks meanwhile waits for it, and fails as it fails."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.done: Future[None] = Future()
        self.waiting = 0


@dataclass(slots=True)
class _Slot:
    """One model's place in memory. Times are readings of `time.monotonic`."""

    model: LoadedModel | None = None
    users: int = 0
    loading: _Loading | None = None
    draining: int = 0  # how many wait for its users to go, for its memory
    reserved: bool = False  # someone has it alone, or waits for the users to go: no new ones are let in
    overrides: LoadSettings = field(default_factory=LoadSettings)  # what the last load asked for, over the record
    used: float = 0.0
    expires: float | None = None
    load_seconds: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether there is a model that nobody uses or is about to."""
        return self.model is not None and not self.users and not self.reserved and self.loading is None


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in memory, as it is at one moment; `expires_at` is ISO 8601 in UTC, None for never or while in use."""

    model: LoadedModel
    users: int
    expires_at: str | None
    pinned: bool
    load_seconds: float


class _Account:
    """Where one model asks for memory: see `loaded.Memory`."""

    def __init__(self, manager: ModelManager, model_id: str) -> None:
        self._manager = manager
        self._model_id = model_id

    def note(self, part: str, sizes: Mapping[str, int]) -> None:
        self._manager.budget.note(self._model_id, part, sizes)

    def keep(self, device: str, size: int) -> None:
        self._manager.budget.keep(self._model_id, _KV_CACHE, device, size)

    def take(self, part: str, device: str, size: int) -> bool:
        return self._manager.budget.take(self._model_id, part, device, size)

    def settle(self) -> None:
        self._manager.budget.settle(self._model_id)

    def relieve(self) -> bool:
        return self._manager.relieve(self._model_id)


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
        self._memory_timeout = memory_timeout
        self._changed = threading.Condition()
        self._slots: dict[str, _Slot] = {}  # never shrinks: a slot may be waited for, and an empty one is tiny
        self._closed = False
        self._importing: threading.Timer | None = None
        self._reaper: threading.Thread | None = None
        self._warm = False
        self._warming_up = threading.Lock()
        self._making_room = threading.Lock()  # two loads must not count on the same memory, or on the same victims

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
        slot, model, record = self._acquire(model_id, gone, watch)
        try:
            yield model
        finally:
            with self._changed:
                slot.users -= 1
                slot.used = time.monotonic()
                if slot.users == 0 and slot.model is model:
                    self._let_expire(slot, record, keep_alive)
                self._changed.notify_all()

    def load(
        self,
        model_id: str,
        *,
        force_reload: bool = False,
        settings: LoadSettings | None = None,
        keep_alive: float | None = None,
        gone: Callable[[], bool] = lambda: False,
        watch: Callable[[Progress], None] = lambda _: None,
    ) -> LoadedModel:
        """Bring the model into memory, anew if `force_reload`, after those who use the old one are done.

        `settings` are in effect over the record's until the model is unloaded; where it is in memory with others, it
        is loaded anew. `watch` gets the progress of a load that is waited for.

        Raises: as `lease`; ModelBusy when a reload's users do not end within the busy timeout.
        """
        if settings is None:
            return self._bring(model_id, force_reload, keep_alive, gone, watch)
        before = self._override(model_id, settings)
        try:
            return self._bring(model_id, force_reload, keep_alive, gone, watch)
        except LocalLLMError:
            with self._changed:  # what failed is not to be in the way of whoever asks next
                slot = self._slots[model_id]
                if slot.overrides == settings and slot.model is None:
                    slot.overrides = before
            raise

    def _bring(
        self,
        model_id: str,
        force_reload: bool,
        keep_alive: float | None,
        gone: Callable[[], bool],
        watch: Callable[[Progress], None],
    ) -> LoadedModel:
        if force_reload:
            self._usable_record(model_id)
            with self._alone(model_id) as slot:
                record = self._usable_record(model_id)
                self._release(model_id, slot)
                loading = slot.loading = _Loading()
                loading.waiting = 1  # this one, whoever else comes and goes
                watch(loading.progress)
                self._load(record, slot, loading)
                loading.done.result()
        with self.lease(model_id, gone, keep_alive, watch) as model:
            return model

    def _override(self, model_id: str, settings: LoadSettings) -> LoadSettings:
        """Have these settings in effect from the next load on, and none with others in memory; returns those before.

        Raises: what a load with them would, as far as that is known before weights are read; nothing is changed then.
        """
        record = self._usable_record(model_id)
        with self._changed:
            slot = self._slots.setdefault(model_id, _Slot())
            before = slot.overrides
        if before == settings:
            return before
        loader = self._import_loader()
        with suppress(FilesMissing, HubUnreachable):  # files that are not here yet say nothing
            folder = self.downloads.present(record)
            loader.check(record, self._options, folder, settings.over(record.settings))
        with self._alone(model_id) as slot:
            self._release(model_id, slot)
            slot.overrides = settings
        return before

    # Unloading -------------------------------------------------------------------------------------------------------

    def unload(self, model_id: str) -> Unloaded:
        """Take the model out of memory, if it is there, after those who use it are done.

        Raises:
            ModelBusy: they did not end within the busy timeout; the model stays.
        """
        with self._alone(model_id) as slot:
            slot.overrides = LoadSettings()
            return self._release(model_id, slot)

    def unload_all(self) -> None:
        """Take every model out of memory, after those who use it are done.

        Raises:
            ModelBusy: some were in use for longer than the busy timeout, and stay; it names them.
        """
        deadline = time.monotonic() + self._busy_timeout
        busy = []
        with self._changed:
            present = [name for name, slot in self._slots.items() if slot.model is not None or slot.loading is not None]
        for model_id in present:
            try:
                with self._alone(model_id, deadline) as slot:
                    slot.overrides = LoadSettings()
                    self._release(model_id, slot)
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
        self._registry.get(model_id)
        with self._alone(model_id) as slot:
            content = self._registry.remove(model_id)
            self.downloads.cancel(model_id)
            slot.overrides = LoadSettings()
            self._release(model_id, slot)
            self.statistics.removed(model_id)
        return content

    def close(self) -> None:
        """Cancel all work and empty the memory; no model is lent or loaded afterwards."""
        with self._changed:
            self._closed = True
            models = [slot.model for slot in self._slots.values() if slot.model is not None]
            for slot in self._slots.values():
                slot.model = None
                if slot.loading is not None:
                    slot.loading.progress.cancel()
            self._changed.notify_all()
            reaper = self._reaper
        self.downloads.close()
        for model in models:
            model.close()
        if reaper is not None:
            reaper.join()
        if self._importing is not None:
            self._importing.cancel()
            self._importing.join()  # an interpreter that ends in the middle of an import may crash

    # Looking ---------------------------------------------------------------------------------------------------------

    def loaded(self) -> dict[str, LoadedModel]:
        """The models in memory, by id; a view of this moment."""
        with self._changed:
            return {model_id: slot.model for model_id, slot in self._slots.items() if slot.model is not None}

    def residents(self) -> dict[str, Resident]:
        """The models in memory and who uses them, by id; a view of this moment."""
        pinned = self._pinned()
        with self._changed:
            now, clock = time.monotonic(), datetime.now(UTC).replace(tzinfo=None)
            found = {}
            for model_id, slot in self._slots.items():
                if slot.model is not None:
                    expires = None
                    if slot.expires is not None and not slot.users:
                        expires = (clock + timedelta(seconds=slot.expires - now)).isoformat(timespec="microseconds")
                    found[model_id] = Resident(slot.model, slot.users, expires, model_id in pinned, slot.load_seconds)
            return found

    def loading(self) -> dict[str, Progress]:
        """The loads under way, by id."""
        with self._changed:
            return {name: slot.loading.progress for name, slot in self._slots.items() if slot.loading is not None}

    def forecast(self, model_id: str, settings: LoadSettings | None = None) -> Forecast:
        """What a load of the model would take, whether there is room for it, and who would go for it.

        Of a model that is not here yet no more than its config is fetched.

        Raises: as `lease`, but for what only comes out when weights are read.
        """
        record = self._registry.get(model_id)
        loader = self._import_loader()
        wanted = (settings or LoadSettings()).over(record.settings)
        estimate = self._estimate(loader, record, wanted)
        idle = self._idle(model_id)
        own = self.budget.held(model_id)
        lacking, rooms, most = {}, {}, {}
        for device, need in estimate.devices.items():
            room, limit = self.budget.room(device), self.budget.most(device)
            if room is not None and limit is not None:
                rooms[device], most[device] = room + own.get(device, 0), limit
                lacking[device] = self.budget.lacking(model_id, device, need)
        goes = choose(idle, lacking) if any(lacking.values()) else []
        possible = all(estimate.devices[device] <= limit for device, limit in most.items())
        fits = possible and (not any(lacking.values()) or bool(goes))
        return Forecast(estimate, rooms, most, fits, possible, [model.model_id for model in goes])

    def _estimate(self, loader: Any, record: ModelRecord, settings: LoadSettings) -> Estimate:
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

    def _refuse_at_once(self, loader: Any, record: ModelRecord, settings: LoadSettings) -> None:
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
        self._lacking(record.model_id, estimate.devices)

    # Room ------------------------------------------------------------------------------------------------------------

    def relieve(self, model_id: str) -> bool:
        """Take the model that was used longest ago out of memory for the sake of another; False if there is none."""
        while not self._making_room.acquire(timeout=_LOOK_AGAIN):
            with self._changed:
                slot = self._slots.get(model_id)
                if slot is None or slot.reserved or self._closed:
                    return False  # it is about to go itself, and whoever waits for that may hold the lock
        try:
            for idle in sorted(self._idle(model_id), key=lambda idle: idle.used):
                if self._evict(idle.model_id, f"'{model_id}' needs its memory"):
                    return True
            return False
        finally:
            self._making_room.release()

    def _make_room(self, model_id: str, needs: Mapping[str, int], gone: Callable[[], bool]) -> None:
        """Set memory aside for a model, for which others may have to go.

        Where those are in use, nobody new gets them for a while, so that whoever waits here has his turn.

        Raises:
            NeverFits: it is more than all models together may have.
            MemoryHeld: the others are pinned, or still in use after the memory timeout. Cancelled: `gone()`.
        """
        deadline = time.monotonic() + self._memory_timeout
        while True:
            with self._making_room:
                while not self.budget.reserve(model_id, needs):
                    lacking = self._lacking(model_id, needs)
                    victims = choose(self._idle(model_id), lacking)
                    if not victims:
                        break
                    for victim in victims:
                        self._evict(victim.model_id, f"'{model_id}' needs its memory")
                else:
                    return
            busy = choose(self._idle(model_id, busy=True), lacking)
            if time.monotonic() >= deadline or not (busy or self._others_come(model_id)):
                raise self._held(model_id, needs)
            self._wait_for_turn([model.model_id for model in busy], deadline, gone)

    def _wait_for_turn(self, model_ids: list[str], deadline: float, gone: Callable[[], bool]) -> None:
        """Wait until nobody uses these models, and let nobody new have them meanwhile."""
        with self._changed:
            slots = [self._slots[model_id] for model_id in model_ids]
            for slot in slots:
                slot.draining += 1
            try:
                if not slots:  # somebody else is being loaded, and may go when that is done
                    self._changed.wait(_LOOK_AGAIN)
                while any(slot.users for slot in slots) and (left := deadline - time.monotonic()) > 0:
                    if self._closed or gone():
                        raise Cancelled
                    self._changed.wait(min(left, _LOOK_AGAIN))
            finally:
                for slot in slots:
                    slot.draining -= 1
                self._changed.notify_all()

    def _others_come(self, model_id: str) -> bool:
        """Whether another model is being loaded."""
        with self._changed:
            return any(slot.loading is not None for name, slot in self._slots.items() if name != model_id)

    def _lacking(self, model_id: str, needs: Mapping[str, int]) -> dict[str, int]:
        """How many bytes more are needed on each device than there are.

        Raises:
            NeverFits: there could never be as many.
        """
        lacking = {}
        for device, need in needs.items():
            most = self.budget.most(device)
            if most is None:
                continue
            if need > most:
                raise NeverFits(
                    f"Model '{model_id}' needs {readable(need)} of memory on {device} ({need} bytes), and models may "
                    f"have {readable(most)} there ({most} bytes)"
                )
            lacking[device] = self.budget.lacking(model_id, device, need)
        return lacking

    def _held(self, model_id: str, needs: Mapping[str, int]) -> MemoryHeld:
        """Who has the memory that a model needs."""
        pinned = self._pinned()
        texts = []
        for device, need in needs.items():
            room = self.budget.room(device)
            if room is not None and need > room:
                holders = []
                for name, size in self.budget.holders(device).items():
                    if name != model_id:
                        with self._changed:
                            slot = self._slots.get(name)
                        state = "pinned" if name in pinned else "idle" if slot is not None and slot.idle else "in use"
                        holders.append(f"'{name}' ({readable(size)}, {state})")
                if (besides := self.budget.besides(device)) > 0:
                    holders.append(f"the process itself ({readable(besides)})")
                texts.append(
                    f"{readable(need)} on {device} are needed and {readable(room)} are to be had; the rest is held by "
                    + (", ".join(holders) or "other programs")
                )
        return MemoryHeld(f"No room for model '{model_id}' now: {'; '.join(texts) or 'its memory was taken meanwhile'}")

    def _idle(self, but: str, *, busy: bool = False) -> list[Idle]:
        """The models that may go for another one; those that are in use too where `busy`."""
        pinned = self._pinned()
        with self._changed:
            idle = [
                (name, slot.used)
                for name, slot in self._slots.items()
                if (slot.idle or (busy and slot.model is not None and not slot.reserved)) and name not in (but, *pinned)
            ]
        return [Idle(name, used, self.budget.held(name)) for name, used in idle]

    def _pinned(self) -> frozenset[str]:
        try:
            return frozenset(record.model_id for record in self._registry.list() if record.pinned)
        except LocalLLMError:  # the registry cannot be read just now: nobody loses his model for that
            with self._changed:
                return frozenset(self._slots)

    def _evict(self, model_id: str, why: str, *, expired: bool = False) -> bool:
        """Take a model out of memory if still nobody uses it, and its time still is up where it `expired`; tells
        whether it went."""
        with self._changed:
            slot = self._slots[model_id]
            if not slot.idle or self._closed:
                return False
            if expired and (slot.expires is None or slot.expires > time.monotonic()):
                return False
            slot.reserved = True
        try:
            logger.info("taking %s out of memory: %s", model_id, why)
            slot.overrides = LoadSettings()
            self._release(model_id, slot)
            if not expired:
                self.statistics.evicted(model_id)
        finally:
            with self._changed:
                slot.reserved = False
                self._changed.notify_all()
        return True

    def _release(self, model_id: str, slot: _Slot) -> Unloaded:
        """Empty a slot that this thread has alone; tells what the model had, and what came back."""
        with self._changed:
            model, slot.model = slot.model, None
            slot.expires = None
        if model is None:
            return Unloaded(False, 0, 0)
        sizes = model.sizes
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
        text = f"{readable(freed)} of {readable(sizes.total)}"
        if resident and sizes.total >= _NOTICED and freed < _ALMOST_ALL * sizes.total:
            logger.warning("unloaded %s, but only %s came back", model_id, text)
        else:
            logger.info("unloaded %s, %s came back", model_id, text)
        return Unloaded(True, sizes.total, freed)

    # Going by themselves ---------------------------------------------------------------------------------------------

    def _let_expire(self, slot: _Slot, record: ModelRecord, keep_alive: float | None) -> None:
        """Have a model that nobody uses go when its time is up; with the lock held."""
        if keep_alive is None:
            keep_alive = record.keep_alive if record.keep_alive is not None else self._keep_alive
        slot.expires = None if keep_alive < 0 else slot.used + keep_alive
        if slot.expires is not None and self._reaper is None and not self._closed:
            self._reaper = threading.Thread(target=self._reap, name="keep-alive")
            self._reaper.start()

    def _reap(self) -> None:
        """Take out of memory what has expired, until nothing will."""
        while True:
            with self._changed:
                waiting = {name: slot.expires for name, slot in self._slots.items() if slot.expires is not None}
                if not waiting or self._closed:
                    self._reaper = None
                    return
                now = time.monotonic()
                due = [name for name, expires in waiting.items() if expires <= now and self._slots[name].idle]
                if not due:
                    soonest = min(waiting.values())
                    self._changed.wait(min(soonest - now, 60.0) if soonest > now else _LOOK_AGAIN)
                    continue
            for model_id in due:
                self._evict(model_id, "its time is up", expired=True)

    # Loading ---------------------------------------------------------------------------------------------------------

    def _acquire(
        self, model_id: str, gone: Callable[[], bool], watch: Callable[[Progress], None]
    ) -> tuple[_Slot, LoadedModel, ModelRecord]:
        """The model's slot, counted as in use, the model in it, and its record."""
        asked = False
        while True:
            record = self._usable_record(model_id)  # looked up in every round: a wait may have been for its removal
            with self._changed:
                if self._closed:
                    raise Cancelled("The server is shutting down")
                slot = self._slots.setdefault(model_id, _Slot())
                loading = slot.loading
                if slot.reserved or slot.draining or (loading is not None and loading.progress.cancelled):
                    self._changed.wait(_LOOK_AGAIN)
                    if gone():
                        raise Cancelled
                    continue
                stale = slot.model is not None and _is_stale(slot.model, record)
                if slot.model is not None and not stale:
                    slot.users += 1
                    slot.expires = None
                    if not asked:
                        self.statistics.found(model_id)
                    return slot, slot.model, record
                mine = loading is None
                if loading is None and not stale:
                    loading = slot.loading = _Loading()
                if loading is not None:
                    loading.waiting += 1
            if stale or loading is None:
                self._drop_stale(record)
                continue
            watch(loading.progress)
            if mine:
                name = f"load-{model_id}"
                threading.Thread(target=self._load, args=(record, slot, loading), name=name).start()
            if not asked:
                self.statistics.missed(model_id)
                asked = True
            self._wait_for(loading, gone)

    def _wait_for(self, loading: _Loading, gone: Callable[[], bool]) -> None:
        """Wait for a load. Where everyone who wanted it has left, it is given up.

        Raises: as the load does; Cancelled where `gone()`.
        """
        try:
            while not wait([loading.done], _LOOK_AGAIN).done:
                if gone():
                    raise Cancelled
        finally:
            with self._changed:
                loading.waiting -= 1
                if not loading.waiting and not loading.done.done():
                    loading.progress.cancel()
        loading.done.result()
        if gone():
            raise Cancelled

    def _load(self, record: ModelRecord, slot: _Slot, loading: _Loading) -> None:
        """Fill `slot`, and settle `loading` for all who wait for it."""
        model, failure = None, None
        started = time.monotonic()
        try:
            model = self._read(record, slot.overrides.over(record.settings), loading.progress)
        except BaseException as error:  # noqa: BLE001 - it is raised by `loading` for everyone who waits
            failure = error
        seconds = time.monotonic() - started
        with self._changed:
            late = self._closed
            slot.model = None if late else model
            slot.loading = None
            slot.used, slot.load_seconds = time.monotonic(), seconds
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

    def _read(self, record: ModelRecord, settings: LoadSettings, progress: Progress) -> LoadedModel:
        model_id = record.model_id
        loader = self._import_loader()
        started = time.monotonic()
        self._refuse_at_once(loader, record, settings)
        folder = self.downloads.folder(record, progress, lambda: progress.cancelled)
        adapters = self.downloads.adapters(record, progress)
        progress.begin("read")
        account = _Account(self, model_id)
        heads = self.downloads.adapter_heads(record)
        if not self._has_plenty(loader, record, settings, folder, heads):
            estimate: Estimate = loader.estimate(record, self._options, folder, settings, adapters=heads)
            self._make_room(model_id, estimate.devices, lambda: progress.cancelled)
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
            )
            model = self._read_or_relieve(model_id, read)
        except BaseException:
            self.budget.forget(model_id)
            raise
        logger.info("loaded %s on %s in %.1f s", model_id, model.device, time.monotonic() - started)
        return model

    def _import_loader(self) -> Any:
        """The loader, ready for work; what the process has then, it has for itself.

        Raises:
            DependencyMissing: torch or transformers cannot be imported.
        """
        loader = import_library(_LOADER)
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
        self, loader: Any, record: ModelRecord, settings: LoadSettings, folder: Path, adapters: Sequence[Any]
    ) -> bool:
        """Set memory aside without a closer look, where there is far more than the model could take."""
        if record.gguf_file is not None or settings.device_map is not None or settings.quantization is not None:
            return False
        device = resolve_device(settings.device or self._options.device)
        rough = loader.rough_bytes(record, self._options, folder, adapters)
        with self._making_room:
            room = self.budget.room(device)
            plenty = room is None or room >= _PLENTY * rough
            return plenty and self.budget.reserve(record.model_id, {device: rough})

    def _read_or_relieve(self, model_id: str, read: Callable[[], LoadedModel]) -> LoadedModel:
        """Read a model; where memory runs out all the same, once more without the others that nobody uses."""
        try:
            return read()
        except OutOfMemory:
            relieved = False
            while self.relieve(model_id):
                relieved = True
            if not relieved:
                raise
            return read()

    @contextmanager
    def _alone(self, model_id: str, deadline: float | None = None) -> Iterator[_Slot]:
        """The model's slot with nobody else in it: users waited for, new ones kept out until the block ends."""
        if deadline is None:
            deadline = time.monotonic() + self._busy_timeout
        with self._changed:
            slot = self._slots.setdefault(model_id, _Slot())
            if not self._changed.wait_for(lambda: not slot.reserved, deadline - time.monotonic()):
                raise ModelBusy(f"Model '{model_id}' is being loaded or unloaded; try again later")
            slot.reserved = True
            if not self._changed.wait_for(
                lambda: slot.users == 0 and slot.loading is None, deadline - time.monotonic()
            ):
                slot.reserved = False
                self._changed.notify_all()
                raise ModelBusy(f"Model '{model_id}' is in use; try again when its requests have ended")
        try:
            yield slot
        finally:
            with self._changed:
                slot.reserved = False
                self._changed.notify_all()

    def _drop_stale(self, record: ModelRecord) -> None:
        """Take a model out of memory that is to be loaded anew."""
        with self._alone(record.model_id) as slot:
            if slot.model is not None and _is_stale(slot.model, record):
                self._release(record.model_id, slot)

    def _usable_record(self, model_id: str) -> ModelRecord:
        record = self._registry.get(model_id)
        if record.status == "disabled":
            raise ModelDisabled(model_id)
        return record


def _is_stale(model: LoadedModel, record: ModelRecord) -> bool:
    """Whether a model was loaded as another than it is registered as now, or its engine broke."""
    then = model.setup.record
    now = (record.model_type, record.revision, record.gguf_file, record.adapters, record.settings)
    return (then.model_type, then.revision, then.gguf_file, then.adapters, then.settings) != now or model.failed
