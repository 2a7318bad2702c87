"""A ticket as a stream of server-sent events.

Each event is one line `data: {JSON}`; silence is filled with comments, which also find out dead connections. The
response begins when there is something to tell, so that whatever goes wrong before has a status of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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


def event_stream(flight: InFlight, ticket: Ticket, shape: Callable[[list[Chunk]], dict[str, Any]]) -> Response:
    """The response that streams `ticket`; its last event is what `shape` makes of the sequences' last chunks.

    The ticket is cancelled when the response is sent or its client has gone.

    Raises: what ended the request before its first token.
    """
    first = _first(flight)
    response = Response(_events(flight, first, shape), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"  # nginx would hold events back
    response.call_on_close(ticket.cancel)
    return response


def _first(flight: InFlight) -> Chunk | None:
    """The first chunk, or None if it takes long."""
    return next(flight.chunks()) if flight.wait(_HOLD) else None


def _events(flight: InFlight, first: Chunk | None, shape: Callable[[list[Chunk]], dict[str, Any]]) -> Iterator[bytes]:
    last: list[Chunk] = []
    try:
        if first is None:
            yield from _silence(flight)
        else:
            yield from _text(first, last)
        for chunk in flight.chunks():
            yield from _text(chunk, last)
        yield _event(shape(last))
    except LocalLLMError as error:
        log(error, "a stream")
        yield _event(body(str(error)))


def _silence(flight: InFlight) -> Iterator[bytes]:
    """Its place in the queue whenever that changes, and comments, until there is a chunk or an end."""
    told: int | None = None
    while True:
        position = flight.position
        if position is not None and position != told:
            told = position
            yield _event({"request_id": flight.request_id, "position": position})
        else:
            yield _COMMENT
        if flight.wait(_KEEP_ALIVE):
            return


def _text(chunk: Chunk, last: list[Chunk]) -> Iterator[bytes]:
    if chunk.finish_reason is not None:
        last.append(chunk)
    if chunk.text:
        yield _event({"index": chunk.index, "text": chunk.text})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
