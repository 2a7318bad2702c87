"""Event streams: the one way to send an answer piece by piece, as server-sent events or as lines of JSON.

A source yields items as they come, and None in a silence. A writer turns items into its protocol's events, and an
encoding turns events into bytes. The response begins with the first item, so an earlier error still gets its HTTP
status. Silences are filled, which also detects dead connections. Serves any request thread.
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

# Seconds. HOLD: how long a response waits for a source's first item, since an error before the response's begin has its
# own status. KEEP_ALIVE: how often a source reports its silence after that.
HOLD = 1.0
KEEP_ALIVE = 2.0

# JSON values, or bytes for an event that is not JSON.
Events = Iterable[Mapping[str, Any] | bytes]
Item = TypeVar("Item")
Written = TypeVar("Written", contravariant=True)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How events are written: `before` and `after` surround each event's data, `silence` is a filler between events.

    With `named`, the `type` of each event also stands on a line of its own.
    """

    mimetype: str
    before: bytes
    after: bytes
    silence: bytes
    named: bool = False

    def encoded(self, events: Events) -> Iterator[bytes]:
        """Encodes each event as bytes."""
        for event in events:
            data = event if isinstance(event, bytes) else encoded(event)
            name = f"event: {event['type']}\n".encode() if self.named and not isinstance(event, bytes) else b""
            yield name + self.before + data + self.after

    def response(self, stream: Iterable[bytes]) -> Response:
        """The response that sends a stream's bytes as they come."""
        response = Response(stream, mimetype=self.mimetype)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"  # nginx would hold events back
        return response


SSE = Encoding("text/event-stream", b"data: ", b"\n\n", b": keep-alive\n\n")
NAMED_SSE = replace(SSE, named=True)
# An empty line is not JSON, so clients would fail on it; a space belongs to the next line.
NDJSON = Encoding("application/x-ndjson", b"", b"\n", b" ")


class Writer(Protocol[Written]):
    """Writes the events of a protocol."""

    def write(self, item: Written) -> Events:
        """The events for an item of the source."""

    def silence(self) -> Events:
        """The events for a silence; where there are none, the encoding's filler is sent."""
        return ()

    def end(self) -> Events:
        """The events at the end of the source."""
        return ()

    def error(self, error: LocalLLMError) -> Events:
        """The events that end a failed stream."""


def event_stream(
    source: Iterator[Item | None], writer: Writer[Item], stack: ExitStack, encoding: Encoding = SSE
) -> Response:
    """Returns the response that streams `source` through `writer`.

    `stack` is closed when the response is sent, or when its client has disconnected.

    Raises: the source's error before its first item; then the stack still belongs to the caller.
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
