"""Which model is in memory, and who uses it.

`ModelManager` is the one owner of loaded models; any thread may call it. A model is loaded once however many ask for
it, is never taken away from whoever holds a lease, and no lock is held while one is loaded or waited for.
It knows the registry and, late, the loader; nothing of HTTP, and torch only through the loader.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import Cancelled, DependencyMissing, ModelBusy, ModelDisabled
from .libraries import import_library
from .records import LoadOptions, ModelRecord
from .registry import ModelRegistry

if TYPE_CHECKING:
    from .loaded import LoadedModel

logger = logging.getLogger(__name__)

_LOADER = f"{__package__}.loader"

_LOOK_AGAIN = 0.1  # seconds between two looks at whether the one who waits is still there


@dataclass(slots=True)
class _Slot:
    """One model's place in memory."""

    model: LoadedModel | None = None
    users: int = 0
    loading: Future[None] | None = None  # everyone who asks meanwhile waits for it, and fails as it fails
    reserved: bool = False  # someone has it alone, or waits for the users to go: no new ones are let in


class ModelManager:
    """Loads, lends and unloads models."""

    def __init__(self, registry: ModelRegistry, options: LoadOptions, *, busy_timeout: float = 30.0) -> None:
        self._registry = registry
        self._options = options
        self._busy_timeout = busy_timeout
        self._changed = threading.Condition()
        self._slots: dict[str, _Slot] = {}  # never shrinks: a slot may be waited for, and an empty one is tiny
        self._closed = False
        self._importing: threading.Timer | None = None

    def import_libraries(self, delay: float) -> None:
        """Import what loading needs, in the background, `delay` seconds from now: the first load need not wait for it.

        Where it cannot be imported, the first load says so.
        """
        self._importing = threading.Timer(delay, _try_import)
        self._importing.name = "import-libraries"
        self._importing.start()

    @contextmanager
    def lease(self, model_id: str, gone: Callable[[], bool] = lambda: False) -> Iterator[LoadedModel]:
        """The model, loaded if it was not, and kept in memory until the block ends.

        Raises:
            ModelNotFound, ModelDisabled: the registry says so.
            DependencyMissing, LoadError: it could not be loaded; everyone who waited for it is told the same.
            Cancelled: the server is shutting down, or `gone()` turned true while somebody else loaded it.
        """
        slot, model = self._acquire(model_id, gone)
        try:
            yield model
        finally:
            with self._changed:
                slot.users -= 1
                self._changed.notify_all()

    def load(self, model_id: str, *, force_reload: bool = False) -> LoadedModel:
        """Bring the model into memory, anew if `force_reload`, after those who use the old one are done.

        Raises: as `lease`; ModelBusy when a reload's users do not end within the busy timeout.
        """
        if force_reload:
            self._usable_record(model_id)
            with self._alone(model_id) as slot:
                record = self._usable_record(model_id)
                self._drop(slot)
                loading: Future[None] = Future()
                slot.loading = loading
                self._load(record, slot, loading)
                loading.result()
        with self.lease(model_id) as model:
            return model

    def unload(self, model_id: str) -> None:
        """Take the model out of memory, if it is there, after those who use it are done.

        Raises:
            ModelBusy: they did not end within the busy timeout; the model stays.
        """
        with self._alone(model_id) as slot:
            self._drop(slot)

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
                    self._drop(slot)
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
            self._drop(slot)
        return content

    def loaded(self) -> dict[str, LoadedModel]:
        """The models in memory, by id; a view of this moment."""
        with self._changed:
            return {model_id: slot.model for model_id, slot in self._slots.items() if slot.model is not None}

    def close(self) -> None:
        """Cancel all work and empty the memory; no model is lent or loaded afterwards."""
        with self._changed:
            self._closed = True
            models = [slot.model for slot in self._slots.values() if slot.model is not None]
            for slot in self._slots.values():
                slot.model = None
            self._changed.notify_all()
        for model in models:
            model.close()
        if self._importing is not None:
            self._importing.cancel()
            self._importing.join()  # an interpreter that ends in the middle of an import may crash

    def _acquire(self, model_id: str, gone: Callable[[], bool]) -> tuple[_Slot, LoadedModel]:
        """The model's slot, counted as in use, and the model in it."""
        while True:
            record = self._usable_record(model_id)  # looked up in every round: a wait may have been for its removal
            with self._changed:
                if self._closed:
                    raise Cancelled("The server is shutting down")
                slot = self._slots.setdefault(model_id, _Slot())
                if slot.reserved:
                    self._changed.wait_for(lambda slot=slot: not slot.reserved, _LOOK_AGAIN)  # type: ignore[misc]
                    if gone():
                        raise Cancelled
                    continue
                stale = slot.model is not None and _is_stale(slot.model, record)
                if slot.model is not None and not stale:
                    slot.users += 1
                    return slot, slot.model
                loading = slot.loading
                mine = loading is None
                if loading is None and not stale:
                    loading = slot.loading = Future()
            if stale or loading is None:
                self._drop_stale(record)
                continue
            if mine:
                self._load(record, slot, loading)
            while not wait([loading], _LOOK_AGAIN).done:
                if gone():
                    raise Cancelled
            loading.result()
            if gone():
                raise Cancelled

    def _load(self, record: ModelRecord, slot: _Slot, loading: Future[None]) -> None:
        """Fill `slot`, and settle `loading` for all who wait for it."""
        model, failure = None, None
        try:
            model = self._read(record)
        except BaseException as error:  # noqa: BLE001 - it is raised by `loading` for everyone who waits
            failure = error
        with self._changed:
            late = self._closed
            slot.model = None if late else model
            slot.loading = None
            self._changed.notify_all()
        if late and model is not None:
            model.close()
        if failure is None:
            loading.set_result(None)
        else:
            loading.set_exception(failure)

    def _read(self, record: ModelRecord) -> LoadedModel:
        loader = import_library(_LOADER)
        started = time.monotonic()
        model: LoadedModel = loader.load(record, self._options)
        logger.info("loaded %s on %s in %.1f s", record.model_id, model.device, time.monotonic() - started)
        return model

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
                self._drop(slot)

    def _drop(self, slot: _Slot) -> None:
        """Empty a slot that this thread has alone."""
        with self._changed:
            model, slot.model = slot.model, None
        if model is not None:
            model.close()

    def _usable_record(self, model_id: str) -> ModelRecord:
        record = self._registry.get(model_id)
        if record.status == "disabled":
            raise ModelDisabled(model_id)
        return record


def _is_stale(model: LoadedModel, record: ModelRecord) -> bool:
    """Whether a model was loaded as another type than it has now (perhaps with another head), or its engine broke."""
    return model.model_type != record.model_type or model.failed


def _try_import() -> None:
    with suppress(DependencyMissing):
        import_library(_LOADER).warm_up()
