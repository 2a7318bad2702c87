"""Preflight: finds out what a model is from its config and the headers of its files, before weights are downloaded.

A `Preflight` belongs to one server: it remembers transformers' tables, and that the Hub did not answer. Any thread may
call it. It reports a model's problems instead of raising them, as JSON values that hold no path of this machine. Must
not know the registry or HTTP, and imports neither torch nor transformers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import Any

from ..cancellation import before_wait
from ..errors import HubUnreachable, LoadError, LocalLLMError, NotServed, public
from ..registry.records import ModelRecord, check_model_id
from ..tasks import MODEL_TYPES
from ..types import LoadOptions
from . import folder as files
from .card import Card, read_card
from .contents import gguf_names
from .gguf_parts import part_names
from .listing import model_folders
from .lora import WEIGHTS
from .names import Names
from .report import Look, blank, look_at_adapter
from .sources import (
    Place,
    as_load_error,
    cached_place,
    check_gguf_name,
    folder_place,
    hub_place,
    is_offline,
    offline_error,
)

logger = logging.getLogger(__name__)

_PATIENCE = 8.0  # seconds for all requests to the Hub in one inspection
_AWAY = 30.0  # seconds without requests after the Hub could not be reached


class Preflight:
    """Inspects models for one server."""

    def __init__(self, options: LoadOptions, *, timeout: float = _PATIENCE) -> None:
        """`timeout` is the seconds that the Hub has for all requests of one inspection together."""
        self._options = options
        self._timeout = timeout
        self._names = Names()
        self._away: float | None = None  # when the Hub stopped answering, by `time.monotonic`
        self._silent: str | None = None  # the last model for which the Hub did not answer in time

    def look(self, record: ModelRecord, *, strict: bool = False) -> dict[str, Any]:
        """Inspects the model of a record, before or after its registration.

        Raises:
            NotServed: with `strict`, for a model that does none of this server's tasks.
        """
        return self.look_at(
            record.model_id,
            revision=record.revision,
            gguf_file=record.gguf_file,
            model_type=record.model_type,
            adapters=record.adapters,
            strict=strict,
        )

    def look_at(
        self,
        model_id: str,
        *,
        revision: str | None = None,
        gguf_file: str | None = None,
        model_type: str | None = None,
        adapters: Mapping[str, str] | None = None,
        strict: bool = False,
    ) -> dict[str, Any]:
        """Inspects a model in the models folder, else in the Hub's cache, else on the Hub.

        `model_type` is the type that the model is registered as: it picks the head, and so the tasks, where the loader
        allows that. The returned type is the one that fits best, whatever the registered one. `adapters` are the
        model's adapters by name. `strict` is as in `look`.
        """
        products: dict[str, tuple[int, ...]] = {}
        details = self._look_at(model_id, revision, gguf_file, model_type, products, strict)
        if not adapters:
            return details
        problems = {
            name: self._adapter_problem(f"Adapter '{name}' of model '{model_id}'", adapter, products)
            for name, adapter in adapters.items()
        }
        first = next(filter(None, problems.values()), None)
        return {**details, "adapters": problems, "problem": details["problem"] or first}

    def _look_at(
        self,
        model_id: str,
        revision: str | None,
        gguf_file: str | None,
        model_type: str | None,
        products: dict[str, tuple[int, ...]],
        strict: bool,
    ) -> dict[str, Any]:
        """The part of `look_at` for the model itself; fills `products` with the shapes of its weights by name."""
        try:
            check_model_id(model_id)
            if gguf_file is not None:
                check_gguf_name(model_id, gguf_file)
            wanted = MODEL_TYPES[model_type].heads if model_type is not None and model_type in MODEL_TYPES else None

            def look(place: Place) -> dict[str, Any]:
                found = Look(place, self._options, self._names, wanted)
                details = found.take(gguf_file, strict=strict)
                products.update(found.products)
                return details

            folder = files.local_folder(self._options.models_dir, model_id)
            if folder is not None:
                return look(folder_place(model_id, folder))
            return self._within(model_id, lambda: self._look_away(model_id, revision, gguf_file, look))
        except LocalLLMError as error:
            if strict and isinstance(error, NotServed):
                raise
            return {**blank(), "problem": str(error)}
        except Exception as error:
            logger.warning("%s could not be inspected", model_id, exc_info=error)
            return {**blank(), "problem": f"Model '{model_id}' could not be inspected: {public(error)}"}

    def _adapter_problem(self, what: str, adapter_id: str, products: Mapping[str, tuple[int, ...]]) -> str | None:
        """The load's message if it would refuse an adapter, as far as config and header show; else None."""

        def look(place: Place) -> dict[str, Any]:
            look_at_adapter(what, place, products)
            return {}

        try:
            check_model_id(adapter_id)
            folder = files.local_folder(self._options.models_dir, adapter_id)
            if folder is not None:
                look(folder_place(adapter_id, folder))
            else:
                self._within(adapter_id, lambda: self._look_away(adapter_id, None, None, look, adapter=True))
        except LocalLLMError as error:
            return str(error)
        except Exception as error:
            logger.warning("%s could not be inspected", what, exc_info=error)
            return f"{what} could not be inspected: {public(error)}"
        return None

    def available(self) -> list[dict[str, Any]]:
        """The models in the models folder, sorted by id, each with its `details`."""
        found = []
        for model_id, folder in model_folders(self._options.models_dir):
            try:
                place = folder_place(model_id, folder)
            except LoadError as error:
                logger.info("%s", error)
                continue
            ggufs = gguf_names(place)
            only = ggufs[0] if ggufs and "config.json" not in place.names else None
            details = self.look_at(model_id, gguf_file=only)
            entry = {
                "model_id": model_id,
                "name": model_id.rpartition("/")[2].replace("-", " ").replace("_", " "),
                "model_type": details["model_type"],
                "bytes": sum(size or 0 for size in place.names.values()),
                "gguf_files": ggufs,
                "details": details,
            }
            if "adapter" in details:
                entry["adapter"] = details["adapter"]
            found.append(entry)
        return sorted(found, key=lambda entry: str(entry["model_id"]))

    def card(self, record: ModelRecord) -> Card:
        """The card of a registered model, from its files on this machine."""
        return read_card(record, self._options)

    # Where it is ------------------------------------------------------------------------------------------------------

    def _within(self, model_id: str, look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs `look` on its own thread with a time limit, because resolving the Hub's address, say, has none."""
        found: Future[dict[str, Any]] = Future()

        def run() -> None:
            try:
                found.set_result(look())
            except BaseException as error:  # noqa: BLE001 - raised again below
                found.set_exception(error)

        threading.Thread(target=run, name="preflight", daemon=True).start()
        before_wait()
        if not wait([found], self._timeout + 0.5).done:
            self._was_silent(model_id)
            raise self._away_error(model_id)
        return found.result()

    def _look_away(
        self,
        model_id: str,
        revision: str | None,
        gguf_file: str | None,
        look: Callable[[Place], dict[str, Any]],
        *,
        adapter: bool = False,
    ) -> dict[str, Any]:
        """Inspects the Hub's cache if it has the whole model, else the Hub, else the incomplete cache."""
        cached = cached_place(model_id, revision)
        if cached is not None and (WEIGHTS in cached.names if adapter else self._is_whole(cached, gguf_file)):
            return look(cached)
        away = self._away
        if self._options.offline or is_offline():
            reason = offline_error(model_id)
        elif away is not None and time.monotonic() - away < _AWAY:
            reason = self._away_error(model_id)
        else:
            try:
                with hub_place(model_id, revision, self._timeout) as place:
                    found = look(place)
                self._silent = None
                return found
            except HubUnreachable as error:
                reason = error
                cause = error.__cause__
                if isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
                    self._was_silent(model_id)
                elif cause is not None and not hasattr(cause, "response"):  # no answer at all
                    self._away = time.monotonic()
        if cached is None:
            raise reason
        return {**look(cached), "problem": str(reason)}

    def _was_silent(self, model_id: str) -> None:
        """Records that the Hub did not answer for a model in time. After two different models in a row, the Hub counts
        as away; one slow repository does not mean that."""
        if self._silent is not None and self._silent != model_id:
            self._away = time.monotonic()
        self._silent = model_id

    def _away_error(self, model_id: str) -> LoadError:
        return as_load_error(model_id, ConnectionError("the Hub does not answer"))

    def _is_whole(self, place: Place, gguf_file: str | None) -> bool:
        if gguf_file is not None:
            return all(name in place.names for name in part_names(gguf_file))
        try:
            files.check(place.model_id, place.folder, allow_pickle=self._options.allow_pickle)
        except (LoadError, OSError):
            return False
        return True
