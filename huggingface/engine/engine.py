"""The engine of one loaded model: a single thread runs everything that touches the model's tensors.

`submit`, `call` and `close` may be called from any thread. The thread repeats `step()`: it schedules, computes, and
delivers results; it ends after some time without work, and the next request starts another. The runner computes rows,
the tasks do their own work. Must not know torch, HTTP, JSON or the registry.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import abc, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from ..cancellation import Cancellation, before_wait
from ..errors import Cancelled, EngineFailed, GenerationFailed, LocalLLMError, OutOfMemory, QueueFull, no_panics
from ..host.memory import forget_frames, release_freed, retried
from ..types import EngineOptions, EngineStatus
from .prefill_budget import Pace
from .scheduler import Row, Scheduler
from .sequence import Sequence
from .slots import SlotTable
from .ticket import Ticket

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds without work after which the thread ends. OpenMP keeps a team of threads for every thread that has computed,
# and if there are more of them than cores, none waits actively: idle models would slow down busy ones.
_IDLE = 10.0

# Seconds between two times that a busy engine gives freed memory back. glibc keeps it for the next step, which needs it
# in other pieces: it would grow by half of what a small model takes.
_TIDY = 0.5

# Seconds that a step waits for constraints; most are settled before it begins.
_FORMS = 0.01


class Batch(Protocol):
    """Computes rows and samples tokens: see `batch.TransformersBatch`."""

    slots: SlotTable

    def forward(self, rows: abc.Sequence[Row]) -> Any:
        """The logits that follow each row's last token."""

    def sample(self, rows: abc.Sequence[Row], logits: Any) -> list[int | LocalLLMError]:
        """Each row's next token, or an error."""

    def settle(self, sequences: abc.Sequence[Sequence], seconds: float) -> None:
        """Waits until the constraints of all sequences are settled, or for `seconds`."""

    def restore_weights(self) -> None:
        """Restores the model itself for use outside the batch."""

    def release_idle(self) -> None:
        """Drops weights that were loaded on demand."""

    def close(self) -> None:
        """Drops the model and the cache."""

    @property
    def allocated_bytes(self) -> int:
        """Allocated bytes of the KV cache."""


class Background(Protocol):
    """Work that is done in bounded pieces between the steps: see `tasks.runner.TaskRunner`."""

    @property
    def pending(self) -> int:
        """Calls that wait or run."""

    def step(self) -> bool:
        """Does one piece; returns whether there is more."""

    def fail(self, error: LocalLLMError) -> None:
        """Fails all present calls."""

    def release_idle(self) -> None:
        """Drops weights that were loaded on demand."""

    def close(self) -> None:
        """Fails all waiting calls."""


@dataclass(slots=True, eq=False)
class _Job:
    """A piece of work that has the thread to itself, with its ticket if it generates text."""

    run: Callable[[], None]
    fail: Callable[[BaseException], None]
    cancellation: Cancellation
    ticket: Ticket | None = None


class Engine:
    """Serves one model's callers: sequences in a batch, everything else between its steps."""

    def __init__(
        self,
        model_id: str,
        batch: Batch | None,
        tasks: Background,
        options: EngineOptions,
        reason: str | None = None,
        relieve: Callable[[], bool] = lambda: False,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        """Without a `batch` each generation is a job of its own; `reason` says why.

        `relieve` evicts another model when memory is short; it returns whether it freed any. `begin` is called first on
        each of the engine's threads.
        """
        self._relieve = relieve
        self._begin = begin
        self._model_id = model_id
        self._batch = batch
        self._tasks = tasks
        self._options = options
        self._reason = reason
        self._scheduler = Scheduler(batch.slots, options.max_batch) if batch is not None else None
        self._pace = Pace()
        self._service = 0.0  # mean of the last seconds that a request ran
        self._changed = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._jobs: deque[_Job] = deque()
        self._job: _Job | None = None
        self._closing = False
        self._tidy_at = 0.0
        self._failed = False
        self._ended = False
        self._thread: threading.Thread | None = None  # None while there is no work

    # From any thread -------------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence for the batch; its ticket reports the result.

        Raises:
            QueueFull: the queue is full.
            OutOfMemory: the sequence would not fit into the cache even alone.
            Cancelled: the engine is being closed.
            EngineFailed: the engine is broken.
        """
        with self._changed:
            self._check_open()
            assert self._scheduler is not None and self._batch is not None  # noqa: S101, PT018 - until it is closed
            if not self._batch.slots.fits(sequence.need):
                raise OutOfMemory(
                    f"Not enough KV cache for {sequence.need} tokens of model '{self._model_id}': "
                    f"LOCAL_LLM_KV_CACHE_BYTES is {self._options.kv_cache_bytes}"
                )
            waiting = self._waiting
            self._check_queue(waiting, self._scheduler.places)
            self._have_thread()
            sequence.ticket.position = waiting + 1
            self._inbox.append(sequence)

    def submit_job(self, ticket: Ticket, work: Callable[[Cancellation], None]) -> None:
        """Queues a generation that has the thread to itself; `work` gets its cancellation.

        Raises: as `submit`.
        """
        cancellation = ticket.cancellation.child(lambda: self._closing)

        def run() -> None:
            ticket.admitted()
            started = time.monotonic()
            work(cancellation)
            self._served(time.monotonic() - started)
            ticket.finish()

        with self._changed:
            self._check_open()
            waiting = self._waiting
            self._check_queue(waiting, 1 if self._job is None else 0)
            self._have_thread()
            ticket.position = waiting + 1
            self._jobs.append(_Job(run, ticket.finish, cancellation, ticket))

    def call(self, work: Callable[[], T]) -> T:
        """Runs `work` on the engine's thread between steps; returns its result or raises its error.

        Raises:
            Cancelled: the engine is being closed.
        """
        future: Future[T] = Future()
        with self._changed:
            self._check_open()
            self._have_thread()
            closing = Cancellation(lambda: self._closing)
            self._jobs.append(_Job(lambda: future.set_result(work()), future.set_exception, closing))
        before_wait()
        return future.result()

    def check_queue_for_task(self) -> None:
        """Refuses one more task call if too many wait already.

        Raises: as `submit`.
        """
        with self._changed:
            self._check_open()
            self._check_queue(self._tasks.pending, self._options.max_batch)

    def wake(self) -> None:
        """Notifies the thread of new work."""
        with self._changed:
            if self._thread is not None or (self._busy and not self._closing):
                self._have_thread()

    def close(self) -> None:
        """Cancels all work and ends the thread. Safe to call twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
            mine, self._ended = thread is None and not self._ended, True
        if mine:  # there is no thread to do it
            self._end(Cancelled())
        elif thread is not None and thread is not threading.current_thread():
            thread.join()

    @property
    def failed(self) -> bool:
        """Whether the engine is broken, so that a load replaces the model."""
        return self._failed

    def status(self) -> EngineStatus:
        """What the engine is doing now."""
        batch, scheduler = self._batch, self._scheduler
        return EngineStatus(
            state="failed" if self._failed else "running",
            mode="batched" if batch is not None else "one at a time",
            reason=self._reason,
            running=(len(scheduler.running) if scheduler is not None else 0) + (self._job is not None),
            waiting=self._waiting,
            tasks=self._tasks.pending,
            slots=batch.slots.taken if batch is not None else 0,
            resting_slots=batch.slots.resting if batch is not None else 0,
            kv_cache_bytes=batch.allocated_bytes if batch is not None else 0,
            kv_cache_limit=self._options.kv_cache_bytes if batch is not None else 0,
        )

    def _have_thread(self) -> None:
        """Wakes the thread, or starts one; with the lock held, so that no thread ends at the same moment."""
        self._changed.notify_all()
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=f"engine-{self._model_id}")
            thread.start()
            self._thread = thread

    @property
    def _waiting(self) -> int:
        scheduler = self._scheduler
        queued = len(scheduler.waiting) if scheduler is not None else 0
        return queued + len(self._inbox) + sum(1 for job in self._jobs if job.ticket is not None)

    def _check_open(self) -> None:
        if self._failed:
            raise EngineFailed(self._model_id)
        if self._closing:
            raise Cancelled(f"Model '{self._model_id}' is being unloaded")

    def _check_queue(self, waiting: int, places: int) -> None:
        if waiting >= self._options.max_queue + places:
            running = len(self._scheduler.running) if self._scheduler is not None else 1
            raise QueueFull(self._model_id, waiting, max(1, math.ceil(self._service / max(running, 1))))

    # On the engine's thread ------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Serves each caller once: drops what is cancelled, admits what waits, and computes a token or a chunk for
        each."""
        self._give_up()
        self._run_job()
        self._run_tasks()
        if self._scheduler is None:
            return
        self._let_in()
        self._settle()
        self._make_room()
        budget = self._pace.budget(len(self._scheduler.decoding), self._scheduler.short_prompts)
        rows = self._scheduler.plan(budget)
        decoding = len(self._scheduler.decoding)
        started = time.monotonic()
        self._compute(rows)
        if rows:
            self._tidy()
            tokens = sum(len(row.tokens) for row in rows) - decoding
            self._pace.took(time.monotonic() - started, decoding=decoding, prompt_tokens=tokens)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._begin()
            while (next_thing := self._wait()) == "step":
                self.step()
            if next_thing == "rest":
                return
        except BaseException as broken:
            logger.exception("the engine of %s failed", self._model_id)
            forget_frames(broken)
            error = EngineFailed(self._model_id)
        with self._changed:
            self._failed = error is not None
            self._closing = True
        self._end(error or Cancelled())

    def _tidy(self) -> None:
        """Gives memory that steps have freed back to the system now and then."""
        now = time.monotonic()
        if now >= self._tidy_at:
            self._tidy_at = now + _TIDY
            release_freed()

    def _wait(self) -> Literal["step", "rest", "close"]:
        """Waits for something to do, and returns its kind. Ends this thread after some time without work."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closing or self._busy, _IDLE):
                self._tasks.release_idle()
                if self._batch is not None:
                    self._batch.release_idle()
                self._thread = None  # under the lock: the next request starts another thread, `close` needs none
                return "rest"
            return "close" if self._closing else "step"

    @property
    def _busy(self) -> bool:
        busy = self._scheduler is not None and (self._scheduler.waiting or self._scheduler.running)
        return bool(busy or self._inbox or self._jobs or self._tasks.pending)

    def _give_up(self) -> None:
        """Drops cancelled jobs and sequences, and frees their slots."""
        with self._changed:
            if self._scheduler is not None:
                self._scheduler.waiting.extend(self._inbox)
                self._inbox.clear()
            cancelled = [job for job in self._jobs if job.cancellation.cancelled]
            for job in cancelled:
                self._jobs.remove(job)
        for job in cancelled:
            job.fail(Cancelled())
        for sequence in self._everyone():
            if sequence.ticket.cancellation.cancelled:
                self._fail(sequence, Cancelled())

    def _run_job(self) -> None:
        """Runs one job that has the thread to itself, if there is one."""
        with self._changed:
            self._job = self._jobs.popleft() if self._jobs else None
        if self._job is None:
            return
        try:
            self._lend_model()
            self._job.run()
        except EngineFailed as error:
            self._job.fail(error)
            raise
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            forget_frames(error)
            self._job.fail(error)
        finally:
            self._job = None

    def _run_tasks(self) -> None:
        """Does one piece of the tasks' work, if there is any; work that arrives now has its turn in the next step."""
        if self._tasks.pending:
            try:
                self._lend_model()
            except OutOfMemory as error:
                self._tasks.fail(error)
            else:
                self._tasks.step()

    def _lend_model(self) -> None:
        """Restores the model itself; called once a job or task is known to run, so that none runs without it."""
        if self._batch is not None:
            retried(self._batch.restore_weights, self._relieve)

    def _let_in(self) -> None:
        """Gives slots to waiting sequences; refuses one that does not fit into all the memory there is."""
        assert self._scheduler is not None  # noqa: S101 - only called with a batch
        while True:
            with self._changed:
                self._scheduler.admit()
                for position, sequence in enumerate(self._scheduler.waiting, 1):
                    sequence.ticket.position = position
                stuck = self._scheduler.waiting[0] if self._scheduler.waiting and not self._scheduler.running else None
            if stuck is None or not self._relieve():
                break
        if stuck is not None:
            reason = f"Not enough memory for the KV cache of {stuck.need} tokens with model '{self._model_id}'"
            self._fail(stuck, OutOfMemory(reason))

    def _settle(self) -> None:
        """Continues sequences whose constraint is settled; one that takes longer delays no other."""
        assert self._scheduler is not None and self._batch is not None  # noqa: S101, PT018 - only called with a batch
        running = self._scheduler.running
        if unsettled := [sequence for sequence in running if not sequence.settled]:
            self._batch.settle(unsettled, _FORMS)
        for sequence in running:
            if sequence.settled:
                self._end_of(sequence, sequence.settle)

    def _make_room(self) -> None:
        """Makes room in the cache for each decoding sequence's next token; fails a sequence for which there is none."""
        assert self._scheduler is not None  # noqa: S101 - only called with a batch
        while True:
            with self._changed:
                stuck = self._scheduler.make_room()
            if stuck is None:
                return
            if self._relieve():
                continue
            reason = f"Not enough memory for the KV cache of {stuck.need} tokens with model '{self._model_id}'"
            self._fail(stuck, OutOfMemory(reason))

    def _compute(self, rows: abc.Sequence[Row]) -> None:
        """Computes rows and gives each sequence its next token. An error fails only the rows that also fail alone.

        If memory is short and some can be freed, it tries once more.
        """
        if not rows:
            return
        assert self._scheduler is not None and self._batch is not None  # noqa: S101, PT018 - only called with a batch
        try:
            logits = self._batch.forward(rows)
        except EngineFailed:
            raise
        except LocalLLMError as error:
            if isinstance(error, OutOfMemory) and self._relieve():
                forget_frames(error)
                self._compute(rows)
                return
            if len(rows) == 1:
                self._fail(rows[0].sequence, error, clean=False)
                return
            forget_frames(error)
            for row in rows:
                self._compute((row,))
            return
        self._scheduler.computed(rows)
        sampled = self._batch.sample(rows, logits)
        for row, token in zip(rows, sampled, strict=True):
            if isinstance(token, LocalLLMError):
                self._fail(row.sequence, token, clean=False)
            elif row.complete:
                self._deliver(row.sequence, token)

    def _deliver(self, sequence: Sequence, token: int) -> None:
        self._end_of(sequence, lambda: sequence.append(token))

    def _end_of(self, sequence: Sequence, say: Callable[[], None]) -> None:
        """Delivers a sequence's last token, and drops the sequence if the token ends it."""
        assert self._scheduler is not None  # noqa: S101 - it runs in the batch
        try:
            with no_panics():
                say()
        except Exception as error:  # a tokenizer may fail on a model's output
            logger.exception("a sequence of %s could not be decoded", self._model_id)
            self._fail(sequence, GenerationFailed(f"Model '{self._model_id}' generated what has no text ({error})"))
            return
        if sequence.finished:
            self._scheduler.drop(sequence)
            self._served(time.monotonic() - sequence.admitted)

    def _fail(self, sequence: Sequence, error: BaseException, *, clean: bool = True) -> None:
        assert self._scheduler is not None  # noqa: S101 - only sequences fail here
        forget_frames(error)
        with self._changed:
            self._scheduler.drop(sequence, clean=clean)
        sequence.ticket.finish(error)

    def _served(self, seconds: float) -> None:
        self._service = seconds if not self._service else self._service + 0.2 * (seconds - self._service)

    def _everyone(self) -> list[Sequence]:
        return [] if self._scheduler is None else [*self._scheduler.waiting, *self._scheduler.running]

    def _end(self, error: BaseException) -> None:
        """Ends all sequences and jobs with an error, and drops the model."""
        with self._changed:
            sequences: Iterable[Sequence] = [*self._everyone(), *self._inbox]
            jobs = list(self._jobs)
            self._jobs.clear()
            self._inbox.clear()
        for sequence in sequences:
            sequence.ticket.finish(error)
        for job in jobs:
            job.fail(error)
        if isinstance(error, LocalLLMError):
            self._tasks.fail(error)
        self._tasks.close()
        if self._batch is not None:
            self._batch.close()
        self._scheduler = self._batch = None
