"""A ticket as a stream of events: server-sent ones, or lines of JSON.

Silence is filled with what says nothing or with the protocol's own pings, which also find out dead connections. The
response begins when there is something to tell, so that whatever goes wrong before has a status of its own. What the
events say is the framing's business, how they are written the encoding's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from flask import Response

from ...engine.ticket import Ticket
from ...errors import LocalLLMError
from ...types import Chunk
from ..requests.active import InFlight
from .errors import body, log
from .json import encoded

# Seconds. A request that has nothing to tell for so long, because it waits or is being read, begins its response
# anyhow; and so often something is sent in silence.
_HOLD = 1.0
_KEEP_ALIVE = 2.0

# JSON values, or bytes where an event is no JSON.
Events = Iterable[dict[str, Any] | bytes]
_Encode = Callable[[Events], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How events are written. `silence` is what may stand between two of them and says nothing; where events are
    `named`, the `type` of each stands in a line of its own too.
    """

    mimetype: str
    before: bytes
    after: bytes
    silence: bytes
    named: bool = False

    def encoded(self, events: Events) -> Iterator[bytes]:
        """Each event as bytes."""
        for event in events:
            data = event if isinstance(event, bytes) else encoded(event)
            name = f"event: {event['type']}\n".encode() if self.named and isinstance(event, dict) else b""
            yield name + self.before + data + self.after

    def response(self, stream: Iterable[bytes]) -> Response:
        """The response that sends a stream as it comes."""
        response = Response(stream, mimetype=self.mimetype)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"  # nginx would hold events back
        return response


SSE = Encoding("text/event-stream", b"data: ", b"\n\n", b": keep-alive\n\n")
NAMED_SSE = replace(SSE, named=True)
# A line that holds nothing is no JSON, and clients fail of it; space before a line's value is part of that line.
NDJSON = Encoding("application/x-ndjson", b"", b"\n", b" ")


class Framing(Protocol):
    """The events that tell of a generation."""

    def chunk(self, chunk: Chunk) -> Events:
        """What a piece of text becomes."""

    def position(self, request_id: str, position: int) -> Events:
        """What tells of a place in the queue; silence is sent where that is nothing."""

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


def event_stream(
    flight: InFlight,
    ticket: Ticket,
    framing: Framing,
    encoding: Encoding = SSE,
    ping: Callable[[], Events] = lambda: (),
) -> Response:
    """The response that streams `ticket`, framed by `framing`.

    `ping` gives the events that fill a silence; where there are none, the encoding's own is sent. The ticket is
    cancelled when the response is sent or its client has gone.

    Raises: what ended the request before its first token.
    """
    first = _first(flight)
    response = encoding.response(_events(flight, first, framing, encoding, ping))
    response.call_on_close(ticket.cancel)
    return response


def _first(flight: InFlight) -> Chunk | None:
    """The first chunk, or None if it takes long."""
    return next(flight.chunks()) if flight.wait(_HOLD) else None


def _events(
    flight: InFlight, first: Chunk | None, framing: Framing, encoding: Encoding, ping: Callable[[], Events]
) -> Iterator[bytes]:
    try:
        if first is None:
            yield from _silence(flight, framing, encoding, ping)
        else:
            yield from encoding.encoded(framing.chunk(first))
        for chunk in flight.chunks():
            yield from encoding.encoded(framing.chunk(chunk))
        yield from encoding.encoded(framing.end())
    except LocalLLMError as error:
        flight.failure = error
        log(error, "a stream")
        yield from encoding.encoded(framing.error(error))


def _silence(flight: InFlight, framing: Framing, encoding: Encoding, ping: Callable[[], Events]) -> Iterator[bytes]:
    """Its place in the queue whenever that changes, and pings, or what says nothing, until a chunk or the end comes."""
    told: int | None = None
    while True:
        position = flight.position
        events: list[bytes] = []
        if position is not None and position != told:
            told = position
            events = list(encoding.encoded(framing.position(flight.request_id, position)))
        yield from events or list(encoding.encoded(ping())) or [encoding.silence]
        if flight.wait(_KEEP_ALIVE):
            return
