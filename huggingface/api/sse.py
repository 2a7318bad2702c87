"""A ticket as a stream of server-sent events.

Each event is one line `data: {JSON}`; silence is filled with comments, which also find out dead connections. The
response begins when there is something to tell, so that whatever goes wrong before has a status of its own. What the
events say, is the framing's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import orjson
from flask import Response

from ..engine.ticket import Ticket
from ..errors import LocalLLMError
from ..records import Chunk
from .errors import body, log
from .inflight import InFlight

# Seconds. A request that has nothing to tell for so long, because it waits or is being read, begins its response
# anyhow; and so often something is sent in silence.
_HOLD = 1.0
_KEEP_ALIVE = 2.0

_COMMENT = b": keep-alive\n\n"

# JSON values, or bytes where an event is no JSON.
Events = Iterable[dict[str, Any] | bytes]


class Framing(Protocol):
    """The events that tell of a generation."""

    def chunk(self, chunk: Chunk) -> Events:
        """What a piece of text becomes."""

    def position(self, request_id: str, position: int) -> Events:
        """What tells of a place in the queue; a comment is sent where that is nothing."""

    def end(self) -> Events:
        """What comes when all is told."""

    def error(self, error: LocalLLMError) -> Events:
        """What ends a stream that failed."""


class DocumentedFraming:
    """The events of `/generate`: pieces of text, and last the documented answer."""

    def __init__(self, shape: Callable[[list[Chunk]], dict[str, Any]]) -> None:
        """`shape` makes the answer of the sequences' last chunks."""
        self._shape = shape
        self._last: list[Chunk] = []

    def chunk(self, chunk: Chunk) -> Events:
        """A piece of text by its sequence."""
        if chunk.finish_reason is not None:
            self._last.append(chunk)
        if chunk.text:
            yield {"index": chunk.index, "text": chunk.text}

    def position(self, request_id: str, position: int) -> Events:
        """A place in the queue by the request's id."""
        yield {"request_id": request_id, "position": position}

    def end(self) -> Events:
        """The answer."""
        yield self._shape(self._last)

    def error(self, error: LocalLLMError) -> Events:
        """An error's documented body."""
        yield body(str(error))


def event_stream(flight: InFlight, ticket: Ticket, framing: Framing) -> Response:
    """The response that streams `ticket`, framed by `framing`.

    The ticket is cancelled when the response is sent or its client has gone.

    Raises: what ended the request before its first token.
    """
    first = _first(flight)
    response = Response(_events(flight, first, framing), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"  # nginx would hold events back
    response.call_on_close(ticket.cancel)
    return response


def _first(flight: InFlight) -> Chunk | None:
    """The first chunk, or None if it takes long."""
    return next(flight.chunks()) if flight.wait(_HOLD) else None


def _events(flight: InFlight, first: Chunk | None, framing: Framing) -> Iterator[bytes]:
    try:
        if first is None:
            yield from _silence(flight, framing)
        else:
            yield from _encoded(framing.chunk(first))
        for chunk in flight.chunks():
            yield from _encoded(framing.chunk(chunk))
        yield from _encoded(framing.end())
    except LocalLLMError as error:
        flight.failure = error
        log(error, "a stream")
        yield from _encoded(framing.error(error))


def _silence(flight: InFlight, framing: Framing) -> Iterator[bytes]:
    """Its place in the queue whenever that changes, and comments, until there is a chunk or an end."""
    told: int | None = None
    while True:
        position = flight.position
        events: list[bytes] = []
        if position is not None and position != told:
            told = position
            events = list(_encoded(framing.position(flight.request_id, position)))
        yield from events or [_COMMENT]
        if flight.wait(_KEEP_ALIVE):
            return


def _encoded(events: Events) -> Iterator[bytes]:
    for event in events:
        yield b"data: " + (event if isinstance(event, bytes) else orjson.dumps(event)) + b"\n\n"
