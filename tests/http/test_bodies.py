"""Bodies: how they are written, packed and addressed does not shut a client out; what they cost is bounded."""

from __future__ import annotations

import gzip
import json
import socket
import stat
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from conftest import PATIENCE

from huggingface.api.http.json import encoded
from huggingface.types import Timings

MODEL = {"model_id": "a/b", "name": "x", "model_type": "text-generation"}
JSON = {"Content-Type": "application/json"}


def put(client: Any, data: bytes, path: str = "/api/huggingface/models", **headers: str) -> tuple[int, Any]:
    """The status and JSON of an answer to a body."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = client.post(path, data=data, headers={**JSON, **headers})
    return answer.status_code, answer.get_json()


def raw_deflate(data: bytes) -> bytes:
    """What some clients call deflate: without zlib's header."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


DATA = json.dumps(MODEL).encode()


@pytest.mark.parametrize(
    ("data", "coding"),
    [
        (b"\xef\xbb\xbf" + DATA, "identity"),
        (gzip.compress(DATA), "gzip"),
        (gzip.compress(DATA), " GZip "),
        (gzip.compress(DATA[:9]) + gzip.compress(DATA[9:]) + b"\0" * 100, "x-gzip"),
        (gzip.compress(b"\xef\xbb\xbf" + DATA), "gzip"),
        (zlib.compress(DATA), "deflate"),
        (raw_deflate(DATA), "deflate"),
    ],
    ids=["mark", "gzip", "as written", "members", "gzip and mark", "deflate", "raw deflate"],
)
def test_a_body_with_a_byte_order_mark_or_compressed_is_read(client: Any, data: bytes, coding: str) -> None:
    """A client may begin a body with a mark, and compress it."""
    assert put(client, data, Content_Encoding=coding)[0] == 200
    assert client.get("/api/huggingface/models/a/b").status_code == 200


@pytest.mark.parametrize(
    ("data", "coding", "status", "told"),
    [
        (DATA, "br", 415, "Content-Encoding must be gzip, deflate or identity, not 'br'"),
        (DATA, "gzip, gzip", 415, "Content-Encoding"),
        (DATA, "gzip", 400, "The request body is not valid gzip"),
        (DATA, "deflate", 400, "The request body is not valid deflate"),
        (gzip.compress(DATA)[:-9], "gzip", 400, "The compressed request body is cut short"),
        (gzip.compress(DATA) + b"more", "gzip", 400, "The request body is not valid gzip"),
        (gzip.compress(b'"' + b"x" * 17 * 2**20), "gzip", 413, "The request body is larger than 16777216 bytes"),
        (gzip.compress(b"x" * 2**20) * 20, "gzip", 413, "The request body is larger than 16777216 bytes"),
        (gzip.compress(b"") * 100_000, "gzip", 400, "The request body is not valid gzip"),
        (DATA.decode().encode("utf-16"), "identity", 400, "must be UTF-8 text, not UTF-16"),
        (DATA.decode().encode("utf-16-le"), "identity", 400, "must be UTF-8 text, not UTF-16"),
        (DATA.decode().encode("utf-32-be"), "identity", 400, "must be UTF-8 text, not UTF-16"),
    ],
    # gzip writes the time: without names, processes that collect the tests at other seconds collect others.
    ids=[
        "brotli",
        "twice",
        "no gzip",
        "no deflate",
        "cut",
        "more behind",
        "large",
        "large in members",
        "members",
        "UTF-16",
        "UTF-16-LE",
        "UTF-32-BE",
    ],
)
def test_a_body_that_cannot_be_unpacked_is_refused_by_name(
    client: Any, data: bytes, coding: str, status: int, told: str
) -> None:
    """An unknown coding, a damaged body and one that unpacks to too much are told apart."""
    answer = client.post("/api/huggingface/models", data=data, headers={**JSON, "Content-Encoding": coding})
    assert answer.status_code == status
    assert told in answer.get_json()["error"]
    assert answer.headers.get("Accept-Encoding") == ("gzip, deflate" if status == 415 else None)


def test_unpacked_bodies_count_among_those_that_are_held(settings: Any) -> None:
    """Where as many bytes of bodies are held as may be, a compressed one that unpacks to more is a 503."""
    import huggingface
    from app import create_app

    app = create_app(settings.model_copy(update={"max_body_bytes": 100_000, "max_held_bytes": 100_000}))
    held = app.extensions["local-llm-bodies"]
    client = app.test_client()
    body = gzip.compress(DATA + b" " * 50_000)
    try:
        room = held.room()
        assert room.take(60_000)
        assert put(client, body, Content_Encoding="gzip")[0] == 503
        room.close()
        for _ in range(3):
            assert put(client, body, Content_Encoding="gzip")[0] in (200, 409)
    finally:
        huggingface.close(app)


def test_every_route_takes_a_slash_at_its_end_and_a_head_where_it_takes_a_get(app: Any, client: Any) -> None:
    """A slash behind an address makes no difference, without a redirect; HEAD tells what GET would, without a body."""
    put(client, DATA)
    named = {"model_id": "a/b", "filename": "index.css"}
    for rule in app.url_map.iter_rules():
        path = rule.rule.rstrip("/")
        for name in rule.arguments:
            path = path.replace(f"<path:{name}>", named.get(name, "x")).replace(f"<{name}>", named.get(name, "x"))
        for method in rule.methods - {"HEAD"}:
            told = client.open(path or "/", method=method, json={} if method in ("POST", "PUT", "PATCH") else None)
            slashed = client.open(f"{path}/", method=method, json={} if method in ("POST", "PUT", "PATCH") else None)
            assert slashed.status_code == told.status_code or method == "DELETE", (method, path)
            if method == "GET":
                for address in (path or "/", f"{path}/"):
                    head = client.head(address)
                    assert (head.status_code, head.data) == (told.status_code, b""), path
                    assert head.headers["Content-Type"] == told.headers["Content-Type"]


def test_a_model_is_asked_at_an_address_with_a_slash(client: Any) -> None:
    """Ids with slashes of their own keep them."""
    assert put(client, DATA, "/api/huggingface/models/")[0] == 200
    assert client.get("/api/huggingface/models/a/b/").get_json()["model"]["model_id"] == "a/b"
    assert client.put("/api/huggingface/models/a/b/", json={"name": "y"}).status_code == 200
    assert client.delete("/api/huggingface/models/a/b/").status_code == 200
    assert client.get("/nowhere/").get_json() == {"success": False, "error": "No such route: GET /nowhere"}


@pytest.mark.parametrize(
    "values",
    [
        "[" + ",".join(["[]"] * 110_000) + "]",
        "[" + ",".join(['{"":0}'] * 110_000) + "]",
        "[" + ",".join(["0"] * 1_100_000) + "]",
        "[" + ",".join(['""'] * 1_100_000) + "]",
    ],
    ids=["lists", "objects", "numbers", "texts"],
)
def test_a_body_of_a_million_values_is_refused_before_it_is_read(client: Any, values: str) -> None:
    """JSON that would cost a multiple of its bytes to read is a 400 that says why."""
    status, answer = put(client, b'{"model_id": "a/b", "inputs": %s}' % values.encode(), "/api/huggingface/pipeline")
    assert status == 400
    told = "The request body holds more than 1000000 values, or more than 100000 lists and objects"
    assert answer == {"success": False, "error": told}


@pytest.mark.parametrize("mark", ["[", ",", "{", '\\"', "\\\\", '\\\\\\"[[,'])
def test_marks_within_a_text_are_no_values(client: Any, mark: str) -> None:
    """A long text is taken, whatever it consists of."""
    body = json.dumps({**MODEL, "description": json.loads(f'"{mark}"') * 1_200_000}).encode()
    assert put(client, body)[0] == 200


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ('"prompt": %s, "prompt": [1]', "Field given twice: prompt"),
        ('"prompt": %s, "temperature": {"a": 1, "a": 2}', "Field given twice: a"),
        ('"prompt": %s, "temperature": NaN', "Invalid value for field 'temperature': must be a finite number"),
        ('"prompt": %s, "temperature": 1e999', "Invalid value for field 'temperature': must be a finite number"),
        ('"prompt": %s, "stop": ":"]', "is not valid JSON: Expecting ',' delimiter"),
        ('"prompt": [123456789012345678901234567890, 1], "seed": "a"', "'seed'"),
    ],
)
def test_a_long_body_is_read_as_strictly_as_a_short_one(client: Any, fields: str, told: str) -> None:
    """Of twenty thousand values or of two: what is wrong with a body is told in the same words."""
    for count in (2, 20_000):
        numbers = json.dumps([1] * count)
        body = b'{"model": "a", %s}' % fields.replace("%s", numbers).encode()
        status, answer = put(client, body, "/v1/completions")
        assert status == 400
        assert told in answer["error"]["message"]


def test_a_long_body_keeps_integers_of_any_size(client: Any) -> None:
    """An integer of more than 64 bits is no float, beside however many others."""
    from flask import Flask, request

    from huggingface.api.http.bodies import init_bodies
    from huggingface.api.http.json import JSONRequest

    app = Flask("numbers")
    app.request_class = JSONRequest
    init_bodies(app, 2**24)

    @app.post("/")
    def echo() -> str:
        return repr(request.get_json()["numbers"][-2:])

    for large in (2**63 - 1, 2**64 - 1, 2**64, -(2**63) - 1, 10**30):
        for count in (2, 20_000):
            body = {"numbers": [0.1] * count + [1.0, large]}
            assert app.test_client().post("/", json=body).text == repr([1.0, large])


def temporary_bytes(pid: int) -> int:
    """Bytes of the files that a process holds open and that have no name any more."""
    size = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it has been closed since
            if "(deleted)" in str(path.readlink()):
                status = path.stat()
                size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size


@pytest.mark.parametrize("chunked", [False, True])
def test_what_is_beyond_the_limit_of_a_body_is_kept_nowhere(start_server: Any, chunked: bool) -> None:
    """A body that is sent on beyond the limit takes no more of the temporary folder than one within it."""
    server = start_server(LOCAL_LLM_MAX_BODY_BYTES="1000000")
    address = urlsplit(server.url)
    size = 8_000_000
    head = b"POST /api/huggingface/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    framed = b"Transfer-Encoding: chunked\r\n\r\n%X\r\n" % size if chunked else b"Content-Length: %d\r\n\r\n" % size
    with socket.create_connection((address.hostname, address.port), timeout=PATIENCE) as client:
        client.sendall(head + b"Content-Type: application/json\r\n" + framed)
        maximum = 0
        for _ in range(size // 500_000):
            client.sendall(b"x" * 500_000)
            maximum = max(maximum, temporary_bytes(server.process.pid))
        if chunked:
            client.sendall(b"\r\n0\r\n\r\n")
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
    assert maximum <= 1_000_000
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"The request body is larger than 1000000 bytes" in answer


def test_bodies_beyond_what_is_held_of_all_together_are_a_503(start_server: Any) -> None:
    """Half bodies on many connections take no more of memory and disk than all bodies may; a small one has its turn."""
    server = start_server(LOCAL_LLM_MAX_BODY_BYTES="1000000", LOCAL_LLM_MAX_HELD_BYTES="3000000")
    address = urlsplit(server.url)
    clients = []
    for _ in range(10):
        client = socket.create_connection((address.hostname, address.port), timeout=PATIENCE)
        clients.append(client)
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n")
        client.sendall(b"Content-Length: 900000\r\n\r\n")
        client.sendall(b" " * 899_999)
    requests.get(server.url, timeout=PATIENCE)
    assert temporary_bytes(server.process.pid) <= 3_000_000
    answers = []
    for client in clients:
        client.sendall(b" ")
        answers.append(client.makefile("rb").read(400))
        client.close()
    assert sum(answer.startswith(b"HTTP/1.1 503") for answer in answers) == 7
    refused = next(answer for answer in answers if answer.startswith(b"HTTP/1.1 503"))
    assert b"Retry-After" in refused
    assert b'"error":{"message":"The server holds as many bytes' in refused
    server.add("a/b", "text-generation")
    while temporary_bytes(server.process.pid):
        pass
    assert server.call("POST", "/models", json={"model_id": "c/d", "description": "x" * 900_000}).status_code == 400


def test_a_chunk_whose_size_never_ends_is_refused(start_server: Any) -> None:
    """What frames a chunked body is bounded too."""
    server = start_server()
    address = urlsplit(server.url)
    for rest in (b"1" * 100_000, b"0\r\n" + b"a: b\r\n" * 100_000):
        with socket.create_connection((address.hostname, address.port), timeout=PATIENCE) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            try:
                client.sendall(rest)
                answer = client.recv(65536)
            except OSError:  # the connection is closed behind the answer, whatever is still being sent
                answer = b"HTTP/1.1 400"
            assert answer.startswith(b"HTTP/1.1 400")
    assert requests.get(server.url, timeout=PATIENCE).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "told"),
    [
        ("/v1/chat/completions", {"messages": [None] * 5000}, "messages.0"),
        ("/v1/responses", {"input": [None] * 5000}, "input.0"),
        ("/v1/messages", {"messages": [None] * 5000, "max_tokens": 1}, "messages.0"),
        ("/api/chat", {"messages": [None] * 5000}, "messages.0"),
        ("/v1/completions", {"prompt": "x", **{f"no_{number}": 0 for number in range(5000)}}, "no_0"),
    ],
)
def test_of_many_wrong_items_the_first_is_told(client: Any, path: str, fields: dict[str, Any], told: str) -> None:
    """A list of wrong items is refused for its first one, at whose cost alone."""
    status, answer = put(client, json.dumps({"model": "a/b", **fields}).encode(), path)
    assert status == 400
    assert told in json.dumps(answer)


def test_an_answer_that_repeats_an_integer_of_any_size_is_written_with_all_that_is_beside_it() -> None:
    """A client's parameters come back beside the timings."""
    timings = Timings(queue=0.5, first_token=1.0, total=2.0, tokens_per_second=3.0)
    answer = json.loads(encoded({"parameters": {"maximum": 2**64}, "timings": timings}))
    assert answer["parameters"] == {"maximum": 2**64}
    assert answer == {"parameters": {"maximum": 2**64}, "timings": json.loads(encoded(timings))}
