"""A small Hub on loopback: real HTTP, asked by `huggingface_hub` itself through `HF_ENDPOINT`.

Serves the folders of one directory as model repositories, each with commits, ETags, redirects and byte ranges, and
keeps a record of every request and of the bytes sent. A repository can be gated, private, damaged or slow, and have
branches and tags: see `Repository`. The test's thread changes repositories, the server's threads read them.
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
_LARGE = (".safetensors", ".bin", ".model", ".gguf")


@dataclass(frozen=True)
class Request:
    """What was asked: method, path without its query, the token that came along, and from and up to which byte."""

    method: str
    path: str
    token: str | None
    start: int = 0
    end: int | None = None

    @property
    def file(self) -> str:
        """The name at the end of the path."""
        return self.path.rsplit("/", 1)[-1]


@dataclass
class Body:
    """The rest of a file as it is sent: from which byte on, and how many bytes so far."""

    model_id: str
    file: str
    start: int
    count: int = 0


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
    whole: frozenset[str] = frozenset()  # files that are sent whole, whatever range is asked for
    revisions: dict[str, Path] = field(default_factory=dict)  # branches and tags besides main: a folder each
    # By a file's name: after how many bytes of any answer the connection breaks; the statuses of its next downloads
    # (200 is none); what is sent in its stead under its true checksum; a size that is announced and is not true; how
    # many bytes a second are sent. Whoever asks for a piece with an end gets it; these are for who downloads.
    cut: dict[str, int] = field(default_factory=dict)
    status: dict[str, list[int]] = field(default_factory=dict)
    replace: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    rate: dict[str, int] = field(default_factory=dict)

    def files(self, folder: Path | None = None) -> dict[str, Path]:
        """Every file, by its name in the repository; of main, or of a revision's folder."""
        folder = folder or self.folder
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path for path in paths}

    @property
    def commit(self) -> str:
        """That of main."""
        return self.commit_of(self.folder)

    def commit_of(self, folder: Path) -> str:
        """Changes when any file does."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, path in self.files(folder).items():
            digest.update(f"{name}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}\0".encode())
        return digest.hexdigest()

    def at(self, revision: str | None) -> Path | None:
        """The folder of a branch, tag or commit, or None where there is none."""
        folders = {"main": self.folder, **self.revisions}
        if revision is None or revision in folders:
            return folders[revision or "main"]
        return next((folder for folder in folders.values() if self.commit_of(folder) == revision), None)


class Hub:
    """The Hub: `with Hub(folder) as hub:` serves `folder/<org>/<name>` and `folder/<name>` at `hub.url`."""

    def __init__(self, root: Path, port: int = 0) -> None:
        self.root = root
        self.requests: list[Request] = []
        self.bodies: list[Body] = []
        self.spans: list[tuple[str, str]] = []  # of weights that were asked for: the file, and its bytes
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
        """The names of the files that were sent (GET), in order; not those of which a piece was, or that there are."""
        return [
            request.file
            for request in self.asked(model_id)
            if request.method == "GET" and not request.path.startswith("/api/") and request.end is None
        ]

    def bodies_of(self, model_id: str, file: str) -> list[Body]:
        """What was sent of a file's content, in order."""
        return [body for body in self.bodies if (body.model_id, body.file) == (model_id, file)]

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
        hub, quoted = self.server.hub, urlsplit(self.path).path
        path = unquote(quoted)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        span = _RANGE.fullmatch(self.headers.get("Range") or "")
        start, end = (int(span[1]), int(span[2]) if span[2] else None) if span else (0, None)
        hub.requests.append(Request(self.command, path, token, start, end))
        if self.command == "GET" and quoted.endswith((".safetensors", ".gguf", ".bin")):
            hub.spans.append((quoted.rpartition("/")[2], self.headers.get("Range") or "all of it"))
        if hub.down is not None:
            return self._send(hub.down, b"out of order")
        for pattern, answer in ((_BLOB, self._blob), (_RESOLVE, self._resolve), (_TREE, self._tree), (_API, self._api)):
            match = pattern.fullmatch(quoted)  # a branch's name may hold a slash, as %2F
            if match is None:
                continue
            found = {name: unquote(part or "") for name, part in match.groupdict().items()}
            repository = hub.find(found["id"])
            if repository is None:
                return self._refuse(404 if token else 401, "RepoNotFound")
            if repository:
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

    def _resolve(self, repository: Repository, found: dict[str, str]) -> None:
        name, folder = found["file"], repository.at(found["revision"])
        if folder is None:
            return self._refuse(404, "RevisionNotFound", repository)
        commit = repository.commit_of(folder)
        if name in repository.silent:
            self.close_connection = True
            return self.server.hub.wait_stalled(60)
        path = repository.files(folder).get(name)
        if path is None:
            return self._refuse(404, "EntryNotFound", repository)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path.suffix in _LARGE:  # large files lie elsewhere
            size = repository.sizes.get(name, path.stat().st_size)
            headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{_sha256(path)}"'}
            # Another host name, as the real Hub's storage has: the token must not follow there.
            storage = self.server.hub.url.replace("127.0.0.1", "localhost")
            return self._send(302, b"", headers | {"Location": f"{storage}/cdn/{found['id']}/{commit}/{name}"})
        return self._file(repository, found, path, headers | {"ETag": f'"{_git_hash(path)}"'})

    def _blob(self, repository: Repository, found: dict[str, str]) -> None:
        path = repository.files(repository.at(found["commit"]))[found["file"]]
        self._file(repository, found, path, {"ETag": f'"{_sha256(path)}"', "Accept-Ranges": "bytes"})

    def _file(self, repository: Repository, found: dict[str, str], path: Path, headers: dict[str, str]) -> None:
        name = found["file"]
        content = repository.replace.get(name, path.read_bytes())
        if self.command == "HEAD":
            size = repository.sizes.get(name, path.stat().st_size)
            return self._send(200, b"", headers | {"Content-Length": str(size)})
        status, start = 200, 0
        span = _RANGE.fullmatch(self.headers.get("Range") or "")
        faults = repository.status.get(name) if not (span and span[2]) else None
        if faults and (fault := faults.pop(0)) != 200:
            return self._send(fault, b"try later")
        if span and name not in repository.whole:
            status, start = 206, int(span[1])
            if start >= len(content):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            end = min(int(span[2]) + 1 if span[2] else len(content), len(content))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            content = content[start:end]
            if span[2]:
                return self._send(status, content, headers)
        body = Body(found["id"], name, start)
        self.server.hub.bodies.append(body)
        self._send(status, b"", headers | {"Content-Length": str(len(content))})
        self.wfile.flush()
        if name in repository.stall:
            return self.server.hub.wait_stalled(60)
        if name in repository.cut and repository.cut[name] < len(content):
            self._pour(body, content[: repository.cut[name]], repository.rate.get(name))
            return self._hang_up()
        return self._pour(body, content, repository.rate.get(name))

    def _pour(self, body: Body, content: bytes, rate: int | None) -> None:
        """Send what a file holds, at so many bytes a second."""
        step = max(1, rate // 20) if rate else 1024**2
        for start in range(0, len(content), step):
            piece = content[start : start + step]
            self.wfile.write(piece)
            self.wfile.flush()
            body.count += len(piece)
            if rate:
                self.server.hub.wait_stalled(len(piece) / rate)

    def _api(self, repository: Repository, found: dict[str, str]) -> None:
        folder = repository.at(found["revision"] or None)
        if folder is None:
            return self._refuse(404, "RevisionNotFound", repository)
        commit = repository.commit_of(folder)
        siblings = []
        for name, path in repository.files(folder).items():
            size = repository.sizes.get(name, path.stat().st_size)
            sibling: dict[str, Any] = {"rfilename": name, "size": size, "blobId": _git_hash(path)}
            if path.suffix in _LARGE:
                sibling["lfs"] = {"sha256": _sha256(path), "size": size, "pointerSize": 133}
            siblings.append(sibling)
        info = {"id": found["id"], "modelId": found["id"], "sha": commit, "tags": [], "siblings": siblings}
        return self._json(info | {"private": repository.private, "gated": "auto" if repository.gated else False})

    def _tree(self, repository: Repository, found: dict[str, str]) -> None:
        folder, root = found["path"], repository.at(found["revision"])
        if root is None:
            return self._refuse(404, "RevisionNotFound", repository)
        entries = []
        for name, path in repository.files(root).items():
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
