"""The server that is tried: `python app.py` in a process of its own, on a free port, and calls to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

from ..client import Callers, Request, Stream
from ..program import Program

ROOT = Path(__file__).resolve().parents[2]
API = "/api/huggingface"
_START = 300.0  # seconds until it takes connections


class Failed(Exception):
    """The server did not do what it is for; the message says what it answered."""


class Served:
    """A running server; `with Served(...) as server`."""

    def __init__(self, models: Path, device: str, **settings: str) -> None:
        """`settings` are the server's own, by their names in the environment without the prefix."""
        self._folder = tempfile.TemporaryDirectory()
        named = {
            "port": "0",  # the system gives a free one: one chosen here could be another server's by then
            "registry": str(Path(self._folder.name) / "models.json"),
            "models_dir": str(models),
            "device": device,
            "backend": "torch",  # on a CPU too: what is tried is torch's side
            "import_at_start": "false",
            "log_level": "WARNING",
            **settings,
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LOCAL_LLM_")}
        own = {f"LOCAL_LLM_{name.upper()}": value for name, value in named.items()}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
        self.program = Program([sys.executable, "app.py"], {**inherited, **offline, **own}, ROOT)
        self.port = self._started()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it."""
        self.program.stop()
        self._folder.cleanup()

    def call(self, method: str, path: str, body: Any = None, limit: float = 300) -> tuple[int, dict[str, Any]]:
        """The status and the JSON answer of one call."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=limit)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", "Connection": "close"})
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        finally:
            connection.close()

    def done(self, method: str, path: str, body: Any = None, limit: float = 300) -> dict[str, Any]:
        """The JSON answer of a call that has to succeed.

        Raises:
            Failed: it did not.
        """
        status, answer = self.call(method, path, body, limit)
        if status != 200:
            raise Failed(f"{method} {path}: {status} {json.dumps(answer)[:300]}")
        return answer

    def register(self, model_id: str, model_type: str = "text-generation", **fields: Any) -> None:
        """Register a model."""
        self.done("POST", f"{API}/models", {"model_id": model_id, "name": model_id, "model_type": model_type, **fields})

    def load(self, model_id: str, **settings: Any) -> dict[str, Any]:
        """Load a model; other settings load it again."""
        return self.done("POST", f"{API}/models/{model_id}/load", settings)

    def estimate(self, model_id: str, **settings: str) -> dict[str, Any]:
        """What a load would take."""
        query = "&".join(f"{name}={value}" for name, value in settings.items())
        return self.done("GET", f"{API}/models/{model_id}/estimate?{query}")

    def generate(self, model_id: str, prompt: str, **parameters: Any) -> dict[str, Any]:
        """The answer of `/generate`: greedy and without a penalty, where `parameters` say nothing else."""
        return self.done("POST", f"{API}/generate", generation(model_id, prompt, **parameters))

    def together(self, bodies: Sequence[Mapping[str, Any]], path: str = f"{API}/generate") -> list[dict[str, Any]]:
        """The answers to several calls that begin at once."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(lambda body: self.done("POST", path, body), bodies))

    def callers(self, bodies: Sequence[Mapping[str, Any]], limit: float = 300) -> Callers:
        """Streaming callers of `/generate`, to be started."""
        return Callers([Request(self.port, f"{API}/generate", {**body, "stream": True}) for body in bodies], limit)

    def latencies(self, path: str, until: Any, pause: float = 0.02) -> list[float]:
        """Seconds of one GET after the other, until `until()`."""
        taken = []
        while not until():
            began = perf_counter()
            self.done("GET", path, limit=60)
            taken.append(perf_counter() - began)
            sleep(pause)
        return taken

    def _started(self) -> int:
        """The port that the server says it is at.

        Raises:
            Failed: it did not start.
        """
        until = monotonic() + _START
        while not (told := re.search(r"Local LLM is at http://\S+:(\d+)\s", self.program.output())):
            if self.program.ended() or monotonic() > until:
                said = self.program.output()[-2000:]
                self.stop()
                raise Failed(f"the server did not start: {said}")
            sleep(0.1)
        return int(told[1])


def generation(model_id: str, prompt: str, **parameters: Any) -> dict[str, Any]:
    """A body of `/generate`."""
    plain = {"do_sample": False, "repetition_penalty": 1.0}
    return {"model_id": model_id, "prompt": prompt, **plain, **parameters}


def texts_of(stream: Stream) -> tuple[str, dict[str, Any]]:
    """The pieces of a stream put together, and its last event.

    Raises:
        Failed: it failed.
    """
    if stream.error:
        raise Failed(stream.error)
    events = [json.loads(data) for _, data in stream.events]
    last = events[-1] if events else {}
    if not last.get("success"):
        raise Failed(f"a stream ended with {json.dumps(last)[:300]}")
    return "".join(event.get("text", "") for event in events[:-1]), last


def times_of(stream: Stream) -> Iterator[float]:
    """When each piece of text arrived, in seconds after the request."""
    for at, data in stream.events:
        if b'"text"' in data and b'"success"' not in data:
            yield at - stream.began
