"""Graphs that are made while torch answers: one at a time, whether or not a caller waits.

A conversion waits for memory within the budget, runs, and is handed to the manager, which has its model computed by the
graph from then on. It survives the client that caused it, and ends with an unload, a removal or the server. One that
failed is not begun again until the model is unloaded or a load asks for OpenVINO by name. Any thread may call it. Must
not know the registry, the loader or HTTP.
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

_TRY_AGAIN = 1.0  # seconds until a conversion that lacks memory, or a model that is in use, is looked at again
_INTERRUPTIONS = 3  # times that a conversion gives its memory to a load, before it is given up


@dataclass(frozen=True, slots=True)
class ConversionStatus:
    """How far a conversion is, and why it waits or failed; `bytes` of memory are what making the graph takes."""

    state: State
    reason: str | None
    bytes: int
    progress: Moment


class Conversion:
    """One graph: `made` is its end, with the folder of a graph that is kept nowhere else where a load waits for it;
    `settled` comes when the model is computed by it, or will not be. But for these, the worker's only.
    """

    def __init__(
        self, model_id: str, pending: Pending, make: Callable[[Progress, bool], Path | None], need: Callable[[], int]
    ) -> None:
        """`pending` is what is made. `make` makes it, and is told whether other work goes first; `need`
        tells how many bytes of memory that takes."""
        self.model_id = model_id
        self.pending = pending
        self.make = make
        self.need = need
        self.progress = Progress()  # of this try
        self.made: Future[Path | None] = Future()
        self.settled: Future[None] = Future()
        self.state: State = "waiting"
        self.reason: str | None = None
        self.bytes: int | None = None
        self.held = False  # whether the budget counts them
        self.waiting = 0  # loads that cannot answer before it is made
        self.asked = 0  # models that torch computes until it is made
        self.cancellation = Cancellation()
        self.interrupted = 0
        self.tries = 0  # to open the graph where there was no room for both
        self.spare: Path | None = None  # the folder of a graph that is kept nowhere else

    @property
    def owner(self) -> str:
        """Its name in the budget."""
        return f"conversion of {self.model_id}"

    @property
    def status(self) -> ConversionStatus:
        """How far it is."""
        return ConversionStatus(self.state, self.reason, self.bytes or 0, self.progress.now())

    def cancel(self) -> None:
        """Have it given up at the next opportunity."""
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
        """`ready` tells whether a graph may be made, now that its model is loaded; `take_over` has the model computed
        by a graph that is made, and tells whether that is settled or is to be tried again; `stays` hears why torch goes
        on."""
        self._budget = budget
        self._ready = ready
        self._take_over = take_over
        self._stays = stays
        self._changed = threading.Condition()
        self._all: list[Conversion] = []  # of a model no more than one that is not cancelled
        self._current: Conversion | None = None  # that the thread works on
        self._thread: threading.Thread | None = None
        self._closed = False

    # Requesting a graph ----------------------------------------------------------------------------------------------

    def add(self, conversion: Conversion) -> Conversion:
        """Have a graph made for a model that torch computes meanwhile; returns what makes it already, or has failed."""
        with self._changed:
            conversion = self._joined(conversion, again=False)
            conversion.asked += 1
            return conversion

    def wait(self, conversion: Conversion, progress: Progress) -> Path | None:
        """Have a graph made, and wait for it; `progress` is told how far that is, and may be cancelled: the conversion
        goes on. Returns the folder of a graph that is kept nowhere else: it is the caller's.

        Raises:
            ConversionFailed: there is none. Cancelled: `progress` was cancelled, or the conversion.
        """
        with self._changed:
            conversion = self._joined(conversion, again=True)
            conversion.waiting += 1
            current = self._current
            if current not in (None, conversion) and not (current.made.done() or current.waiting):
                current.reason = "another model's comes first, which a load waits for"
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
        """The conversion that makes this graph: one under way, one that failed but for where it is to be tried `again`,
        or this one; with the lock held."""
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
        """Give up a model's conversion, and wait until it is; one that failed may be tried again afterwards."""
        with self._changed:
            conversion = self.of(model_id)
            if conversion is None:
                return
            self._give_up(conversion)
        wait([conversion.settled])

    def _give_up(self, conversion: Conversion) -> None:
        """Cancel a conversion, or forget that it failed; with the lock held."""
        conversion.cancel()
        if conversion.state == "failed":
            self._all.remove(conversion)
        elif conversion is not self._current:
            self._settle(conversion, Cancelled())
        self._changed.notify_all()

    def give_way(self) -> bool:
        """Have a conversion that no load waits for give its memory up; tells whether one did. It begins again when
        there is memory."""
        with self._changed:
            running = next((each for each in self._all if each.held and not each.waiting), None)
            if running is None or running.made.done():
                return False
            running.interrupted += 1
            running.reason = "it gave its memory to a load"
            attempt = running.progress
            attempt.cancel()
            self._changed.wait_for(lambda: running.progress is not attempt or running.made.done())
            return True

    def close(self) -> None:
        """Give all of them up, and wait until they are."""
        with self._changed:
            self._closed = True
            for conversion in self._all:
                conversion.cancel()
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join()

    # Looking ---------------------------------------------------------------------------------------------------------

    def of(self, model_id: str) -> Conversion | None:
        """The model's conversion: one under way, or one that failed."""
        with self._changed:
            return next(
                (each for each in self._all if each.model_id == model_id and not each.cancellation.cancelled), None
            )

    def shown(self) -> dict[str, ConversionStatus]:
        """How far each of them is, by model."""
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
        """Take a conversion as far as it comes now; tells whether it came any further."""
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
            with self._changed:  # a model may have been loaded for it since
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
                return False  # so that what it gave way to takes the memory first
            self._fail(conversion, ConversionFailed("memory is short: its conversion gave way to other loads"))
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
        """Set memory aside for a conversion; tells whether it may begin. One that a load waits for does so in any case:
        it was asked for.

        Raises:
            ConversionFailed: it takes more than there could ever be.
        """
        waited = conversion.waiting > 0
        if not waited and not self._ready(conversion):
            return False
        if conversion.bytes is None:
            conversion.bytes = conversion.need()
        need, room = conversion.bytes, self._budget.room("cpu")
        with self._changed:
            conversion.held = not need or self._budget.keep(conversion.owner, "memory", "cpu", need)
            if conversion.held or waited:
                conversion.state, conversion.reason = "converting", None
                return True
        most = self._budget.most("cpu")
        if most is not None and need > most:
            raise ConversionFailed(
                f"its conversion takes {readable(need)} of memory, and models may have {readable(most)}"
            )
        conversion.reason = f"its conversion takes {readable(need)} of memory, and {readable(room or 0)} are free"
        return False

    def _make(self, conversion: Conversion) -> None:
        """Have the graph made.

        Raises:
            ConversionFailed: it cannot be. Cancelled: it is to be given up, or gives way.
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
        """Forget a conversion that has come to its end; with the lock held."""
        self._all.remove(conversion)
        if conversion.spare is not None:  # no load has taken it
            shutil.rmtree(conversion.spare, ignore_errors=True)
        conversion.progress.end("ready" if error is None else "cancelled")
        if error is not None and not conversion.made.done():
            conversion.made.set_exception(error)
        conversion.settled.set_result(None)
        self._changed.notify_all()

    def _fail(self, conversion: Conversion, error: LocalLLMError) -> None:
        """Keep a conversion that failed, so that it is not begun again, and say why torch goes on."""
        logger.warning("%s has no graph in use: %s", conversion.model_id, error)
        with self._changed:
            conversion.state, conversion.reason = "failed", str(error)
            if conversion.spare is not None:
                shutil.rmtree(conversion.spare, ignore_errors=True)
            conversion.progress.end("failed", str(error))
            if not conversion.made.done():
                conversion.made.set_exception(error)
            if conversion.cancellation.cancelled or not conversion.asked:  # no model goes on without it
                self._all.remove(conversion)
            conversion.settled.set_result(None)
            self._changed.notify_all()
        self._stays(conversion, str(error))
