"""What is measured of contestants that run side by side: many callers at once, long prompts, and the turns of a chat.

Contestants take turns. While one is measured the others are paused, so that only it and the callers use the processor;
the order changes from round to round. Results are plain dictionaries, as they stand in the line of JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from math import inf
from time import perf_counter, sleep
from typing import Any, TypeVar

from .client import Callers
from .contestants import Answer, Contestant, LocalLLM, Server, Unavailable
from .program import Watch
from .prompts import Prompts
from .report import gap_summary, median, ratios, summary

T = TypeVar("T")

_WARM_NUMBERS = 1_000_000  # prompts from here on only warm up
_JOIN_NUMBERS = 2_000_000
_CHAT_NUMBERS = 3_000_000
_LONG_NUMBERS = 4_000_000
_RIVALS = ("generate", "llama-cpp")  # with whom everybody is compared
_MIB = 1024 * 1024


def note(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


class Field:
    """The contestants that run; at most one of them at a time is not paused."""

    def __init__(self, contestants: list[Contestant], prompts: Prompts) -> None:
        """`out` then says why a contestant takes no part."""
        self.contestants = contestants
        self.prompts = prompts
        self.out: dict[str, str] = {}
        self._warming = prompts.series(_WARM_NUMBERS, 64)

    def start(self) -> None:
        """Start all that can be, and pause each."""
        for contestant in self.contestants:
            note(f"starting {contestant.name}")
            self._start(contestant)

    def stop(self) -> None:
        """Stop all of them."""
        for contestant in self.contestants:
            contestant.stop()

    def running(self) -> list[Contestant]:
        """Those that take part."""
        return [contestant for contestant in self.contestants if contestant.key not in self.out]

    @contextmanager
    def turn(self, contestant: Contestant) -> Iterator[Watch]:
        """This contestant's turn: it is awake and warm, the others are paused.

        If it turns out to be Unavailable, it is started again, rid of work that was given up.
        """
        if contestant.program is None:
            raise Unavailable("not started")
        contestant.program.resume()
        try:
            self._warm(contestant, 1)
            with Watch(contestant.program) as watch:
                yield watch
        except Unavailable:
            contestant.stop()
            self._start(contestant)
            raise
        contestant.program.pause()

    def _start(self, contestant: Contestant) -> None:
        try:
            contestant.start()
            # Alone and in a batch: the first of each kind makes memory and threads that the later ones find.
            for callers in (1, 4):
                self._warm(contestant, callers)
        except Unavailable as error:
            self.out[contestant.key] = str(error)
            note(f"  {contestant.name} takes no part: {error}")
            contestant.stop()
        else:
            if contestant.program is not None:
                contestant.program.pause()

    def _warm(self, contestant: Contestant, callers: int) -> None:
        prompts = list(islice(self._warming, callers))
        for answer in contestant.ask(prompts, 4, 120):
            if answer.error:
                raise Unavailable(f"did not answer: {answer.error}")
            if answer.prompt_tokens not in (64, None):
                raise Unavailable(f"made {answer.prompt_tokens} tokens of a prompt of 64")


# Many callers at once -------------------------------------------------------------------------------------------------


def callers(
    field: Field, counts: list[int], rounds: int, prompt_tokens: int, new_tokens: int, limit: float
) -> dict[str, Any]:
    """Each count of callers, in every round, for every contestant in turn: speed, latencies, memory, ratios.

    A measurement that at the contestant's best speed so far would not be over after `limit` seconds is left out; so is,
    in later rounds, one that failed.
    """
    results: dict[tuple[int, str], list[dict[str, Any]]] = {}
    left_out: dict[tuple[int, str], str] = {}
    best: dict[str, float] = {}
    fresh = field.prompts.series(0, prompt_tokens)
    for turn in range(rounds):
        for count in counts:
            prompts = list(islice(fresh, count))
            for contestant in rotated(field.running(), turn):
                key = contestant.key
                if (count, key) in left_out:
                    continue
                needed = count * new_tokens / best.get(key, inf)
                if needed > limit:
                    left_out[count, key] = f"would take {needed:.0f} s"
                    continue
                told = f"round {turn + 1}/{rounds}, {count:>2} callers, {contestant.name}"
                try:
                    result = _measured(field, contestant, prompts, new_tokens, limit)
                except Unavailable as error:
                    left_out[count, key] = str(error)
                    note(f"{told}: {error}")
                    continue
                note(f"{told}: {result['tokens_per_second']:.1f} tokens/s")
                results.setdefault((count, key), []).append(result)
                best[key] = max(best.get(key, 0.0), result["tokens_per_second"])
    rows: list[dict[str, Any]] = []
    for count in counts:
        for key in (contestant.key for contestant in field.contestants):
            row = {"callers": count, "server": key, "expected_tokens": count * new_tokens}
            if found := results.get((count, key)):
                others = {name: results[count, name] for name in ("ours", *_RIVALS) if (count, name) in results}
                rows.append(row | _compared(found, others))
            else:
                rows.append(row | {"left_out": field.out.get(key) or left_out.get((count, key)) or "not measured"})
    return {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "limit_s": limit, "rows": rows}


def _measured(
    field: Field, contestant: Contestant, prompts: list[str], new_tokens: int, limit: float
) -> dict[str, Any]:
    """One measurement. Raises Unavailable if one of the callers got no whole answer."""
    with field.turn(contestant) as watch:
        answers = contestant.ask(prompts, new_tokens, limit)
        for answer in answers:
            if answer.error:
                raise Unavailable(answer.error)
    texts = [answer.text for answer in answers]
    return {**summary(answers), "memory_mib": watch.peak / _MIB, "elsewhere": watch.elsewhere, "texts": texts}


def _compared(results: list[dict[str, Any]], others: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A row: the rounds of one contestant, beside the same rounds of this server, of `model.generate` and so on."""
    same = None
    generate = others.get("generate")
    if generate and results is not generate:
        rounds = zip(results, generate, strict=False)
        pairs = [pair for one, other in rounds for pair in zip(one["texts"], other["texts"], strict=True)]
        same = [sum(one == other for one, other in pairs), len(pairs)]
    numbers = [{name: value for name, value in result.items() if name != "texts"} for result in results]
    speed = "tokens_per_second"
    over = {name: found[speed] for name in _RIVALS if (found := ratios(results, others.get(name, [])))}
    return {
        "rounds": len(results),
        **median(numbers),
        "memory_mib": round(max(result["memory_mib"] for result in results)),
        "each_tokens_per_second": [result[speed] for result in results],
        "ours_over_this": ratios(others.get("ours", []), results),
        "over": over,
        "same_text_as_generate": same,
    }


def rotated(them: Sequence[T], turn: int) -> list[T]:
    """The order of a round: each is first once."""
    cut = turn % len(them) if them else 0
    return [*them[cut:], *them[:cut]]


# One long prompt ------------------------------------------------------------------------------------------------------


def long_prompt(field: Field, rounds: int, prompt_tokens: int, limit: float) -> dict[str, Any]:
    """One caller with one long prompt, for every contestant in turn: seconds to the first token."""
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    fresh = field.prompts.series(_LONG_NUMBERS, prompt_tokens)
    for turn in range(rounds):
        prompts = [next(fresh)]
        for contestant in rotated(field.running(), turn):
            if contestant.key in failed:
                continue
            told = f"round {turn + 1}/{rounds}, a prompt of {prompt_tokens} tokens, {contestant.name}"
            try:
                result = _measured(field, contestant, prompts, 4, limit)
            except Unavailable as error:
                failed[contestant.key] = str(error)
                note(f"{told}: {error}")
                continue
            note(f"{told}: {result['first_token_p50_ms']:.0f} ms")
            found.setdefault(contestant.key, []).append(result)
    rows: list[dict[str, Any]] = []
    for key in (contestant.key for contestant in field.contestants):
        row: dict[str, Any] = {"server": key}
        if results := found.get(key):
            firsts = [{name: one[name] for name in ("first_token_p50_ms", "elsewhere")} for one in results]
            ratio = {name: ratios(results, found.get(name, [])) for name in ("generate", "ours-torch")}
            over = {name: each["first_token_p50_ms"] for name, each in ratio.items() if each}
            rows.append(row | {"rounds": len(results), **median(firsts), "over": over})
        else:
            rows.append(row | {"left_out": field.out.get(key) or failed.get(key) or "not measured"})
    return {"prompt_tokens": prompt_tokens, "rows": rows}


# Long prompts join ----------------------------------------------------------------------------------------------------


def join(
    field: Field, keys: tuple[str, ...], rounds: int, new_tokens: int, joiners: int, joiner_tokens: int, limit: float
) -> dict[str, Any]:
    """Four callers stream, and long prompts join them in turn: what that does to the time between tokens."""
    rows: dict[str, list[dict[str, Any]]] = {}
    fresh = field.prompts.series(_JOIN_NUMBERS, 64)
    fresh_long = field.prompts.series(_JOIN_NUMBERS + 1000, joiner_tokens)
    for turn in range(rounds):
        for contestant in rotated([one for one in field.running() if one.key in keys], turn):
            if not isinstance(contestant, Server):
                continue
            prompts, long = list(islice(fresh, 4)), list(islice(fresh_long, joiners))
            try:
                with field.turn(contestant):
                    result = _joined(contestant, prompts, long, new_tokens, limit)
            except Unavailable as error:
                note(f"  {contestant.name}, prompts that join: {error}")
                rows.setdefault(contestant.key, []).append({"left_out": str(error)})
                continue
            note(f"round {turn + 1}/{rounds}, prompts that join, {contestant.name}: {result['p99_over_p50']:.2f}")
            rows.setdefault(contestant.key, []).append(result)
    found = []
    for key in keys:
        results = [result for result in rows.get(key, []) if "left_out" not in result]
        why = next((result["left_out"] for result in rows.get(key, []) if "left_out" in result), None)
        row = median(results) if results else {"left_out": field.out.get(key) or why or "not measured"}
        found.append({"server": key, "rounds": len(results), **row})
    return {"new_tokens": new_tokens, "joiners": joiners, "joiner_tokens": joiner_tokens, "rows": found}


def _joined(contestant: Server, prompts: list[str], long: list[str], new_tokens: int, limit: float) -> dict[str, Any]:
    streaming = Callers([contestant.request(prompt, new_tokens) for prompt in prompts], limit)
    streaming.start()
    while streaming.running() and not all(
        any(contestant.event(data).text for _, data in stream.events[:5]) for stream in streaming.streams
    ):
        sleep(0.02)
    began = perf_counter()
    joined: list[Answer] = []
    for prompt in long:
        if not streaming.running():
            break
        joined.append(contestant.ask_one(contestant.request(prompt, 8), limit))
    ended = perf_counter()
    answers = [contestant.understand(stream, new_tokens) for stream in streaming.finish()]
    for answer in [*answers, *joined]:
        if answer.error:
            raise Unavailable(answer.error)
    gaps = [gap for answer in answers for gap in answer.gaps]
    during = [
        after - before
        for answer in answers
        for before, after in zip(answer.times, answer.times[1:], strict=False)
        if after > began and before < ended
    ]
    firsts = [answer.first for answer in joined if answer.first is not None]
    return {
        **gap_summary(gaps),
        **{f"{name}_while_joining": value for name, value in gap_summary(during).items()},
        # One whose first token came only when the callers were done has waited, not joined.
        "joined": sum(bool(one.times) and one.times[0] < max(answer.ended for answer in answers) for one in joined),
        "joiner_first_token_s": sum(firsts) / len(firsts) if firsts else 0.0,
        "joiner_prompt_tokens": max((answer.prompt_tokens or 0 for answer in joined), default=0),
    }


# A chat ---------------------------------------------------------------------------------------------------------------


def chat(field: Field, rounds: int, turns: int, new_tokens: int, limit: float) -> dict[str, Any]:
    """A chat that grows: seconds to the first token of a turn, for each token that the turn adds to the prompt."""
    contestant = next((one for one in field.running() if isinstance(one, LocalLLM)), None)
    if contestant is None:
        return {"rows": [], "left_out": field.out.get("ours", "not measured")}
    chats: list[list[dict[str, Any]]] = []
    for number in range(rounds):
        try:
            with field.turn(contestant):
                chats.append(_chat(contestant, field.prompts, number, turns, new_tokens, limit))
        except Unavailable as error:
            note(f"  a chat: {error}")
            return {"rows": [], "left_out": str(error)}
        note(f"chat {number + 1}/{rounds}: {turns} turns")
    rows = [{"turn": turn + 1, **median([one[turn] for one in chats])} for turn in range(turns)]
    over = rows[-1]["ms_per_new_token"] / rows[0]["ms_per_new_token"]
    return {"server": "ours", "turns": turns, "new_tokens": new_tokens, "last_over_first": over, "rows": rows}


def _chat(
    contestant: LocalLLM, prompts: Prompts, number: int, turns: int, new_tokens: int, limit: float
) -> list[dict[str, Any]]:
    first = _CHAT_NUMBERS + number * 1000
    # Its own system message, so that a chat finds nothing of an earlier one.
    messages = [{"role": "system", "content": prompts.make(first, 24)}]
    known = 0
    found = []
    for turn in range(turns):
        messages.append({"role": "user", "content": prompts.make(first + 1 + turn, 48)})
        answer = contestant.ask_one(contestant.chat(messages, new_tokens), limit)
        if answer.error or answer.first is None or not answer.prompt_tokens:
            raise Unavailable(answer.error or "no text or no usage in an answer")
        new = answer.prompt_tokens - known
        known = answer.prompt_tokens + (answer.tokens or 0)
        messages.append({"role": "assistant", "content": answer.text})
        found.append(
            {
                "prompt_tokens": answer.prompt_tokens,
                "new_prompt_tokens": new,
                "first_token_ms": answer.first * 1000,
                "ms_per_new_token": answer.first * 1000 / new,
            }
        )
    return found
