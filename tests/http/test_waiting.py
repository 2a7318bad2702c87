"""Requests that wait are bounded below the server's threads: whatever waits, what waits for nothing is answered."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import Context
from functools import partial
from typing import Any

import pytest
import requests
from conftest import PATIENCE
from test_concurrency import LONG, at_once, in_thread

import huggingface
from app import create_app
from config import Settings
from huggingface.cancellation import on_wait

pytestmark = pytest.mark.each_backend

THREADS = 8
SHORT = ("/health", "/ready", "/", "/api/tags", "/v1/models", "/api/huggingface/models", "/api/huggingface/cache")
SHORT += ("/api/huggingface/requests", "/api/huggingface/statistics", "/api/version")


def ask_for_short_ones(server: Any) -> None:
    """All that waits for nothing is answered."""
    for path in SHORT:
        assert requests.get(f"{server.url}{path}", timeout=PATIENCE).status_code == 200, path


def flood(calls: list[Callable[[], requests.Response]], refused: int) -> list[tuple[threading.Thread, list[Any]]]:
    """Make all calls at once; returns when so many of them have been refused for want of a place."""
    made = [in_thread(call) for call in calls]
    deadline = time.monotonic() + 100
    while sum(1 for _, results in made if results) < refused:
        assert time.monotonic() < deadline, "the others were to be refused"
        time.sleep(0.01)
    for answer in answered(made):
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert "Too many requests" in answer.text
    return made


def answered(made: list[tuple[threading.Thread, list[Any]]]) -> list[requests.Response]:
    """The answers that there are."""
    return [results[0] for _, results in made if results]


def test_unloads_of_a_model_in_use_leave_threads_for_the_others(start_server: Any, tiny: Any) -> None:
    """Three times as many unloads, removals and reloads as threads wait for one user; short calls do not wait."""
    server = start_server(LOCAL_LLM_THREADS=str(THREADS), LOCAL_LLM_BUSY_TIMEOUT="100")
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    # It is given up at the end, and must not end before.
    [user] = at_once(server, {"model_id": model_id, "prompt": "a", **LONG, "num_beams": 96})
    calls = [
        partial(server.call, "POST", f"/models/{model_id}/unload"),
        partial(server.call, "DELETE", "/cache"),
        partial(server.call, "DELETE", f"/cache?model_id={model_id}"),
        partial(server.call, "POST", f"/models/{model_id}/load", json={"force_reload": True}),
    ]
    waiting = flood(calls * 6, 24 - (THREADS - 2))
    ask_for_short_ones(server)
    assert len(answered(waiting)) == 24 - (THREADS - 2), "the others were to wait during all of this"
    [flight] = [each for each in server.call("GET", "/requests").json()["requests"] if each["task"] == "generate"]
    assert server.call("DELETE", f"/requests/{flight['request_id']}").status_code == 200
    for thread, _ in [user, *waiting]:
        thread.join(100)
    assert {answer.status_code for answer in answered(waiting)} == {200, 503}


def test_calls_that_wait_for_the_hub_leave_threads_for_the_others(start_server: Any) -> None:
    """Looks, estimates, registrations, downloads and pulls of a Hub that says nothing are bounded as all that waits."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = start_server(LOCAL_LLM_THREADS=str(THREADS), HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="100")
    assert server.call("GET", "/dependencies").status_code == 200
    with listener:
        calls: list[Callable[[], requests.Response]] = []
        for number in range(4):
            name = f"somebody/slow-{number}"
            body = {"model_id": name, "name": name, "model_type": "text-generation"}
            calls += [
                partial(server.call, "POST", "/models", json=body),
                partial(server.call, "GET", f"/models/{name}/preflight"),
                partial(
                    requests.post, f"{server.url}/api/pull", json={"model": name, "stream": False}, timeout=PATIENCE
                ),
            ]
        waiting = flood(calls, 12 - (THREADS - 1))
        ask_for_short_ones(server)
        assert len(answered(waiting)) == 12 - (THREADS - 1), "the others were to wait during all of this"
    server.stop()
    for thread, _ in waiting:
        thread.join(100)


@pytest.fixture
def small_app(settings: Settings) -> Iterator[Any]:
    """An app with one place for those who wait."""
    app = create_app(settings.model_copy(update={"threads": 2}))
    yield app
    huggingface.close(app)


# What tells of a moment or gives something up; every other route counts as one that may wait.
AT_ONCE = {
    *("root.show_server", "root.show_health", "root.show_readiness", "system.show_statistics"),
    *("system.list_model_types", "requests.list_requests", "requests.cancel_request"),
    *("models.list_models", "models.get_model", "models.show_model_health", "models.show_model_info"),
    *("downloads.show_download", "cache.show_cache", "openai.list_models", "openai.get_model", "docs.page"),
    *("ollama.show_version", "ollama.list_models", "ollama.list_running", "ollama.create_model", "ollama.copy_model"),
    *("ollama.push_model", "ollama.put_blob", "ollama.show_blob"),
}


def test_every_route_counts_among_those_that_may_wait_but_for_those_that_never_do(small_app: Any) -> None:
    """With all places taken each route is a 503 at once, or is one of those that answer from what they know."""
    client = small_app.test_client()
    [place] = [each for name, each in small_app.extensions.items() if name == "local-llm-waiting"]
    another, request = Context(), small_app.test_request_context()
    another.run(request.push)
    assert another.run(place.take)
    at_once = set()
    for rule in small_app.url_map.iter_rules():
        if rule.endpoint.endswith(".static"):
            continue
        path = rule.rule
        for argument in rule.arguments:
            kind = "path:" if f"<path:{argument}>" in path else ""
            path = path.replace(f"<{kind}{argument}>", "nobody/nothing")
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            answer = client.open(path.replace("nobody/nothing", "nothing"), method=method, json={})
            if answer.status_code != 503:
                at_once.add(rule.endpoint)
            else:
                assert int(answer.headers["Retry-After"]) >= 1
    assert at_once == AT_ONCE
    another.run(request.pop)


def test_a_place_is_free_again_when_its_request_ends_however_it_ends(small_app: Any, tiny: Any) -> None:
    """Answers, refusals, failures and streams, whole and broken off, all give their place back."""
    client = small_app.test_client()
    model_id = tiny("gpt2")
    body = {"model_id": model_id, "name": "a", "model_type": "text-generation"}
    assert client.post("/api/huggingface/models", json=body).status_code == 200
    ask = {"model_id": model_id, "prompt": "The cat", "max_new_tokens": 3}
    for _ in range(3):
        assert client.post("/api/huggingface/generate", json=ask).status_code == 200
        assert client.post("/api/huggingface/generate", json={"model_id": model_id}).status_code == 400
        assert client.post("/api/huggingface/generate", data=b"{").status_code in (400, 415)
        assert client.post("/api/huggingface/generate", json={**ask, "model_id": "no/body"}).status_code == 404
        assert client.get("/api/huggingface/generate").status_code == 405
        assert client.get("/nowhere").status_code == 404
        with client.post("/api/huggingface/generate", json={**ask, "stream": True}) as stream:
            assert b'"success":true' in stream.get_data()
        with client.post("/api/huggingface/generate", json={**ask, "stream": True}, buffered=False) as stream:
            assert client.post("/api/huggingface/generate", json=ask).status_code == 503  # it has the one place
            next(stream.iter_encoded())


def test_what_may_wait_says_so_before_it_waits(client: Any, tiny: Any) -> None:
    """For the registry's file, a load, the engine, a template, a model's users: the next request computes meanwhile."""
    base, model_id = "/api/huggingface", tiny("llama")
    at_model = f"{base}/models/{model_id}"
    body = {"model_id": model_id, "name": "a", "model_type": "text-generation"}
    ask = {"model_id": model_id, "prompt": "The cat", "max_new_tokens": 3}
    chat = {"model": model_id, "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
    calls: list[tuple[str, str, Any]] = [
        ("POST", f"{base}/models", body),
        ("GET", f"{at_model}/estimate", None),
        ("POST", f"{at_model}/load", {}),
        ("POST", f"{base}/generate", ask),
        ("POST", f"{base}/generate", {**ask, "num_beams": 2}),
        ("POST", "/v1/chat/completions", chat),
        ("DELETE", f"{base}/cache", None),
        ("POST", f"{at_model}/load", {}),
        ("POST", f"{at_model}/unload", {}),
    ]
    for method, path, sent in calls:
        told = threading.Event()
        with on_wait(told.set):
            assert client.open(path, method=method, json=sent).status_code == 200, path
        assert told.is_set(), path
    told = threading.Event()
    with on_wait(told.set):
        assert client.get(f"{base}/models").status_code == 200
    assert not told.is_set(), "a list waits for nothing"
