"""Connections: however many there are and however slowly they send or read, the server answers the others."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from conftest import PATIENCE, ROOT

from connections import Connection, Limits

HEAD = b"POST /api/huggingface/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALF_BODY = HEAD + b"Content-Length: 1000\r\n\r\n" + b"{" * 500
HALF_HEADERS = HEAD[:-20]


@pytest.fixture
def connect() -> Iterator[Any]:
    """Opens a connection to a server and sends bytes; all are closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def open_one(server: Any, data: bytes = b"", buffer: int | None = None) -> socket.socket:
            client = stack.enter_context(socket.socket())
            if buffer is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            client.settimeout(60)
            address = urlsplit(server.url)
            client.connect((address.hostname, address.port))
            client.sendall(data)
            return client

        yield open_one


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(65536):
            answer += chunk
    return answer


def healthy(server: Any) -> bool:
    """Whether the server answers a new client."""
    return requests.get(f"{server.url}/health", timeout=PATIENCE).status_code == 200


def test_the_server_goes_on_beyond_1024_descriptors(start_server: Any, connect: Any) -> None:
    """Half bodies on 1,100 connections end neither the server nor its answers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    server = start_server(LOCAL_LLM_CONNECTION_LIMIT="1200")
    half = HEAD + b"Content-Length: 16000000\r\n\r\n" + b"{" * 600
    for _ in range(1100):
        connect(server, half)
    assert healthy(server)
    assert psutil.Process(server.process.pid).num_fds() > 1100
    assert server.process.poll() is None


@pytest.mark.parametrize("sent", [b"", HALF_HEADERS, HALF_BODY], ids=["nothing", "half headers", "half a body"])
def test_connections_that_hold_every_place_make_room_for_a_new_one(
    start_server: Any, connect: Any, sent: bytes
) -> None:
    """With more unfinished connections than there may be, a new client is answered, time after time."""
    server = start_server(LOCAL_LLM_CONNECTION_LIMIT="20")
    first = connect(server, sent)
    assert healthy(server)
    for _ in range(3):
        for _ in range(30):
            connect(server, sent)
        for _ in range(3):
            assert healthy(server)
    assert read_all(first).startswith(b"HTTP/1.1 503" if sent else b"")


def test_few_open_files_are_fewer_connections_and_no_end_of_the_server(start_server: Any, connect: Any) -> None:
    """Where the system allows few open files, connections beyond them are closed, and new clients are answered."""
    server = start_server()
    psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE, (64, 64))
    for _ in range(150):
        connect(server, HALF_BODY)
    assert healthy(server)
    assert server.process.poll() is None


def test_a_server_asks_for_as_many_open_files_as_its_connections_need() -> None:
    """A low soft limit is raised to what the connections need, as far as the hard one allows."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard})); from server import _connections;"
    )
    for hard, soft, connections in ((4096, 1412, 300), (256, 256, 42)):
        program = code.format(hard=hard) + "print(_connections(300), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        assert done.stdout.split() == [str(connections), str(soft)]


@pytest.mark.parametrize("sent", [HALF_HEADERS, HALF_BODY], ids=["headers", "body"])
def test_a_request_that_never_arrives_is_told_so(start_server: Any, connect: Any, sent: bytes) -> None:
    """A client that stops in the middle of a request gets a 408 and the connection's end."""
    server = start_server(LOCAL_LLM_RECEIVE_TIMEOUT="0.5")
    client = connect(server, sent)
    answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b'"success": false' in answer


def test_an_idle_connection_is_closed_in_silence(start_server: Any, connect: Any) -> None:
    """A connection that waits for its client's next request, or has had none, ends without a word."""
    assert read_all(connect(start_server(LOCAL_LLM_RECEIVE_TIMEOUT="0.5"))) == b""
    server = start_server(LOCAL_LLM_IDLE_TIMEOUT="0.5")
    answer = read_all(connect(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.count(b"HTTP/1.1") == 1


def test_a_client_that_does_not_read_is_cut_off(start_server: Any, connect: Any) -> None:
    """A client that takes nothing of a long answer loses its connection, and the server holds it no longer."""
    server = start_server(LOCAL_LLM_SEND_TIMEOUT="0.5")
    client = connect(server, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100, buffer=4096)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):  # by whether the server had read all that was sent
        while True:
            client.sendall(b"x")
            time.sleep(0.05)
    assert healthy(server)


class Place:
    """What a connection needs of its server."""

    limits = Limits(connections=10, receive=30, rate=1000, send=60, idle=120, body=2**20)

    def __init__(self) -> None:
        self.active_channels: dict[int, Any] = {}


def test_only_what_a_client_does_wears_its_connection() -> None:
    """A slow but steady body, a slow but steady reader, and a client that waits for the server lose nothing."""
    from waitress.adjustments import Adjustments

    from huggingface.api.http.bodies import HeldBodies

    ours, theirs = socket.socketpair()
    adj = Adjustments()
    adj.limits, adj.held = Place.limits, HeldBodies(2**20)
    place: Any = Place()
    place.add_task = lambda task: None
    with ours, theirs:
        connection = Connection(place, ours, ("", 0), adj, map={})
        now = time.monotonic()
        assert connection.wear(now + 15) == pytest.approx(0.5, abs=0.1)
        assert connection.overdue(now + 31)
        theirs.sendall(HEAD)
        assert not connection.overdue(now + 31)  # what has come lies unread: it is the server that is slow
        ours.recv(len(HEAD))
        connection.received(HEAD)
        assert connection.wear(now + 15) == pytest.approx(0.5, abs=0.1)  # it is still about the headers
        connection.received(b"Content-Length: 60001\r\n\r\n")
        for seconds in range(1, 61):  # a thousand bytes a second, for twice as long as a body may take at least
            connection.received(b" " * 1000)
            assert connection.wear(now + seconds) < 1
        assert connection.wear(now + 100) > 1
        connection.received(b" ")
        assert connection.requests
        assert connection.wear(now + 10**6) == 0  # it waits for its answer
        connection.total_outbufs_len = 5
        assert connection.wear(now + 10**6) == 0
        assert connection.wear(now + 10**6 + 30) == 0.5
        connection.send(b"x")
        assert connection.wear(now + 10**6 + 40) == 0  # it reads
        connection.total_outbufs_len, connection.requests = 0, []
        assert connection.wear(now + 10**6 + 50) == 0
        assert connection.wear(now + 10**6 + 110) == 0.5  # idle
        connection.close()
