"""Browsers: which web pages may use the server, and that those can, from the headers to real Chromium.

The headers are looked at on real sockets. In Chromium a page is served from another port or another name, runs its
script, and reports to the server that it came from.
"""

from __future__ import annotations

import http.client
import json
import queue
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from conftest import PATIENCE, ROOT, STARTER, Server
from pydantic import ValidationError

from config import Settings
from huggingface.api.http.origins import LOCAL_ORIGINS, allowed_origins

API = "/api/huggingface"
CORS = "access-control-"

LOCAL = (
    "http://localhost",
    "http://localhost:8099",
    "https://localhost:8443",
    "http://127.0.0.1:3000",
    "https://127.0.0.1",
    "http://[::1]:3000",
    "http://chat.localhost:3000",
    "http://tauri.localhost",
    "app://obsidian.md",
    "app://.",
    "tauri://localhost",
    "vscode-webview://0k3j9d8n7",
    "vscode-file://vscode-app",
)
FOREIGN = (
    "http://evil.example",
    "https://localhost.evil.example",
    "https://localhost.evil.com:8099",
    "http://127.0.0.1.evil.example",
    "http://evillocalhost",
    "http://evil.example/.localhost",
    "http://evil.example#.localhost",
    "http://evil.example:80#localhost",
    "http://evil.example?.localhost",
    "http://evil.example\\.localhost",
    "http://localhost@evil.example",
    "http://localhost:80@evil.example",
    "http://localhost:8099/",
    "http://localhost:8099/page",
    "http://localhost:",
    "http://localhost:99999",
    "http://localhost:8099 http://evil.example",
    "http://localhost:8099, http://evil.example",
    "http://evil.example, http://localhost:8099",
    "http://LOCALHOST.EVIL.EXAMPLE",
    "http://localhost.evil.example.",
    "http://localhost..",
    "http://127.0.0.2:8099",
    "http://2130706433",
    "http://0.0.0.0:8099",
    "http://0:8099",
    "http://[::]:8099",
    "http://[::ffff:127.0.0.1]:8099",
    "http://[::1%25lo]:8099",
    "http://[::1].evil.example",
    "http://[",
    "http://",
    "//localhost",
    "localhost",
    "ftp://localhost",
    "file://",
    "data://localhost",
    "blob:http://localhost:8099",
    "chrome-extension://abcdefghijklmnopabcdefghijklmnop",
    "moz-extension://6b3a5c0e-7d1f-4f3b-9a55-1f3c5d7e9b11",
    "xapp://obsidian.md",
    "http://loc\xe4lhost",
    "*",
    "null",
    "NULL",
    "",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """A live server of these tests' own."""
    server = Server(tmp_path_factory.mktemp("server"), models_dir)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def model(server: Server, tiny: Callable[[str], str]) -> str:
    """A registered model that generates."""
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    return model_id


Answer = tuple[int, dict[str, str], bytes]


def send(server: Server, method: str, path: str, headers: dict[str, str] | None = None, body: Any = None) -> Answer:
    """Status, headers (names in lower case) and body of a request with just these headers, which begin with `Host`."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=PATIENCE)
    try:
        data = json.dumps(body).encode() if body is not None else None
        fields = {"Host": address.netloc, **({"Content-Type": "application/json"} if data else {}), **(headers or {})}
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in fields.items():
            connection.putheader(name, value.encode("latin-1"))
        if data is not None:
            connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def preflight(server: Server, origin: str, path: str = f"{API}/generate", **headers: str) -> Answer:
    """A browser's question whether a page of `origin` may POST JSON."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    return send(server, "OPTIONS", path, {"Origin": origin, **asked, **headers})


def listed(headers: dict[str, str], name: str) -> set[str]:
    """A header's list."""
    return {part.strip().lower() for part in headers.get(name, "").split(",")}


def lets_in(headers: dict[str, str], origin: str) -> bool:
    """Whether a browser gives this answer to a page of `origin`, with the headers that it is to see."""
    shown = {"x-request-id", "x-local-llm-request-id", "x-local-llm-ignored", "retry-after"}
    return (
        headers.get("access-control-allow-origin") == origin
        and "origin" in listed(headers, "vary")
        and shown <= listed(headers, "access-control-expose-headers")
    )


def silent(headers: dict[str, str]) -> bool:
    """Whether an answer tells a browser nothing of CORS, and caches that it depends on the page."""
    return not [name for name in headers if name.startswith(CORS)] and "origin" in listed(headers, "vary")


@pytest.mark.parametrize("origin", LOCAL)
def test_a_page_of_this_machine_may_come_in(server: Server, origin: str) -> None:
    """Its preflight is answered, and so is its request, with its own origin."""
    status, headers, body = preflight(server, origin)
    assert (status, body) == (204, b"")
    assert lets_in(headers, origin)
    assert {"get", "post", "put", "delete"} <= listed(headers, "access-control-allow-methods")
    assert int(headers["access-control-max-age"]) > 0
    status, headers, _ = send(server, "GET", f"{API}/models", {"Origin": origin})
    assert status == 200
    assert lets_in(headers, origin)


def test_a_preflight_allows_the_headers_that_clients_send(server: Server) -> None:
    """Those that it asks for, SDKs' own included, and the usual ones; what is no header's name is left out."""
    usual = {"content-type", "authorization", "x-api-key", "anthropic-version", "anthropic-beta", "x-request-id"}
    assert usual <= listed(preflight(server, LOCAL[1])[1], "access-control-allow-headers")
    asked = "X-Stainless-Lang,x-stainless-retry-count, openai-organization,a b,,\xe4,x:y," + "x" * 200
    _, headers, _ = preflight(server, LOCAL[1], **{"Access-Control-Request-Headers": asked})
    allowed = listed(headers, "access-control-allow-headers")
    assert {"x-stainless-lang", "x-stainless-retry-count", "openai-organization"} <= allowed
    assert not allowed & {"a b", "", "\xe4", "x:y", "x" * 200}
    many = ",".join(f"x-{number}" for number in range(1000))
    _, headers, _ = preflight(server, LOCAL[1], **{"Access-Control-Request-Headers": many})
    assert len(listed(headers, "access-control-allow-headers")) < 200


def test_a_private_network_is_allowed_where_a_browser_asks_for_it(server: Server) -> None:
    asked = {"Access-Control-Request-Private-Network": "true"}
    assert preflight(server, LOCAL[1], **asked)[1]["access-control-allow-private-network"] == "true"
    assert "access-control-allow-private-network" not in preflight(server, LOCAL[1])[1]
    assert silent(preflight(server, "http://evil.example", **asked)[1])


def test_a_preflight_is_answered_for_every_route_and_for_none(server: Server) -> None:
    """The request itself then says that there is no such route, and the page can read that."""
    for path in ("/", "/v1/chat/completions", f"{API}/models/a/b/load", "/no/such/route", f"{API}/generate?a=1&a=2"):
        assert preflight(server, LOCAL[1], path)[0] == 204


def test_options_without_a_preflight_are_what_they_were(server: Server) -> None:
    status, headers, _ = send(server, "OPTIONS", f"{API}/generate", {"Origin": LOCAL[1]})
    assert (status, headers["allow"]) == (200, headers["allow"])
    assert lets_in(headers, LOCAL[1])


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status"),
    [
        ("POST", f"{API}/generate", {}, {"model_id": "a"}, 400),
        ("GET", f"{API}/models?type=a&type=b", {}, None, 400),
        ("POST", f"{API}/generate", {}, {"model_id": "no/such", "prompt": "x"}, 404),
        ("POST", "/v1/chat/completions", {}, {"model": "no/such", "messages": [{"role": "user", "content": "x"}]}, 404),
        ("GET", "/nowhere", {}, None, 404),
        ("PATCH", f"{API}/generate", {}, None, 405),
        ("POST", f"{API}/generate", {"Content-Type": "text/plain"}, {"model_id": "a"}, 415),
        ("POST", f"{API}/generate", {"Content-Length": "ten"}, None, 400),
        ("POST", f"{API}/generate", {"Content-Length": "999999999999"}, None, 413),
    ],
)
def test_a_page_can_read_every_failure(
    server: Server, method: str, path: str, headers: dict[str, str], body: Any, status: int
) -> None:
    """Those of the routes, those without a route, and those that the HTTP server answers before any."""
    told, received, text = send(server, method, path, {"Origin": LOCAL[1], **headers}, body)
    assert told == status, text
    assert "error" in json.loads(text)
    assert lets_in(received, LOCAL[1])
    told, received, text = send(server, method, path, {"Origin": "http://evil.example", **headers}, body)
    assert told in (status, 403)
    assert silent(received)


def test_a_page_can_read_that_its_body_is_too_large(start_server: Any) -> None:
    server = start_server(LOCAL_LLM_MAX_BODY_BYTES="1024")
    body = {"model_id": "a", "prompt": "x" * 2000}
    status, headers, _ = send(server, "POST", f"{API}/generate", {"Origin": LOCAL[1]}, body)
    assert status == 413
    assert lets_in(headers, LOCAL[1])


def test_a_page_can_read_a_failure_of_the_server_itself(start_server: Any) -> None:
    """The registry's file is a folder: nothing works with it."""
    server = start_server()
    server.registry.unlink(missing_ok=True)
    server.registry.mkdir()
    status, headers, _ = send(server, "GET", f"{API}/models", {"Origin": LOCAL[1]})
    assert status == 500
    assert lets_in(headers, LOCAL[1])


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (f"{API}/generate", {"model_id": "", "prompt": "the cat", "max_new_tokens": 4}),
        ("/v1/chat/completions", {"model": "", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
    ],
)
def test_a_page_can_read_streams_and_what_was_ignored(
    server: Server, model: str, path: str, fields: dict[str, Any]
) -> None:
    body = {**fields, next(iter(fields)): model, "stream": True}
    status, headers, text = send(server, "POST", path, {"Origin": LOCAL[1], "X-Request-Id": "mine"}, body)
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/event-stream")
    assert lets_in(headers, LOCAL[1])
    assert headers["x-request-id"] == "mine"
    assert headers["x-local-llm-request-id"]
    assert text.startswith(b"data: ")


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_foreign_page_gets_nothing_and_changes_nothing(server: Server, origin: str) -> None:
    """A refusal names the setting that helps, and lets no browser show it to the page."""
    for status, headers, body in (
        preflight(server, origin),
        send(server, "GET", f"{API}/models", {"Origin": origin}),
        send(server, "POST", f"{API}/models", {"Origin": origin}, {"model_id": "evil", "name": "x"}),
    ):
        assert status == 403
        assert "LOCAL_LLM_ALLOWED_ORIGINS" in json.loads(body)["error"]
        assert silent(headers)
    assert send(server, "GET", f"{API}/models/evil")[0] == 404


def test_several_origins_are_none(server: Server) -> None:
    """A request with two `Origin` headers is refused, whatever stands in them."""
    for first, second in ((LOCAL[1], LOCAL[1]), (LOCAL[1], "http://evil.example")):
        lines = f"GET / HTTP/1.1\r\nHost: localhost\r\nOrigin: {first}\r\nOrigin: {second}\r\nConnection: close\r\n\r\n"
        with socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0), timeout=PATIENCE) as connection:
            connection.sendall(lines.encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert b" 403 " in answer.splitlines()[0]
        assert CORS.encode() not in answer.lower()


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:5000", "127.0.0.1.evil.example", "localhost@evil.example", "a b"]
)
def test_a_rebinding_name_is_refused_with_the_setting_that_helps(server: Server, host: str) -> None:
    """Whether its page tells its own origin, one of this machine, or none."""
    for headers in ({}, {"Origin": f"http://{host}"}, {"Origin": LOCAL[1]}):
        status, received, body = send(server, "GET", f"{API}/models", {"Host": host, **headers})
        assert status == 403
        assert "LOCAL_LLM_ALLOWED_HOSTS" in json.loads(body)["error"]
        assert silent(received)
        assert preflight(server, f"http://{host}", Host=host)[0] == 403


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("10.0.0.5:5000", "http://10.0.0.5:5000"),
        ("10.0.0.5", "http://10.0.0.5"),
        ("10.0.0.5:443", "https://10.0.0.5"),
        ("[fe80::1]:5000", "http://[fe80::1]:5000"),
    ],
)
def test_the_servers_own_page_may_come_in_under_any_of_its_names(server: Server, host: str, origin: str) -> None:
    """As `/docs` does; a page from another port there is another's."""
    headers = {"Host": host, "Origin": origin}
    assert send(server, "POST", f"{API}/generate", headers, {})[0] == 400
    for foreign in ("http://10.0.0.5:8099", "app2://10.0.0.5:5000"):
        assert send(server, "POST", f"{API}/generate", {"Host": host, "Origin": foreign}, {})[0] == 403


NAVIGATION = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
IMAGE = {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
FRAME = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}


@pytest.mark.parametrize(
    ("method", "path", "headers", "host", "served"),
    [
        ("GET", f"{API}/models", {"Sec-Fetch-Site": "cross-site", **IMAGE}, "localhost:5000", False),
        ("GET", f"{API}/models", {"Sec-Fetch-Site": "cross-site", **NAVIGATION}, "localhost:5000", False),
        ("POST", f"{API}/cache/warm", {"Sec-Fetch-Site": "cross-site", **NAVIGATION}, "localhost:5000", False),
        ("POST", "/", {"Sec-Fetch-Site": "cross-site", **NAVIGATION}, "localhost:5000", False),
        ("GET", "/docs", {"Sec-Fetch-Site": "cross-site", **FRAME}, "localhost:5000", False),
        ("GET", "/", {"Sec-Fetch-Site": "cross-site", **IMAGE}, "localhost:5000", False),
        ("GET", f"{API}/models", {"Sec-Fetch-Site": "same-site", **IMAGE}, "nas.localhost:5000", False),
        ("GET", f"{API}/models", {"Sec-Fetch-Site": "same-site", **IMAGE}, "localhost:5000", True),
        ("GET", f"{API}/models", {"Sec-Fetch-Site": "same-site", **IMAGE}, "127.0.0.1:5000", True),
        ("GET", "/", {"Sec-Fetch-Site": "cross-site", **NAVIGATION}, "localhost:5000", True),
        ("GET", "/docs", {"Sec-Fetch-Site": "cross-site", **NAVIGATION}, "localhost:5000", True),
        ("GET", "/openapi.json", {"Sec-Fetch-Site": "cross-site", **NAVIGATION}, "localhost:5000", True),
        ("GET", f"{API}/models", {"Sec-Fetch-Site": "none", **NAVIGATION}, "localhost:5000", True),
        ("GET", f"{API}/models", {"Sec-Fetch-Site": "same-origin"}, "localhost:5000", True),
        ("GET", f"{API}/models", {"Sec-Fetch-Site": "cross-site", "Origin": LOCAL[1]}, "127.0.0.1:5000", True),
        ("GET", f"{API}/models", {}, "localhost:5000", True),
    ],
)
def test_what_a_browser_sends_without_an_origin(
    server: Server, method: str, path: str, headers: dict[str, str], host: str, served: bool
) -> None:
    """Images, forms and frames of foreign pages are refused; a link to a page for people may be followed."""
    status, received, body = send(server, method, path, {"Host": host, **headers})
    if served:
        assert status == 200
    else:
        assert status == 403
        assert "LOCAL_LLM_ALLOWED_ORIGINS" in json.loads(body)["error"]
        assert silent(received)


@pytest.mark.parametrize(
    ("pattern", "fitting", "others"),
    [
        (
            "https://chat.example",
            ["https://chat.example", "https://chat.example:443", "https://CHAT.example."],
            ["http://chat.example", "https://chat.example:8443", "https://a.chat.example", "https://chat.example.evil"],
        ),
        (
            "http://10.0.0.5:*",
            ["http://10.0.0.5", "http://10.0.0.5:8080"],
            ["https://10.0.0.5", "http://10.0.0.50", "http://10.0.0.5.evil.example:8080"],
        ),
        (
            "https://*.chat.example",
            ["https://a.chat.example", "https://a.b.chat.example"],
            ["https://chat.example", "https://evilchat.example", "https://a.chat.example:1", "https://.chat.example"],
        ),
        ("http://[fe80:0::1]:80", ["http://[fe80::1]"], ["http://[fe80::2]", "http://[fe80::1]:81"]),
        ("https://*", ["https://a.example", "https://b.example:8443"], ["http://a.example", "null", "https://a@b"]),
        ("chrome-extension://*", ["chrome-extension://abcd"], ["moz-extension://abcd", "chrome-extension://a/b"]),
        ("null", ["null"], ["http://null", "file://"]),
        ("*", ["null", "https://a.example", "chrome-extension://abcd"], []),
    ],
)
def test_a_pattern_lets_in_the_origins_that_fit_it(pattern: str, fitting: list[str], others: list[str]) -> None:
    allowed = allowed_origins([pattern])
    assert [origin for origin in fitting if not allowed.allows(origin)] == []
    assert [origin for origin in others if allowed.allows(origin)] == []


def test_the_setting_adds_to_the_pages_of_this_machine(start_server: Any) -> None:
    server = start_server(LOCAL_LLM_ALLOWED_ORIGINS="https://chat.example, null")
    for origin in ("https://chat.example", "null", LOCAL[1]):
        assert preflight(server, origin)[0] == 204
        assert lets_in(send(server, "GET", f"{API}/models", {"Origin": origin})[1], origin)
    assert preflight(server, "https://other.example")[0] == 403
    assert send(server, "GET", f"{API}/models", {"Sec-Fetch-Site": "cross-site"})[0] == 403
    every = start_server(LOCAL_LLM_ALLOWED_ORIGINS="*")
    for origin in ("https://other.example", "null"):
        assert lets_in(send(every, "GET", f"{API}/models", {"Origin": origin})[1], origin)
    assert send(every, "GET", f"{API}/models", {"Sec-Fetch-Site": "cross-site"})[0] == 200
    assert preflight(every, "http://rebound.example", Host="rebound.example")[0] == 403


@pytest.mark.parametrize(
    "value",
    [
        "chat.example",
        "localhost:*",
        "https://chat.example/",
        "https://chat.example/path",
        "https://user@chat.example",
        "https://",
        "https://a.*.example",
        "https://chat*.example",
        "*://chat.example",
        "http://chat.example:99999",
        "http://chat.example:x",
        "http://[zz]",
        "file://",
        "https://chat.example,,nonsense",
        "https://ch\xe4t.example",
    ],
)
def test_a_wrong_pattern_stops_the_start_with_a_message_that_names_it(value: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(_env_file=None, allowed_origins=value)
    [problem] = caught.value.errors()
    assert problem["loc"] == ("allowed_origins",)
    assert value.split(",")[-1] in problem["msg"]


def test_every_default_is_a_pattern() -> None:
    assert allowed_origins(LOCAL_ORIGINS).patterns


# Chromium -------------------------------------------------------------------------------------------------------------

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-proxy-server"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    "--remote-debugging-port=0",  # without it, headless Chromium may end when the page is loaded
    "--host-resolver-rules=MAP *.test 127.0.0.1",
)
SECONDS = 120

# The packages that pages import, as `make test` installs them for Node.
MODULES = {
    "openai": "openai/index.mjs",
    "@huggingface/inference": "@huggingface/inference/dist/esm/index.js",
    "@huggingface/jinja": "@huggingface/jinja/dist/index.js",
    "@huggingface/tasks": "@huggingface/tasks/dist/esm/index.js",
}

# Collects what the page tells, and reports it with whatever ended the script.
PAGE = """<!doctype html><meta charset="utf-8">
<script>
const told = [];
console.log = (...values) => told.push(...values);
const report = (error) => fetch("REPORT", {method: "POST", mode: "no-cors", body: JSON.stringify(
  {told, error: error ? String(error) : null, origin: location.origin})});
addEventListener("error", (event) => report(event.message));
addEventListener("unhandledrejection", (event) => report(event.reason));
</script>
IMPORTS
<script type="module">
SCRIPT
await report();
</script>
"""


class Pages:
    """Serves pages and the modules that they import, takes their reports, and opens them in Chromium."""

    def __init__(self, folder: Path, upstream: str) -> None:
        """`upstream` is where requests for anything else go, as they are: this is how a rebound name works."""
        self.page = ""
        self.reports: queue.Queue[dict[str, Any]] = queue.Queue()
        self._folder = folder
        pages, port = self, urlsplit(upstream).port

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/page":
                    return self._answer(pages.page.encode(), "text/html")
                if self.path.startswith("/modules/"):
                    file = ROOT / "tests" / "clients" / "node_modules" / self.path.removeprefix("/modules/")
                    return self._answer(file.read_bytes(), "text/javascript")
                return self._forward()

            def do_POST(self) -> None:
                if self.path == "/report":
                    pages.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                    return self._answer(b"", "text/plain")
                return self._forward()

            def _forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                self._answer(answer.read(), answer.headers["Content-Type"], answer.status)
                connection.close()

            def _answer(self, data: bytes, kind: str, status: int = 200) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def run(self, script: str, host: str = "localhost") -> dict[str, Any]:
        """What the script tells, as a page under this name; as a page from a file where there is none."""
        page = PAGE.replace("REPORT", f"http://127.0.0.1:{self.port}/report").replace("SCRIPT", script)
        modules = {name: f"http://{host}:{self.port}/modules/{path}" for name, path in MODULES.items()}
        imports = f'<script type="importmap">{json.dumps({"imports": modules})}</script>' if host else ""
        self.page = page.replace("IMPORTS", imports)
        address = f"http://{host}:{self.port}/page"
        if not host:
            file = self._folder / "page.html"
            file.write_text(self.page, "utf-8")
            address = file.as_uri()
        with _chromium(self._folder, address) as log:
            try:
                return self.reports.get(timeout=SECONDS)
            except queue.Empty:
                pytest.fail(f"the page told nothing in {SECONDS} s; Chromium says:\n{log.read_text('utf-8')[-4000:]}")

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def _chromium(folder: Path, address: str) -> Iterator[Path]:
    """Chromium with a page and a profile of its own; gives its log."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program, "Chromium is needed: `apt-get install chromium`, as root, or your system's package of it"
    profile, log = folder / f"profile-{len(list(folder.glob('profile-*')))}", folder / "chromium.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", address], stdout=output, stderr=output
        )
        try:
            yield log
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Pages]:
    """Pages from another port than the server's."""
    pages = Pages(tmp_path_factory.mktemp("pages"), server.url)
    yield pages
    pages.close()


def examples() -> list[str]:
    """The programs for browsers in the page of clients."""
    page = (ROOT / "docs" / "clients.md").read_text("utf-8")
    return re.findall(r"^```javascript\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(examples())))
def test_the_pages_javascript_runs_in_a_page(pages: Pages, server: Server, model: str, number: int) -> None:
    """Each example as it stands there, but for the address and the model, and `openai`'s own question back."""
    program = examples()[number].replace("http://localhost:5000", server.url).replace(STARTER, model)
    program = program.replace("new OpenAI({", "new OpenAI({ dangerouslyAllowBrowser: true,")
    report = pages.run(program)
    assert report["error"] is None
    assert report["told"]
    assert all(isinstance(text, str) for text in report["told"])


def test_the_page_of_clients_shows_pages_how_to_ask_and_how_to_stream() -> None:
    fetching = [text for text in examples() if "await fetch(" in text]
    assert len(fetching) >= 2
    assert any("stream: true" in text for text in fetching)


# The API document's class, written as a page would have it.
CLASS = """
class HuggingFaceClient {
  constructor(address) {
    this.root = `${address}/api/huggingface`;
  }
  async ask(method, path, body) {
    const headers = body ? { "Content-Type": "application/json" } : {};
    const answer = await fetch(this.root + path, { method, headers, body: body && JSON.stringify(body) });
    return answer.json();
  }
  addModel(model_id, name, model_type, options = {}) {
    return this.ask("POST", "/models", { model_id, name, model_type, ...options });
  }
  generateText(model_id, prompt, params = {}) {
    return this.ask("POST", "/generate", { model_id, prompt, ...params });
  }
}
"""


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "chat.localhost"])
def test_the_documented_class_runs_in_a_page_of_this_machine(
    pages: Pages, server: Server, tiny: Callable[[str], str], host: str
) -> None:
    """It adds, changes, generates and removes, reads a refusal, and sees the headers that are exposed."""
    model_id = tiny("gpt2")
    server.call("DELETE", f"/models/{model_id}")
    report = pages.run(
        f"""{CLASS}
        const client = new HuggingFaceClient({json.dumps(server.url)}), id = {json.dumps(model_id)};
        console.log(await client.addModel(id, "GPT-2", "text-generation"));
        console.log(await client.ask("PUT", `/models/${{id}}`, {{ description: "changed by a page" }}));
        console.log(await client.generateText(id, "Hello world", {{ max_new_tokens: 5 }}));
        console.log(await client.generateText(id, "Hello world", {{ temperature: -1 }}));
        console.log(await client.ask("DELETE", `/models/${{id}}`));
        const headers = {{ "X-Request-Id": "mine", Authorization: "Bearer none" }};
        const answer = await fetch(`${{client.root}}/models`, {{ headers }});
        console.log(answer.headers.get("X-Request-Id"));
        """,
        host,
    )
    assert report["error"] is None
    assert report["origin"] == f"http://{host}:{pages.port}"
    added, changed, made, refused, removed, name = report["told"]
    assert added["model"]["model_id"] == model_id
    assert changed["model"]["description"] == "changed by a page"
    assert isinstance(made["response"], str)
    assert made["usage"]["completion_tokens"] <= 5
    assert refused == {"success": False, "error": "Invalid value for field 'temperature': must be at least 0"}
    assert removed["success"] is True
    assert name == "mine"


def test_the_openai_package_runs_in_a_page(pages: Pages, server: Server, model: str) -> None:
    """With the headers that it adds by itself, streams included."""
    report = pages.run(f"""
        import OpenAI from "openai";
        const options = {{ baseURL: "{server.url}/v1", apiKey: "none", dangerouslyAllowBrowser: true, maxRetries: 0 }};
        const client = new OpenAI(options);
        const body = {{ model: {json.dumps(model)}, temperature: 0, max_tokens: 8,
                       messages: [{{ role: "user", content: "where is the cat?" }}] }};
        const answer = await client.chat.completions.create(body);
        console.log(answer.choices[0].message.content);
        let text = "";
        for await (const event of await client.chat.completions.create({{ ...body, stream: true }})) {{
          text += event.choices[0].delta.content ?? "";
        }}
        console.log(text);
        try {{
          await client.chat.completions.create({{ ...body, model: "no/such" }});
        }} catch (error) {{
          console.log(error.code);
        }}
    """)
    assert report["error"] is None
    said, streamed, code = report["told"]
    assert said == streamed
    assert code == "model_not_found"


TRY = """
const tell = (asked) => asked.then(
  async (answer) => console.log(answer.type === "opaque" ? "opaque" : [answer.status, await answer.text()]),
  (error) => console.log(error.message),
);
const json = { "Content-Type": "application/json" };
const body = JSON.stringify({ model_id: "evil", name: "x", model_type: "text-generation" });
await tell(fetch(`${root}/models`));
await tell(fetch(`${root}/models`, { method: "POST", headers: json, body }));
await tell(fetch(`${root}/models`, { method: "POST", mode: "no-cors", body }));
await tell(fetch(`${root}/models`, { mode: "no-cors" }));
"""


@pytest.mark.parametrize("host", ["foreign.test", ""])
def test_a_page_of_another_origin_is_refused_by_chromium(pages: Pages, server: Server, host: str) -> None:
    """A foreign site's, and one from a file, whose origin is as hidden as that of any frame."""
    report = pages.run(f"const root = '{server.api}';" + TRY, host)
    assert report["error"] is None
    assert report["told"] == ["Failed to fetch", "Failed to fetch", "opaque", "opaque"]
    assert server.call("GET", "/models/evil").status_code == 404
    log = "\n".join(server.lines)  # where the user sees why: the page cannot read it
    assert f"of the origin {(report['origin'] if host else 'null')!r} are refused" in log
    assert "where the browser does not tell the page's origin" in log


def test_a_page_from_a_file_may_come_in_by_the_setting(
    pages: Pages, start_server: Any, tiny: Callable[[str], str]
) -> None:
    server = start_server(LOCAL_LLM_ALLOWED_ORIGINS="null,http://foreign.test:*")
    model_id = tiny("gpt2")
    server.add(model_id, "text-generation")
    for host in ("", "foreign.test"):
        report = pages.run(
            f"""{CLASS}
            const client = new HuggingFaceClient({json.dumps(server.url)});
            console.log((await client.generateText({json.dumps(model_id)}, "Hello", {{ max_new_tokens: 3 }})).success);
            """,
            host,
        )
        assert report["error"] is None
        assert report["told"] == [True]


def test_a_rebound_name_is_refused_by_chromium(pages: Pages, server: Server) -> None:
    """The page's own name leads to the server, so that its browser sees one origin: the server sees the name."""
    report = pages.run(f"const root = '{API}';" + TRY, "rebound.test")
    assert report["error"] is None
    assert [status for status, _ in report["told"]] == [403, 403, 403, 403]
    assert all("LOCAL_LLM_ALLOWED_HOSTS" in text for _, text in report["told"])
    direct = pages.run(f"const root = 'http://rebound.test:{urlsplit(server.url).port}{API}';" + TRY, "foreign.test")
    assert direct["told"] == ["Failed to fetch", "Failed to fetch", "opaque", "opaque"]
    assert requests.get(f"{server.api}/models/evil", timeout=PATIENCE).status_code == 404
