"""The server's worker threads: one request computes at a time, and those for the probes overtake."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PATIENCE

from dispatcher import Dispatcher
from huggingface.cancellation import NEVER, before_wait

THREADS = 8
FOR_EVER = 1e9


class Task:
    """A connection with one complete request. Runs `work`; `began` and `ended` are set around it."""

    def __init__(self, work: Callable[[], object] = lambda: None, path: str = "/other") -> None:
        self.requests = [SimpleNamespace(path=path)]
        self.began, self.ended = threading.Event(), threading.Event()
        self._work = work

    def service(self) -> None:
        self.began.set()
        try:
            self._work()
        finally:
            self.ended.set()

    def cancel(self) -> None:
        """For the dispatcher's end."""


@pytest.fixture
def dispatcher() -> Iterator[Any]:
    """Makes a dispatcher with threads; it ends with the test."""
    made: list[Dispatcher] = []

    def make(longest: float = FOR_EVER) -> Dispatcher:
        made.append(Dispatcher(frozenset({"/first"}), longest))
        made[0].set_thread_count(THREADS)
        return made[0]

    yield make
    for each in made:
        assert each.shutdown(timeout=PATIENCE)
        assert not each.threads


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Holds tasks that wait for it until the test opens it, at its end at the latest."""
    event = threading.Event()
    yield event
    event.set()


def test_one_request_computes_and_the_others_run_one_after_another(dispatcher: Any, gate: threading.Event) -> None:
    made = dispatcher()
    order: list[int] = []
    inside, maximum = 0, 0
    lock = threading.Lock()

    def work(number: int) -> None:
        nonlocal inside, maximum
        with lock:
            inside, maximum = inside + 1, max(maximum, inside + 1)
        order.append(number)
        gate.wait(PATIENCE)
        with lock:
            inside -= 1

    tasks = [Task(lambda number=number: work(number)) for number in range(3 * THREADS)]
    for task in tasks:
        made.add_task(task)
    assert tasks[0].began.wait(PATIENCE)
    gate.set()
    for task in tasks:
        assert task.ended.wait(PATIENCE)
    assert maximum == 1
    assert order == list(range(3 * THREADS))


def test_a_request_for_a_probe_overtakes_and_needs_no_turn(dispatcher: Any, gate: threading.Event) -> None:
    made = dispatcher()
    computing = Task(lambda: gate.wait(PATIENCE))
    queued = [Task() for _ in range(3 * THREADS)]
    probe = Task(path="/first")
    made.add_task(computing)
    assert computing.began.wait(PATIENCE)
    for task in [*queued, probe]:
        made.add_task(task)
    assert probe.ended.wait(PATIENCE)
    assert not any(task.began.is_set() for task in queued)


@pytest.mark.parametrize(
    "waits",
    [
        pytest.param(before_wait, id="by itself"),
        pytest.param(lambda: NEVER.until(lambda seconds: True), id="for something"),
        pytest.param(lambda: NEVER.wait(0), id="for a time"),
    ],
)
def test_a_request_that_waits_lets_the_next_one_compute(
    dispatcher: Any, gate: threading.Event, waits: Callable[[], object]
) -> None:
    made = dispatcher()

    def work() -> None:
        waits()
        gate.wait(PATIENCE)

    tasks = [Task(work) for _ in range(THREADS - 1)] + [Task()]
    for task in tasks:
        made.add_task(task)
    assert tasks[-1].ended.wait(PATIENCE)
    assert not tasks[0].ended.is_set()


def test_a_turn_ends_by_itself(dispatcher: Any, gate: threading.Event) -> None:
    """A request that neither ends nor says that it waits holds up the others only for a while."""
    made = dispatcher(longest=0.01)
    tasks = [Task(lambda: gate.wait(PATIENCE)) for _ in range(THREADS)]
    for task in tasks:
        made.add_task(task)
    for task in tasks:
        assert task.began.wait(PATIENCE)


def test_a_request_that_fails_ends_its_turn(dispatcher: Any) -> None:
    made = dispatcher()

    def fail() -> None:
        raise ValueError

    tasks = [Task(fail), Task(), Task(lambda: (_ for _ in ()).throw(SystemExit)), Task()]
    for task in tasks:
        made.add_task(task)
    for task in tasks:
        assert task.ended.wait(PATIENCE)


def test_a_wait_is_told_once_and_to_its_own_thread(dispatcher: Any, gate: threading.Event) -> None:
    """What a request waits for after its turn does not end the turn of the next one."""
    made = dispatcher()
    again, told = threading.Event(), threading.Event()

    def work() -> None:
        before_wait()
        again.wait(PATIENCE)
        before_wait()
        told.set()
        gate.wait(PATIENCE)

    first, second, third = Task(work), Task(lambda: gate.wait(PATIENCE)), Task()
    for task in (first, second, third):
        made.add_task(task)
    assert second.began.wait(PATIENCE)
    again.set()
    assert told.wait(PATIENCE)
    with made.lock:
        assert made.queue[0] is third
    gate.set()
    assert third.ended.wait(PATIENCE)


def test_a_request_that_could_not_be_parsed_has_no_path(dispatcher: Any) -> None:
    made = dispatcher()
    task = Task()
    task.requests = [SimpleNamespace(error=ValueError())]
    made.add_task(task)
    assert task.ended.wait(PATIENCE)
