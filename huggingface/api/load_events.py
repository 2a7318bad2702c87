"""A load as server-sent events: how far it is, and last the answer, or what went wrong.

Each event is one line `data: {JSON}`; silence is filled with comments. A client that leaves gives its wait up, and the
load with it where nobody else waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import chain
from typing import Any

import orjson
from flask import Response

from ..errors import LocalLLMError
from ..progress import Progress
from .errors import body, log

logger = logging.getLogger(__name__)

# Seconds: between two events of one phase, until a comment in silence, and how long an error may take to come before
# the response begins, and have its status.
_BETWEEN = 0.1
_KEEP_ALIVE = 2.0
_HOLD = 0.5

Work = Callable[[Callable[[], bool], Callable[[Progress], None]], dict[str, Any]]


def load_events(work: Work, closed: Callable[[], None]) -> Response:
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
    response = Response(_framed(chain(first, events), done), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"  # nginx would hold events back
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


def _framed(events: Iterator[dict[str, Any] | None], done: Future[dict[str, Any]]) -> Iterator[bytes]:
    told, silent = None, time.monotonic()
    for event in events:
        if event is not None and event != told:
            told, silent = event, time.monotonic()
            yield _event({"progress": event})
        elif time.monotonic() - silent >= _KEEP_ALIVE:
            silent = time.monotonic()
            yield b": keep-alive\n\n"
    error = done.exception()
    if error is None:
        yield _event(done.result())
    elif isinstance(error, LocalLLMError):
        log(error, "a load")
        yield _event(body(str(error)))
    else:
        logger.error("a load failed", exc_info=error)
        yield _event(body("Internal server error; the server's log has the details"))


def _ended(done: Future[dict[str, Any]], seconds: float) -> None:
    """Wait for the end for so long at most."""
    try:
        done.exception(seconds)
    except TimeoutError:
        return


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
