"""The server's connections: limits of their number, of their time, and of the bytes kept from them.

waitress reads and writes all connections on one thread, and only that thread decides here; its workers only run
requests. A client has a time limit for its headers, its body, reading its answer and being idle. The used share of the
present limit is the connection's wear: at 1 the connection is closed, and where connections or file descriptors run
out, the most worn one is closed. Must not know routes or models.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import MultiSocketServer, TcpWSGIServer
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import BadRequest, RequestEntityTooLarge

from dispatcher import Dispatcher
from huggingface.api.http.bodies import UNHELD, HeldBodies
from huggingface.api.http.host_check import Guard

logger = logging.getLogger(__name__)

# A body may be longer than the app's limit by this factor before its sender is cut off. The bytes beyond the limit are
# read and dropped, so that the client has finished sending when the answer arrives.
_BODY_SLACK = 16

_MAX_LINE = 4096  # bytes of a line with the size of a chunk
_MAX_TRAILER = 65536
_AT_ONCE = 128  # connections accepted before the others are served again
_LOOK_AGAIN = 1.0  # seconds between checks for overdue connections, and before the next try to accept
_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})  # `accept` lacks a resource


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of connections. Times in seconds, sizes in bytes.

    `connections` is the most at once. `receive` is for the headers of a request, and for its body before that must
    arrive at `rate` bytes per second on average; `send` is for reading any part of an answer, `idle` for the next
    request; `body` is the app's own limit.
    """

    connections: int
    receive: float
    rate: int
    send: float
    idle: float
    body: int


class _Answers(Protocol):
    """The part of a channel that answers outside of the app need."""

    server: Listener


def _error_answer(channel: _Answers, message: str, headers: dict[str, str]) -> tuple[bytes, list[tuple[str, str]]]:
    """The documented body of a failure and its headers, for requests that never reach the app."""
    body = json.dumps({"success": False, "error": message}).encode()
    told = [("Content-Type", "application/json")]
    told += channel.server.guard.answer_headers(headers.get("ORIGIN"), headers.get("HOST", ""))
    return body, told


class _JSONErrorTask(ErrorTask):  # type: ignore[misc]
    """Answers a request that waitress itself refuses, in the documented shape."""

    def execute(self) -> None:
        error = self.request.error
        message = f"{error.reason}: {error.body}"
        if isinstance(error, RequestEntityTooLarge):
            message = f"The request body is larger than {self.channel.server.limits.body} bytes"
        self.status = f"{error.code} {error.reason}"
        # After a failure of the app, `self.request` is a new request without the client's headers.
        sent = (self.channel.requests or [self.request])[0].headers
        body, headers = _error_answer(self.channel, message, sent)
        self.response_headers.extend(headers)
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Task(WSGITask):  # type: ignore[misc]
    """A request to the app; the environment says whether there was room for the body."""

    def get_environment(self) -> dict[str, Any]:
        """The WSGI environment."""
        environ: dict[str, Any] = super().get_environment()
        environ[UNHELD] = self.request.unheld
        return environ


class _Body(OverflowableBuffer):  # type: ignore[misc]
    """A request's body. Beyond the limit, or without room, its bytes are counted and dropped, the earlier ones too."""

    def __init__(self, overflow: int, maximum: int, held: HeldBodies) -> None:
        super().__init__(overflow)
        self._maximum, self._room = maximum, held.room()
        self._size = 0
        self._dropped = False
        self.unheld = False

    def __len__(self) -> int:
        return self._size

    def append(self, data: bytes) -> None:
        """Keeps further bytes, or drops them."""
        self._size += len(data)
        if self._dropped:
            return
        self.unheld = self._size <= self._maximum and not self._room.take(len(data))
        if self._size > self._maximum or self.unheld:
            self.close()
            self.buf, self.strbuf, self._dropped = None, b"", True
        else:
            super().append(data)

    def close(self) -> None:
        """Frees the body's bytes."""
        super().close()
        self._room.close()


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    """Parses a request as it arrives; `adj` holds the limits and the held bodies."""

    completed: bool

    @property
    def unheld(self) -> bool:
        """Whether there was no room for the request's body."""
        return self.body_rcv is not None and self.body_rcv.getbuf().unheld

    def parse_header(self, header_plus: bytes) -> None:
        """Reads the headers, and prepares for the body."""
        super().parse_header(header_plus)
        if self.body_rcv is not None:
            self.body_rcv.buf = _Body(self.adj.inbuf_overflow, self.adj.limits.body, self.adj.held)

    def received(self, data: bytes) -> int:
        """Takes bytes; limits the framing of a chunked body too."""
        consumed: int = super().received(data)
        if self.chunked and not self.completed and self.body_rcv is not None:
            line, trailer = len(self.body_rcv.control_line), len(self.body_rcv.trailer)
            if line > _MAX_LINE or trailer > _MAX_TRAILER:
                self.error = BadRequest("Chunk size or trailer too long")
                self.completed = True
        return consumed


class Connection(HTTPChannel):  # type: ignore[misc]
    """One client's connection."""

    task_class = _Task
    error_task_class = _JSONErrorTask
    parser_class = _Parser

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._turn = 0  # changes when a request begins and when it is complete
        self._sent = 0  # bytes
        self._state: tuple[Any, ...] = ()
        self._since = 0.0
        super().__init__(*arguments, **options)
        self.wear(time.monotonic())

    def received(self, data: bytes) -> bool:
        """Takes bytes of requests."""
        before = self.request
        taken: bool = super().received(data)
        if before is None or self.request is not before:
            self._turn += 1
        self.wear(time.monotonic())
        return taken

    def send(self, data: bytes, do_close: bool = True) -> int:
        """Sends bytes to the client; returns how many it took."""
        sent: int = super().send(data, do_close)
        self._sent += sent
        return sent

    def wear(self, now: float) -> float:
        """The used share of the client's time limit, 1 for all of it; 0 while the client waits for the server.

        A state's time begins with the first call in that state. Only for the connections' thread.
        """
        limits: Limits = self.server.limits
        if self.total_outbufs_len:
            state, limit = ("unread", self._sent), limits.send
        elif self.requests:
            state, limit = ("served", 0), float("inf")
        elif self.request is None and self._turn:
            state, limit = ("idle", self._turn), limits.idle
        elif self.request is None or not self.request.headers_finished:
            state, limit = ("headers", self._turn or 1), limits.receive  # the first headers begin with the connection
        else:
            state, limit = ("body", self._turn), limits.receive + self.request.body_bytes_received / limits.rate
        if state != self._state:
            self._state, self._since = state, now
        return (now - self._since) / limit

    def overdue(self, now: float) -> bool:
        """Whether the client has used up its time. If its bytes lie unread, the server is the slow side."""
        if self.wear(now) < 1:
            return False
        try:
            return self._state[0] == "unread" or not self.socket.recv(1, socket.MSG_PEEK)
        except OSError:  # no bytes, or no client
            return True

    def give_up(self, status: str, message: str) -> None:
        """Closes the connection; sends the reason to a client in the middle of a request, if it can take it at once."""
        if self.request is not None and not self.requests and not self.total_outbufs_len:
            body, headers = _error_answer(self, message, self.request.headers)
            headers += [("Content-Length", str(len(body))), ("Connection", "close"), ("Retry-After", "1")]
            head = "\r\n".join([f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers)])
            with suppress(OSError):
                self.socket.send(head.encode("latin-1") + b"\r\n\r\n" + body)
        self.handle_close()

    def handle_close(self) -> None:
        """Closes the connection, and frees the bytes of a request that will never be complete."""
        super().handle_close()
        if self.request is not None:
            self.request.close()

    def handle_expt(self) -> None:
        """Closes the connection on urgent data: no HTTP client sends it, and the system would report it for ever."""
        self.handle_close()


class Listener(TcpWSGIServer):  # type: ignore[misc]
    """A listening socket. The listeners of one server share their connections."""

    channel_class = Connection
    limits: Limits
    guard: Guard
    stopped: threading.Event
    active_channels: dict[int, Connection]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._looks_at = self._accepts_at = 0.0
        super().__init__(*arguments, **options)

    def readable(self) -> bool:
        """Whether to accept a connection now. Called before every wait, so overdue connections are closed here too."""
        if self.stopped.is_set():
            raise SystemExit(0)
        now = time.monotonic()
        if now >= self._looks_at:
            self._looks_at = now + _LOOK_AGAIN
            for connection in list(self.active_channels.values()):
                if connection.overdue(now):
                    connection.give_up("408 Request Timeout", "The request took too long to arrive")
        if now < self._accepts_at:
            return False
        full = len(self.active_channels) >= self.limits.connections
        return not full or any(each.wear(now) > 0 for each in self.active_channels.values())

    def handle_accept(self) -> None:
        """Accepts connections; at the limit, closes the most worn ones for new ones."""
        for _ in range(_AT_ONCE):
            if len(self.active_channels) >= self.limits.connections and not self._evict():
                return
            try:
                pair = self.accept()
            except OSError as error:
                if error.errno in _SHORT and not self._evict():
                    logger.warning("No connection can be accepted: %s", error.strerror)
                    self._accepts_at = time.monotonic() + _LOOK_AGAIN
                return
            if pair is None:
                return
            client, address = pair
            try:
                self.set_socket_options(client)
                self.channel_class(self, client, self.fix_addr(address), self.adj, map=self._map)
            except OSError:  # the client has gone already
                client.close()

    def handle_error(self) -> None:
        """Logs the error and continues, so that an error with one connection does not stop the others."""
        logger.exception("Accepting a connection failed")
        self._accepts_at = time.monotonic() + _LOOK_AGAIN

    def _evict(self) -> bool:
        """Closes the most worn connection; False if all clients are waiting for the server."""
        now = time.monotonic()
        worn = max(self.active_channels.values(), key=lambda each: each.wear(now), default=None)
        if worn is None or worn.wear(now) <= 0:
            return False
        worn.give_up("503 Service Unavailable", "There are too many connections; try again later")
        return True


def listen(
    app: Any,
    limits: Limits,
    guard: Guard,
    held: HeldBodies,
    stopped: threading.Event,
    dispatcher: Dispatcher,
    **adjustments: Any,
) -> MultiSocketServer:
    """Returns a server for a WSGI app, already listening.

    `held` counts its bodies, `dispatcher` runs its requests, `adjustments` are waitress's own.

    Its loop ends, with SystemExit, within a second after `stopped` is set.

    Raises:
        OSError: the server cannot listen on the address.
        ValueError: waitress cannot resolve the address.
    """
    adj = Adjustments(max_request_body_size=limits.body * _BODY_SLACK, asyncore_use_poll=True, **adjustments)
    adj.limits, adj.held = limits, held
    sockets: dict[int, Any] = {}
    listeners = [Listener(app, sockets, dispatcher=dispatcher, adj=adj, sockinfo=each) for each in adj.listen]
    connections: dict[int, Connection] = {}
    for listener in listeners:
        listener.limits, listener.guard, listener.active_channels = limits, guard, connections
        listener.stopped = stopped
    dispatcher.set_thread_count(adj.threads)
    addresses = [(each.effective_host, each.effective_port) for each in listeners]
    return MultiSocketServer(sockets, adj, addresses, dispatcher, listeners[0].log_info)
