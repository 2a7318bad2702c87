"""Forecasts: what a load would take, whether it could fit, and with which settings, before any weights are read.

Any thread may call it. Must not know HTTP; torch only through the loader.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from ..cancellation import Cancellation
from ..errors import FilesMissing, HubUnreachable, LocalLLMError, NeverFits
from ..host.memory import readable
from ..hub.downloads import Downloads
from ..registry.records import LOAD_SETTINGS, STORED, LoadSettings, ModelRecord
from ..registry.registry import ModelRegistry
from ..types import Estimate, Forecast, LoadOptions
from .eviction import Evictor
from .loader import LateLoader
from .table import ModelTable


class Forecasts:
    """Estimates loads."""

    def __init__(
        self,
        registry: ModelRegistry,
        loader: LateLoader,
        options: LoadOptions,
        downloads: Downloads,
        table: ModelTable,
        evictor: Evictor,
    ) -> None:
        self._registry = registry
        self._loader = loader
        self._options = options
        self._downloads = downloads
        self._table = table
        self._evictor = evictor
        self._computing = threading.Lock()

    def forecast(self, model_id: str, settings: LoadSettings | None, cancellation: Cancellation) -> Forecast:
        """Estimates a load of the model, whether it fits, and which models it would evict.

        Fetches only the config of a model that is not here. Computes one forecast at a time: it keeps the interpreter
        busy, and many at once would stop other threads.

        Raises: as `ModelManager.lease`, except errors that only reading the weights shows.
        """
        cancellation = cancellation.child(lambda: self._table.closed)
        cancellation.until(lambda seconds: self._computing.acquire(timeout=seconds))
        try:
            record = self._registry.get(model_id)
            wanted = (settings or LoadSettings()).over(record.settings)
            return self._evictor.forecast(model_id, self.fitting(record, wanted)[1])
        finally:
            self._computing.release()

    def check(self, record: ModelRecord, settings: LoadSettings) -> None:
        """Refuses settings that a load would refuse, as far as that is known before weights are read.

        Raises: as `ModelManager.lease`.
        """
        loader = self._loader.get()
        with suppress(FilesMissing, HubUnreachable):  # without the files nothing can be checked yet
            loader.check(record, self._options, self._downloads.present(record), settings)

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

        Where a model could never fit in float32, which `dtype` `auto` is on a CPU, it has the 16 bits of its weights:
        computed with in float32, or, where that does not fit either, in 16 bits.

        Raises: as `ModelManager.lease`.
        """
        estimate = self.estimate(record, settings)
        open_to = settings.dtype in (None, "auto") and record.gguf_file is None  # unpacked weights have more bits
        if open_to and _own_16_bits(estimate) and not self._is_possible(record, estimate):
            for dtype in (STORED, estimate.own_dtype):
                narrow = replace(settings, dtype=dtype)
                with suppress(LocalLLMError):  # the backend that is asked for computes plain float32 only
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

    def refuse_at_once(self, record: ModelRecord, settings: LoadSettings) -> None:
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
        with self.naming_what_fits(record, settings, estimate):
            self._evictor.lacking(record.model_id, estimate.devices)

    @contextmanager
    def naming_what_fits(self, record: ModelRecord, settings: LoadSettings, estimate: Estimate) -> Iterator[None]:
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


def _own_16_bits(estimate: Estimate) -> bool:
    """Whether the estimate is for float32, and the weights in their files have 16 bits."""
    plain = estimate.quantization is None and estimate.dtype == "float32" and not estimate.is_stored
    return plain and estimate.own_dtype in ("bfloat16", "float16")


def _smaller(estimate: Estimate) -> Iterator[LoadSettings]:
    """The settings that make a model smaller than `estimate`, those that lose least first."""
    if _own_16_bits(estimate):
        yield LoadSettings(dtype=estimate.own_dtype)
    if estimate.quantization is None:
        yield LoadSettings(quantization="int8")
    if estimate.quantization != "int4":
        yield LoadSettings(quantization="int4")
