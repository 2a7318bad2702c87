"""A ticket: what a caller holds of a request that waits or runs.

An iterator of chunks that the caller reads, the engine's thread fills, and anyone may cancel, any number of times.
Standard library only; it knows neither how chunks are made nor how they travel on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from ..records import Chunk


class Ticket(Iterator[Chunk]):
    """The chunks of one request, in the order they are made.

    Iteration blocks until the next chunk is there, ends after the last one, and raises the error that ended the
    request, if one did.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._chunks: deque[Chunk] = deque()
        self._done = False
        self._error: BaseException | None = None
        self._cancelled = False

    def __next__(self) -> Chunk:
        self.wait()
        with self._changed:
            if self._chunks:
                return self._chunks.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until `next()` would not block, at most `timeout` seconds; tell whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._chunks) or self._done, timeout)

    def cancel(self) -> None:
        """Ask that the work be given up; it ends at its next step with `errors.Cancelled`."""
        self._cancelled = True

    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    # The engine's side -----------------------------------------------------------------------------------------------

    def put(self, chunk: Chunk) -> None:
        """Deliver a chunk."""
        with self._changed:
            self._chunks.append(chunk)
            self._changed.notify_all()

    def finish(self, error: BaseException | None = None) -> None:
        """Say that no chunk will follow, and why if it is for an error."""
        with self._changed:
            self._done = True
            self._error = error
            self._changed.notify_all()
