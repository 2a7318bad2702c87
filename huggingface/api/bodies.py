"""The bodies of requests that are held at once, all together: a bound on memory and on the temporary folder.

One `HeldBodies` an app. The server takes room for a body while it arrives, the app for what a compressed one unpacks
to; it is given back when the request ends. Any thread; must not know routes.
"""

from __future__ import annotations

import threading

from flask import Flask, g, request

from ..errors import ServerFull

EXTENSION = "local-llm-bodies"

# What the server puts into the WSGI environment of a request whose body it had no room for.
UNHELD = "local-llm.unheld"


class HeldBodies:
    """How many bytes of bodies are held, of `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._held = 0

    def room(self) -> Room:
        """Room for one body, of which nothing is taken yet."""
        return Room(self)

    def add(self, size: int) -> bool:
        """Count `size` bytes more (or fewer, where it is negative), if there is room; tells whether there is."""
        with self._lock:
            if size > 0 and self._held + size > self.most:
                return False
            self._held += size
            return True


class Room:
    """What one body takes; it is given back by `close`, or with the object itself."""

    def __init__(self, held: HeldBodies) -> None:
        self._held = held
        self._size = 0

    def take(self, size: int) -> bool:
        """Take room for so many bytes more; tells whether there is room."""
        if not self._held.add(size):
            return False
        self._size += size
        return True

    def close(self) -> None:
        """Give all of it back. Safe to call twice."""
        size, self._size = self._size, 0
        self._held.add(-size)

    __del__ = close


def init_bodies(app: Flask, most: int) -> None:
    """Hold at most so many bytes of request bodies for `app`; a request beyond them is refused (503)."""
    held = app.extensions[EXTENSION] = HeldBodies(most)

    def check() -> None:
        if request.environ.get(UNHELD):
            raise ServerFull("The server holds as many bytes of request bodies as it may; try again later")
        g.unpacked = held.room()

    def give_back(_: BaseException | None) -> None:
        if (room := g.pop("unpacked", None)) is not None:
            room.close()

    app.before_request(check)
    app.teardown_request(give_back)
