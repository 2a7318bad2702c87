"""Streams, deadlines, hang-ups and the queue, over real sockets on a live server."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from conftest import PATIENCE, Graphs, Server, until

pytestmark = pytest.mark.each_backend

GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
LONG = {**GREEDY, "max_new_tokens": 480, "min_new_tokens": 480}
# Has the engine to itself for seconds, so that what comes meanwhile waits.
ALONE = {"do_sample": False, "num_beams": 12, "min_new_tokens": 470, "max_new_tokens": 480}


def events(response: requests.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream; comments are skipped, and every other line is checked."""
    for line in response.iter_lines():
        if line and not line.startswith(b":"):
            assert line.startswith(b"data: "), line
            yield json.loads(line[6:])


def stream(server: Server, body: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """All events of the stream that answers `body`."""
    url = f"{server.api}/generate"
    with requests.post(url, json={**body, "stream": True}, stream=True, timeout=PATIENCE, **options) as response:
        assert response.status_code == 200, response.text
        assert response.headers["Content-Type"].startswith("text/event-stream")
        return list(events(response))


def engine(server: Server, model_id: str) -> dict[str, Any]:
    """What the engine of a model does."""
    state: dict[str, Any] = server.call("GET", "/cache").json()["cached_models"][model_id]["engine"]
    return state


def idle(server: Server, model_id: str) -> None:
    """Wait until nothing runs, waits or has a slot."""

    def still() -> bool:
        state = engine(server, model_id)
        return not (state["running"] or state["waiting"] or state["slots"])

    until(still)
    until(lambda: server.call("GET", "/requests").json() == {"success": True, "requests": [], "count": 0})


@pytest.fixture(scope="module")
def llama(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path, tiny: Any, backend: str, graphs: Graphs
) -> Iterator[Callable[..., tuple[Server, str]]]:
    """Gives a server with the tiny llama in memory, and nothing to do; tests with the same settings share one."""
    servers: dict[tuple[tuple[str, str], ...], Server] = {}

    def give(**settings: str) -> tuple[Server, str]:
        key, model_id = tuple(sorted(settings.items())), tiny("llama")
        if key not in servers:
            servers[key] = Server(
                tmp_path_factory.mktemp("server"), models_dir, graphs if backend == "openvino" else None, **settings
            )
        server = servers[key]
        server.add(model_id, "text-generation")
        assert server.call("POST", f"/models/{model_id}/load").status_code == 200
        idle(server, model_id)
        return server, model_id

    yield give
    for server in servers.values():
        server.stop()


def test_a_stream_is_the_answer_bit_by_bit(server: Server, tiny: Any) -> None:
    """The pieces of text join to the response, and the last event is the body that comes without `stream`."""
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    body = {"model_id": model_id, "prompt": "The cat", **GREEDY, "max_new_tokens": 30}
    whole = server.call("POST", "/generate", json=body).json()
    *pieces, last = stream(server, body)
    assert len(pieces) > 3
    assert all(list(piece) == ["index", "text"] and piece["index"] == 0 for piece in pieces)
    assert "".join(piece["text"] for piece in pieces) == last["response"] == whole["response"]
    assert list(last) == list(whole)
    assert {**last, "timings": None} == {**whole, "timings": None}
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 30, "total_tokens": 34}
    assert last["finish_reason"] == "length"
    assert set(last["timings"]) == {"queue", "first_token", "total", "tokens_per_second"}


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        ({"temperature": -1}, 400),
        ({"model_id": "no/such"}, 404),
        ({"prompt": "a cat " * 600}, 400),
        ({"timeout": 0}, 400),
        ({"stream": 1}, 400),
    ],
)
def test_what_is_wrong_from_the_start_has_its_status(
    server: Server, tiny: Any, extra: dict[str, Any], status: int
) -> None:
    """An error before the first token is an ordinary answer with its status, not an event."""
    server.add(tiny("llama"), "text-generation")
    body = {"model_id": tiny("llama"), "prompt": "x", "stream": True, **extra}
    answer = server.call("POST", "/generate", json=body)
    assert (answer.status_code, answer.json()["success"]) == (status, False)


def test_several_sequences_are_told_apart(server: Server, tiny: Any) -> None:
    """Events of several returned sequences carry their index."""
    server.add(tiny("llama"), "text-generation")
    body = {"model_id": tiny("llama"), "prompt": "The", "max_new_tokens": 8, "num_return_sequences": 3, "seed": 1}
    *pieces, last = stream(server, body)
    for index, text in enumerate(last["responses"]):
        assert "".join(piece["text"] for piece in pieces if piece["index"] == index) == text
    assert len(last["finish_reasons"]) == 3


def test_a_stop_string_ends_a_stream_without_being_seen(server: Server, tiny: Any) -> None:
    """A stop string is in no event, not even its beginning."""
    server.add(tiny("llama"), "text-generation")
    body = {"model_id": tiny("llama"), "prompt": "The old lighthouse", **GREEDY, "max_new_tokens": 40}
    whole = server.call("POST", "/generate", json=body).json()["response"]
    stop = whole[8:12]
    *pieces, last = stream(server, {**body, "stop_strings": [stop]})
    assert "".join(piece["text"] for piece in pieces) == last["response"] == whole[: whole.index(stop)]
    assert last["finish_reason"] == "stop"


def test_sixty_four_streams_of_which_a_third_hang_up(llama: Any) -> None:
    """Every survivor's text is right, and slots and memory are back where they were."""
    server, model_id = llama()
    bodies = [
        {"model_id": model_id, "prompt": f"{index} little {'harbour ' * (index % 9)}", **GREEDY, "max_new_tokens": 60}
        for index in range(64)
    ]
    expected = [server.call("POST", "/generate", json=body).json()["response"] for body in bodies]
    idle(server, model_id)

    def one(index: int) -> str | None:
        if index % 3:
            *pieces, last = stream(server, bodies[index])
            assert "".join(piece.get("text", "") for piece in pieces) == last["response"]
            return str(last["response"])
        body = {**bodies[index], **LONG, "stream": True}
        with requests.post(f"{server.api}/generate", json=body, stream=True, timeout=PATIENCE) as response:
            for _ in zip(range(random.Random(index).randrange(20)), events(response), strict=False):
                pass
        return None

    process, sizes = psutil.Process(server.process.pid), []
    for _ in range(3):
        with ThreadPoolExecutor(64) as pool:
            texts = list(pool.map(one, range(64)))
        assert [text for text in texts if text is not None] == [expected[i] for i in range(64) if i % 3]
        idle(server, model_id)
        sizes.append(process.memory_info().rss)
    assert sizes[2] < 1.05 * sizes[1], sizes
    assert server.call("DELETE", "/cache").status_code == 200
    assert process.memory_info().rss < sizes[2]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hang_up_frees_the_slot_at_once(llama: Any, streaming: bool) -> None:
    """A client that closes its connection is noticed within steps, whether its answer streams or not."""
    server, model_id = llama()
    address = urlsplit(server.url)
    body = json.dumps({"model_id": model_id, "prompt": "The", **ALONE, "num_beams": 1, "stream": streaming})

    def made() -> int:
        told: int = server.call("GET", "/statistics").json()["statistics"]["models"][model_id]["tokens"]
        return told

    before = made()
    connection = http.client.HTTPConnection(address.hostname, address.port)
    connection.request("POST", "/api/huggingface/generate", body, {"Content-Type": "application/json"})
    until(lambda: server.call("GET", "/requests").json()["count"] == 1)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    idle(server, model_id)
    assert made() == before  # it did not go on to its end


def test_who_leaves_the_queue_is_not_waited_for(llama: Any) -> None:
    """A client that hangs up while it waits is gone from the list long before its turn."""
    server, model_id = llama(LOCAL_LLM_MAX_BATCH="1")
    first = threading.Thread(target=stream, args=(server, {"model_id": model_id, "prompt": "The", **LONG}))
    first.start()
    until(lambda: engine(server, model_id)["running"] == 1)
    with pytest.raises(requests.exceptions.ReadTimeout):
        body = {"model_id": model_id, "prompt": "cat", **LONG}
        requests.post(f"{server.api}/generate", json=body, timeout=0.1)
    until(lambda: engine(server, model_id)["waiting"] == 0)
    first.join(60)
    idle(server, model_id)


def test_requests_are_listed_and_cancelled_by_their_id(llama: Any) -> None:
    """GET /requests shows what runs and waits; DELETE ends one, whose client gets a 499, and harms no other."""
    server, model_id = llama(LOCAL_LLM_MAX_BATCH="1")
    body = {"model_id": model_id, "prompt": "The cat", **LONG, "max_new_tokens": 500, "min_new_tokens": 500}
    with ThreadPoolExecutor(3) as pool:
        headers = {"X-Request-Id": "mine"}
        calls = [pool.submit(server.call, "POST", "/generate", json=body, headers=headers) for _ in range(3)]
        until(lambda: server.call("GET", "/requests").json()["count"] == 3)
        listed = server.call("GET", "/requests").json()["requests"]
        assert len({one["request_id"] for one in listed}) == 3
        assert {one["client_request_id"] for one in listed} == {"mine"}
        assert {one["task"] for one in listed} == {"generate"}
        assert [one["model_id"] for one in listed] == [model_id] * 3
        for one in listed[:2]:
            assert server.call("DELETE", f"/requests/{one['request_id']}").status_code in (200, 404)
        answers = [call.result(60) for call in calls]
    assert 1 <= sum(answer.status_code == 499 for answer in answers) <= 2
    assert all("cancelled" in answer.json()["error"] for answer in answers if answer.status_code == 499)
    assert any(answer.status_code == 200 for answer in answers)
    assert {answer.headers["X-Request-Id"] for answer in answers} == {"mine"}
    assert {answer.headers["X-Local-LLM-Request-Id"] for answer in answers} == {one["request_id"] for one in listed}
    assert server.call("DELETE", "/requests/nobody").status_code == 404
    idle(server, model_id)


def test_what_goes_wrong_in_the_middle_is_the_last_event(llama: Any) -> None:
    """A stream that is cancelled after its first token ends with an event in the shape of every error."""
    server, model_id = llama()
    body = {"model_id": model_id, "prompt": "The", **LONG, "stream": True}
    with requests.post(f"{server.api}/generate", json=body, stream=True, timeout=PATIENCE) as response:
        assert response.status_code == 200
        told = events(response)
        assert list(next(told)) == ["index", "text"]
        request_id = response.headers["X-Local-LLM-Request-Id"]
        assert server.call("DELETE", f"/requests/{request_id}").status_code == 200
        *_, last = told
    assert last == {"success": False, "error": f"Request '{request_id}' was cancelled"}
    idle(server, model_id)


def test_a_deadline_holds_wherever_the_request_is(llama: Any, tiny: Any) -> None:
    """`timeout` ends a request with a 504: in the queue behind another, running, and for tasks."""
    server, model_id = llama()
    busy = threading.Thread(
        target=lambda: server.call("POST", "/generate", json={"model_id": model_id, "prompt": "The", **ALONE})
    )
    busy.start()
    until(lambda: engine(server, model_id)["running"] == 1)
    task = {"model_id": model_id, "task": "text-generation", "inputs": "The", "timeout": 0.3}
    for path, body in (
        ("/generate", {"model_id": model_id, "prompt": "x", "timeout": 0.3}),
        ("/generate", {"model_id": model_id, "prompt": "x", "timeout": 0.3, "stream": True}),
        ("/pipeline", task),
    ):
        started = time.monotonic()
        answer = server.call("POST", path, json=body)
        assert (answer.status_code, answer.json()["success"]) == (504, False)
        assert "0.3" in answer.json()["error"]
        assert time.monotonic() - started > 0.2
        assert busy.is_alive(), "it was to keep the engine during all of this"
    busy.join(60)
    idle(server, model_id)


def test_whoever_waits_sees_the_place_in_the_queue(llama: Any) -> None:
    """A stream that has to wait tells its place, and sends comments in silence; the text comes when it is its turn."""
    server, model_id = llama(LOCAL_LLM_MAX_BATCH="1")
    busy = [
        threading.Thread(
            target=lambda: server.call("POST", "/generate", json={"model_id": model_id, "prompt": "The", **ALONE})
        )
        for _ in range(2)
    ]
    for thread in busy:
        thread.start()
    until(lambda: engine(server, model_id)["running"] + engine(server, model_id)["waiting"] == 2)
    body = {"model_id": model_id, "prompt": "The cat", **GREEDY, "max_new_tokens": 5}
    first, *_, last = stream(server, body)
    assert list(first) == ["request_id", "position"]
    assert first["position"] >= 1
    assert last["success"] is True
    for thread in busy:
        thread.join(60)


def test_a_full_queue_is_a_503_that_says_when_to_come_back(llama: Any) -> None:
    """Beyond the batch and the queue a request is refused at once; those before it are answered."""
    server, model_id = llama(LOCAL_LLM_MAX_BATCH="2", LOCAL_LLM_MAX_QUEUE="1")
    body = {"model_id": model_id, "prompt": "The", **LONG}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.call("POST", "/generate", json=body), range(8)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses.count(200) >= 3
    assert set(statuses) == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["Retry-After"]) >= 1
            assert "queue" in answer.json()["error"]
    idle(server, model_id)


def test_concurrent_task_calls_are_batched_and_can_be_cancelled(llama: Any, tiny: Any) -> None:
    """A long list does not hold up a short one, and ends at the next batch when it is cancelled."""
    server, model_id = llama()[0], tiny("distilbert-sst2")
    server.add(model_id, "sentiment-analysis")
    body = {"model_id": model_id, "task": "sentiment-analysis"}
    texts = [f"good and bad {'day ' * (index % 40)}" for index in range(6000)]
    alone = server.call("POST", "/pipeline", json={**body, "inputs": "good day"}).json()["results"]
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.call, "POST", "/pipeline", json={**body, "inputs": texts})
        until(lambda: server.call("GET", "/requests").json()["count"] == 1)
        short = server.call("POST", "/pipeline", json={**body, "inputs": "good day"}).json()["results"]
        assert short[0]["label"] == alone[0]["label"]
        assert abs(short[0]["score"] - alone[0]["score"]) < 1e-5
        assert not long.done()
        [listed] = server.call("GET", "/requests").json()["requests"]
        server.call("DELETE", f"/requests/{listed['request_id']}")
        assert long.result(30).status_code == 499
    until(lambda: engine(server, model_id)["tasks"] == 0)
