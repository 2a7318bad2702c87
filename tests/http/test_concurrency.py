"""Many callers at once: one load, no blocked route, and nobody's model is taken away."""

from __future__ import annotations

import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import requests
from conftest import until

pytestmark = pytest.mark.each_backend

# Seconds of work on a tiny model, so that what a test does meanwhile is done meanwhile.
LONG = {"do_sample": False, "num_beams": 12, "min_new_tokens": 470, "max_new_tokens": 480}


@pytest.fixture
def stalled_hub() -> Iterator[socket.socket]:
    """A Hub that takes connections and never answers, until it is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start `call` on a thread; its result appears in the list."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


def at_once(server: Any, *bodies: dict[str, Any]) -> list[tuple[threading.Thread, list[Any]]]:
    """Callers of `/generate` that all are at the model at the same time: running, or in its queue. Where the first ones
    have ended before the last one has come, all of them are begun again, with twice the beams."""

    def present() -> int:
        engines = [model["engine"] for model in server.call("GET", "/cache").json()["cached_models"].values()]
        return sum(engine["running"] + engine["waiting"] for engine in engines if engine)

    users: list[tuple[threading.Thread, list[Any]]] = []
    times = 1
    while True:
        for body in bodies:
            longer = {**body, "num_beams": body["num_beams"] * times}
            users.append(in_thread(partial(server.call, "POST", "/generate", json=longer)))
            until(lambda: present() >= len(users) or any(results for _, results in users))
        if not any(results for _, results in users):
            return users
        for thread, _ in users:
            thread.join()
        users.clear()
        times *= 2


def test_a_cold_model_is_loaded_once_for_all_who_ask(start_server: Any, tiny: Any) -> None:
    """Twelve requests at once for a model that is not in memory load it once, and all are answered alike."""
    server = start_server()
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    body = {"model_id": model_id, "prompt": "The cat", "do_sample": False, "max_new_tokens": 8}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: server.call("POST", "/generate", json=body), range(12)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["response"] for answer in answers}) == 1
    assert sum(f"loaded {model_id}" in line for line in server.lines) == 1
    assert server.call("GET", f"/models/{model_id}").json()["model"]["usage_count"] == 12


def test_a_load_holds_nobody_else_up(start_server: Any, tiny: Any, stalled_hub: socket.socket) -> None:
    """While one model's load hangs on a silent Hub, other routes answer and other models load and generate."""
    endpoint = f"http://127.0.0.1:{stalled_hub.getsockname()[1]}"
    server = start_server(HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="60")
    model_id = tiny("gpt2")
    server.add(model_id, "text-generation")
    server.add("somebody/slow", "text-generation")
    assert server.call("GET", "/dependencies").json()["dependencies"]["torch"] is True
    thread, results = in_thread(lambda: server.call("POST", "/models/somebody/slow/load"))
    assert select.select([stalled_hub], [], [], 60)[0], "the load was to ask the Hub"
    for path in ("/models", "/cache", "/statistics", "/models/somebody/slow"):
        assert server.call("GET", path).status_code == 200
    answer = server.call("POST", "/generate", json={"model_id": model_id, "prompt": "x", "max_new_tokens": 4})
    assert answer.status_code == 200
    assert not results, "the load was to hang during all of this"
    stalled_hub.close()
    thread.join(60)
    assert results[0].status_code == 503
    assert "somebody/slow" in results[0].json()["error"]


def test_clearing_a_model_in_use_waits_for_its_users(server: Any, tiny: Any) -> None:
    """DELETE /cache lets running and waiting generations finish, and then the model is gone."""
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    body = {"model_id": model_id, "prompt": "The cat", **LONG, "num_beams": 4}  # short enough to be waited for
    users = at_once(server, body, body, body)
    assert server.call("DELETE", "/cache", params={"model_id": model_id}).status_code == 200
    assert model_id not in server.call("GET", "/cache").json()["cached_models"]
    for thread, results in users:
        thread.join()
        made = results[0].json()
        alone = server.call("POST", "/generate", json={**body, "num_beams": made["parameters"]["num_beams"]})
        assert made["response"] == alone.json()["response"]


def test_a_model_in_use_for_too_long_is_refused_cleanly(start_server: Any, tiny: Any) -> None:
    """Where the users do not end in time, unload, removal and reload are a 409, and nothing has changed."""
    server = start_server(LOCAL_LLM_BUSY_TIMEOUT="0.05")
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    assert server.call("POST", f"/models/{model_id}/load").status_code == 200
    body = {"model_id": model_id, "prompt": "The cat", **LONG}
    users = at_once(server, *[body] * 4)
    for method, path, arguments in (
        ("DELETE", f"/cache?model_id={model_id}", None),
        ("DELETE", "/cache", None),
        ("DELETE", f"/models/{model_id}", None),
        ("POST", f"/models/{model_id}/load", {"force_reload": True}),
    ):
        answer = server.call(method, path, json=arguments)
        assert answer.status_code == 409, answer.text
        assert model_id in answer.json()["error"]
    assert not all(results for _, results in users), "the generations were to run during all of this"
    for thread, results in users:
        thread.join()
        assert results[0].status_code == 200
    assert model_id in server.call("GET", "/cache").json()["cached_models"]
    assert server.call("DELETE", f"/models/{model_id}").status_code == 200
    assert server.call("GET", "/cache").json()["total_cached"] == 0
    assert server.call("POST", "/generate", json={"model_id": model_id, "prompt": "x"}).status_code == 404


def test_a_client_that_hangs_up_stops_costing(server: Any, tiny: Any) -> None:
    """The work of a client that has left is given up; the next caller does not wait for it."""
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    short = {"model_id": model_id, "prompt": "The cat", "do_sample": False, "max_new_tokens": 2}
    server.call("POST", "/generate", json=short)
    started = time.monotonic()
    server.call("POST", "/generate", json={"model_id": model_id, "prompt": "The cat", **LONG})
    whole = time.monotonic() - started
    for _ in range(3):
        with pytest.raises(requests.exceptions.ReadTimeout):
            body = {"model_id": model_id, "prompt": "The cat", **LONG}
            requests.post(f"{server.api}/generate", json=body, timeout=whole / 8)
    started = time.monotonic()
    assert server.call("POST", "/generate", json=short).status_code == 200
    assert time.monotonic() - started < whole


def test_a_storm_of_mixed_calls_breaks_nothing(start_server: Any, tiny: Any) -> None:
    """Loads, unloads, removals, generations and tasks at random from many threads: only documented answers."""
    server = start_server()
    ids = [tiny("gpt2"), tiny("llama"), tiny("distilbert-sst2")]
    types = ["text-generation", "text-generation", "sentiment-analysis"]
    expected: dict[str, set[str]] = {model_id: set() for model_id in ids}

    def storm(seed: int) -> set[int]:
        draw = random.Random(seed)
        seen = set()
        for _ in range(15):
            index = draw.randrange(3)
            model_id = ids[index]
            kind = draw.choice(
                ["use", "use", "use", "load", "reload", "clear", "clear all", "remove", "change", "look"]
            )
            if kind == "use" and index < 2:
                body = {"model_id": model_id, "prompt": "The cat", "do_sample": False, "max_new_tokens": 5}
                answer = server.call("POST", "/generate", json=body)
                if answer.status_code == 200:
                    expected[model_id].add(answer.json()["response"])
            elif kind == "use":
                body = {"model_id": model_id, "task": "sentiment-analysis", "inputs": "good"}
                answer = server.call("POST", "/pipeline", json=body)
                if answer.status_code == 200:
                    expected[model_id].add(str(answer.json()["results"]))
            elif kind in ("load", "reload"):
                answer = server.call("POST", f"/models/{model_id}/load", json={"force_reload": kind == "reload"})
            elif kind == "clear":
                answer = server.call("DELETE", "/cache", params={"model_id": model_id})
            elif kind == "clear all":
                answer = server.call("DELETE", "/cache")
            elif kind == "remove":
                answer = server.call("DELETE", f"/models/{model_id}")
            elif kind == "change":
                answer = server.call("PUT", f"/models/{model_id}", json={"description": str(seed)})
            else:
                answer = server.call("GET", "/cache")
            seen.add(answer.status_code)
            server.add(model_id, types[index])
        return seen

    for model_id, model_type in zip(ids, types, strict=True):
        server.add(model_id, model_type)
    with ThreadPoolExecutor(8) as pool:
        statuses = set().union(*pool.map(storm, range(8)))
    assert statuses <= {200, 404}, statuses
    assert 200 in statuses
    assert all(len(answers) == 1 for answers in expected.values()), expected
    assert server.call("DELETE", "/cache").status_code == 200
    assert server.call("GET", "/cache").json()["total_cached"] == 0


def test_requests_that_wait_for_models_leave_threads_for_the_others(start_server: Any, tiny: Any) -> None:
    """With every place taken by long generations, one more is a 503 at once, and other routes answer as ever."""
    server = start_server(LOCAL_LLM_THREADS="8")
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    assert server.call("POST", f"/models/{model_id}/load").status_code == 200
    body = {"model_id": model_id, "prompt": "The cat", **LONG}
    short = {**body, "min_new_tokens": 1, "max_new_tokens": 8}
    users = at_once(server, *[body] * 3, *[short] * 4)  # the short ones wait for the long ones
    full = server.call("POST", "/generate", json=body)
    assert (full.status_code, full.json()["success"]) == (503, False)
    assert int(full.headers["Retry-After"]) >= 1
    for path in ("/models", "/cache", "/statistics"):
        assert server.call("GET", path).status_code == 200
    assert not all(results for _, results in users), "the generations were to run during all of this"
    for thread, results in users:
        thread.join()
        assert results[0].status_code == 200
