"""Event streams: the one way to send an answer bit by bit, as server-sent events or as lines of JSON.

A source gives items as they come, None in silence, and raises what ends it. A writer turns items into the events of its
protocol, and an encoding makes bytes of those. The response begins with the first item, so that whatever goes wrong
before has a status of its own; silence is filled, which also finds dead connections. Serves any request thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Protocol, TypeVar

from flask import Response

from ...errors import LocalLLMError
from .errors import log
from .json import encoded

logger = logging.getLogger(__name__)

# Seconds: so long a source has nothing to tell before its response begins all the same, as an error that comes by then
# has its status; and so often it says after that that it is silent.
HOLD = 1.0
KEEP_ALIVE = 2.0

# JSON values, or bytes where an event is no JSON.
Events = Iterable[Mapping[str, Any] | bytes]
Item = TypeVar("Item")
Written = TypeVar("Written", contravariant=True)


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
            name = f"event: {event['type']}\n".encode() if self.named and not isinstance(event, bytes) else b""
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


class Writer(Protocol[Written]):
    """The events of a protocol."""

    def write(self, item: Written) -> Events:
        """What an item of the source becomes."""

    def silence(self) -> Events:
        """What fills a silence; where that is nothing, the encoding's own is sent."""
        return ()

    def end(self) -> Events:
        """What comes when all is told."""
        return ()

    def error(self, error: LocalLLMError) -> Events:
        """What ends a stream that failed."""


def event_stream(
    source: Iterator[Item | None], writer: Writer[Item], stack: ExitStack, encoding: Encoding = SSE
) -> Response:
    """The response that streams `source` as `writer` tells it.

    `stack` is closed when the response is sent, or its client has gone.

    Raises: what ended the source before its first item; the stack is the caller's then.
    """
    first = list(islice(source, 1))
    response = encoding.response(_written(chain(first, source), writer, encoding))
    response.call_on_close(stack.pop_all().close)
    return response


def _written(source: Iterator[Item | None], writer: Writer[Item], encoding: Encoding) -> Iterator[bytes]:
    try:
        for item in source:
            if item is None:
                yield from list(encoding.encoded(writer.silence())) or [encoding.silence]
            else:
                yield from encoding.encoded(writer.write(item))
        yield from encoding.encoded(writer.end())
    except LocalLLMError as error:
        log(error, "a stream")
        yield from encoding.encoded(writer.error(error))
    except Exception:
        logger.exception("a stream failed")
        unforeseen = LocalLLMError("Internal server error; the server's log has the details")
        yield from encoding.encoded(writer.error(unforeseen))
