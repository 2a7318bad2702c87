"""Loads models: from a record to a model in memory, with its files and its memory before that.

Any thread may call it. Must not know HTTP; torch only through the loader.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Cancelled, FilesMissing, HubUnreachable, LocalLLMError, ModelDisabled, NeverFits, OutOfMemory
from ..host.devices import resolve_device
from ..host.memory import readable
from ..hub.downloads import Downloads
from ..progress import Progress
from ..registry.records import LOAD_SETTINGS, LoadSettings, ModelRecord
from ..registry.registry import ModelRegistry
from ..types import Estimate, LoadOptions, Pending
from .budget import Account, Budget
from .conversions import Conversion, Conversions
from .eviction import Evictor
from .loader import Heads, LateLoader, Loader
from .statistics import Statistics
from .table import Loading, ModelEntry, ModelTable

if TYPE_CHECKING:
    from ..model.loaded import LoadedModel

logger = logging.getLogger(__name__)

_PLENTY = 2  # times the load's rough size; if so much is free, no estimate is needed


class Loads:
    """Loads models into their entries."""

    def __init__(
        self,
        loader: LateLoader,
        options: LoadOptions,
        downloads: Downloads,
        table: ModelTable,
        budget: Budget,
        evictor: Evictor,
        conversions: Conversions,
        statistics: Statistics,
    ) -> None:
        self._loader = loader
        self._options = options
        self._downloads = downloads
        self._table = table
        self._budget = budget
        self._evictor = evictor
        self._conversions = conversions
        self._statistics = statistics

    def fill(self, record: ModelRecord, entry: ModelEntry, loading: Loading, spare: Path | None = None) -> None:
        """Loads a model into `entry`, and ends `loading` for all who wait; `spare` as in `loader.load`."""
        model, failure = None, None
        account = self.account(record.model_id, record.model_id)
        started = time.monotonic()
        try:
            model = self._read(record, entry.overrides.over(record.settings), loading.progress, account, spare)
        except BaseException as error:  # noqa: BLE001 - `loading` raises it for all who wait
            failure = error
        seconds = time.monotonic() - started
        with self._table.changed:
            late = self._table.closed
            entry.model, entry.account = None if late else model, account
            entry.loading = None
            if entry.model is not None:
                entry.users += loading.waiting
                loading.model = entry.model
            entry.used, entry.load_seconds = time.monotonic(), seconds
            self._table.changed.notify_all()
        if late and model is not None:
            model.close()
        if failure is None:
            loading.progress.end("ready")
            self._statistics.loaded(record.model_id, seconds)
            loading.done.set_result(None)
        else:
            cancelled = isinstance(failure, Cancelled)
            loading.progress.end("cancelled" if cancelled else "failed", str(failure))
            if not cancelled:
                self._statistics.failed(record.model_id, type(failure).__name__)
            loading.done.set_exception(failure)

    def open(
        self, record: ModelRecord, conversion: Conversion, settings: LoadSettings, account: Account
    ) -> LoadedModel:
        """Opens the graph of a finished conversion, beside the model in its entry.

        Raises: as `loader.load`.
        """
        return self._loader.get().load(
            record,
            self._options,
            self._downloads.present(record),
            settings=settings,
            progress=conversion.progress,
            memory=account,
            spare=conversion.spare,
        )

    def account(self, owner: str, model_id: str) -> Account:
        """The account of `owner` in the budget; it may evict idle models other than `model_id`."""
        return Account(self._budget, owner, partial(self._evictor.evict_one, model_id))

    def estimate(self, record: ModelRecord, settings: LoadSettings) -> Estimate:
        """Estimates what a load of a model would take, whether its weights are here or not.

        Raises: as `ModelManager.lease`.
        """
        loader = self._loader.get()
        try:
            folder = self._downloads.present(record)
        except (FilesMissing, HubUnreachable):
            if record.gguf_file is not None:
                raise
            folder = self._downloads.described(record)
            heads = self._downloads.adapter_heads(record)
            estimate: Estimate = loader.estimate(
                record, self._options, folder, settings, described=True, adapters=heads
            )
        else:
            heads = self._downloads.adapter_heads(record)
            estimate = loader.estimate(record, self._options, folder, settings, adapters=heads)
        return estimate

    def fitting(self, record: ModelRecord, settings: LoadSettings) -> tuple[LoadSettings, Estimate]:
        """The settings with which a load reads a model, and its estimate.

        Where a model could never fit in float32, which `dtype` `auto` is on a CPU, it has the 16 bits of its weights.

        Raises: as `ModelManager.lease`.
        """
        estimate = self.estimate(record, settings)
        open_to = settings.dtype in (None, "auto") and record.gguf_file is None  # unpacked weights have more bits
        if open_to and _own_16_bits(estimate) and not self._is_possible(record, estimate):
            narrow = replace(settings, dtype=estimate.own_dtype)
            with suppress(LocalLLMError):  # the backend that is asked for computes in float32 only
                smaller = self.estimate(record, narrow)
                if self._is_possible(record, smaller):
                    return narrow, smaller
        return settings, estimate

    def _is_possible(self, record: ModelRecord, estimate: Estimate) -> bool:
        """Whether a load could fit if no other model were in memory."""
        try:
            self._evictor.lacking(record.model_id, estimate.devices)
        except NeverFits:
            return False
        return True

    def _refuse_at_once(self, record: ModelRecord, settings: LoadSettings) -> None:
        """Refuses a model that is not here and could never fit, before its download.

        Raises:
            NeverFits: larger than the limit. Other errors are left to the load.
        """
        with suppress(FilesMissing, HubUnreachable):
            self._downloads.present(record)
            return
        try:
            settings, estimate = self.fitting(record, settings)
        except LocalLLMError:
            return
        with self._naming_what_fits(record, settings, estimate):
            self._evictor.lacking(record.model_id, estimate.devices)

    @contextmanager
    def _naming_what_fits(self, record: ModelRecord, settings: LoadSettings, estimate: Estimate) -> Iterator[None]:
        """Adds to a refusal of a model that never fits the settings with which it would, and their bytes.

        Raises:
            NeverFits: by the block.
        """
        try:
            yield
        except NeverFits as error:
            fitting = []
            for form in _smaller(estimate) if record.gguf_file is None else ():
                with suppress(LocalLLMError):  # not for this model, or it does not fit either
                    smaller = self.estimate(record, form.over(settings))
                    if self._is_possible(record, smaller):
                        size = readable(sum(smaller.devices.values()))
                        named = [f"{name} {value}" for name in LOAD_SETTINGS if (value := getattr(form, name))]
                        fitting.append(f"{' '.join(named)} ({size})")
            if not fitting:
                raise
            *others, last = fitting
            choice = f"{', '.join(others)} or {last}" if others else last
            raise NeverFits(f"{error}. It fits with {choice}") from error

    def _read(
        self, record: ModelRecord, settings: LoadSettings, progress: Progress, account: Account, spare: Path | None
    ) -> LoadedModel:
        model_id = record.model_id
        loader = self._loader.get()
        started = time.monotonic()
        self._refuse_at_once(record, settings)
        folder = self._downloads.folder(record, progress)
        adapters = self._downloads.adapters(record, progress)
        heads = self._downloads.adapter_heads(record)
        if not self._has_plenty(loader, record, settings, folder, heads):
            settings, estimate = self.fitting(record, settings)
            with self._naming_what_fits(record, settings, estimate):
                self._evictor.reserve(model_id, estimate.devices, progress)
            account.reserve_floor(estimate.device, estimate.kv_cache)
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
                make=lambda lacks, told: self._conversions.wait(
                    self._conversion(record, settings, folder, lacks), told
                ),
                spare=spare,
            )
            model = self._read_or_relieve(model_id, read)
        except BaseException:
            self._budget.forget(model_id)
            raise
        if (pending := model.setup.pending) is not None:
            conversion = self._conversions.add(self._conversion(record, settings, folder, pending))
            if conversion.state == "failed" and conversion.reason is not None:
                model.backend_reason = conversion.reason
        logger.info("loaded %s on %s in %.1f s", model_id, model.device, time.monotonic() - started)
        return model

    def _conversion(self, record: ModelRecord, settings: LoadSettings, folder: Path, pending: Pending) -> Conversion:
        """The conversion of a model that is loaded, or is being loaded, with these settings."""
        loader = self._loader.get()

        def make(progress: Progress, aside: bool) -> Path | None:
            made: Path | None = loader.convert(
                record, self._options, folder, settings, progress, backend=pending.backend, aside=aside
            )
            return made

        def need() -> int:
            estimate: Estimate = loader.estimate(record, self._options, folder, settings)
            return estimate.conversion

        return Conversion(record.model_id, pending, make, need)

    def _has_plenty(
        self,
        loader: Loader,
        record: ModelRecord,
        settings: LoadSettings,
        folder: Path,
        adapters: Heads,
    ) -> bool:
        """Reserves a rough size where far more is free, so that no estimate is needed; returns whether it did."""
        if record.gguf_file is not None or settings.device_map is not None or settings.quantization is not None:
            return False
        device = resolve_device(settings.device or self._options.device)
        rough = loader.rough_bytes(record, self._options, folder, adapters)
        return self._evictor.reserve_if_plenty(record.model_id, device, rough, _PLENTY)

    def _read_or_relieve(self, model_id: str, read: Callable[[], LoadedModel]) -> LoadedModel:
        """Reads a model; if memory still runs out, evicts idle models and reads it once more."""
        try:
            return read()
        except OutOfMemory:
            relieved = False
            while self._evictor.evict_one(model_id):
                relieved = True
            if not relieved:
                raise
            return read()


def usable(registry: ModelRegistry, model_id: str) -> ModelRecord:
    """The record of a model that may be loaded.

    Raises:
        ModelNotFound, ModelDisabled: there is none, or it is disabled.
    """
    record = registry.get(model_id)
    if record.status == "disabled":
        raise ModelDisabled(model_id)
    return record


def is_stale(model: LoadedModel, record: ModelRecord) -> bool:
    """Whether a model was loaded from an outdated record, or its engine broke."""
    then = model.setup.record
    now = (record.model_type, record.revision, record.gguf_file, record.adapters, record.settings)
    return (then.model_type, then.revision, then.gguf_file, then.adapters, then.settings) != now or model.failed


def _own_16_bits(estimate: Estimate) -> bool:
    """Whether the estimate is for float32, and the weights in their files have 16 bits."""
    plain = estimate.quantization is None and estimate.dtype == "float32"
    return plain and estimate.own_dtype in ("bfloat16", "float16")


def _smaller(estimate: Estimate) -> Iterator[LoadSettings]:
    """The settings that make a model smaller than `estimate`, those that lose least first."""
    if _own_16_bits(estimate):
        yield LoadSettings(dtype=estimate.own_dtype)
    if estimate.quantization is None:
        yield LoadSettings(quantization="int8")
    if estimate.quantization != "int4":
        yield LoadSettings(quantization="int4")
