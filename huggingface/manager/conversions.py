"""Converts models to graphs while torch answers: one at a time, whether a caller waits or not.

A conversion waits for memory within the budget, runs, and reaches the manager, whose model the graph computes from then
on. It survives the request that caused it, and ends with an unload, a removal or the server. A failed conversion is not
repeated until the model is unloaded or a load asks for OpenVINO by name. Any thread may call it. Must not know the
registry, the loader or HTTP.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..cancellation import LOOK_AGAIN, Cancellation
from ..errors import Cancelled, ConversionFailed, LocalLLMError
from ..host.memory import readable
from ..progress import Moment, Progress
from ..types import Pending
from .budget import Budget

logger = logging.getLogger(__name__)

State = Literal["waiting", "converting", "opening", "failed"]

_TRY_AGAIN = 1.0  # seconds until a conversion that lacks memory, or a model that is in use, is checked again
_INTERRUPTIONS = 3  # how often a conversion gives its memory to a load before it fails


@dataclass(frozen=True, slots=True)
class ConversionStatus:
    """How far a conversion is, and why it waits or failed; `bytes` is the memory that it takes."""

    state: State
    reason: str | None
    bytes: int
    progress: Moment


class Conversion:
    """One conversion to a graph.

    `made` ends with the graph; its result is the folder of a graph that is stored nowhere else, where a load waits for
    it. `settled` ends when the graph computes the model, or never will. All else is for the worker thread only.
    """

    def __init__(
        self, model_id: str, pending: Pending, make: Callable[[Progress, bool], Path | None], need: Callable[[], int]
    ) -> None:
        """`pending` is what the conversion makes. `make` makes it; its second argument says whether other work goes
        first. `need` returns how many bytes of memory that takes."""
        self.model_id = model_id
        self.pending = pending
        self.make = make
        self.need = need
        self.progress = Progress()  # of this attempt
        self.made: Future[Path | None] = Future()
        self.settled: Future[None] = Future()
        self.state: State = "waiting"
        self.reason: str | None = None
        self.bytes: int | None = None
        self.held = False  # whether the budget counts `bytes`
        self.waiting = 0  # loads that cannot answer without the graph
        self.asked = 0  # models that torch computes until the graph is made
        self.cancellation = Cancellation()
        self.interrupted = 0
        self.tries = 0  # attempts to open the graph where memory has no room for both models
        self.spare: Path | None = None  # the folder of a graph that is stored nowhere else

    @property
    def owner(self) -> str:
        """The conversion's name in the budget."""
        return f"conversion of {self.model_id}"

    @property
    def status(self) -> ConversionStatus:
        """How far the conversion is."""
        return ConversionStatus(self.state, self.reason, self.bytes or 0, self.progress.now())

    def wait_until_settled(self, watch: Callable[[Progress], None], cancellation: Cancellation) -> None:
        """Waits until the graph computes the model, or never will; `watch` gets the progress of each attempt.

        Raises:
            Cancelled: by `cancellation`.
        """
        told = None
        while not wait([self.settled], LOOK_AGAIN).done:
            if self.progress is not told:
                told = self.progress
                watch(told)
            cancellation.check()

    def cancel(self) -> None:
        """Cancels the conversion at its next check."""
        self.cancellation.cancel()
        self.progress.cancel()


class Conversions:
    """All conversions, and the thread that works on them while there are any."""

    def __init__(
        self,
        budget: Budget,
        ready: Callable[[Conversion], bool],
        take_over: Callable[[Conversion], bool],
        stays: Callable[[Conversion, str], None],
    ) -> None:
        """`ready` returns whether a conversion may begin, because its model's load is over. `take_over` lets a finished
        graph compute its model, and returns whether that is settled or must be tried again. `stays` is called with the
        reason why torch goes on."""
        self._budget = budget
        self._ready = ready
        self._take_over = take_over
        self._stays = stays
        self._changed = threading.Condition()
        self._all: list[Conversion] = []  # at most one of a model that is not cancelled
        self._current: Conversion | None = None  # the one that the thread works on
        self._thread: threading.Thread | None = None
        self._closed = False

    # Requesting a graph ----------------------------------------------------------------------------------------------

    def add(self, conversion: Conversion) -> Conversion:
        """Starts the conversion of a model that torch computes meanwhile; returns the model's running or failed one
        instead, if there is one."""
        with self._changed:
            conversion = self._joined(conversion, again=False)
            conversion.asked += 1
            return conversion

    def wait(self, conversion: Conversion, progress: Progress) -> Path | None:
        """Converts a model and waits for the graph; returns the folder of a graph that is stored nowhere else.

        The caller owns that folder. `progress` follows the conversion; its cancellation ends the wait, the conversion
        goes on.

        Raises:
            ConversionFailed: there is no graph.
            Cancelled: `progress` or the conversion was cancelled.
        """
        with self._changed:
            conversion = self._joined(conversion, again=True)
            conversion.waiting += 1
            current = self._current
            if current not in (None, conversion) and not (current.made.done() or current.waiting):
                current.reason = "another model's conversion comes first, because a load waits for it"
                current.progress.cancel()
        version, phase = -1, None
        try:
            while not conversion.made.done():
                progress.check()
                version, moment = conversion.progress.wait(version, LOOK_AGAIN)
                if moment.phase in ("read", "convert") and moment.phase != phase:
                    phase = moment.phase
                    progress.begin(phase, moment.total, moment.done)
                elif moment.phase == phase and moment.total is not None:
                    progress.expect(moment.total, moment.done)
        finally:
            with self._changed:
                conversion.waiting -= 1
        return conversion.made.result()

    def _joined(self, conversion: Conversion, *, again: bool) -> Conversion:
        """The model's conversion that makes this graph, or `conversion` itself, started; with the lock held.

        With `again`, a failed conversion is replaced.
        """
        present = self.of(conversion.model_id)
        if present is not None and present.pending == conversion.pending and not (again and present.state == "failed"):
            return present
        if present is not None:
            self._give_up(present)
        if self._closed:
            conversion.made.set_exception(Cancelled("The server is shutting down"))
            conversion.settled.set_result(None)
            return conversion
        self._all.append(conversion)
        self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="conversions")
            self._thread.start()
        return conversion

    # Cancelling a conversion ----------------------------------------------------------------------------------------

    def cancel(self, model_id: str) -> None:
        """Cancels a model's conversion and waits for its end; forgets a failed one, so that it may be tried again."""
        with self._changed:
            conversion = self.of(model_id)
            if conversion is None:
                return
            self._give_up(conversion)
        wait([conversion.settled])

    def _give_up(self, conversion: Conversion) -> None:
        """Cancels a conversion, or forgets a failed one; with the lock held."""
        conversion.cancel()
        if conversion.state == "failed":
            self._all.remove(conversion)
        elif conversion is not self._current:
            self._settle(conversion, Cancelled())
        self._changed.notify_all()

    def give_way(self) -> bool:
        """Interrupts a conversion that no load waits for, so that it frees its memory; returns whether there was one.

        The conversion begins again when there is memory.
        """
        with self._changed:
            running = next((each for each in self._all if each.held and not each.waiting), None)
            if running is None or running.made.done():
                return False
            running.interrupted += 1
            running.reason = "it freed its memory for a load"
            attempt = running.progress
            attempt.cancel()
            self._changed.wait_for(lambda: running.progress is not attempt or running.made.done())
            return True

    def close(self) -> None:
        """Cancels all conversions and waits for their end."""
        with self._changed:
            self._closed = True
            for conversion in self._all:
                conversion.cancel()
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join()

    # Status -----------------------------------------------------------------------------------------------------------

    def of(self, model_id: str) -> Conversion | None:
        """The model's conversion, running or failed."""
        with self._changed:
            return next(
                (each for each in self._all if each.model_id == model_id and not each.cancellation.cancelled), None
            )

    def shown(self) -> dict[str, ConversionStatus]:
        """How far each conversion is, by model."""
        with self._changed:
            return {each.model_id: each.status for each in self._all if not each.cancellation.cancelled}

    # The worker ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                queue = [each for each in self._all if each.state != "failed"]
                if not queue:
                    self._thread = None
                    return
            queue.sort(key=lambda each: not each.waiting)
            if not any(self._work(conversion) for conversion in queue):
                with self._changed:
                    if not any(conversion.cancellation.cancelled for conversion in queue):
                        self._changed.wait(_TRY_AGAIN)

    def _work(self, conversion: Conversion) -> bool:
        """Takes a conversion as far as it can get now; returns whether it got further."""
        with self._changed:
            if conversion.cancellation.cancelled:
                if not conversion.settled.done():
                    self._settle(conversion, Cancelled())
                return True
            self._current, asked = conversion, conversion.asked
        try:
            if not conversion.made.done():
                if not self._begin(conversion):
                    return False
                self._make(conversion)
            conversion.state = "opening"
            if not self._take_over(conversion):
                return False
            with self._changed:  # a load may have asked for the graph since
                if conversion.asked != asked:
                    return True
                self._settle(conversion)
        except Cancelled as error:
            with self._changed:
                if conversion.cancellation.cancelled:
                    self._settle(conversion, error)
                    return True
                conversion.state, conversion.progress = "waiting", Progress()
                self._changed.notify_all()
            if conversion.interrupted < _INTERRUPTIONS:
                return False  # so that the load that interrupted it takes the memory first
            self._fail(conversion, ConversionFailed("memory is short: loads interrupted its conversion too often"))
        except Exception as error:
            if not isinstance(error, LocalLLMError):
                logger.exception("the conversion of %s failed", conversion.model_id)
                error = ConversionFailed(f"its conversion failed ({type(error).__name__})")
            self._fail(conversion, error)
        finally:
            with self._changed:
                self._current = None
        return True

    def _begin(self, conversion: Conversion) -> bool:
        """Reserves memory for a conversion; returns whether it may begin. It always may if a load waits for it.

        Raises:
            ConversionFailed: it takes more memory than models may ever have.
        """
        waited = conversion.waiting > 0
        if not waited and not self._ready(conversion):
            return False
        if conversion.bytes is None:
            conversion.bytes = conversion.need()
        need, room = conversion.bytes, self._budget.available("cpu")
        with self._changed:
            conversion.held = not need or self._budget.reserve_floor(conversion.owner, "memory", "cpu", need)
            if conversion.held or waited:
                conversion.state, conversion.reason = "converting", None
                return True
        maximum = self._budget.maximum("cpu")
        if maximum is not None and need > maximum:
            raise ConversionFailed(
                f"its conversion takes {readable(need)} of memory, and models may have {readable(maximum)}"
            )
        conversion.reason = f"its conversion takes {readable(need)} of memory, and {readable(room or 0)} are free"
        return False

    def _make(self, conversion: Conversion) -> None:
        """Runs the conversion.

        Raises:
            ConversionFailed: the graph cannot be made.
            Cancelled: the conversion is cancelled or interrupted.
        """
        try:
            spare = conversion.make(conversion.progress, conversion.waiting == 0)
        finally:
            with self._changed:
                self._budget.forget(conversion.owner)
                conversion.held = False
                self._changed.notify_all()
        with self._changed:
            if conversion.waiting:
                conversion.made.set_result(spare)
            else:
                conversion.spare = spare
                conversion.made.set_result(None)
            self._changed.notify_all()

    def _settle(self, conversion: Conversion, error: Cancelled | None = None) -> None:
        """Removes a conversion that has ended; with the lock held."""
        self._all.remove(conversion)
        if conversion.spare is not None:  # no load has taken the folder
            shutil.rmtree(conversion.spare, ignore_errors=True)
        conversion.progress.end("ready" if error is None else "cancelled")
        if error is not None and not conversion.made.done():
            conversion.made.set_exception(error)
        conversion.settled.set_result(None)
        self._changed.notify_all()

    def _fail(self, conversion: Conversion, error: LocalLLMError) -> None:
        """Keeps a failed conversion, so that it is not repeated, and reports why torch goes on."""
        logger.warning("%s is not computed by a graph: %s", conversion.model_id, error)
        with self._changed:
            conversion.state, conversion.reason = "failed", str(error)
            if conversion.spare is not None:
                shutil.rmtree(conversion.spare, ignore_errors=True)
            conversion.progress.end("failed", str(error))
            if not conversion.made.done():
                conversion.made.set_exception(error)
            if conversion.cancellation.cancelled or not conversion.asked:  # no model waits for the graph
                self._all.remove(conversion)
            conversion.settled.set_result(None)
            self._changed.notify_all()
        self._stays(conversion, str(error))
