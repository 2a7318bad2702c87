"""Loads models before a request needs them: those of a setting at the start, and those that a caller names.

One thread loads them one after the other; any thread may call anything here. Must not know HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

from ..errors import LocalLLMError, no_panics
from .manager import ModelManager

logger = logging.getLogger(__name__)

State = Literal["waiting", "loading", "ready", "failed"]


class Warmup:
    """Loads models in the background, and reports how far that is."""

    def __init__(self, manager: ModelManager, first: Sequence[str] = ()) -> None:
        """`first` are the models that must be in memory before the server counts as ready."""
        self._manager = manager
        self._first = tuple(dict.fromkeys(first))
        self._lock = threading.Lock()
        self._queue: deque[str] = deque()
        self._states: dict[str, tuple[State, str | None]] = dict.fromkeys(self._first, ("waiting", None))
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts to load the first models."""
        self.add(self._first)

    def add(self, model_ids: Iterable[str]) -> dict[str, State]:
        """Queues further models; returns the state of each."""
        model_ids = tuple(model_ids)
        with self._lock:
            for model_id in model_ids:
                if model_id not in self._queue and self._states.get(model_id, ("", None))[0] != "loading":
                    self._states[model_id] = ("waiting", None)
                    self._queue.append(model_id)
            if self._queue and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="warm-up", daemon=True)
                self._thread.start()
            return {model_id: self._states[model_id][0] for model_id in model_ids}

    @property
    def missing(self) -> dict[str, tuple[State, str | None]]:
        """The first models that are not ready yet, each with its state and the reason of a failure."""
        with self._lock:
            return {name: self._states[name] for name in self._first if self._states[name][0] != "ready"}

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                model_id = self._queue.popleft()
                self._states[model_id] = ("loading", None)
            state: tuple[State, str | None] = ("ready", None)
            try:
                with no_panics(), self._manager.lease(model_id) as model:
                    model.prepared()
            except LocalLLMError as error:
                logger.warning("%s could not be preloaded: %s", model_id, error)
                state = ("failed", str(error))
            except Exception:
                logger.exception("%s could not be preloaded", model_id)
                state = ("failed", "An internal error; the server's log has the details")
            with self._lock:
                self._states[model_id] = state
