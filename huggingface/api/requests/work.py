"""Work that a request follows: a load of its own on a thread beside it, or a download that others may share.

`moments` is the source of such a stream. Any thread may ask how far work is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Protocol

from ...errors import no_panics
from ...progress import Moment, Progress
from ..http.sse import HOLD, KEEP_ALIVE

_BETWEEN = 0.1  # seconds between two looks at how far it is


class Followed(Protocol):
    """Work whose progress can be watched, once it is known."""

    @property
    def progress(self) -> Progress | None:
        """How far it is."""

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""

    def wait(self, seconds: float) -> bool:
        """Wait for its end; returns whether it came."""

    def result(self) -> Any:
        """What it gave.

        Raises: what it failed of.
        """


class Work:
    """Work that one request waits for: it begins with the block, and is given up where the block ends before it."""

    def __init__(self, work: Callable[[Callable[[], bool], Callable[[Progress], None]], dict[str, Any]]) -> None:
        """`work` gets a function that tells whether its client has gone, and one to call with its progress."""
        self._work = work
        self._gone = threading.Event()
        self._done: Future[dict[str, Any]] = Future()
        self.progress: Progress | None = None

    def __enter__(self) -> Work:
        threading.Thread(target=self._run, name="work").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._gone.set()

    def _run(self) -> None:
        try:
            with no_panics():
                self._done.set_result(self._work(self._gone.is_set, self._watch))
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            self._done.set_exception(error)

    def _watch(self, progress: Progress) -> None:
        self.progress = progress

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""
        return self._done.done()

    def wait(self, seconds: float) -> bool:
        """Wait for its end; returns whether it came."""
        return bool(wait([self._done], seconds).done)

    def result(self) -> dict[str, Any]:
        """What it gave, when it is over.

        Raises: what it failed of.
        """
        return self._done.result()


def moments(work: Followed, hold: float = HOLD) -> Iterator[Moment | None]:
    """How far the work is, each phase in its turn, to its end; None every now and then where nothing changes.

    Nothing is told for `hold` seconds, unless the work ends before; of work that fails before, nothing is.

    Raises: what the work failed of.
    """
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
