"""Which requests may wait for something, and how many of them at once: the others always find a thread.

A request has a thread of the server for as long as it waits: for a model, for its users to go, for another process's
lock, for the Hub, for its turn. So every route counts as one that may wait, unless it says that it answers `at_once`;
beyond a number of them one more is refused, with `Retry-After`. A stream has its place until it is sent.
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
_STATIC = "static"  # what Flask calls a blueprint's route to its files


def at_once(view: View) -> View:
    """Mark a view as one that waits for nothing: it has what it tells, and runs however many others wait.

    It stands below the route's own decorator.
    """
    view.at_once = True  # type: ignore[attr-defined]
    return view


class Waiting:
    """The places of the requests that may wait, of which there are fewer than threads."""

    def __init__(self, threads: int) -> None:
        """`threads` are those that serve requests; a sixteenth of them is kept for those that wait for nothing."""
        self._places = threading.BoundedSemaphore(max(1, threads - max(1, threads // 16)))

    def admit(self) -> None:
        """Give the present request a place, if it is one that may wait.

        Raises:
            ServerFull: there is none.
        """
        if request.endpoint is None or request.endpoint.rpartition(".")[2] == _STATIC:
            return
        if getattr(current_app.view_functions[request.endpoint], "at_once", False):
            return
        if not self.take():
            raise ServerFull

    def take(self) -> bool:
        """Give the present request a place, if there is one."""
        if taken := self._places.acquire(blocking=False):
            setattr(g, _PLACE, self._places.release)
        return taken

    @staticmethod
    def keep(response: Response) -> Response:
        """Let a stream keep the place until it is sent."""
        if response.is_streamed and (release := g.pop(_PLACE, None)) is not None:
            response.call_on_close(release)
        return response

    @staticmethod
    def leave(_: BaseException | None = None) -> None:
        """Give the place back, unless a stream has it."""
        if (release := g.pop(_PLACE, None)) is not None:
            release()


def may_wait() -> bool:
    """Whether a request that is answered at once may wait for a moment all the same: as long as there are places."""
    waiting: Waiting = current_app.extensions[_EXTENSION]
    return waiting.take()


def init_waiting(app: Flask, threads: int, check: Callable[[Flask], None]) -> None:
    """Bound the requests of `app` that wait; `check` puts before it whatever refuses requests altogether."""
    waiting = app.extensions[_EXTENSION] = Waiting(threads)
    app.after_request(waiting.keep)  # of all that look at a response the first to be named is the last to run
    app.teardown_request(waiting.leave)
    check(app)
    app.before_request(waiting.admit)
