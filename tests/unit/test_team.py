"""The number of threads of a step of llama.cpp: what is fastest, found out at little cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from huggingface.engine.llama_cpp.team import Team


class Machine:
    """A machine whose time is ours: a step takes the seconds that `cost` says for its tokens and threads."""

    def __init__(self, most: int, cost: Callable[[int, int], float]) -> None:
        self.now = 0.0
        self.cost = cost
        self.team = Team(most, lambda: self.now)

    def step(self, tokens: int) -> int:
        """Computes a step; returns how many threads it had."""
        with self.team.step(tokens) as threads:
            self.now += self.cost(tokens, threads)
        return threads


def alone(tokens: int, threads: int) -> float:
    """A machine with the cores to itself."""
    return 0.01 * tokens / threads


def beside_others(tokens: int, threads: int) -> float:
    """Another program has a core: threads that wait for each other are slow."""
    return 0.01 * tokens if threads == 1 else 0.5 * tokens


@pytest.mark.parametrize("most", [1, 2, 3, 16])
def test_all_threads_compute_where_nothing_else_runs(most: int) -> None:
    machine = Machine(most, alone)
    chosen = [machine.step(1) for _ in range(2000)]
    assert chosen[0] == most
    assert len(chosen) - chosen.count(most) <= 3  # each other number once


def test_one_thread_computes_beside_other_programs_and_all_do_afterwards() -> None:
    """What is lost by trying the other number stays a small share of the time, and is found out again later."""
    machine = Machine(2, alone)
    for _ in range(50):
        machine.step(4)
    machine.cost = beside_others
    begin = machine.now
    count = 3000
    for _ in range(count):
        machine.step(4)
    assert machine.now - begin < 1.2 * count * beside_others(4, 1)
    machine.cost = alone
    chosen = [machine.step(4) for _ in range(4000)]
    assert chosen[-100:].count(2) > 90


def test_texts_that_grow_cost_few_tries() -> None:
    """Steps take longer as texts grow, by any number of threads."""
    machine = Machine(2, lambda tokens, threads: alone(tokens, threads) * (1 + machine.now))
    chosen = [machine.step(1) for _ in range(500)]
    assert machine.cost(1, 2) > 3 * alone(1, 2)
    assert chosen.count(1) <= 12


def test_long_prompts_take_what_is_best_for_a_few_tokens() -> None:
    """They are never tried with a number of threads that may be many times slower."""
    machine = Machine(8, alone)
    assert machine.step(512) == 8
    for _ in range(200):
        machine.step(1)
    assert {machine.step(512) for _ in range(50)} == {8}
    machine.cost = beside_others
    for _ in range(50):
        machine.step(1)
    assert machine.step(512) == 1


def test_a_step_that_fails_is_not_timed() -> None:
    machine = Machine(2, alone)
    with pytest.raises(ValueError, match="broken"), machine.team.step(1):
        raise ValueError("broken")
    assert machine.step(1) == 2
