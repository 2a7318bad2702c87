"""Event streams without a model: what begins, fills and ends one, and how far work is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from flask import Response

from huggingface.api.http.sse import NAMED_SSE, NDJSON, SSE, Encoding, Events, Writer, event_stream
from huggingface.api.requests.work import Work, moments
from huggingface.cancellation import Cancellation
from huggingface.errors import InvalidRequest, LocalLLMError
from huggingface.progress import Moment, Progress


class Told(Writer[int]):
    """Tells numbers."""

    def write(self, item: int) -> Events:
        yield {"type": "number", "number": 10 // item}

    def end(self) -> Events:
        yield b"[DONE]"

    def error(self, error: LocalLLMError) -> Events:
        yield {"type": "error", "error": str(error)}


class Pinging(Told):
    """Has something to say in silence, once."""

    pinged = False

    def silence(self) -> Events:
        if not self.pinged:
            self.pinged = True
            yield {"type": "ping"}


def sent(source: Iterator[int | None], writer: Writer[int] | None = None, encoding: Encoding = SSE) -> list[bytes]:
    """What a stream sends, piece by piece."""
    return list(event_stream(source, writer or Told(), ExitStack(), encoding).response)  # type: ignore[arg-type]


def failing(*items: int | None, error: Exception) -> Iterator[int | None]:
    """A source that ends in an error."""
    yield from items
    raise error


def test_each_encoding_writes_events_and_silence_in_its_way() -> None:
    items = [5, None, 2]
    assert sent(iter(items)) == [
        b'data: {"type":"number","number":2}\n\n',
        b": keep-alive\n\n",
        b'data: {"type":"number","number":5}\n\n',
        b"data: [DONE]\n\n",
    ]
    assert sent(iter(items), encoding=NAMED_SSE)[0] == b'event: number\ndata: {"type":"number","number":2}\n\n'
    assert sent(iter(items), encoding=NDJSON)[:2] == [b'{"type":"number","number":2}\n', b" "]


def test_a_protocols_own_words_fill_a_silence_where_it_has_some() -> None:
    assert sent(iter([5, None, None]), Pinging())[1:3] == [b'data: {"type":"ping"}\n\n', b": keep-alive\n\n"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: failing(5, error=InvalidRequest("It is wrong")), b"It is wrong"),
        (lambda: failing(5, error=OSError("/secret/path")), b"Internal server error; the server's log has the details"),
        (lambda: iter([5, 0]), b"Internal server error; the server's log has the details"),
    ],
)
def test_what_goes_wrong_in_the_middle_is_an_event_that_says_nothing_private(
    source: Callable[[], Iterator[int | None]], message: bytes
) -> None:
    first, last = sent(source())
    assert first == b'data: {"type":"number","number":2}\n\n'
    assert last == b'data: {"type":"error","error":"' + message + b'"}\n\n'


def test_an_error_before_the_first_item_is_no_stream_and_leaves_the_stack_to_its_caller() -> None:
    closed: list[str] = []
    with pytest.raises(InvalidRequest), ExitStack() as stack:
        stack.callback(closed.append, "by the caller")
        event_stream(failing(error=InvalidRequest("no")), Told(), stack)
    assert closed == ["by the caller"]


def test_the_stack_is_closed_with_the_response_and_not_before() -> None:
    closed: list[str] = []
    with ExitStack() as stack:
        stack.callback(closed.append, "with the response")
        response: Response = event_stream(iter([5]), Told(), stack)
    assert not closed
    response.close()
    assert closed == ["with the response"]


def test_each_phase_is_told_in_its_turn_and_a_short_one_too() -> None:
    progress = Progress()
    version, news = progress.since(-1)
    assert [moment.phase for moment in news] == ["waiting"]
    assert progress.since(version) == (version, [])
    progress.begin("download", 10)
    progress.begin("read", 20)
    progress.advance(5)
    version, news = progress.since(version)
    assert [(moment.phase, moment.done) for moment in news] == [("download", 0), ("read", 5)]
    progress.end("ready")
    assert [moment.phase for moment in progress.since(version)[1]] == ["ready"]


def followed(work: Callable[..., dict[str, Any]], hold: float = 600) -> list[Moment | None]:
    """What is told of some work."""
    with Work(work) as begun:
        return list(moments(begun, hold))


def test_work_is_told_to_its_end() -> None:
    progress = Progress()

    def work(cancellation: Cancellation, watch: Callable[[Progress], None]) -> dict[str, Any]:
        watch(progress)
        progress.begin("read", 1)
        progress.end("ready")
        return {"done": not cancellation.cancelled}

    told = followed(work)
    assert [moment and moment.phase for moment in told] == ["read", "ready"]


def test_of_work_that_fails_at_once_nothing_is_told() -> None:
    def work(_: Cancellation, watch: Callable[[Progress], None]) -> dict[str, Any]:
        watch(Progress())
        raise InvalidRequest("no")

    with Work(work) as begun:
        source = moments(begun, 600)
        with pytest.raises(InvalidRequest):
            next(source)


def test_work_is_given_up_when_its_stream_ends_before_it() -> None:
    ended = threading.Event()

    def work(cancellation: Cancellation, watch: Callable[[Progress], None]) -> dict[str, Any]:
        watch(Progress())
        while not cancellation.cancelled:
            ended.wait(0.01)
        ended.set()
        return {}

    with Work(work) as begun:
        first = next(moments(begun, 0))
        assert first is None or first.phase == "waiting"
    assert ended.wait(600)
