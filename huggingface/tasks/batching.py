"""Micro-batching across calls: which call is served next, and which rows of which calls share a forward pass.

`submit`, `close`, `pending` and a TaskCall may be used from any thread; `step` and all that it calls only on the
model's engine thread, which owns tokenizers and tensors. Must not know torch, or what a task is: a `Work` knows.
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

# How many rows a step prepares over all calls, and how many rows of one call may wait for their batch: enough to sort
# them by length, with bounded memory for any length of list.
_PORTION = 128
_AHEAD = 2048


class TaskCall:
    """A submitted call; any thread may wait for it or cancel it.

    `future` has the result as JSON values, or a LocalLLMError.
    """

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.future: Future[Any] = Future()

    def cancel(self) -> None:
        """Cancels the call unless it is done: it fails with `Cancelled` at once, and no further batch is computed for
        it."""
        self.settle(error=Cancelled())

    def done(self) -> bool:
        """Whether the call has a result or an error."""
        return self.future.done()

    def settle(self, value: Any = None, error: BaseException | None = None) -> None:
        """Sets the call's result or error, unless it has one. For the batcher."""
        with suppress(InvalidStateError):
            if error is None:
                self.future.set_result(value)
            else:
                self.future.set_exception(error)

    def when_done(self, tell: Callable[[TaskCall], None]) -> None:
        """Calls `tell` on the thread that settles the call. For the batcher."""
        self.future.add_done_callback(lambda _: tell(self))


@dataclass(frozen=True, slots=True)
class Request:
    """What a call asks for; the engine's thread checks `cancellation`."""

    task: str
    inputs: Any
    parameters: Mapping[str, Any]
    cancellation: Cancellation


class Work(Protocol):
    """A batched call, as its task reads it: `count` inputs, each of one or more rows for the model."""

    lane: Lane
    count: int

    def rows(self, index: int) -> Iterator[tuple[Tensors, Any]]:
        """The rows of one input, made on demand, each with what `answer` needs beside the outputs."""

    def answer(self, rows: Sequence[tuple[Any, Outputs]]) -> Any:
        """The answer to one input in JSON values, from each row's known part and the model's outputs."""

    def whole(self, answers: list[Any]) -> Any:
        """The call's result, from the answers to all inputs in order."""

    def blame(self, error: Exception, tokens: int) -> Exception:
        """Returns what the model's error on a row of so many tokens means to the caller; `error` if unknown."""


class _Input:
    """One input of a call while it is computed."""

    __slots__ = ("computed", "index", "outputs", "prepared")

    def __init__(self, index: int) -> None:
        self.index = index
        self.outputs: list[Any] = []  # (known, outputs) of each row; None until the row is computed
        self.computed = 0
        self.prepared = False  # whether all of its rows are known

    @property
    def complete(self) -> bool:
        return self.prepared and self.computed == len(self.outputs)


class _Row:
    """A row that waits for its forward pass. Rows of one lane and one kind share a pass; kind None goes alone."""

    __slots__ = ("input", "job", "kind", "known", "length", "place", "tensors")

    def __init__(self, job: _Batched, source: _Input, tensors: Tensors, known: Any) -> None:
        self.job, self.input, self.place = job, source, len(source.outputs)
        self.tensors, self.known = tensors, known
        self.length = token_count(tensors)
        self.kind = job.work.lane.kind(tensors)
        source.outputs.append(None)


class _Job:
    """A call on the engine's side that is computed whole."""

    def __init__(self, call: TaskCall, request: Request) -> None:
        self.call, self.request = call, request


class _Batched(_Job):
    """A call that is computed in batches: the rows that wait, and the answers so far."""

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
        """The work left: rows, and inputs whose rows are not known yet."""
        return len(self.ready) + self._unprepared

    @property
    def preparing(self) -> bool:
        """Whether more rows should be prepared before they are sorted by length."""
        return self._unprepared > 0 and len(self.ready) < _AHEAD

    @property
    def answered(self) -> bool:
        return self._unanswered == 0

    def result(self) -> Any:
        return self.work.whole(self._answers)

    def prepare(self, count: int) -> None:
        """Prepares up to `count` more rows, and checks the cancellation before each."""
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
        """Takes a row's outputs, and answers its input if the row was its last."""
        row.input.outputs[row.place] = (row.known, outputs)
        row.input.computed += 1
        self._answer(row.input)

    def _answer(self, source: _Input) -> None:
        if source.complete:
            self._answers[source.index] = self.work.answer(source.outputs)
            self._unanswered -= 1


class Batcher:
    """The calls that wait for one model, and the choice of the next piece of work."""

    def __init__(
        self,
        *,
        begin: Callable[[Request], Work | None],
        whole: Callable[[Request], Any],
        explain: Callable[[Request, Exception], LocalLLMError],
        finished: Callable[[Request], None],
    ) -> None:
        """`begin` reads a call, or returns None if it can only be computed `whole`, in one step; both raise refusals.
        `explain` turns any other error into the caller's. `finished` is called before the caller gets the result."""
        self._begin, self._whole, self._explain, self._finished = begin, whole, explain, finished
        self._lock = threading.Lock()
        self._closed = False
        self._calls: set[TaskCall] = set()
        self._submitted: list[tuple[TaskCall, Request]] = []
        # Only the engine's thread uses the rest. The jobs are in the order of their turns.
        self._jobs: list[_Job] = []
        self._nearly_done_first = False

    # From any thread --------------------------------------------------------------------------------------------------

    def submit(self, task: str, inputs: Any, parameters: Mapping[str, Any], cancellation: Cancellation) -> TaskCall:
        """Queues a call; see `TaskRunner.submit`."""
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
        """Fails all present calls with this error."""
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.settle(error=error)

    def close(self) -> None:
        """Cancels all calls, and those submitted later."""
        with self._lock:
            self._closed = True
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    # On the engine's thread -------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Prepares some rows, and computes one batch or one whole call; returns whether more work waits.

        Raises:
            EngineFailed: the device failed, and will keep failing.
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
                    self._conclude(job)  # a call without inputs has its result
            except Exception as error:  # noqa: BLE001 - raised again where the result is read
                self._fail(_Job(call, request), error)

    def _drop(self) -> None:
        """Drops calls that are done or cancelled, with all their rows."""
        for job in self._jobs:
            try:
                cancelled = job.request.cancellation.cancelled
            except Exception as error:  # noqa: BLE001 - a probe that fails means that the client is gone
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
        """The call whose turn it is; None while all calls still prepare rows.

        Turns go in order, but every other turn goes to the call with the least work left: a short call that comes while
        long ones run is in one of the next two batches, and the long ones still get half of them.
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
        """The rows to compute together with `first`: those of all calls that are nearest to its length."""
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
        """Handles a failed forward pass: the end of the call if it had one row; otherwise the rows run alone."""
        first = rows[0]
        lane = first.job.work.lane
        traceback.clear_frames(error.__traceback__)  # the frames hold what the model has computed
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
            job.call.settle(error=error)  # a waiting thread must not wait for ever
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
