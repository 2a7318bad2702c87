"""The slots' bookkeeping, on lists instead of tensors: whatever is taken or moved, each row holds its own."""

from __future__ import annotations

import random

import pytest
import torch

from huggingface.engine.openvino.paged_cache import BLOCK, BlockCache
from huggingface.engine.prefill_budget import LARGEST, Pace
from huggingface.engine.scheduler import Scheduler
from huggingface.engine.sequence import Sequence
from huggingface.engine.slots import SMALLEST, Slot, SlotTable
from huggingface.engine.ticket import Ticket
from huggingface.engine.torch.cache import LayerShape


class Lists:
    """Rows of tokens in lists: what a cache holds, as far as the table can tell."""

    joint = True

    def __init__(self, maximum: int = 10**9) -> None:
        self.banks: dict[int, list[list[int | None]]] = {}
        self.maximum = maximum

    def create(self, bank: int, rows: int, capacity: int) -> bool:
        if sum(len(row) for kept in self.banks.values() for row in kept) + rows * capacity > self.maximum:
            return False
        self.banks[bank] = [[None] * capacity for _ in range(rows)]
        return True

    def drop(self, bank: int) -> None:
        del self.banks[bank]

    def copy(self, source: tuple[int, int], target: tuple[int, int], tokens: int) -> None:
        self.banks[target[0]][target[1]][:tokens] = self.banks[source[0]][source[1]][:tokens]

    def swap(self, bank: int, one: int, other: int, tokens: int) -> None:
        rows = self.banks[bank]
        rows[one][:tokens], rows[other][:tokens] = rows[other][:tokens], rows[one][:tokens]

    def clear(self, bank: int, row: int) -> None:
        self.banks[bank][row] = [None] * len(self.banks[bank][row])

    def write(self, slot: Slot, tokens: list[int]) -> None:
        """What a forward pass does: the tokens go into the slot's row, behind those that are there."""
        start = len(slot.tokens)
        self.banks[slot.bank.key][slot.row][start : start + len(tokens)] = tokens
        slot.tokens.extend(tokens)

    def read(self, slot: Slot) -> list[int | None]:
        return self.banks[slot.bank.key][slot.row][: len(slot.tokens)]


class Blocks(BlockCache):
    """The same on the blocks that OpenVINO reads: a token is kept as the number that its keys and values are."""

    def __init__(self, limit: int) -> None:
        shape = LayerShape((1, 1), (1, 2), torch.float32, torch.device("cpu"))
        super().__init__([shape, shape], limit)
        self.taken = 0
        self.take = self._take

    def _take(self, _: str, size: int) -> bool:
        self.taken += size
        return True

    @property
    def banks(self) -> dict[int, int]:
        assert self.taken == self.allocated_bytes
        return self._banks

    def write(self, slot: Slot, tokens: list[int]) -> None:
        start = len(slot.tokens)
        table = self.blocks(slot.bank.key, slot.row, start, len(tokens))
        for place, token in enumerate(tokens, start):
            for pair in self.tensors:
                for kept in pair:
                    kept[table[place // BLOCK], 0, place % BLOCK] = token
        slot.tokens.extend(tokens)

    def table(self, slot: Slot) -> list[int]:
        """The blocks of a slot's row, which stay as they are."""
        return self.blocks(slot.bank.key, slot.row, len(slot.tokens), 0)

    def read(self, slot: Slot) -> list[int | None]:
        table = self._rows.get((slot.bank.key, slot.row), [])
        seen = [
            [int(kept[table[place // BLOCK], 0, place % BLOCK, 0]) for place in range(len(slot.tokens))]
            for pair in self.tensors
            for kept in pair
        ]
        assert all(each == seen[0] for each in seen)
        assert not set(self._free) & set(self._readers)
        assert max(self._readers, default=0) < self._promised
        return list(seen[0])


@pytest.mark.parametrize("kind", ["lists", "blocks"])
@pytest.mark.parametrize("seed", range(12))
def test_every_row_holds_its_own_tokens_whatever_happens(seed: int, kind: str) -> None:
    """Slots are taken, filled, promoted, released and evicted at random; each row's content is what its slot says."""
    draw = random.Random(seed)
    limit = draw.choice([4, 12, 60]) * SMALLEST
    store = Lists() if kind == "lists" else Blocks(limit)
    table = SlotTable(store, limit)
    live: list[Slot] = []
    shared = [draw.randrange(50) for _ in range(300)]
    for _ in range(600):
        action = draw.random()
        if action < 0.4:
            prompt = [*shared[: draw.randrange(200)], *(draw.randrange(50) for _ in range(draw.randint(1, 60)))]
            need = len(prompt) + draw.choice([5, 100, 400])
            if not table.fits(need):
                continue
            slot = table.take(prompt, need)
            if slot is None:
                assert live, "with nobody there, what fits has to be let in"
                continue
            assert len(slot.tokens) < len(prompt)
            assert slot.tokens == prompt[: len(slot.tokens)] == store.read(slot)
            store.write(slot, prompt[len(slot.tokens) :])
            live.append(slot)
        elif live and action < 0.6:
            table.promote(draw.choice(live))
        elif live and action < 0.8:
            slot = draw.choice(live)
            if len(slot.tokens) < slot.bank.capacity:
                store.write(slot, [draw.randrange(50)])
            if draw.random() < 0.3:
                before, decodes = slot.bank.capacity, slot.decodes
                grown = table.grow(slot, before + 1)
                assert slot.bank.capacity == (2 * before if grown else before)
                assert slot.decodes is decodes
        elif live:
            slot = live.pop(draw.randrange(len(live)))
            table.release(slot, keep=draw.random() < 0.8, clean=draw.random() < 0.9)
        assert table.allocated <= limit
        assert table.taken == len(live)
        for slot in live:
            assert slot.taken
            assert store.read(slot) == slot.tokens
        for bank in {slot.bank for slot in live}:
            assert all(row is not None and row.taken for row in bank.rows[: bank.decoding])
            assert all(row is None or (row.bank is bank and bank.rows[row.row] is row) for row in bank.rows)
    for slot in live:
        table.release(slot)
    table.forget()
    assert table.allocated == table.taken == table.resting == 0
    assert not store.banks


def test_shared_blocks_that_move_are_still_shared() -> None:
    """Where a bank goes, the blocks behind its own come forward, those that several rows have as one."""
    limit = 16 * SMALLEST
    store = Blocks(limit)
    table = SlotTable(store, limit)
    fillers = []
    for start in range(1000, 9000, 1000):  # they have all the blocks in front
        filler = table.take([start], SMALLEST)
        assert filler is not None
        store.write(filler, list(range(start, start + SMALLEST)))
        fillers.append(filler)
    long = list(range(100))
    one, other = table.take(long, 2 * SMALLEST), None
    assert one is not None
    store.write(one, long)
    other = table.take([*range(70), 7, 7], 4 * SMALLEST)
    assert other is not None
    store.write(other, [7, 7])

    def shared() -> set[int]:
        return set(store.table(one)) & set(store.table(other))

    before = shared()
    assert len(before) == 2, "two whole blocks of 32 tokens"
    for filler in fillers:
        table.release(filler, keep=False)
    table.forget()
    assert not shared() & before, "they moved"
    assert len(shared()) == 2
    assert store.read(one) == long
    table.release(one, keep=False)
    table.forget()
    assert store.read(other) == [*range(70), 7, 7]
    table.release(other, keep=False)
    table.forget()
    whole = table.take([-1], limit)
    assert whole is not None
    store.write(whole, list(range(limit)))
    assert store.read(whole) == list(range(limit)), "no block stays with a sequence that has ended"


def test_a_prompt_that_goes_on_continues_in_its_place_and_a_branch_is_copied() -> None:
    """The next turn takes over the resting row; another chat with the same beginning gets a copy, and both are kept."""
    store = Lists()
    table = SlotTable(store, 64 * SMALLEST)
    first = table.take(list(range(100)), 200)
    assert first is not None
    store.write(first, list(range(100)))
    table.release(first)
    branch = table.take([*range(60), 7, 7], 200)
    assert branch is not None
    assert branch is not first
    assert branch.tokens == list(range(60)) == store.read(branch)
    again = table.take([*range(100), 5, 6], 200)
    assert again is first
    assert again.tokens == list(range(100))


def test_the_least_recently_used_row_goes_first() -> None:
    """Where there is no room, the row that rests longest is given up."""
    store = Lists()
    table = SlotTable(store, 2 * SMALLEST)
    slots = []
    for start in (0, 1000):
        slot = table.take([start, start + 1, start + 2], 10)
        assert slot is not None
        store.write(slot, [start, start + 1, start + 2])
        slots.append(slot)
    for slot in reversed(slots):
        table.release(slot)
    third = table.take([5000, 5001], 10)
    assert third is not None
    kept = table.take([0, 1, 2, 3], 10)
    assert kept is not None
    assert kept.tokens == [0, 1, 2]


def test_memory_that_is_not_there_is_not_taken() -> None:
    """Where the store has no memory for a bank, a sequence waits, and the bookkeeping is as before."""
    table = SlotTable(Lists(maximum=SMALLEST), 64 * SMALLEST)
    first = table.take([1, 2], 10)
    assert first is not None
    assert table.take([3, 4], 10) is None
    table.release(first)
    assert table.take([3, 4], 10) is not None


def test_chunks_take_less_than_the_decoding_they_delay() -> None:
    """A long prompt gets what fits into a share of a decoding step; many short ones may take longer."""
    pace = Pace()
    assert pace.budget(0, 5) == LARGEST
    for _ in range(20):
        pace.took(0.1, decoding=4, prompt_tokens=0)
        pace.took(0.2, decoding=4, prompt_tokens=50)
    assert 20 <= pace.budget(4, 0) <= 50
    assert pace.budget(4, 4) > 2 * pace.budget(4, 0)
    assert pace.budget(1, 1000) == LARGEST


def test_short_prompts_are_read_at_once_however_often_they_come() -> None:
    """What a step costs by itself is not taken for its tokens' price: then chunks would get ever smaller."""
    pace = Pace()

    def burst(prompts: int, tokens: int) -> int:
        """How many steps it takes until so many prompts of so many tokens, that come at once, are read."""
        left, steps = [tokens] * prompts, 0
        while left:
            decoding = prompts - len(left)
            budget = read = pace.budget(decoding, len(left))
            while left and budget:
                part = min(left[0], budget)
                budget, left[0] = budget - part, left[0] - part
                left = left[left[0] == 0 :]
            read -= budget
            own = (0.010 + 0.001 * decoding) if decoding else 0.0
            pace.took(own + 0.008 + 0.0005 * read, decoding=decoding, prompt_tokens=read)
            steps += 1
        for _ in range(50):
            pace.took(0.010 + 0.001 * prompts, decoding=prompts, prompt_tokens=0)
        return steps

    assert [burst(16, 64) for _ in range(8)] == [4] * 8


def test_a_clock_that_stands_still_is_no_division_by_zero() -> None:
    """Steps may be over before a coarse clock moves."""
    pace = Pace()
    pace.took(0.0, decoding=1, prompt_tokens=0)
    pace.took(0.0, decoding=1, prompt_tokens=10)
    assert pace.budget(1, 0) > 0


class Nothing:
    """Text, and a sampler, for sequences that only stand in line."""

    stopped = complete = False
    settled = True

    def close(self) -> None:
        pass

    def add(self, token: int) -> str:
        return ""

    def finish(self) -> tuple[str, str]:
        return "", ""


class Digits(Nothing):
    """Text that shows the number of each token."""

    def add(self, token: int) -> str:
        return str(token)


def waiting(tokens: list[int]) -> Sequence:
    """A sequence with a prompt of these tokens."""
    return Sequence(
        tokens=tokens,
        prompt_tokens=len(tokens),
        maximum=len(tokens) + 8,
        ends=frozenset(),
        ticket=Ticket(),
        text=Nothing(),
        sampler=Nothing(),
        parameters={},
    )


def test_nobody_hurries_for_the_end_of_a_long_prompt() -> None:
    """A prompt is short by what is to be read of it, a long one's end is not, and one that goes on a known text is."""
    scheduler = Scheduler(SlotTable(Lists(), 10_000), 4)

    def admit(tokens: list[int]) -> Sequence:
        scheduler.waiting.append(waiting(tokens))
        scheduler.admit()
        return scheduler.prefilling[-1]

    long = admit(list(range(2000)))
    assert scheduler.short_prompts == 0
    while len(long.tokens) - long.computed > 200:
        scheduler.computed(scheduler.plan(200))
    assert scheduler.prefilling == [long]
    assert scheduler.short_prompts == 0
    short = admit([7, 8, 9])
    assert scheduler.short_prompts == 1
    while scheduler.prefilling:
        scheduler.computed(scheduler.plan(200))
    for sequence in (long, short):
        scheduler.drop(sequence)
    again = admit([*range(2000), 5, 6])
    assert again.reused >= 1900
    assert scheduler.short_prompts == 1


def test_a_token_is_said_before_the_next_one_is_computed() -> None:
    """A form may come to be settled at any moment, also between the look that says a token and the plan of the step."""
    scheduler = Scheduler(SlotTable(Lists(), 10_000), 4)
    sequence = waiting([1, 2, 3])
    sequence.text, sequence.sampler, sequence.streams = Digits(), Nothing(), True
    scheduler.waiting.append(sequence)
    scheduler.admit()
    scheduler.computed(scheduler.plan(100))
    sequence.sampler.settled = False
    sequence.append(4)
    sequence.sampler.settled = True  # after the engine has looked
    assert scheduler.plan(100) == ()
    sequence.settle()
    assert [row.tokens for row in scheduler.plan(100)] == [(4,)]
    sequence.append(5)
    assert [next(sequence.ticket).text for _ in "45"] == ["4", "5"]


def test_a_further_bank_is_made_only_where_it_costs_no_pass_of_its_own() -> None:
    """Where each bank is computed by itself, a new row rather takes the place of one that rests."""
    for joint, banks in ((True, 2), (False, 1)):
        store = Lists()
        store.joint = joint
        table = SlotTable(store, 100_000)
        for start in range(16):
            slot = table.take([start], 100)
            assert slot is not None
            store.write(slot, [start])
            table.release(slot)
        taken = [table.take([100 + start], 100) for start in range(15)] + [table.take([15, 1], 100)]
        assert all(slot is not None for slot in taken)
        assert len(store.banks) == banks
        assert table.take([200], 100) is not None  # the first bank's rows are all taken
        assert len(store.banks) == 2
