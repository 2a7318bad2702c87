"""The engine of one loaded model: one thread on which everything that touches its tensors runs, in order of arrival.

`submit` and `call` may be called from any thread. It decides who is served next and nothing else: what a request
computes is the runner's business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from ..errors import Cancelled
from ..memory import forget_frames
from ..records import Chunk, GenerationRequest
from .ticket import Ticket

T = TypeVar("T")


class Runner(Protocol):
    """What an engine needs of whatever computes: see `engine.runner.TransformersRunner`."""

    def generate(
        self, request: GenerationRequest, emit: Callable[[Chunk], None], cancelled: Callable[[], bool]
    ) -> None:
        """Generate for `request`, calling `emit` with each chunk, until done or `cancelled()`."""


class Engine:
    """Serves one model's callers, one at a time, on a thread of its own."""

    def __init__(self, name: str, runner: Runner) -> None:
        self._runner = runner
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"engine-{name}")
        self._closing = threading.Event()

    def submit(self, request: GenerationRequest, cancelled: Callable[[], bool] = lambda: False) -> Ticket:
        """Queue `request` and return its ticket at once; it is given up when `cancelled()`, asked at every step.

        Raises:
            Cancelled: the engine is being closed.
        """
        ticket = Ticket()
        self._start(self._generate, request, ticket, cancelled)
        return ticket

    def call(self, work: Callable[[Callable[[], bool]], T], cancelled: Callable[[], bool] = lambda: False) -> T:
        """Run `work` on the engine's thread, between generations, and return what it returns.

        `work` gets a function that tells whether to give up; that is so when `cancelled()` is, or the engine closes.

        Raises:
            Cancelled: it was given up before it was done. Whatever `work` raises is raised here too.
        """

        def gone() -> bool:
            return cancelled() or self._closing.is_set()

        def run() -> T:
            if gone():
                raise Cancelled
            return work(gone)

        return self._start(run).result()

    def close(self) -> None:
        """Cancel whatever waits or runs, and end the thread. Safe to call twice."""
        self._closing.set()
        self._thread.shutdown(wait=True)

    def _start(self, work: Callable[..., T], *arguments: object) -> Future[T]:
        try:
            return self._thread.submit(work, *arguments)
        except RuntimeError as error:
            if not self._closing.is_set():  # no thread could be started
                raise
            raise Cancelled("The model is being taken out of memory") from error

    def _generate(self, request: GenerationRequest, ticket: Ticket, cancelled: Callable[[], bool]) -> None:
        def gone() -> bool:
            return ticket.cancelled() or cancelled() or self._closing.is_set()

        try:
            if gone():
                raise Cancelled
            self._runner.generate(request, ticket.put, gone)
        except BaseException as error:  # noqa: BLE001 - it is raised again where the ticket is read
            forget_frames(error)
            ticket.finish(error)
        else:
            ticket.finish()
