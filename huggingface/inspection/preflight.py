"""Preflight: what a model is, told from its config and the heads of its files before any weights are fetched or read.

A `Preflight` is one server's: it remembers what it has read of transformers' sources, and that the Hub was away. Any
thread may call it, it never raises for what a model is or is not, and what it tells are JSON values that hold no path
of this machine. Must not know the registry or HTTP, and imports neither torch nor transformers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import HubUnreachable, LoadError, LocalLLMError, NotServed, public
from ..registry.records import ModelRecord, check_model_id
from ..tasks import MODEL_TYPES
from ..types import LoadOptions
from . import folder as files
from .card import Card, read_card
from .contents import gguf_names
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

_PATIENCE = 8.0  # seconds for all that is asked of the Hub in one look
_AWAY = 30.0  # seconds in which a Hub that could not be reached is not asked again


class Preflight:
    """Looks at models for one server."""

    def __init__(self, options: LoadOptions, *, timeout: float = _PATIENCE) -> None:
        """`timeout` is how many seconds the Hub has to answer, all questions of one look together."""
        self._options = options
        self._timeout = timeout
        self._names = Names()
        self._away: float | None = None  # since when it does not answer, by `time.monotonic`
        self._silent: str | None = None  # the last model of which nothing was heard in time

    def look(self, record: ModelRecord, *, strict: bool = False) -> dict[str, Any]:
        """What a registered model is, or one that is to be registered.

        Raises:
            NotServed: where it is `strict`, for a model of a kind that does none of this server's tasks.
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
        """What the model of that id is: of the models folder, else the Hub's cache, else the Hub.

        `model_type` is what it is registered as: it picks the head, and so the tasks, where the loader lets it. The
        type that is told is the one that fits best, whatever it is registered as. `adapters` are those that it is to
        have, by their names. `strict` is as in `look`.
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
        """What `look_at` says of the model itself; `products` get the shapes of its weights by their names."""
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
            logger.warning("%s could not be looked at", model_id, exc_info=error)
            return {**blank(), "problem": f"Model '{model_id}' could not be looked at: {public(error)}"}

    def _adapter_problem(self, what: str, adapter_id: str, products: Mapping[str, tuple[int, ...]]) -> str | None:
        """Why a load would refuse an adapter, in the load's own words, as far as config and head tell; or None."""

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
            logger.warning("%s could not be looked at", what, exc_info=error)
            return f"{what} could not be looked at: {public(error)}"
        return None

    def available(self) -> list[dict[str, Any]]:
        """The models in the models folder, sorted by id: each with its `details`."""
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
        """What the files of a registered model say of it, as far as they are on this machine."""
        return read_card(record, self._options)

    # Where it is ------------------------------------------------------------------------------------------------------

    def _within(self, model_id: str, look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `look` finds in time. On a thread of its own: finding the Hub's address, say, knows no time limit."""
        found: list[dict[str, Any]] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                found.append(look())
            except BaseException as error:  # noqa: BLE001 - raised again below
                failures.append(error)

        thread = threading.Thread(target=run, name="preflight", daemon=True)
        thread.start()
        thread.join(self._timeout + 0.5)
        if thread.is_alive():
            self._was_silent(model_id)
            raise self._away_error(model_id)
        if failures:
            raise failures[0]
        return found[0]

    def _look_away(
        self,
        model_id: str,
        revision: str | None,
        gguf_file: str | None,
        look: Callable[[Place], dict[str, Any]],
        *,
        adapter: bool = False,
    ) -> dict[str, Any]:
        """Look into the cache where it has all of the model, else at the Hub, else at what the cache has."""
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
        """Note that nothing was heard of a model in time. One repository that is slow is not a Hub that is away; two
        in a row are taken for it."""
        if self._silent is not None and self._silent != model_id:
            self._away = time.monotonic()
        self._silent = model_id

    def _away_error(self, model_id: str) -> LoadError:
        return as_load_error(model_id, ConnectionError("the Hub does not answer"))

    def _is_whole(self, place: Place, gguf_file: str | None) -> bool:
        if gguf_file is not None:
            return gguf_file in place.names
        try:
            files.check(place.model_id, place.folder, allow_pickle=self._options.allow_pickle)
        except (LoadError, OSError):
            return False
        return True
