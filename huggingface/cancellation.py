"""One object that cancels work: it goes from a request down to the loop that computes the answer.

Work asks its `Cancellation` between steps, and waits through it. What waits otherwise calls `before_wait`, so that the
thread's owner can let other work run meanwhile. Any thread may call anything here. Must not know which work it cancels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from threading import Event, local
from typing import TypeVar

from .errors import Cancelled

T = TypeVar("T")

LOOK_AGAIN = 0.1  # seconds between two polls of what wakes no thread


class _Thread(local):
    """What the present thread calls before it waits."""

    on_wait: Callable[[], object] | None = None


_thread = _Thread()


@contextmanager
def on_wait(callback: Callable[[], object]) -> Iterator[None]:
    """Calls `callback` before this thread waits for the first time within the block."""
    _thread.on_wait = callback
    try:
        yield
    finally:
        _thread.on_wait = None


def before_wait() -> None:
    """Tells the thread's owner that the thread is about to wait for others."""
    callback, _thread.on_wait = _thread.on_wait, None
    if callback is not None:
        callback()


class Cancellation:
    """Is cancelled by `cancel`, by its parent, at its deadline, or by its probe, and then stays cancelled."""

    __slots__ = ("_cancelled", "_deadline", "_event", "_parent", "_probe")

    def __init__(
        self,
        probe: Callable[[], bool] | None = None,
        *,
        parent: Cancellation | None = None,
        deadline: float | None = None,
    ) -> None:
        """`probe` says, on any thread and at once, whether the client has left; `deadline` is a reading of
        `time.monotonic`."""
        self._cancelled = False
        self._event = Event()
        self._probe = probe
        self._parent = parent
        self._deadline = deadline

    @property
    def cancelled(self) -> bool:
        """Whether the work is cancelled."""
        if not self._cancelled and (
            (self._parent is not None and self._parent.cancelled)
            or (self._deadline is not None and self.expired)
            or (self._probe is not None and self._probe())
        ):
            self.cancel()
        return self._cancelled

    @property
    def expired(self) -> bool:
        """Whether its own deadline has passed."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def cancel(self) -> None:
        """Cancels the work at its next step."""
        self._cancelled = True
        self._event.set()

    def check(self) -> None:
        """Continues only if the work is not cancelled.

        Raises:
            Cancelled: the work is cancelled.
        """
        if self.cancelled:
            raise Cancelled

    def child(self, probe: Callable[[], bool] | None = None) -> Cancellation:
        """Returns a `Cancellation` that is cancelled with this one, or alone."""
        return Cancellation(probe, parent=self)

    def wait(self, seconds: float) -> bool:
        """Waits `seconds`, or until the work is cancelled (`cancel` wakes it at once); returns whether it is."""
        before_wait()
        end = time.monotonic() + seconds
        while not self.cancelled and (left := end - time.monotonic()) > 0:
            self._event.wait(min(left, LOOK_AGAIN))
        return self.cancelled

    def until(self, ready: Callable[[float], T], seconds: float = math.inf) -> T:
        """Repeats `ready` until it returns a true value or `seconds` have passed; returns its last value.

        `ready` waits for something, at most for the seconds that it is given.

        Raises:
            Cancelled: the work is cancelled.
        """
        before_wait()
        end = time.monotonic() + seconds
        while not (found := ready(max(0.0, min(LOOK_AGAIN, end - time.monotonic())))):
            self.check()
            if time.monotonic() >= end:
                break
        return found

    def result(self, future: Future[T]) -> T:
        """Waits for a future's result.

        Raises: the future's error; Cancelled if the work is cancelled first.
        """
        if not future.done():
            self.until(lambda seconds: wait([future], seconds).done)
        return future.result()


NEVER = Cancellation()  # for work that is never cancelled: nothing calls its `cancel`
