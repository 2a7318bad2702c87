"""Loads models: from a record to a model in memory, with its files and its memory before that.

Any thread may call it. Must not know HTTP; torch only through the loader.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Cancelled
from ..host.devices import resolve_device
from ..host.memory import retried
from ..hub.downloads import Downloads
from ..progress import Progress
from ..registry.records import LoadSettings, ModelRecord
from ..types import Estimate, LoadOptions, Pending
from .budget import Account, Budget
from .conversions import Conversion, Conversions
from .eviction import Evictor
from .forecasts import Forecasts
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
        forecasts: Forecasts,
        conversions: Conversions,
        statistics: Statistics,
    ) -> None:
        self._loader = loader
        self._options = options
        self._downloads = downloads
        self._table = table
        self._budget = budget
        self._evictor = evictor
        self._forecasts = forecasts
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

    def _read(
        self, record: ModelRecord, settings: LoadSettings, progress: Progress, account: Account, spare: Path | None
    ) -> LoadedModel:
        model_id = record.model_id
        loader = self._loader.get()
        started = time.monotonic()
        self._forecasts.refuse_at_once(record, settings)
        folder = self._downloads.folder(record, progress)
        adapters = self._downloads.adapters(record, progress)
        heads = self._downloads.adapter_heads(record)
        if not self._has_plenty(loader, record, settings, folder, heads):
            settings, estimate = self._forecasts.fitting(record, settings)
            with self._forecasts.naming_what_fits(record, settings, estimate):
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
            model = retried(read, partial(self._evict_all, model_id))
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

    def _evict_all(self, model_id: str) -> bool:
        """Evicts all idle models for a model whose read has run out of memory; returns whether there was one."""
        evicted = False
        while self._evictor.evict_one(model_id):
            evicted = True
        return evicted


def is_stale(model: LoadedModel, record: ModelRecord) -> bool:
    """Whether a model was loaded from an outdated record, or its engine broke."""
    then = model.setup.record
    now = (record.model_type, record.revision, record.gguf_file, record.adapters, record.settings)
    return (then.model_type, then.revision, then.gguf_file, then.adapters, then.settings) != now or model.failed
