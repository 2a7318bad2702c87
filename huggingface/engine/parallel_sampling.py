"""One ticket for several generations: their chunks in order of arrival, each with its generation's index.

Generations for which the queue has no room yet start as others end, on the reader's thread. Standard library only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..cancellation import NEVER, Cancellation
from ..errors import LocalLLMError, QueueFull
from .ticket import Ticket

# Starts a generation and returns its ticket, which the given `Cancellation` cancels.
Begin = Callable[[Cancellation], Ticket]


class JointTicket(Ticket):
    """Reads several tickets as one. It ends with the last of them, or with the first that fails."""

    def __init__(self, begins: Sequence[Begin], maximum: int, cancellation: Cancellation = NEVER) -> None:
        """Starts up to `maximum` generations at once, on the reading thread; the first one here.

        Raises: as the first of `begins`.
        """
        self._running: dict[int, Ticket] = {}
        super().__init__(cancellation=cancellation)
        self._left = deque(enumerate(begins))
        self._maximum = maximum
        self._ended = 0
        self._count = len(begins)
        self._begin()

    def wait(self, timeout: float | None = None) -> bool:
        """As `Ticket.wait`."""
        while len(self._running) < self._maximum and self._left and not self._done and not self.cancellation.cancelled:
            try:
                self._begin()
            except QueueFull as error:
                if not self._running:
                    self.finish(error)
                break
            except LocalLLMError as error:
                self.finish(error)
        return super().wait(timeout)

    def finish(self, error: BaseException | None = None) -> None:
        """Marks the end of the chunks; an error cancels the other generations."""
        super().finish(error)
        if error is not None:
            self.cancel()

    def _begin(self) -> None:
        index, begin = self._left[0]
        ticket = begin(self.cancellation)
        self._left.popleft()
        self._running[index] = ticket
        self.prompt_tokens += ticket.prompt_tokens
        self.prompt_end = self.prompt_end or ticket.prompt_end
        ticket.forward(lambda chunk: self.put(replace(chunk, index=index)), lambda error: self._end(index, error))

    def _end(self, index: int, error: BaseException | None) -> None:
        with self._changed:
            ticket = self._running.pop(index)
            self._ended += 1
            self._made += ticket.made
            last = self._ended == self._count
        if error is not None or last:
            self.finish(error)

    # State ------------------------------------------------------------------------------------------------------------

    @property
    def made(self) -> int:
        """New tokens so far, of all generations."""
        return self._made + sum(ticket.made for ticket in list(self._running.values()))

    @made.setter
    def made(self, value: int) -> None:
        self._made = value

    @property
    def position(self) -> int | None:
        """The place in the queue of the generation that is next; None where none waits."""
        places = [ticket.position for ticket in list(self._running.values()) if ticket.position is not None]
        return min(places, default=None)

    @position.setter
    def position(self, value: int | None) -> None:
        """Ignored: the tickets have the places."""
