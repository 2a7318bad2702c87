"""Whether work is still wanted: one object that goes from a request down to the loop that computes its answer.

Work asks it between its steps, and waits through it. Any thread may call anything here. It must not know whose work
it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Event
from typing import TypeVar

from .errors import Cancelled

T = TypeVar("T")

LOOK_AGAIN = 0.1  # seconds between two looks at what nothing wakes a thread for


class Cancellation:
    """Cancelled by `cancel`, by its parent, at its deadline, or when its probe says so; and from then on for good."""

    __slots__ = ("_cancelled", "_deadline", "_event", "_parent", "_probe")

    def __init__(
        self,
        probe: Callable[[], bool] | None = None,
        *,
        parent: Cancellation | None = None,
        deadline: float | None = None,
    ) -> None:
        """`probe` tells, on any thread and in no time, whether the client has gone; `deadline` is a reading of
        `time.monotonic`."""
        self._cancelled = False
        self._event = Event()
        self._probe = probe
        self._parent = parent
        self._deadline = deadline

    @property
    def cancelled(self) -> bool:
        """Whether the work is to be given up."""
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
        """Have the work given up at its next step."""
        self._cancelled = True
        self._event.set()

    def check(self) -> None:
        """Go on only if the work is still wanted.

        Raises:
            Cancelled: it is not.
        """
        if self.cancelled:
            raise Cancelled

    def child(self, probe: Callable[[], bool] | None = None) -> Cancellation:
        """One that is cancelled with this one, or by itself."""
        return Cancellation(probe, parent=self)

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until it is cancelled, at once where that is by `cancel`; tells whether it is."""
        end = time.monotonic() + seconds
        while not self.cancelled and (left := end - time.monotonic()) > 0:
            self._event.wait(min(left, LOOK_AGAIN))
        return self.cancelled

    def until(self, ready: Callable[[float], T], seconds: float = math.inf) -> T:
        """Repeat `ready`, which waits for something for as many seconds at most as it is given, until it gives what is
        true, or until so many seconds have passed; returns what it gave last.

        Raises:
            Cancelled: the work is not wanted any more.
        """
        end = time.monotonic() + seconds
        while not (found := ready(max(0.0, min(LOOK_AGAIN, end - time.monotonic())))):
            self.check()
            if time.monotonic() >= end:
                break
        return found

    def result(self, future: Future[T]) -> T:
        """Wait for a future's result.

        Raises: what it failed of; Cancelled where that is not wanted any more.
        """
        if not future.done():
            self.until(lambda seconds: wait([future], seconds).done)
        return future.result()


NEVER = Cancellation()  # of work that is always wanted: nothing calls its `cancel`
