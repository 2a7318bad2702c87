"""The progress of a long piece of work: one thread writes it, any number of threads watch and cancel it.

Standard library only. Any thread may call anything here. Phases come in order; bytes count within a phase. Speed is a
mean over the last seconds, so that the remaining time follows the network.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

from .cancellation import Cancellation
from .errors import Cancelled

Phase = Literal["waiting", "download", "read", "convert", "ready", "failed", "cancelled"]

_ENDS = ("ready", "failed", "cancelled")
_WINDOW = 5.0  # seconds over which the speed is averaged


@dataclass(frozen=True, slots=True)
class Moment:
    """The progress at one moment. `total` is None until it is known; `speed` is in bytes per second."""

    phase: Phase
    done: int
    total: int | None
    speed: float
    seconds_left: float | None
    error: str | None = None
    file: str | None = None

    @property
    def fraction(self) -> float | None:
        """The completed part of the phase, 0 to 1."""
        if self.phase == "ready":
            return 1.0
        return None if not self.total else min(1.0, self.done / self.total)

    def to_dict(self) -> dict[str, object]:
        """Returns the fields that the API shows."""
        fraction, left = self.fraction, self.seconds_left
        return {
            "phase": self.phase,
            "bytes_done": self.done,
            "bytes_total": self.total,
            "bytes_per_second": round(self.speed),
            "seconds_left": None if left is None else round(left, 1),
            "fraction": None if fraction is None else round(fraction, 4),
            "file": self.file,
            "error": self.error,
        }


class Progress:
    """The progress of one piece of work; its `cancellation` cancels the work."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._phase: Phase = "waiting"
        self._done = 0
        self._total: int | None = None
        self._file: str | None = None
        self._error: str | None = None
        self._version = 0
        self.cancellation = Cancellation()
        self._seen: deque[tuple[float, int]] = deque()  # times, and the bytes that arrived then
        self._begun: list[tuple[int, Moment]] = []  # the start of each phase, and the version then

    # For the worker ---------------------------------------------------------------------------------------------------

    def begin(self, phase: Phase, total: int | None = None, done: int = 0) -> None:
        """Begins a phase of `total` bytes, of which `done` are complete already."""
        with self._changed:
            if self._phase in _ENDS:
                return
            self._phase, self._total, self._done = phase, total, done
            self._file = None
            self._seen.clear()
            self._note()
            self._begun.append((self._version, self._moment()))

    def expect(self, total: int, done: int = 0) -> None:
        """Sets the phase's number of bytes, once it is known."""
        with self._changed:
            if self._phase not in _ENDS:
                self._total, self._done = total, done
                self._note()

    def at(self, file: str) -> None:
        """Sets the file that is worked on."""
        with self._changed:
            if self._phase not in _ENDS:
                self._file = file
                self._note()

    def advance(self, count: int) -> None:
        """Counts `count` more bytes; a negative number where some must be read again.

        Raises:
            Cancelled: the work is cancelled.
        """
        now = time.monotonic()
        with self._changed:
            self._done = max(0, self._done + count)
            if count > 0:
                self._seen.append((now, count))
            while self._seen and now - self._seen[0][0] > _WINDOW:
                self._seen.popleft()
            self._note()
        self.check()

    def check(self) -> None:
        """Raises Cancelled if the work is cancelled."""
        if self.cancellation.cancelled:
            raise Cancelled("The download was cancelled")

    def end(self, phase: Phase, error: str | None = None) -> None:
        """Ends the work in this phase."""
        with self._changed:
            if self._phase not in _ENDS:
                self._phase, self._error = phase, error
                self._note()
                self._begun.append((self._version, self._moment()))

    def _note(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def part(self) -> Progress:
        """The progress of a further part of the same phase; its bytes are added to those counted before."""
        return _Part(self)

    # For watchers -----------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Cancels the work at its next check, and notifies the watchers."""
        with self._changed:
            self.cancellation.cancel()
            self._note()

    @property
    def over(self) -> bool:
        """Whether the work has ended."""
        return self._phase in _ENDS

    def now(self) -> Moment:
        """The current progress."""
        with self._changed:
            return self._moment()

    def wait(self, version: int, seconds: float) -> tuple[int, Moment]:
        """The next state after `version` (begin with -1), or the current one if nothing changes for `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, seconds)
            return self._version, self._moment()

    def since(self, version: int) -> tuple[int, list[Moment]]:
        """What changed after `version` (begin with -1), with the current version.

        The moments are the starts of phases that have ended since, and the current state; none if nothing changed.
        """
        with self._changed:
            if version == self._version:
                return version, []
            over = [moment for begun, moment in self._begun[:-1] if begun > version]
            return self._version, [*over, self._moment()]

    def _moment(self) -> Moment:
        now = time.monotonic()
        recent = [(at, count) for at, count in self._seen if now - at <= _WINDOW]
        speed = sum(count for _, count in recent) / max(now - recent[0][0], 0.2) if recent else 0.0
        left = None
        if self._total is not None and speed > 0 and self._phase not in _ENDS:
            left = max(0, self._total - self._done) / speed
        return Moment(self._phase, self._done, self._total, speed, left, self._error, self._file)


class _Part(Progress):
    """A part of a phase: it reports to the whole, on top of what was counted before."""

    def __init__(self, whole: Progress) -> None:
        super().__init__()
        self._whole = whole
        self.cancellation = whole.cancellation
        before = whole.now()
        self._before = (before.total or 0, before.done)

    def begin(self, phase: Phase, total: int | None = None, done: int = 0) -> None:  # noqa: ARG002 - it has begun
        if total is not None:
            self.expect(total, done)

    def expect(self, total: int, done: int = 0) -> None:
        self._whole.expect(self._before[0] + total, self._before[1] + done)

    def at(self, file: str) -> None:
        self._whole.at(file)

    def advance(self, count: int) -> None:
        self._whole.advance(count)
