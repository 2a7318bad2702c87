"""Limits the bytes of request bodies that are held at once, and unpacks compressed bodies.

Each app has one `HeldBodies`, which bounds memory and the temporary folder. The server takes room for a body while it
arrives, and the app for the unpacked bytes of a compressed body; the room is freed when the request ends. Any thread;
must not know routes.
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

# The WSGI environment's key that is true for a request whose body had no room.
UNHELD = "local-llm.unheld"


# zlib's formats of each coding; some clients send deflate without its header.
_FORMATS = MappingProxyType({"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)})
_PIECE = 65536  # bytes
_MAX_MEMBERS = 1000  # members of one gzip body: each costs more than its bytes

_FULL = "The server holds as many bytes of request bodies as it may; try again later"


class UnsupportedCoding(UnsupportedMediaType):
    """A body has an unknown compression. The answer names the known ones, as RFC 7694 says."""

    def get_headers(self, *arguments: Any, **options: Any) -> list[tuple[str, str]]:
        """The headers of the answer."""
        return [*super().get_headers(*arguments, **options), ("Accept-Encoding", ", ".join(("gzip", "deflate")))]


class HeldBodies:
    """Counts the held bytes of bodies, at most `maximum`."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self._lock = threading.Lock()
        self._held = 0

    def room(self) -> Room:
        """A `Room` for one body, empty at first."""
        return Room(self)

    def add(self, size: int) -> bool:
        """Adds `size` bytes (negative ones are freed) if there is room; returns whether there was."""
        with self._lock:
            if size > 0 and self._held + size > self.maximum:
                return False
            self._held += size
            return True


class Room:
    """The room that one body takes; `close` frees it, and so does the object's end."""

    def __init__(self, held: HeldBodies) -> None:
        self._held = held
        self._size = 0

    def take(self, size: int) -> bool:
        """Takes room for `size` more bytes; returns whether there was room."""
        if not self._held.add(size):
            return False
        self._size += size
        return True

    def close(self) -> None:
        """Frees the room. Safe to call twice."""
        size, self._size = self._size, 0
        self._held.add(-size)

    __del__ = close


def init_bodies(app: Flask, maximum: int) -> None:
    """Limits the held bytes of `app`'s request bodies to `maximum`; a request beyond that is refused (503)."""
    held = app.extensions[EXTENSION] = HeldBodies(maximum)

    def check() -> None:
        if request.environ.get(UNHELD):
            raise ServerFull(_FULL)
        g.unpacked = held.room()

    def give_back(_: BaseException | None) -> None:
        if (room := g.pop("unpacked", None)) is not None:
            room.close()

    app.before_request(check)
    app.teardown_request(give_back)


def unpacked(data: bytes, coding: str, maximum: int, room: Room) -> bytes:
    """Unpacks a body by its `Content-Encoding`, to at most `maximum` bytes.

    Raises:
        UnsupportedCoding: the coding is unknown.
        RequestEntityTooLarge: the body unpacks to more.
        ServerFull: the server holds too many bytes of bodies.
        InvalidRequest: the body is damaged or cut short.
    """
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return data
    if coding not in _FORMATS:
        raise UnsupportedCoding(f"Content-Encoding must be gzip, deflate or identity, not {coding[:100]!r}")
    for form in _FORMATS[coding]:
        try:
            return _inflated(memoryview(data), form, maximum, room)
        except zlib.error:
            continue
    raise InvalidRequest(f"The request body is not valid {coding}")


def _inflated(data: memoryview, form: int, maximum: int, room: Room) -> bytes:
    parts: list[bytes] = []
    size = at = 0
    for _ in range(_MAX_MEMBERS):
        unpacker = zlib.decompressobj(form)
        while not unpacker.eof:
            fed = data[at : at + _PIECE]
            part = unpacker.decompress(fed, _PIECE)
            at += len(fed) - len(unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail)
            size += len(part)
            if size > maximum:
                raise RequestEntityTooLarge
            if not room.take(len(part)):
                raise ServerFull(_FULL)
            parts.append(part)
            if not fed and not part and not unpacker.eof:
                raise InvalidRequest("The compressed request body is cut short")
        if not bytes(data[at:]).strip(b"\0"):  # zeros may pad the end of a gzip member
            return b"".join(parts)
        if form != 31:
            break
    raise zlib.error
