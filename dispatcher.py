"""The server's worker threads: which request runs next, and which one computes.

Python runs one thread at a time, and the thread of the connections needs its turn several times for one answer. With a
hundred requests that compute at once even a trivial answer takes a tenth of a second. So one request at a time computes
and the others stay queued. A request holds the turn until it is answered, until it waits for something
(`cancellation.before_wait`), or for at most `longest` seconds: longer work runs outside the interpreter. Requests for
one of the `first` paths need no turn and overtake the queue. Must not know routes or models.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from waitress.task import ThreadedTaskDispatcher

from huggingface.cancellation import on_wait


class Dispatcher(ThreadedTaskDispatcher):  # type: ignore[misc]
    """Runs requests on threads, in the order in which they arrive."""

    def __init__(self, first: frozenset[str], longest: float = 0.1) -> None:
        """`first` are the paths of requests that overtake the others; a turn lasts at most `longest` seconds."""
        super().__init__()
        self._first = first
        self._longest = longest
        self._computing: Any = None  # the request that has the turn
        self._since = 0.0

    def add_task(self, task: Any) -> None:
        """Queues a connection whose request is complete."""
        if not self._overtakes(task):
            super().add_task(task)
            return
        with self.lock:
            self.queue.appendleft(task)
            self.queue_cv.notify()

    def handler_thread(self, thread_no: int) -> None:
        """Runs requests until the dispatcher stops this thread."""
        while (task := self._next(thread_no)) is not None:
            try:
                with on_wait(partial(self._end_turn, task)):
                    task.service()
            except BaseException:  # as waitress's own dispatcher: no request ends the thread
                self.logger.exception("Exception when servicing %r", task)
            finally:
                self._end_turn(task)

    def _overtakes(self, task: Any) -> bool:
        # A request that waitress could not parse has no path.
        return bool(task.requests) and getattr(task.requests[0], "path", None) in self._first

    def _next(self, thread_no: int) -> Any:
        """Waits for the next request that can run; None when the thread has to end."""
        with self.lock:
            while not self.stop_count:
                patience = self._until_turn()
                if patience == 0:
                    task = self.queue.popleft()
                    if not self._overtakes(task):
                        self._computing, self._since = task, time.monotonic()
                    return task
                # Every request that is queued wakes a thread: that one waits here until the turn ends.
                self.active_count -= 1
                self.queue_cv.wait(patience)
                self.active_count += 1
            self.active_count -= 1
            self.stop_count -= 1
            self.threads.discard(thread_no)
            self.thread_exit_cv.notify()
            return None

    def _until_turn(self) -> float | None:
        """Seconds until the first request in the queue can run at the latest; None where the queue is empty."""
        if not self.queue:
            return None
        if self._computing is None or self._overtakes(self.queue[0]):
            return 0
        return max(0.0, self._since + self._longest - time.monotonic())

    def _end_turn(self, task: Any) -> None:
        """Ends the turn of a request, if it has the turn."""
        with self.lock:
            if self._computing is task:
                self._computing = None
                if self.queue:
                    self.queue_cv.notify()
