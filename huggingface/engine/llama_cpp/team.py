"""How many threads compute a step of llama.cpp: what was fastest lately.

Its threads wait for each other some hundred times a step, busily. Where another program has one of the cores, each wait
lasts until the system gives the core back: two threads then take twenty times as long as one. So steps are timed:
fewer threads are tried where steps take longer than they used to, and more from time to time. Engine's thread only.
Must not know llama.cpp.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SHARE = 0.05  # of the time, at most, goes into trying each other number of threads
_RESTING = 2.0  # seconds until a number of threads is tried again, at least
_SLOWED = 1.5  # times what a step took: then fewer threads may be faster
_LATELY = 3  # steps: of these the fastest counts, as any step may be delayed by something else
_TIMED = 31  # the most tokens of a step that is timed; a larger one takes what is best for a smaller one


class Team:
    """Chooses the number of threads for each step."""

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """`most` is the most threads; `clock` tells seconds."""
        self._choices = sorted({most, most - 1, most // 2, 1} - {0}, reverse=True)
        self._clock = clock
        # For each size of a step, by its tokens' bits, and number of threads: the seconds that a token took lately, and
        # when the number is tried again.
        self._times: dict[int, dict[int, deque[float]]] = {}
        self._due: dict[tuple[int, int], float] = {}
        # The least of these seconds since fewer threads were tried.
        self._usual: dict[tuple[int, int], float] = {}

    @contextmanager
    def step(self, tokens: int) -> Iterator[int]:
        """Gives the number of threads for a step of so many tokens, and times the block."""
        if tokens > _TIMED:
            yield self._best(max(self._times, default=0))
            return
        size, begin = tokens.bit_length(), self._clock()
        chosen, best = self._choose(size, begin), self._best(size)
        yield chosen
        end = self._clock()
        times = self._times.setdefault(size, {})
        times.setdefault(chosen, deque(maxlen=_LATELY)).append((end - begin) / tokens)
        lost = (times[chosen][-1] - min(map(min, times.values()))) * tokens
        self._due[size, chosen] = end + max(_RESTING, lost / _SHARE)
        self._usual[size, chosen] = min(self._usual.get((size, chosen), math.inf), times[chosen][-1])
        if chosen < best and best in times:
            self._usual[size, best] = min(times[best])

    def _best(self, size: int) -> int:
        times = self._times.get(size)
        return min(times, key=lambda choice: min(times[choice])) if times else self._choices[0]

    def _choose(self, size: int, now: float) -> int:
        """The best number of threads, or one to try: not tried so far, or not for a while."""
        known, best = self._times.get(size, {}), self._best(size)
        if best not in known:
            return best
        slowed = min(known[best]) > _SLOWED * self._usual[size, best]
        for choice in self._choices:
            if choice not in known or (
                (choice > best or (choice < best and slowed)) and now >= self._due[size, choice]
            ):
                return choice
        return best
