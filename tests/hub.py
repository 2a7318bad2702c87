"""A small Hub on loopback: real HTTP, asked by `huggingface_hub` itself through `HF_ENDPOINT`.

Serves the folders of one directory as model repositories, each with a commit, ETags, redirects and byte ranges, and
keeps a record of every request. A repository can be gated, private, damaged or slow: see `Repository`. The test's
thread changes repositories, the server's threads read them.
By hand: `python tests/hub.py FOLDER [PORT]`.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

_RESOLVE = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_BLOB = re.compile(r"/cdn/(?P<id>[^/]+(?:/[^/]+)?)/(?P<commit>[0-9a-f]{40})/(?P<file>.+)")
_API = re.compile(r"/api/models/(?P<id>[^/]+(?:/[^/]+)?)(?:/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/models/(?P<id>[^/]+(?:/[^/]+)?)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Request:
    """What was asked: method, path without its query, and the token that came along."""

    method: str
    path: str
    token: str | None
    start: int = 0

    @property
    def file(self) -> str:
        """The name at the end of the path."""
        return self.path.rsplit("/", 1)[-1]


@dataclass
class Repository:
    """How one repository behaves. What is not set here is as on the real Hub."""

    folder: Path
    gated: bool = False
    private: bool = False
    api: bool = True  # whether /api/models knows it; small Hubs serve files only
    codes: bool = True  # whether a 404 says why (X-Error-Code); small Hubs do not
    tokens: frozenset[str] = frozenset()  # who may read it, where it is gated or private
    silent: frozenset[str] = frozenset()  # files about which no question is ever answered
    stall: frozenset[str] = frozenset()  # files whose download sends its headers and nothing more
    # By a file's name: after how many bytes of any answer the connection breaks; the statuses of its next downloads;
    # what is sent in its stead under its true checksum; a size that is announced and is not true.
    cut: dict[str, int] = field(default_factory=dict)
    status: dict[str, list[int]] = field(default_factory=dict)
    replace: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def files(self) -> dict[str, Path]:
        """Every file, by its name in the repository."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}

    @property
    def commit(self) -> str:
        """Changes when any file does."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, path in self.files().items():
            digest.update(f"{name}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}\0".encode())
        return digest.hexdigest()


class Hub:
    """The Hub: `with Hub(folder) as hub:` serves `folder/<org>/<name>` and `folder/<name>` at `hub.url`."""

    def __init__(self, root: Path, port: int = 0) -> None:
        self.root = root
        self.requests: list[Request] = []
        self.down: int | None = None  # a status that every request gets
        self._repositories: dict[str, Repository] = {}
        self._released = threading.Event()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` is to be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process that knows this Hub only, with its cache in `home`."""
        proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"), "")
        patience = {"HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **proxies, **patience, **more}

    def repository(self, model_id: str) -> Repository:
        """The repository of that id, to be changed at will; there is one wherever there is a folder."""
        return self._repositories.setdefault(model_id, Repository(self.root / model_id))

    def find(self, model_id: str) -> Repository | None:
        """The repository of that id, or None."""
        repository = self.repository(model_id)
        return repository if any(path.is_file() for path in repository.folder.glob("*")) else None

    def asked(self, model_id: str) -> list[Request]:
        """The requests that were about the model, in order."""
        return [request for request in self.requests if f"/{model_id}/" in f"{request.path}/"]

    def downloads(self, model_id: str) -> list[str]:
        """The names of the files that were sent (GET), in order; what was only asked about is not among them."""
        return [
            request.file
            for request in self.asked(model_id)
            if request.method == "GET" and not request.path.startswith("/api/")
        ]

    def wait_stalled(self, seconds: float | None = None) -> None:
        """Block a stalled download until the Hub stops."""
        self._released.wait(seconds)

    @contextmanager
    def recording(self) -> Iterator[list[Request]]:
        """The requests made within the block."""
        start = len(self.requests)
        made: list[Request] = []
        try:
            yield made
        finally:
            made.extend(self.requests[start:])

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port: whoever asks now is refused."""
        self._released.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(10)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *arguments: Any) -> None:
        """The record is enough."""

    def _answer(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        span = _RANGE.fullmatch(self.headers.get("Range") or "")
        hub.requests.append(Request(self.command, path, token, int(span[1]) if span else 0))
        if hub.down is not None:
            return self._send(hub.down, b"out of order")
        for pattern, answer in ((_BLOB, self._blob), (_RESOLVE, self._resolve), (_TREE, self._tree), (_API, self._api)):
            found = pattern.fullmatch(path)
            repository = hub.find(found["id"]) if found else None
            if found and repository is None:
                return self._refuse(404 if token else 401, "RepoNotFound")
            if found and repository:
                if answer != self._blob and not self._admitted(repository, token, answer == self._resolve):
                    return None
                return answer(repository, found)
        return self._send(404, b"not found")

    def _admitted(self, repository: Repository, token: str | None, file: bool) -> bool:
        """Whether the caller may go on; if not, it was told so. A gated repository can be described but not read."""
        if repository.private and token not in repository.tokens:
            self._refuse(404 if token else 401, "RepoNotFound")
        elif repository.gated and file and token not in repository.tokens:
            self._refuse(403 if token else 401, "GatedRepo")
        elif not repository.api and not file:
            self._send(404, b"not found")
        else:
            return True
        return False

    def _resolve(self, repository: Repository, found: re.Match[str]) -> None:
        name, commit = found["file"], repository.commit
        if found["revision"] not in ("main", commit):
            return self._refuse(404, "RevisionNotFound", repository)
        if name in repository.silent:
            self.close_connection = True
            return self.server.hub.wait_stalled(60)
        path = repository.files().get(name)
        if path is None:
            return self._refuse(404, "EntryNotFound", repository)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path.suffix in (".safetensors", ".bin", ".model"):  # large files lie elsewhere
            size = repository.sizes.get(name, path.stat().st_size)
            headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{_sha256(path)}"'}
            # Another host name, as the real Hub's storage has: the token must not follow there.
            storage = self.server.hub.url.replace("127.0.0.1", "localhost")
            return self._send(302, b"", headers | {"Location": f"{storage}/cdn/{found['id']}/{commit}/{name}"})
        return self._file(repository, name, path, headers | {"ETag": f'"{_git_hash(path)}"'})

    def _blob(self, repository: Repository, found: re.Match[str]) -> None:
        path = repository.files()[found["file"]]
        self._file(repository, found["file"], path, {"ETag": f'"{_sha256(path)}"', "Accept-Ranges": "bytes"})

    def _file(self, repository: Repository, name: str, path: Path, headers: dict[str, str]) -> None:
        content = repository.replace.get(name, path.read_bytes())
        if self.command == "HEAD":
            size = repository.sizes.get(name, path.stat().st_size)
            return self._send(200, b"", headers | {"Content-Length": str(size)})
        if faults := repository.status.get(name):
            return self._send(faults.pop(0), b"try later")
        status, start = 200, 0
        if span := _RANGE.fullmatch(self.headers.get("Range") or ""):
            status, start = 206, int(span[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        if name in repository.stall:
            self._send(status, b"", headers | {"Content-Length": str(len(content))})
            self.wfile.flush()
            return self.server.hub.wait_stalled(60)
        if name in repository.cut and repository.cut[name] < len(content):
            self._send(status, content[: repository.cut[name]], headers | {"Content-Length": str(len(content))})
            return self._hang_up()
        return self._send(status, content, headers)

    def _api(self, repository: Repository, found: re.Match[str]) -> None:
        commit = repository.commit
        if found["revision"] not in (None, "main", commit):
            return self._refuse(404, "RevisionNotFound", repository)
        siblings = []
        for name, path in repository.files().items():
            sibling: dict[str, Any] = {"rfilename": name, "size": path.stat().st_size, "blobId": _git_hash(path)}
            if path.suffix in (".safetensors", ".bin", ".model"):
                sibling["lfs"] = {"sha256": _sha256(path), "size": path.stat().st_size, "pointerSize": 133}
            siblings.append(sibling)
        info = {"id": found["id"], "modelId": found["id"], "sha": commit, "tags": [], "siblings": siblings}
        return self._json(info | {"private": repository.private, "gated": "auto" if repository.gated else False})

    def _tree(self, repository: Repository, found: re.Match[str]) -> None:
        folder = found["path"] or ""
        entries = []
        for name, path in repository.files().items():
            if not folder or name.startswith(f"{folder}/"):
                entries.append({"type": "file", "path": name, "size": path.stat().st_size, "oid": _git_hash(path)})
        if folder and not entries:
            return self._refuse(404, "EntryNotFound", repository)
        return self._json(entries)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, repository: Repository | None = None) -> None:
        headers = {}
        if repository is None or repository.codes:
            headers = {"X-Error-Code": code, "X-Error-Message": code}
            if repository is not None:
                headers["X-Repo-Commit"] = repository.commit
        self._send(status, code.encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _hang_up(self) -> None:
        """Break the connection as a failing network does."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def main(arguments: list[str]) -> None:
    """Serve the folder given first until interrupted."""
    with Hub(Path(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 0) as hub:
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        hub.wait_stalled()


if __name__ == "__main__":
    main(sys.argv[1:])
