"""Whether work is still wanted: probes, parents, deadlines, and waiting for something as long as it is."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest
from conftest import PATIENCE

from huggingface.cancellation import NEVER, Cancellation
from huggingface.errors import Cancelled


def test_work_goes_on_until_it_is_cancelled() -> None:
    cancellation = Cancellation()
    cancellation.check()
    assert not cancellation.cancelled
    cancellation.cancel()
    assert cancellation.cancelled
    with pytest.raises(Cancelled, match="The request was cancelled, or the server is stopping"):
        cancellation.check()


def test_a_probe_is_asked_until_it_says_yes_and_then_no_more() -> None:
    answers = iter([False, True])
    cancellation = Cancellation(lambda: next(answers))
    assert not cancellation.cancelled
    assert cancellation.cancelled
    assert cancellation.cancelled


def test_a_parent_cancels_its_children_and_not_the_other_way() -> None:
    parent = Cancellation()
    child, other = parent.child(), parent.child(lambda: False)
    child.cancel()
    assert child.cancelled
    assert not parent.cancelled
    assert not other.cancelled
    parent.cancel()
    assert other.cancelled
    assert NEVER.child(lambda: True).cancelled
    assert not NEVER.cancelled


def test_a_deadline_that_has_passed_cancels() -> None:
    late = Cancellation(deadline=time.monotonic() - 1)
    assert late.expired
    assert late.cancelled
    early = Cancellation(deadline=time.monotonic() + 3600)
    assert not early.cancelled
    early.cancel()
    assert early.cancelled
    assert not early.expired


def test_until_gives_the_first_true_value() -> None:
    values = iter([0, "", [1]])
    waits: list[float] = []

    def ready(seconds: float) -> object:
        waits.append(seconds)
        return next(values)

    assert NEVER.until(ready) == [1]
    assert len(waits) == 3
    assert all(seconds > 0 for seconds in waits)


def test_until_raises_where_the_work_is_cancelled_and_ends_where_its_time_is_over() -> None:
    cancellation = Cancellation()

    def never(_: float) -> bool:
        cancellation.cancel()
        return False

    with pytest.raises(Cancelled):
        cancellation.until(never)
    assert cancellation.until(lambda _: "ready") == "ready"  # what is there already is not refused
    assert NEVER.until(lambda seconds: seconds > 0, 0) is False


def test_a_result_is_waited_for_as_long_as_it_is_wanted() -> None:
    future: Future[list[int]] = Future()
    cancellation = Cancellation()
    threading.Timer(0.01, cancellation.cancel).start()
    with pytest.raises(Cancelled):
        cancellation.result(future)
    threading.Timer(0.01, future.set_result, [[]]).start()
    assert NEVER.result(future) == []
    failed: Future[None] = Future()
    failed.set_exception(TimeoutError())  # of the work, not of the wait
    with pytest.raises(TimeoutError):
        NEVER.result(failed)


def test_a_wait_ends_when_another_thread_cancels() -> None:
    for cancels in (Cancellation(), Cancellation().child()):
        waited: Future[bool] = Future()
        thread = threading.Thread(target=lambda c=cancels, f=waited: f.set_result(c.wait(10 * PATIENCE)))
        thread.start()
        cancels.cancel()
        assert waited.result(PATIENCE)
    assert not NEVER.wait(0.001)
