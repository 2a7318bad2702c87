"""The bytes of requests' bodies: how many are held at once, and unpacking those that are compressed.

One `HeldBodies` an app bounds memory and the temporary folder. The server takes room for a body while it arrives, the
app for what a compressed one unpacks to; it is given back when the request ends. Any thread; must not know routes.
"""

from __future__ import annotations

import threading
import zlib
from types import MappingProxyType
from typing import Any

from flask import Flask, g, request
from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType

from ...errors import InvalidRequest, ServerFull

EXTENSION = "local-llm-bodies"

# What the server puts into the WSGI environment of a request whose body it had no room for.
UNHELD = "local-llm.unheld"


# What zlib calls the formats of each coding; some clients' deflate is without the header that it should have.
_FORMATS = MappingProxyType({"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)})
_PIECE = 65536  # bytes
_MOST_MEMBERS = 1000  # of one gzip body: each costs more than its bytes

_FULL = "The server holds as many bytes of request bodies as it may; try again later"


class UnsupportedCoding(UnsupportedMediaType):
    """A body is compressed in a way that is not known here. The answer names those that are, as RFC 7694 says."""

    def get_headers(self, *arguments: Any, **options: Any) -> list[tuple[str, str]]:
        """The headers of the answer."""
        return [*super().get_headers(*arguments, **options), ("Accept-Encoding", ", ".join(("gzip", "deflate")))]


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
            raise ServerFull(_FULL)
        g.unpacked = held.room()

    def give_back(_: BaseException | None) -> None:
        if (room := g.pop("unpacked", None)) is not None:
            room.close()

    app.before_request(check)
    app.teardown_request(give_back)


def unpacked(data: bytes, coding: str, most: int, room: Room) -> bytes:
    """A body without the coding that its `Content-Encoding` names; it may unpack to `most` bytes.

    Raises:
        UnsupportedCoding: no such coding is known here.
        RequestEntityTooLarge: it unpacks to more.
        ServerFull: as many bytes of bodies are held as may be.
        InvalidRequest: it is damaged or cut short.
    """
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return data
    if coding not in _FORMATS:
        raise UnsupportedCoding(f"Content-Encoding must be gzip, deflate or identity, not {coding[:100]!r}")
    for form in _FORMATS[coding]:
        try:
            return _inflated(memoryview(data), form, most, room)
        except zlib.error:
            continue
    raise InvalidRequest(f"The request body is not valid {coding}")


def _inflated(data: memoryview, form: int, most: int, room: Room) -> bytes:
    parts: list[bytes] = []
    size = at = 0
    for _ in range(_MOST_MEMBERS):
        unpacker = zlib.decompressobj(form)
        while not unpacker.eof:
            fed = data[at : at + _PIECE]
            part = unpacker.decompress(fed, _PIECE)
            at += len(fed) - len(unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail)
            size += len(part)
            if size > most:
                raise RequestEntityTooLarge
            if not room.take(len(part)):
                raise ServerFull(_FULL)
            parts.append(part)
            if not fed and not part and not unpacker.eof:
                raise InvalidRequest("The compressed request body is cut short")
        if not bytes(data[at:]).strip(b"\0"):  # zeros may fill up what follows a gzip member
            return b"".join(parts)
        if form != 31:
            break
    raise zlib.error
