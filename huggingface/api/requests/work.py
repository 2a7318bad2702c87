"""Work whose progress a request streams: its own load on another thread, or a download that others may share.

`moments` is the source of such a stream. Any thread may read the progress.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Protocol

from ...cancellation import Cancellation, before_wait
from ...errors import no_panics
from ...progress import Moment, Progress
from ..http.sse import HOLD, KEEP_ALIVE

_BETWEEN = 0.1  # seconds between two reads of the progress


class Followed(Protocol):
    """Work whose progress can be watched."""

    @property
    def progress(self) -> Progress | None:
        """The progress; None before it is known."""

    @property
    def over(self) -> bool:
        """Whether the work has ended."""

    def wait(self, seconds: float) -> bool:
        """Waits for the end; returns whether the work has ended."""

    def result(self) -> Any:
        """The result of ended work.

        Raises: the error that ended the work.
        """


class Work:
    """Work that one request waits for. It begins with the block; if the block ends first, the work is cancelled."""

    def __init__(self, work: Callable[[Cancellation, Callable[[Progress], None]], dict[str, Any]]) -> None:
        """`work` gets what cancels it, and a function to call with its progress."""
        self._work = work
        self._cancellation = Cancellation()
        self._done: Future[dict[str, Any]] = Future()
        self.progress: Progress | None = None

    def __enter__(self) -> Work:
        threading.Thread(target=self._run, name="work").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._cancellation.cancel()

    def _run(self) -> None:
        try:
            with no_panics():
                self._done.set_result(self._work(self._cancellation, self._watch))
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            self._done.set_exception(error)

    def _watch(self, progress: Progress) -> None:
        self.progress = progress

    @property
    def over(self) -> bool:
        """Whether the work has ended."""
        return self._done.done()

    def wait(self, seconds: float) -> bool:
        """Waits for the end; returns whether the work has ended."""
        return bool(wait([self._done], seconds).done)

    def result(self) -> dict[str, Any]:
        """The result; waits until the work has ended.

        Raises: the error that ended the work.
        """
        before_wait()
        return self._done.result()


def moments(work: Followed, hold: float = HOLD) -> Iterator[Moment | None]:
    """Yields the work's progress until its end, phase by phase, and None from time to time while nothing changes.

    The first item comes after `hold` seconds, or when the work ends; work that fails before that yields nothing.

    Raises: the error that ended the work.
    """
    before_wait()
    if work.wait(hold):
        work.result()
    followed, version, told = None, -1, time.monotonic()
    while True:
        over, progress = work.over, work.progress
        if progress is not followed:
            followed, version = progress, -1
        if progress is not None:
            version, news = progress.since(version)
            for moment in news:
                told = time.monotonic()
                yield moment
        if over:
            work.result()
            return
        if time.monotonic() - told >= KEEP_ALIVE:
            told = time.monotonic()
            yield None
        work.wait(_BETWEEN)
