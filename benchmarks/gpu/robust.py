"""Robustness: clients that leave, many at once, a load beside generations, and the end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from json import dumps
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

import psutil

from ..report import percentile
from . import models
from .scale import Scale
from .served import API, Served, generation, texts_of
from .tell import Tell

_SOON = 60.0  # seconds that something may take before it counts as not happening
_ENDLESS = 1800  # tokens


def run(root: Path, scale: Scale, tell: Tell) -> None:
    """All of it, on one server that has to live through it; it is ended by SIGTERM."""
    small, large = f"{models.ORG}/llama", f"{models.ORG}/large"
    with Served(root, scale.device) as server:
        server.register(small)
        server.register(large)
        server.load(large, dtype=scale.half)
        server.generate(large, "The cat", max_new_tokens=2)
        with tell.part("a client that hangs up"):
            _hangs_up(server, large, tell)
        with tell.part("a cancel by id"):
            _cancelled(server, large, tell)
        with tell.part("many callers at once"):
            lengths = {"max_new_tokens": scale.new_tokens, "min_new_tokens": scale.new_tokens}
            bodies = [generation(large, f"{number} cats", **lengths) for number in range(scale.many)]
            callers = server.callers(bodies)
            callers.start()
            ends = [texts_of(stream)[1] for stream in callers.finish()]
            whole = sum(end["usage"]["completion_tokens"] == scale.new_tokens for end in ends)
            tell.check("many callers at once", whole == len(ends) == scale.many, answered=whole)
        with tell.part("a load beside generations"):
            _loads_beside(server, small, large, scale, tell)
        with tell.part("SIGTERM"):
            _ends(server, large, tell)


def _running(server: Served) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.done("GET", f"{API}/requests")["requests"]
    return found


def _comes(true: Callable[[], bool]) -> float | None:
    """Seconds until something is true; None where it is not."""
    began = monotonic()
    while monotonic() - began < _SOON:
        if true():
            return monotonic() - began
        sleep(0.01)
    return None


def _long(model_id: str) -> dict[str, Any]:
    return generation(model_id, "The cat", max_new_tokens=_ENDLESS, min_new_tokens=_ENDLESS)


def _hangs_up(server: Served, model_id: str, tell: Tell) -> None:
    for streams in (True, False):
        body = dumps({**_long(model_id), "stream": streams}).encode()
        head = f"POST {API}/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            came = _comes(lambda: any(each["completion_tokens"] > 0 for each in _running(server)))
        seconds = _comes(lambda: not _running(server))
        name = "a client that hangs up costs nothing more" + (", streaming" if streams else "")
        tell.check(name, came is not None and seconds is not None, seconds=seconds)


def _cancelled(server: Served, model_id: str, tell: Tell) -> None:
    answers: list[tuple[int, dict[str, Any]]] = []
    asking = threading.Thread(target=lambda: answers.append(server.call("POST", f"{API}/generate", _long(model_id))))
    asking.start()
    _comes(lambda: bool(_running(server)))
    server.done("DELETE", f"{API}/requests/{_running(server)[0]['request_id']}")
    asking.join()
    status = answers[0][0]
    tell.check("a cancel by id", status == 499 and _comes(lambda: not _running(server)) is not None, status=status)


def _loads_beside(server: Served, small: str, large: str, scale: Scale, tell: Tell) -> None:
    """How long `/health` takes, and how long tokens pause, while the large model is read and the small one writes."""
    server.done("POST", f"{API}/models/{large}/unload", {})
    server.generate(small, "The cat", max_new_tokens=2)
    asked = generation(small, "The cat", max_new_tokens=400, min_new_tokens=400)
    before = server.generate(**asked)["response"]
    loading = threading.Thread(target=server.load, args=(large,), kwargs={"dtype": scale.half})
    callers = server.callers([asked] * 4)
    callers.start()
    loading.start()
    taken = server.latencies("/health", lambda: not loading.is_alive())
    loading.join()
    streams = callers.finish()
    same = [texts_of(stream)[1]["response"] == before for stream in streams]
    gaps = [
        after - earlier
        for stream in streams
        for (earlier, _), (after, _) in zip(stream.events, stream.events[1:], strict=False)
    ]
    tell.check("texts beside a load are the same", all(same), equal=sum(same))
    tell.figure(
        "/health while a model loads",
        calls=len(taken),
        p50_ms=percentile(taken, 0.5) * 1000,
        p99_ms=percentile(taken, 0.99) * 1000,
        gap_p50_ms=percentile(gaps, 0.5) * 1000,
        gap_p99_ms=percentile(gaps, 0.99) * 1000,
    )


def _ends(server: Served, model_id: str, tell: Tell) -> None:
    """SIGTERM while a generation runs: the process ends by itself, with status 0."""
    asking = threading.Thread(target=lambda: _ignoring(lambda: server.call("POST", f"{API}/generate", _long(model_id))))
    asking.start()
    _comes(lambda: bool(_running(server)))
    began = perf_counter()
    status = server.program.ask_to_end(_SOON)
    seconds = perf_counter() - began
    asking.join()
    left = [each for each in psutil.Process().children(recursive=True) if "app.py" in " ".join(each.cmdline())]
    tell.check("SIGTERM ends it", status == 0 and not left, status=status, seconds=seconds)


def _ignoring(call: Callable[[], Any]) -> None:
    try:
        call()
    except (OSError, ValueError):  # the server went away in the middle of it, as it was told
        return
