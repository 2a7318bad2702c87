"""Limits the number of requests that may wait, so that requests which never wait always find a thread.

A request holds a thread of the server while it waits: for a model, for a model's users, for another process's lock, for
the Hub, for its turn. So every route may wait unless it is marked `at_once`; above the limit, a further request is
refused with `Retry-After`. A stream holds its place until it is sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from flask import Flask, Response, current_app, g, request

from ...errors import ServerFull

View = TypeVar("View", bound=Callable[..., Any])

_EXTENSION = "local-llm-waiting"
_PLACE = "place_among_the_waiting"
_STATIC = "static"  # Flask's name for a blueprint's route to its files


def at_once(view: View) -> View:
    """Marks a view that never waits; it runs however many other requests wait.

    The decorator stands below the route's own.
    """
    view.at_once = True  # type: ignore[attr-defined]
    return view


class Waiting:
    """The places for requests that may wait, fewer than threads."""

    def __init__(self, threads: int) -> None:
        """`threads` is the number that serve requests; a sixteenth is kept for requests that never wait."""
        self._places = threading.BoundedSemaphore(max(1, threads - max(1, threads // 16)))

    def admit(self) -> None:
        """Takes a place for the present request, if it may wait.

        Raises:
            ServerFull: no place is free.
        """
        if request.endpoint is None or request.endpoint.rpartition(".")[2] == _STATIC:
            return
        if getattr(current_app.view_functions[request.endpoint], "at_once", False):
            return
        if not self.take():
            raise ServerFull

    def take(self) -> bool:
        """Takes a place for the present request; returns whether one was free."""
        if taken := self._places.acquire(blocking=False):
            setattr(g, _PLACE, self._places.release)
        return taken

    @staticmethod
    def keep(response: Response) -> Response:
        """Keeps a stream's place until the stream is sent."""
        if response.is_streamed and (release := g.pop(_PLACE, None)) is not None:
            response.call_on_close(release)
        return response

    @staticmethod
    def leave(_: BaseException | None = None) -> None:
        """Frees the place, unless a stream holds it."""
        if (release := g.pop(_PLACE, None)) is not None:
            release()


def may_wait() -> bool:
    """Whether a place is free, so that a request which is marked `at_once` may still wait for a moment; takes it."""
    waiting: Waiting = current_app.extensions[_EXTENSION]
    return waiting.take()


def init_waiting(app: Flask, threads: int, check: Callable[[Flask], None]) -> None:
    """Limits the requests of `app` that wait; `check` registers the checks that refuse requests before that."""
    waiting = app.extensions[_EXTENSION] = Waiting(threads)
    app.after_request(waiting.keep)  # Flask runs the first registered function last
    app.teardown_request(waiting.leave)
    check(app)
    app.before_request(waiting.admit)
