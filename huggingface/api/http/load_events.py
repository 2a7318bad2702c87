"""A load, or a download, as a stream of events: how far it is, and last the answer, or what went wrong.

What the events say is the framing's business, how they are written the encoding's; silence is filled. A client that
leaves gives its wait up, and the work with it where no other request waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import chain
from typing import Any, Protocol

from flask import Response

from ...errors import LocalLLMError
from ...progress import Progress
from .errors import body, log
from .sse import SSE, Encoding, Events

logger = logging.getLogger(__name__)

# Seconds: between two events of one phase, until a comment in silence, and how long an error may take to come before
# the response begins, and have its status.
_BETWEEN = 0.1
_KEEP_ALIVE = 2.0
_HOLD = 0.5

Work = Callable[[Callable[[], bool], Callable[[Progress], None]], dict[str, Any]]


class WorkFraming(Protocol):
    """The events that tell of such work."""

    def progress(self, moment: dict[str, Any]) -> Events:
        """How far it is: `progress.Moment` as the API shows it."""

    def result(self, result: dict[str, Any]) -> Events:
        """What ends it well."""

    def error(self, message: str) -> Events:
        """What ends a stream that failed."""


class DocumentedProgress:
    """The events of `/load`: `{"progress"}`, and last the documented answer or error."""

    def progress(self, moment: dict[str, Any]) -> Events:
        """A moment as it is."""
        yield {"progress": moment}

    def result(self, result: dict[str, Any]) -> Events:
        """The answer as it is."""
        yield result

    def error(self, message: str) -> Events:
        """An error's documented body."""
        yield body(message)


_DOCUMENTED = DocumentedProgress()


def load_events(
    work: Work, closed: Callable[[], None], framing: WorkFraming = _DOCUMENTED, encoding: Encoding = SSE
) -> Response:
    """The response that tells how far `work` is, and ends with what it returns.

    `work` gets a function that tells whether the client has gone, and one to call with the progress that it waits for.
    `closed` is called when the response is over.

    Raises: what `work` raises at once.
    """
    gone = threading.Event()
    done: Future[dict[str, Any]] = Future()
    watched: list[Progress] = []

    def run() -> None:
        try:
            done.set_result(work(gone.is_set, watched.append))
        except BaseException as error:  # noqa: BLE001 - it is told, or raised, where the future is looked at
            done.set_exception(error)

    threading.Thread(target=run, name="load-events").start()
    events, first, hold = _progress(done, watched), [], time.monotonic() + _HOLD
    for event in events:
        first.append(event)
        if time.monotonic() > hold:
            break
    if done.done() and (error := done.exception()) is not None:
        closed()
        raise error
    response = encoding.response(_framed(chain(first, events), done, framing, encoding))
    response.call_on_close(gone.set)
    response.call_on_close(closed)
    return response


def _progress(done: Future[dict[str, Any]], watched: list[Progress]) -> Iterator[dict[str, Any] | None]:
    """Each phase as it begins, and what changes; None every now and then where nothing does."""
    followed, version = None, -1
    while True:
        over = done.done()
        if watched and watched[-1] is not followed:
            followed, version = watched[-1], -1
        if followed is not None:
            begun = followed.phases(version)
            seen, moment = followed.wait(version, 0 if over else _BETWEEN)
            for phase in begun:
                yield phase.to_dict()
            if seen != version and moment not in begun:
                yield moment.to_dict()
            version = seen
        if over:
            return
        _ended(done, _BETWEEN)
        yield None


def _framed(
    events: Iterator[dict[str, Any] | None], done: Future[dict[str, Any]], framing: WorkFraming, encoding: Encoding
) -> Iterator[bytes]:
    told, silent = None, time.monotonic()
    for event in events:
        if event is not None and event != told:
            told, silent = event, time.monotonic()
            yield from encoding.encoded(framing.progress(event))
        elif time.monotonic() - silent >= _KEEP_ALIVE:
            silent = time.monotonic()
            yield encoding.silence
    error = done.exception()
    if error is None:
        yield from encoding.encoded(framing.result(done.result()))
    elif isinstance(error, LocalLLMError):
        log(error, "a load")
        yield from encoding.encoded(framing.error(str(error)))
    else:
        logger.error("a load failed", exc_info=error)
        yield from encoding.encoded(framing.error("Internal server error; the server's log has the details"))


def _ended(done: Future[dict[str, Any]], seconds: float) -> None:
    """Wait for the end for so long at most."""
    try:
        done.exception(seconds)
    except TimeoutError:
        return
