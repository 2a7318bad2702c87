"""A model's preparation: the thread that finds out how the model is served best, and the parts that come of it.

Every request waits for the parts. Any thread may call it. Must not know requests, the manager or HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from ..cancellation import NEVER, Cancellation
from ..errors import Cancelled, EngineFailed, LocalLLMError
from ..host.memory import forget_frames
from .memory import ModelMemory, detach
from .parts import Parts, Setup, use_device

logger = logging.getLogger(__name__)

_DETACHED_AT_ONCE = 64 * 2**20  # bytes of weights up to which a load itself copies them out of their file


class Preparation:
    """Copies a model's weights into memory of their own, and makes its parts."""

    def __init__(self, setup: Setup, model: Any, memory: ModelMemory, make: Callable[[Cancellation], Parts]) -> None:
        """`make` makes the parts on a thread of the model's own; `close` cancels it."""
        self.resident = False  # whether the weights are in memory of their own, not in a mapped file
        self._setup = setup
        self._model_id = setup.record.model_id
        self._memory = memory
        self._closing = Cancellation()
        self._parts: Future[Parts] | None = Future()
        small = memory.sizes.weights <= _DETACHED_AT_ONCE
        if small:
            detach(model)
        # The thread ends after its work, as the load's does: see `loader.load`.
        work = (self._parts, None if small else model, make)
        self._thread = threading.Thread(target=self._run, args=work, name=f"prepare-{self._model_id}")
        self._thread.start()

    def _run(self, parts: Future[Parts], mapped: Any, make: Callable[[Cancellation], Parts]) -> None:
        """Makes the parts; `mapped` is a model with weights in a mapped file."""
        try:
            use_device(self._setup.device)
            if mapped is not None:
                detach(mapped, self._closing)
            self.resident = True
            parts.set_result(make(self._closing))
        except BaseException as error:
            forget_frames(error)
            if not isinstance(error, LocalLLMError):
                logger.exception("%s could not be prepared", self._model_id)
                error = EngineFailed(self._model_id)
            parts.set_exception(error)
        finally:
            self._memory.account.commit()

    @property
    def done(self) -> Parts | None:
        """The parts, if they are ready and whole."""
        parts = self._parts
        return parts.result() if parts is not None and parts.done() and parts.exception() is None else None

    @property
    def failed(self) -> bool:
        """Whether there are no parts, or their engine is broken."""
        parts = self._parts
        if parts is None or not parts.done():
            return False
        return parts.exception() is not None or parts.result().engine.failed

    def settles(self, seconds: float) -> bool:
        """Waits up to `seconds` until the preparation has ended; returns whether it has."""
        parts = self._parts
        return parts is None or bool(wait([parts], seconds).done)

    def parts(self, cancellation: Cancellation = NEVER) -> Parts:
        """Waits for the parts.

        Raises:
            Cancelled: by `cancellation`, or the model is being unloaded.
            EngineFailed: the model cannot be served.
        """
        parts = self._parts
        if parts is None:
            raise Cancelled(f"Model '{self._model_id}' was unloaded")
        return cancellation.result(parts)

    def close(self) -> bool:
        """Cancels running work and drops the parts; returns False if they were dropped before."""
        self._closing.cancel()
        parts, self._parts = self._parts, None
        if parts is None:
            return False
        if parts.exception() is None:  # waits for the preparation, which the cancel above ends soon
            parts.result().engine.close()
            parts.result().preparer.close()
        self._thread.join()  # the thread holds the model
        return True
