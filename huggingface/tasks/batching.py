"""Micro-batching across callers: who is served next, and which rows of which calls share a forward pass.

`submit`, `close`, `pending` and a TaskCall may be used from any thread; `step`, and all that it calls, on the model's
engine thread only, where tokenizers and tensors are. Must not know torch, nor what a task is: a `Work` knows.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from ..cancellation import Cancellation
from ..errors import Cancelled, EngineFailed, GenerationFailed, LocalLLMError, OutOfMemory, no_panics
from .padded_batch import Lane, Outputs, Tensors, token_count

# How many rows a step prepares, over all calls; and how many of one call may be waiting for their batch: enough to sort
# them by length, and no more memory than that, however long the list is.
_PORTION = 128
_AHEAD = 2048


class TaskCall:
    """A call that was submitted, for any thread to wait for or to cancel.

    `future` gives the result as JSON values, or the LocalLLMError why there is none.
    """

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.future: Future[Any] = Future()

    def cancel(self) -> None:
        """Give it up, unless it is done: the result is `Cancelled` at once, and no further batch is computed for it."""
        self.settle(error=Cancelled())

    def done(self) -> bool:
        """Whether it has a result, or an error."""
        return self.future.done()

    def settle(self, value: Any = None, error: BaseException | None = None) -> None:
        """Give it its result or its error, unless it has one already. For the batcher."""
        with suppress(InvalidStateError):
            if error is None:
                self.future.set_result(value)
            else:
                self.future.set_exception(error)

    def when_done(self, tell: Callable[[TaskCall], None]) -> None:
        """Have `tell` called, on whichever thread settles the call. For the batcher."""
        self.future.add_done_callback(lambda _: tell(self))


@dataclass(frozen=True, slots=True)
class Request:
    """What a call asks for; `cancellation` is asked on the engine's thread."""

    task: str
    inputs: Any
    parameters: Mapping[str, Any]
    cancellation: Cancellation


class Work(Protocol):
    """A call that can be batched, as its task reads it: `count` inputs, each of them one or more rows for the model."""

    lane: Lane
    count: int

    def rows(self, index: int) -> Iterator[tuple[Tensors, Any]]:
        """The rows of one input, made as they are asked for, each with what `answer` must know of it."""

    def answer(self, rows: Sequence[tuple[Any, Outputs]]) -> Any:
        """The answer to one input in JSON values: from what was known of its rows, and the model's outputs for them."""

    def whole(self, answers: list[Any]) -> Any:
        """The call's result, from the answers to all inputs in their order."""

    def blame(self, error: Exception, tokens: int) -> Exception:
        """What an error of the model on a row of so many tokens means; `error` itself, if no more is known."""


class _Input:
    """One input of a call, on its way through the model."""

    __slots__ = ("computed", "index", "outputs", "prepared")

    def __init__(self, index: int) -> None:
        self.index = index
        self.outputs: list[Any] = []  # (known, outputs) of each row; None until it was computed
        self.computed = 0
        self.prepared = False  # whether all of its rows are known

    @property
    def complete(self) -> bool:
        return self.prepared and self.computed == len(self.outputs)


class _Row:
    """A row that waits for its forward pass. Rows go together if lane and kind are the same; None goes alone."""

    __slots__ = ("input", "job", "kind", "known", "length", "place", "tensors")

    def __init__(self, job: _Batched, source: _Input, tensors: Tensors, known: Any) -> None:
        self.job, self.input, self.place = job, source, len(source.outputs)
        self.tensors, self.known = tensors, known
        self.length = token_count(tensors)
        self.kind = job.work.lane.kind(tensors)
        source.outputs.append(None)


class _Job:
    """A call on the engine's side; one that can only be done whole."""

    def __init__(self, call: TaskCall, request: Request) -> None:
        self.call, self.request = call, request


class _Batched(_Job):
    """A call that is done in batches: the rows it waits for, and the answers it has."""

    def __init__(self, call: TaskCall, request: Request, work: Work) -> None:
        super().__init__(call, request)
        self.work = work
        self.ready: list[_Row] = []
        self._unprepared = work.count
        self._unanswered = work.count
        self._answers: list[Any] = [None] * work.count
        self._source = self._rows()

    @property
    def left(self) -> int:
        """How much is left to do: in rows, and in inputs where the rows are not known yet."""
        return len(self.ready) + self._unprepared

    @property
    def preparing(self) -> bool:
        """Whether it should have more rows before it is sorted by length."""
        return self._unprepared > 0 and len(self.ready) < _AHEAD

    @property
    def answered(self) -> bool:
        return self._unanswered == 0

    def result(self) -> Any:
        return self.work.whole(self._answers)

    def prepare(self, count: int) -> None:
        """Make up to `count` more rows ready, asking before each whether to go on."""
        for _ in range(count):
            self.request.cancellation.check()
            row = next(self._source, None)
            if row is None:
                return
            self.ready.append(row)

    def _rows(self) -> Iterator[_Row]:
        for index in range(self.work.count):
            source = _Input(index)
            for tensors, known in self.work.rows(index):
                yield _Row(self, source, tensors, known)
            source.prepared = True
            self._unprepared -= 1
            self._answer(source)

    def deliver(self, row: _Row, outputs: Outputs) -> None:
        """Take a row's outputs, and answer its input if it was the last."""
        row.input.outputs[row.place] = (row.known, outputs)
        row.input.computed += 1
        self._answer(row.input)

    def _answer(self, source: _Input) -> None:
        if source.complete:
            self._answers[source.index] = self.work.answer(source.outputs)
            self._unanswered -= 1


class Batcher:
    """The calls that wait for one model, and the next thing to do for them."""

    def __init__(
        self,
        *,
        begin: Callable[[Request], Work | None],
        whole: Callable[[Request], Any],
        explain: Callable[[Request, Exception], LocalLLMError],
        finished: Callable[[Request], None],
    ) -> None:
        """`begin` reads a call, or returns None if it can only be done `whole`, in one step; both raise what they
        refuse. `explain` tells what any other error means to the caller. `finished` is told before the caller is.
        """
        self._begin, self._whole, self._explain, self._finished = begin, whole, explain, finished
        self._lock = threading.Lock()
        self._closed = False
        self._calls: set[TaskCall] = set()
        self._submitted: list[tuple[TaskCall, Request]] = []
        # From here on the engine's own. The jobs stand in the order of their turns.
        self._jobs: list[_Job] = []
        self._nearly_done_first = False

    # From any thread --------------------------------------------------------------------------------------------------

    def submit(self, task: str, inputs: Any, parameters: Mapping[str, Any], cancellation: Cancellation) -> TaskCall:
        """Queue a call; see `TaskRunner.submit`."""
        call = TaskCall()
        request = Request(task, inputs, parameters, cancellation.child(call.done))
        with self._lock:
            closed = self._closed
            if not closed:
                self._calls.add(call)
                self._submitted.append((call, request))
        if closed:
            call.cancel()
        call.when_done(self._forget)
        return call

    def _forget(self, call: TaskCall) -> None:
        with self._lock:
            self._calls.discard(call)

    @property
    def pending(self) -> int:
        """How many calls have no result yet."""
        with self._lock:
            return len(self._calls)

    def fail(self, error: LocalLLMError) -> None:
        """Have all calls that are there fail with this error."""
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.settle(error=error)

    def close(self) -> None:
        """Cancel all calls, those to come included."""
        with self._lock:
            self._closed = True
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    # On the engine's thread -------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do the next piece of work: prepare some rows, and compute one batch or one whole call. Whether more waits.

        Raises:
            EngineFailed: the device failed, and does so from now on.
        """
        self._admit()
        self._drop()
        self._prepare()
        job = self._next()
        if isinstance(job, _Batched):
            self._compute(self._batch(max(job.ready, key=lambda row: row.length)))
        elif job is not None:
            self._finish(job, lambda: self._whole(job.request))
        self._sweep()
        return bool(self._jobs or self._submitted)

    def _admit(self) -> None:
        with self._lock:
            submitted, self._submitted = self._submitted, []
        for call, request in submitted:
            try:
                with no_panics():
                    work = None if call.done() else self._begin(request)
                job = _Job(call, request) if work is None else _Batched(call, request, work)
                self._jobs.append(job)
                if isinstance(job, _Batched):
                    self._conclude(job)  # one without any input has its result
            except Exception as error:  # noqa: BLE001 - it is raised again where the result is read
                self._fail(_Job(call, request), error)

    def _drop(self) -> None:
        """Let go of calls that are done or given up, and of all their rows."""
        for job in self._jobs:
            try:
                cancelled = job.request.cancellation.cancelled
            except Exception as error:  # noqa: BLE001 - whoever can't be asked is not there
                self._fail(job, error)
            else:
                if cancelled:
                    job.call.cancel()
        self._sweep()

    def _sweep(self) -> None:
        self._jobs = [job for job in self._jobs if not job.call.done()]

    def _prepare(self) -> None:
        preparing = [job for job in self._jobs if isinstance(job, _Batched) and job.preparing]
        for job in preparing:
            try:
                with no_panics():
                    job.prepare(max(2, _PORTION // len(preparing)))  # 2: the second shows that a single row is all
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(job, error)
            else:
                self._conclude(job)
        self._sweep()

    def _next(self) -> _Job | None:
        """Whose turn it is; nobody's, as long as all still prepare.

        Turns are taken in order, and every other one goes to the call with the least left to do: a short one that comes
        while long ones run is in one of the next two batches, and the long ones still get half of them.
        """
        able = [job for job in self._jobs if not isinstance(job, _Batched) or job.ready]
        batched = [job for job in able if isinstance(job, _Batched)]
        if not able or (len(batched) == len(able) and all(job.preparing for job in batched)):
            return None
        self._nearly_done_first = not self._nearly_done_first
        if self._nearly_done_first and batched:
            return min(batched, key=lambda job: job.left)
        self._jobs.remove(able[0])
        self._jobs.append(able[0])
        return able[0]

    def _batch(self, first: _Row) -> list[_Row]:
        """The rows to compute together with `first`: of all calls, those that are nearest to its length."""
        lane = first.job.work.lane
        rows = [
            row
            for job in self._jobs
            if isinstance(job, _Batched) and job.work.lane is lane
            for row in job.ready
            if row is first or (row.kind == first.kind and row.kind is not None)
        ]
        rows.sort(key=lambda row: row.length)
        low = high = rows.index(first)
        tokens = first.length
        while True:
            beside = [at for at in (low - 1, high + 1) if 0 <= at < len(rows)]
            for at in sorted(beside, key=lambda at: abs(rows[at].length - first.length)):
                shortest, longest = rows[min(low, at)].length, rows[max(high, at)].length
                if lane.takes(high - low + 2, tokens + rows[at].length, shortest, longest):
                    low, high, tokens = min(low, at), max(high, at), tokens + rows[at].length
                    break
            else:
                return rows[low : high + 1]

    def _compute(self, rows: list[_Row]) -> None:
        taken = set(rows)
        for job in {row.job for row in rows}:
            job.ready = [row for row in job.ready if row not in taken]
        lane = rows[0].job.work.lane
        try:
            outputs = lane.run([row.tensors for row in rows])
        except Exception as error:  # noqa: BLE001 - as above
            self._again(rows, error)
            return
        for row, found in zip(rows, outputs, strict=True):
            if found is None:
                row.job.ready.append(row)
            elif isinstance(found, GenerationFailed):
                self._fail(row.job, found)
            elif not row.job.call.done():
                self._deliver(row, found)

    def _deliver(self, row: _Row, outputs: Outputs) -> None:
        try:
            with no_panics():
                row.job.deliver(row, outputs)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(row.job, error)
        else:
            self._conclude(row.job)

    def _again(self, rows: list[_Row], error: Exception) -> None:
        """After a forward pass failed: the end of the call, if it was for one row; else the rows go alone."""
        first = rows[0]
        lane = first.job.work.lane
        traceback.clear_frames(error.__traceback__)  # they hold what the model had computed
        if len(rows) == 1:
            lane.excuse()
            self._fail(first.job, first.job.work.blame(error, first.length))
            return
        lane_failed = lane.failed(memory=isinstance(self._explain(first.job.request, error), OutOfMemory))
        for row in rows:
            if lane_failed:
                row.kind = None
            row.job.ready.append(row)

    def _conclude(self, job: _Batched) -> None:
        if job.answered and not job.call.done():
            self._finish(job, job.result)

    def _finish(self, job: _Job, result: Callable[[], Any]) -> None:
        try:
            with no_panics():
                value = result()
            self._finished(job.request)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(job, error)
        except BaseException as error:
            job.call.settle(error=error)  # whoever waits must not wait for ever
            raise
        else:
            job.call.settle(value)

    def _fail(self, job: _Job, error: Exception) -> None:
        failure = error
        if not isinstance(error, LocalLLMError):
            failure = self._explain(job.request, error)
            failure.__cause__ = error
        job.call.settle(error=failure)
        if isinstance(failure, EngineFailed):
            raise failure
