"""The active requests: which they are, how far they are, and their cancellation.

One `Requests` per app. A request is cancelled for one of three reasons: its client disconnects, its own timeout runs
out, or its id is cancelled. Its work checks its `cancellation`. Any thread; must not know models or tensors.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...cancellation import Cancellation
from ...engine.ticket import Ticket
from ...errors import Cancelled, DeadlineExceeded, RequestCancelled, RequestNotFound
from ...types import Chunk, timestamp
from ..http.sse import HOLD, KEEP_ALIVE


class InFlight:
    """One request. `request_id` is the server's id, `client_id` the client's own, if it sent one."""

    def __init__(
        self,
        model_id: str,
        task: str,
        cancellation: Cancellation,
        *,
        client_id: str | None = None,
        timeout: float | None = None,
        stream: bool = False,
        used: Callable[[], None] = lambda: None,
    ) -> None:
        """The deadline of `cancellation` is in `timeout` seconds. `used` is called after the last chunk."""
        self.request_id = secrets.token_hex(8)
        self._about = {"client_request_id": client_id, "model_id": model_id, "task": task, "stream": stream}
        self.cancellation = cancellation
        self._timeout = timeout
        self._used = used
        self._date, self._started = timestamp(), time.monotonic()
        self._cancelled = False
        self._leased = False
        self._ticket: Ticket | None = None
        self.failure: Exception | None = None  # the error that ended its chunks

    def cancel(self) -> None:
        """Cancels the request; its work ends at the next step."""
        self._cancelled = True
        self.cancellation.cancel()

    def leased(self) -> None:
        """Records that the request has its model."""
        self._leased = True

    def attach(self, ticket: Ticket) -> Ticket:
        """Records the engine's ticket of the request."""
        self._ticket = ticket
        return ticket

    def chunks(self) -> Iterator[Chunk]:
        """The ticket's chunks until the end.

        Raises: the error that ended the request, if one did.
        """
        return (chunk for chunk in self.stream() if chunk is not None)

    def stream(self) -> Iterator[Chunk | None]:
        """The ticket's chunks, and None from time to time while no chunk comes."""
        assert self._ticket is not None  # noqa: S101 - attached before it is read
        patience = HOLD
        try:
            while True:
                if not self.cancellation.until(self._ticket.wait, patience):
                    yield None
                elif (chunk := next(self._ticket, None)) is not None:
                    yield chunk
                else:
                    break
                patience = KEEP_ALIVE
            self._used()
        except Cancelled as error:
            self.failure = self.explain(error)
            raise self.failure from error
        except Exception as error:
            self.failure = error
            raise

    def explain(self, error: Cancelled) -> Cancelled:
        """The error that tells the client why the request was cancelled."""
        if self._cancelled:
            return RequestCancelled(self.request_id)
        if self.cancellation.expired and self._timeout is not None:
            return DeadlineExceeded(self._timeout)
        return error

    def release(self) -> None:
        """Cancels the rest of the generation, at the end of the request."""
        if self._ticket is not None and not self._ticket.done:
            self._ticket.cancel()

    @property
    def made(self) -> int:
        """Tokens generated so far."""
        return self._ticket.made if self._ticket is not None else 0

    @property
    def position(self) -> int | None:
        """The request's place in the queue, from 1; None where it does not wait in one."""
        return self._ticket.position if self._ticket is not None else None

    def to_dict(self) -> dict[str, Any]:
        """The request as `/requests` shows it."""
        ticket = self._ticket
        state = "waiting" if self.position is not None else "running" if self._leased else "loading"
        return {
            "request_id": self.request_id,
            **self._about,
            "state": state,
            "position": self.position,
            "prompt_tokens": ticket.prompt_tokens if ticket is not None else 0,
            "completion_tokens": ticket.made if ticket is not None else 0,
            "started": self._date,
            "age": round(time.monotonic() - self._started, 3),
        }


class Requests:
    """All active requests of an app, by their ids."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[str, InFlight] = {}

    @contextmanager
    def hold(self, flight: InFlight) -> Iterator[InFlight]:
        """Lists a request until the block ends.

        Raises:
            RequestCancelled, DeadlineExceeded: in place of a plain `Cancelled`, to tell the client the reason.
        """
        with self._lock:
            self._flights[flight.request_id] = flight
        try:
            yield flight
        except Cancelled as error:
            explained = flight.explain(error)
            if explained is error:
                raise
            raise explained from error
        finally:
            with self._lock:
                del self._flights[flight.request_id]

    def list(self) -> list[InFlight]:
        """The active requests, oldest first."""
        with self._lock:
            return list(self._flights.values())

    def cancel(self, request_id: str) -> None:
        """Cancels a request.

        Raises:
            RequestNotFound: no request with this id waits or runs.
        """
        with self._lock:
            flight = self._flights.get(request_id)
        if flight is None:
            raise RequestNotFound(request_id)
        flight.cancel()
