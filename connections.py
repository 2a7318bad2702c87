"""The connections of the server: how many there are, how long each may take, and what is kept of what it sends.

waitress reads and writes all of them on one thread, which alone decides here; its workers only run requests. A client
has a time for its headers, its body, taking its answer and being idle. How much of that is used up is the connection's
wear: one that has used it all is closed, and where places or file descriptors are short, the most worn one makes room.
Must not know routes or models.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import MultiSocketServer, TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.utilities import BadRequest, RequestEntityTooLarge

from huggingface.api.http.bodies import UNHELD, HeldBodies
from huggingface.api.http.host_check import Guard

logger = logging.getLogger(__name__)

# A body may be longer than the app's limit by this factor before its sender is cut off: what is beyond the limit is
# read and dropped, so that the answer finds a client that has finished sending.
_BODY_SLACK = 16

_MOST_LINE = 4096  # bytes of a line that tells the size of a chunk
_MOST_TRAILER = 65536
_AT_ONCE = 16  # connections accepted before the others are looked at again
_LOOK_AGAIN = 1.0  # seconds between two looks at what is overdue, and before accepting is tried again
_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})  # what `accept` lacks


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections there may be, and what each may take. Times in seconds, sizes in bytes.

    `receive` is for the headers of a request, and for its body before that has to come at `rate` bytes per second on
    average; `send` is for taking any part of an answer, `idle` for the next request; `body` is the app's own limit.
    """

    connections: int
    receive: float
    rate: int
    send: float
    idle: float
    body: int


class _Answers(Protocol):
    """What an answer that the app does not make needs of its channel."""

    server: Listener


def _error_answer(channel: _Answers, message: str, headers: dict[str, str]) -> tuple[bytes, list[tuple[str, str]]]:
    """The documented body of a failure, and its headers, for what never reaches the app."""
    body = json.dumps({"success": False, "error": message}).encode()
    told = [("Content-Type", "application/json")]
    told += channel.server.guard.answer_headers(headers.get("ORIGIN"), headers.get("HOST", ""))
    return body, told


class _JSONErrorTask(ErrorTask):  # type: ignore[misc]
    """Answers a request that waitress refuses by itself, in the documented shape."""

    def execute(self) -> None:
        error = self.request.error
        message = f"{error.reason}: {error.body}"
        if isinstance(error, RequestEntityTooLarge):
            message = f"The request body is larger than {self.channel.server.limits.body} bytes"
        self.status = f"{error.code} {error.reason}"
        # A failure of the app has a new request here, without the headers that were sent.
        sent = (self.channel.requests or [self.request])[0].headers
        body, headers = _error_answer(self.channel, message, sent)
        self.response_headers.extend(headers)
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Task(WSGITask):  # type: ignore[misc]
    """A request to the app, which learns where there was no room for the body."""

    def get_environment(self) -> dict[str, Any]:
        """The WSGI environment."""
        environ: dict[str, Any] = super().get_environment()
        environ[UNHELD] = self.request.unheld
        return environ


class _Body(OverflowableBuffer):  # type: ignore[misc]
    """A request's body. What is beyond the limit, or finds no room, is counted and dropped, with all before it."""

    def __init__(self, overflow: int, most: int, held: HeldBodies) -> None:
        super().__init__(overflow)
        self._most, self._room = most, held.room()
        self._size = 0
        self._dropped = False
        self.unheld = False

    def __len__(self) -> int:
        return self._size

    def append(self, data: bytes) -> None:
        """Keep further bytes, or drop them."""
        self._size += len(data)
        if self._dropped:
            return
        self.unheld = self._size <= self._most and not self._room.take(len(data))
        if self._size > self._most or self.unheld:
            self.close()
            self.buf, self.strbuf, self._dropped = None, b"", True
        else:
            super().append(data)

    def close(self) -> None:
        """Give back what it takes."""
        super().close()
        self._room.close()


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    """A request as it comes; `adj` has the limits and the bodies that are held."""

    completed: bool

    @property
    def unheld(self) -> bool:
        """Whether there was no room for its body."""
        return self.body_rcv is not None and self.body_rcv.getbuf().unheld

    def parse_header(self, header_plus: bytes) -> None:
        """Read the headers, and prepare for the body."""
        super().parse_header(header_plus)
        if self.body_rcv is not None:
            self.body_rcv.buf = _Body(self.adj.inbuf_overflow, self.adj.limits.body, self.adj.held)

    def received(self, data: bytes) -> int:
        """Take bytes; what frames a chunked body is bounded, too."""
        consumed: int = super().received(data)
        if self.chunked and not self.completed and self.body_rcv is not None:
            line, trailer = len(self.body_rcv.control_line), len(self.body_rcv.trailer)
            if line > _MOST_LINE or trailer > _MOST_TRAILER:
                self.error = BadRequest("Chunk size or trailer too long")
                self.completed = True
        return consumed


class Connection(HTTPChannel):  # type: ignore[misc]
    """One client's connection."""

    task_class = _Task
    error_task_class = _JSONErrorTask
    parser_class = _Parser

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._turn = 0  # changes with every request that begins or is complete
        self._sent = 0  # bytes
        self._state: tuple[Any, ...] = ()
        self._since = 0.0
        super().__init__(*arguments, **options)
        self.wear(time.monotonic())

    def received(self, data: bytes) -> bool:
        """Take bytes of requests."""
        before = self.request
        taken: bool = super().received(data)
        if before is None or self.request is not before:
            self._turn += 1
        self.wear(time.monotonic())
        return taken

    def send(self, data: bytes, do_close: bool = True) -> int:
        """Hand bytes to the client; how many it took."""
        sent: int = super().send(data, do_close)
        self._sent += sent
        return sent

    def wear(self, now: float) -> float:
        """How much of its time the client has used up, 1 being all; 0 while it waits for the server.

        A state's time begins when this is first asked in it. Only for the thread of the connections.
        """
        limits: Limits = self.server.limits
        if self.total_outbufs_len:
            state, limit = ("unread", self._sent), limits.send
        elif self.requests:
            state, limit = ("served", 0), float("inf")
        elif self.request is None and self._turn:
            state, limit = ("idle", self._turn), limits.idle
        elif self.request is None or not self.request.headers_finished:
            state, limit = ("headers", self._turn or 1), limits.receive  # those of the first begin with the connection
        else:
            state, limit = ("body", self._turn), limits.receive + self.request.body_bytes_received / limits.rate
        if state != self._state:
            self._state, self._since = state, now
        return (now - self._since) / limit

    def overdue(self, now: float) -> bool:
        """Whether the client has used up all of its time. Where what it sent lies unread, it is the server that is
        slow."""
        if self.wear(now) < 1:
            return False
        try:
            return self._state[0] == "unread" or not self.socket.recv(1, socket.MSG_PEEK)
        except OSError:  # nothing is there, or nobody
            return True

    def give_up(self, status: str, message: str) -> None:
        """Close the connection; a client in the middle of a request is told why, if it can take that at once."""
        if self.request is not None and not self.requests and not self.total_outbufs_len:
            body, headers = _error_answer(self, message, self.request.headers)
            headers += [("Content-Length", str(len(body))), ("Connection", "close"), ("Retry-After", "1")]
            head = "\r\n".join([f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers)])
            with suppress(OSError):
                self.socket.send(head.encode("latin-1") + b"\r\n\r\n" + body)
        self.handle_close()

    def handle_close(self) -> None:
        """Close it, and give back what it holds of a request that will never be complete."""
        super().handle_close()
        if self.request is not None:
            self.request.close()

    def handle_expt(self) -> None:
        """Close it for urgent data, which no client of HTTP sends, and of which the system would tell for ever."""
        self.handle_close()


class Listener(TcpWSGIServer):  # type: ignore[misc]
    """A socket that listens. Those of one server share their connections."""

    channel_class = Connection
    limits: Limits
    guard: Guard
    active_channels: dict[int, Connection]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._looks_at = self._accepts_at = 0.0
        super().__init__(*arguments, **options)

    def readable(self) -> bool:
        """Whether to accept a connection now. Asked before every wait, so what is overdue is closed here, too."""
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
        """Accept connections; where there are as many as may be, the most worn ones are closed for them."""
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
            except OSError:  # it has gone already
                client.close()

    def handle_error(self) -> None:
        """Go on: whatever went wrong with one connection, the others are to be accepted."""
        logger.exception("Accepting a connection failed")
        self._accepts_at = time.monotonic() + _LOOK_AGAIN

    def _evict(self) -> bool:
        """Close the most worn connection; whether there was one whose client is not waiting for the server."""
        now = time.monotonic()
        worn = max(self.active_channels.values(), key=lambda each: each.wear(now), default=None)
        if worn is None or worn.wear(now) <= 0:
            return False
        worn.give_up("503 Service Unavailable", "There are too many connections; try again later")
        return True


def listen(app: Any, limits: Limits, guard: Guard, held: HeldBodies, **adjustments: Any) -> MultiSocketServer:
    """A server for a WSGI app, listening already; `held` are the bodies of its requests, `adjustments` waitress's own.

    Raises:
        OSError: the address cannot be listened on.
        ValueError: it cannot be resolved, as waitress says.
    """
    adj = Adjustments(max_request_body_size=limits.body * _BODY_SLACK, asyncore_use_poll=True, **adjustments)
    adj.limits, adj.held = limits, held
    dispatcher = ThreadedTaskDispatcher()
    sockets: dict[int, Any] = {}
    listeners = [Listener(app, sockets, dispatcher=dispatcher, adj=adj, sockinfo=each) for each in adj.listen]
    connections: dict[int, Connection] = {}
    for listener in listeners:
        listener.limits, listener.guard, listener.active_channels = limits, guard, connections
    dispatcher.set_thread_count(adj.threads)
    addresses = [(each.effective_host, each.effective_port) for each in listeners]
    return MultiSocketServer(sockets, adj, addresses, dispatcher, listeners[0].log_info)
