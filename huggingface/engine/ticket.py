"""A ticket: the caller's side of a request that waits or runs.

An iterator of chunks: the caller reads it, the engine's thread fills it, and any thread may cancel it, any number of
times. Standard library only; must not know how chunks are generated or sent on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from ..cancellation import NEVER, Cancellation
from ..types import Chunk


class Ticket(Iterator[Chunk]):
    """The chunks of one request, in order.

    Iteration blocks until the next chunk arrives, ends after the last one, and raises the error that ended the request,
    if one did. `prompt_end` is the text at the end of its prompt. `position` is its place in the queue, counted from 1,
    and None once it runs; `prompt_tokens` and `made` are the tokens read, and generated so far. These may be read at
    any time.
    """

    def __init__(self, prompt_tokens: int = 0, prompt_end: str = "", cancellation: Cancellation = NEVER) -> None:
        """The ticket is cancelled with `cancellation`, or alone."""
        self._changed = threading.Condition()
        self._chunks: deque[Chunk] = deque()
        self._done = False
        self._error: BaseException | None = None
        self.cancellation = cancellation.child()
        self._put: Callable[[Chunk], None] | None = None
        self._finish: Callable[[BaseException | None], None] | None = None
        self.position: int | None = None
        self.prompt_tokens = prompt_tokens
        self.prompt_end = prompt_end
        self.made = 0

    def __next__(self) -> Chunk:
        self.wait()
        with self._changed:
            if self._chunks:
                return self._chunks.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until `next()` would not block, at most `timeout` seconds; returns whether it would not."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._chunks) or self._done, timeout)

    def cancel(self) -> None:
        """Cancels the work; it ends at its next step with `errors.Cancelled`."""
        self.cancellation.cancel()

    def forward(self, put: Callable[[Chunk], None], finish: Callable[[BaseException | None], None]) -> None:
        """Redirects chunks and the end to callbacks: buffered ones now, the others as they come."""
        with self._changed:
            self._put, self._finish = put, finish
            while self._chunks:
                put(self._chunks.popleft())
            if self._done:
                finish(self._error)

    @property
    def done(self) -> bool:
        """Whether no further chunk will come."""
        return self._done

    # For the engine ---------------------------------------------------------------------------------------------------

    def admitted(self) -> None:
        """Marks the request as running."""
        self.position = None

    def put(self, chunk: Chunk) -> None:
        """Delivers a chunk."""
        with self._changed:
            if self._put is not None:
                self._put(chunk)
                return
            self._chunks.append(chunk)
            self._changed.notify_all()

    def finish(self, error: BaseException | None = None) -> None:
        """Marks the end of the chunks, with its error if there is one. Only the first call counts."""
        with self._changed:
            if self._done:
                return
            self._done = True
            self._error = error
            self.position = None
            self._changed.notify_all()
            if self._finish is not None:
                self._finish(error)
