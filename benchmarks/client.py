"""The load generator: many callers that post at the same moment and note when each event of their answer arrives.

A thread and a blocking socket a caller: that costs the least of what shares the cores with the server. Lines are kept
as they come and understood afterwards. It knows HTTP and server-sent events, and nothing of any server's fields.
"""

from __future__ import annotations

import http.client
import json
import threading
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Request:
    """One POST of a JSON body."""

    port: int
    path: str
    body: dict[str, Any]


@dataclass
class Stream:
    """What one caller received: the data of each event with its time, in seconds of `perf_counter`."""

    began: float = 0.0
    ended: float = 0.0
    events: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


def post(request: Request, limit: float) -> dict[str, Any]:
    """Post and return the JSON answer; an error status is an `OSError` with what the server said."""
    connection = http.client.HTTPConnection("127.0.0.1", request.port, timeout=limit)
    try:
        response = _send(connection, request)
        body = response.read()
    finally:
        connection.close()
    if response.status >= 400:
        raise OSError(_refusal(response.status, body))
    return dict(json.loads(body))


def get(port: int, path: str, limit: float) -> bytes:
    """The body of a GET; an error status is an `OSError` with what the server said."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=limit)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status >= 400:
        raise OSError(_refusal(response.status, body))
    return body


def follow(request: Request, stream: Stream, limit: float) -> None:
    """Post and fill `stream` until the server ends it, or `limit` seconds are over. Errors go into the stream."""
    connection = http.client.HTTPConnection("127.0.0.1", request.port, timeout=limit)
    stream.began = perf_counter()
    try:
        response = _send(connection, request)
        if response.status != 200:
            stream.error = _refusal(response.status, response.read())
            return
        for line in response:
            now = perf_counter()
            if line.startswith(b"data:"):
                stream.events.append((now, line[5:].strip()))
            if now - stream.began > limit:
                raise TimeoutError
    except TimeoutError:
        stream.error = f"not finished after {limit:.0f} s"
    except (OSError, http.client.HTTPException) as error:
        stream.error = f"{type(error).__name__}: {error}"
    finally:
        stream.ended = perf_counter()
        connection.close()


class Callers:
    """Callers that start at once; their streams can be looked at while they run."""

    def __init__(self, requests: list[Request], limit: float) -> None:
        self.streams = [Stream() for _ in requests]
        self._gate = threading.Barrier(len(requests) + 1)
        self._threads = [
            threading.Thread(target=self._run, args=(request, stream, limit), daemon=True)
            for request, stream in zip(requests, self.streams, strict=True)
        ]

    def start(self) -> None:
        """Let them go, once all are ready."""
        for thread in self._threads:
            thread.start()
        self._gate.wait()

    def running(self) -> bool:
        """Whether any of them still waits for something."""
        return any(thread.is_alive() for thread in self._threads)

    def finish(self) -> list[Stream]:
        """Wait for all of them."""
        for thread in self._threads:
            thread.join()
        return self.streams

    def _run(self, request: Request, stream: Stream, limit: float) -> None:
        self._gate.wait()
        follow(request, stream, limit)


def _send(connection: http.client.HTTPConnection, request: Request) -> http.client.HTTPResponse:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    connection.request("POST", request.path, json.dumps(request.body).encode(), headers)
    return connection.getresponse()


def _refusal(status: int, body: bytes) -> str:
    return f"HTTP {status}: {body[:200].decode(errors='replace').strip()}"
