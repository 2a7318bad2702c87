"""A Hub, servers that know no other, and what the tests of files ask of them.

Used by the tests' threads; the servers are processes of their own.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import tiny_models
from conftest import Server
from hub import Hub, Repository, Request


class Place:
    """A Hub with repositories, and servers that know it only; they share its cache, their models folder is empty."""

    def __init__(self, directory: Path, built: Path) -> None:
        self.directory, self.built = directory, built
        self.home, self.local = directory / "home", directory / "local"
        (directory / "hub").mkdir()
        self.local.mkdir()
        self.hub = Hub(directory / "hub")
        self.servers: list[Server] = []

    def publish(self, model_id: str, name: str = "gpt2") -> Repository:
        """Put a copy of a tiny model on the Hub, without the graph that a server may have made of it."""
        tiny_models.build(self.built, name)
        source = self.built / "tiny" / name
        shutil.copytree(source, self.hub.root / model_id, ignore=shutil.ignore_patterns(".local-llm"))
        return self.hub.repository(model_id)

    def serve(self, home: Path | None = None, **environment: str) -> Server:
        """A server; `home` is another cache than the shared one."""
        directory = self.directory / f"server-{len(self.servers)}"
        directory.mkdir()
        environment = self.hub.environment(home or self.home, **environment)
        self.servers.append(Server(directory, self.local, **environment))
        return self.servers[-1]

    def cached(self, model_id: str) -> Path:
        """The folder that the Hub's cache keeps for the model."""
        return self.home / "hub" / f"models--{model_id.replace('/', '--')}"

    def snapshot(self, model_id: str) -> Path:
        """The cached files of the one commit that is in the cache."""
        (folder,) = (self.cached(model_id) / "snapshots").iterdir()
        return folder


def load(server: Server, model_id: str, model_type: str = "text-generation") -> Any:
    """Register the model, if it is not, and load it anew; returns the answer."""
    server.add(model_id, model_type)
    return server.call("POST", f"/models/{model_id}/load", json={"force_reload": True})


def works(server: Server, model_id: str, model_type: str = "text-generation") -> str:
    """Load the model, generate, and return the text."""
    answer = load(server, model_id, model_type)
    assert answer.status_code == 200, answer.text
    body = {"model_id": model_id, "prompt": "The little harbour", "max_new_tokens": 4, "do_sample": False}
    answer = server.call("POST", "/generate", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["response"])


def refused(answer: Any, status: int, model_id: str, *words: str) -> str:
    """Check that the answer is a clear error that names the model and holds nothing private; returns its message."""
    assert answer.status_code == status, answer.text
    assert answer.json()["success"] is False
    message = str(answer.json()["error"])
    assert f"'{model_id}'" in message
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert not re.search(r"/(tmp|home|root|usr|work|var)\b", message)
    return message


def sent(requests: list[Request]) -> list[str]:
    """The names of the files that these requests brought, in order; not of those of which they brought a piece."""
    return [
        request.file
        for request in requests
        if request.method == "GET" and "/api/" not in request.path and request.end is None
    ]
