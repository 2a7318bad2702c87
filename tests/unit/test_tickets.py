"""Several generations read as one ticket, whatever the order in which they begin and end."""

from __future__ import annotations

import threading
import time

import pytest

from huggingface.cancellation import Cancellation
from huggingface.engine.parallel_sampling import Begin, JointTicket
from huggingface.engine.ticket import Ticket
from huggingface.errors import GenerationFailed, QueueFull
from huggingface.types import Chunk


def ended(text: str) -> Ticket:
    """A ticket that was over before anybody looked."""
    ticket = Ticket(3, prompt_end="the end")
    ticket.put(Chunk(text, finish_reason="stop"))
    ticket.finish()
    return ticket


def test_what_ends_at_once_is_read_all_the_same() -> None:
    joint = JointTicket([lambda _: ended("a"), lambda _: ended("b"), lambda _: ended("c")], 2)
    assert joint.prompt_end == "the end"
    assert sorted((chunk.index, chunk.text) for chunk in joint) == [(0, "a"), (1, "b"), (2, "c")]
    assert joint.prompt_tokens == 9


def test_no_more_than_so_many_run_at_once() -> None:
    running: list[Ticket] = []
    maximum = 0

    def begin(_: Cancellation) -> Ticket:
        nonlocal maximum
        ticket = Ticket()
        running.append(ticket)
        maximum = max(maximum, len(running))

        def work() -> None:
            time.sleep(0.005)
            running.remove(ticket)
            ticket.made = 2
            ticket.put(Chunk("x", finish_reason="stop"))
            ticket.finish()

        threading.Thread(target=work).start()
        return ticket

    joint = JointTicket([begin] * 30, 4)
    assert len(list(joint)) == 30
    assert maximum <= 4
    assert joint.made == 60


def test_a_full_queue_is_waited_for_and_refuses_only_the_first() -> None:
    tries = 0

    def begin(_: Cancellation) -> Ticket:
        nonlocal tries
        tries += 1
        if tries in (2, 3):
            raise QueueFull("m", 9, 1)
        return ended(str(tries))

    first = Ticket()

    def begin_first(_: Cancellation) -> Ticket:
        nonlocal tries
        tries += 1
        return first

    joint = JointTicket([begin_first, begin], 2)
    assert not joint.wait(0.01)
    first.put(Chunk("first", finish_reason="stop"))
    assert next(joint).text == "first"
    assert joint.wait(1)
    first.finish()
    assert [chunk.text for chunk in joint] == ["4"]

    def refuse(_: Cancellation) -> Ticket:
        raise QueueFull("m", 9, 1)

    with pytest.raises(QueueFull):
        JointTicket([refuse], 2)


def beginning(tickets: list[Ticket]) -> Begin:
    """Begins a generation, and adds its ticket to these."""

    def begin(cancellation: Cancellation) -> Ticket:
        tickets.append(Ticket(cancellation=cancellation))
        return tickets[-1]

    return begin


def test_one_that_fails_ends_all() -> None:
    tickets: list[Ticket] = []
    joint = JointTicket([beginning(tickets)] * 2, 2)
    assert not joint.wait(0.01)
    tickets[0].finish(GenerationFailed("broken"))
    with pytest.raises(GenerationFailed):
        list(joint)
    assert tickets[1].cancellation.cancelled


def test_to_cancel_one_is_to_cancel_all() -> None:
    tickets: list[Ticket] = []
    joint = JointTicket([beginning(tickets)] * 2, 2)
    joint.wait(0.01)
    joint.cancel()
    assert [ticket.cancellation.cancelled for ticket in tickets] == [True, True]


def test_one_that_begins_while_all_is_cancelled_is_cancelled_too() -> None:
    tickets: list[Ticket] = []
    begin = beginning(tickets)

    def begin_late(cancellation: Cancellation) -> Ticket:
        joint.cancel()
        return begin(cancellation)

    joint = JointTicket([begin, begin_late], 2)
    joint.wait(0.01)
    assert [ticket.cancellation.cancelled for ticket in tickets] == [True, True]


def test_none_begins_for_a_client_that_has_gone() -> None:
    tickets: list[Ticket] = []
    client = Cancellation()
    joint = JointTicket([beginning(tickets)] * 3, 2, client)
    client.cancel()
    assert not joint.wait(0.01)
    assert [ticket.cancellation.cancelled for ticket in tickets] == [True]
