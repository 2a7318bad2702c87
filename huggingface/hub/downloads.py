"""Downloads as jobs that any number of callers share: one at a time for a model, its revision, GGUF file and adapters.

Any thread may call anything here; every job has its own thread. A job goes on while a load waits for it, or until it is
cancelled if the download itself was asked for. Downloaded bytes stay, whatever ends the job, and the next job continues
from there. Must not know HTTP's routes, the registry or what is in memory.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .. import hub
from ..cancellation import LOOK_AGAIN, NEVER, Cancellation
from ..errors import Cancelled, DiskFull, FilesMissing, HubUnreachable, LoadError, LocalLLMError, public
from ..inspection import folder as files
from ..inspection.headers import Tensor
from ..inspection.lora import read_head
from ..progress import Moment, Progress
from ..registry.records import ModelRecord
from ..types import LoadOptions
from .disk import Disk, DiskClaims
from .job import Job, Key

logger = logging.getLogger(__name__)

_CLOSING = 2.0  # seconds that jobs get to end when the server stops; the process's end may interrupt them at any point
_BAR_AFTER = 1.0  # seconds until a job draws a bar: most find all files in the cache


class Downloads:
    """All downloads of one server."""

    def __init__(self, options: LoadOptions, *, terminal: TextIO | None = None, disk: Disk | None = None) -> None:
        """`terminal` is where bars are drawn; None for stderr, if that is a terminal. `disk` holds the claims of all
        downloads."""
        self._options = options
        self._terminal = terminal
        self._disk = disk or Disk()
        self._lock = threading.Lock()
        self._latest: dict[str, Job] = {}  # by model
        self._jobs: dict[Key, Job] = {}  # the latest by key
        self._closed = False

    def start(self, record: ModelRecord) -> Job:
        """Starts a download of the model, or subscribes to it; it goes on until it is complete or cancelled.

        A model that has a folder in the models folder is ready at once.

        Raises:
            Cancelled: the server is stopping.
            FilesMissing: the model's folder cannot be read.
        """
        job = Job(record)
        folder = files.local_folder(self._options.models_dir, record.model_id)
        if folder is None or job.adapters:
            return self._subscribe(record, pin=True)
        job.end(folder)
        with self._lock:
            self._latest[record.model_id] = job
        return job

    def get(self, model_id: str) -> Job | None:
        """The latest job of the model since the server's start, running or ended."""
        with self._lock:
            return self._latest.get(model_id)

    def running(self, model_id: str) -> bool:
        """Whether a download of the model is running."""
        job = self.get(model_id)
        return job is not None and not job.over

    def left_behind(self, model_id: str) -> int | None:
        """How many bytes of incomplete files an ended download left; None where there are no such files."""
        return hub.partial_bytes(model_id)

    def cancel(self, model_id: str) -> bool:
        """Cancels every download of the model; downloaded bytes stay. Returns whether one was running."""
        with self._lock:
            jobs = [job for job in self._jobs.values() if job.model_id == model_id and not job.over]
        for job in jobs:
            job.cancel()
        return bool(jobs)

    def folder(self, record: ModelRecord, progress: Progress, cancellation: Cancellation = NEVER) -> Path:
        """The folder with the model's files: in the models folder, or downloaded as far as files are missing.

        `progress` follows the download's own. Its cancellation, or `cancellation`, ends the wait; the download goes on
        if other callers need it.

        Raises:
            LoadError: the files cannot be downloaded.
            Cancelled: the wait or the download was cancelled.
        """
        folder = files.local_folder(self._options.models_dir, record.model_id)
        if folder is not None:
            return folder
        job = self._subscribe(record, pin=False)
        try:
            mirror = _Mirror(progress)
            version = -1
            while not job.over:
                version, moment = job.progress.wait(version, LOOK_AGAIN)
                mirror.show(moment)
                cancellation.check()
            mirror.show(job.progress.now())
            return job.result()
        finally:
            self._unsubscribe(job)

    def present(self, record: ModelRecord) -> Path:
        """The folder with the model's files on this machine; sends no packet.

        Raises:
            LoadError: the files are not here, or cannot be used.
        """
        folder = files.local_folder(self._options.models_dir, record.model_id)
        if folder is not None:
            return folder
        try:
            return self._fetch(record.model_id, record.revision, record.gguf_file, Progress(), offline=True)
        except HubUnreachable as error:
            raise FilesMissing(
                f"Model '{record.model_id}' is not (completely) on this machine; download it first"
            ) from error

    def described(self, record: ModelRecord) -> Path:
        """A folder with the model's config, fetched if it is missing; the weights need not be there.

        Raises: as `folder`.
        """
        folder = files.local_folder(self._options.models_dir, record.model_id)
        if folder is not None:
            return folder
        return hub.fetch_config(
            record.model_id,
            trusted=self._options.trust_remote_code,
            revision=record.revision,
            offline=self._options.offline,
        )

    def adapters(self, record: ModelRecord, progress: Progress | None = None) -> dict[str, Path]:
        """The folders of the record's adapters by name, downloaded as far as files are missing.

        Raises: as `folder`.
        """
        wanted = record.adapters or {}
        with self._claims(()) as claims:  # usually the adapters are here
            return {
                name: self._adapter(adapter, (progress or Progress()).part(), claims)
                for name, adapter in wanted.items()
            }

    def adapter_heads(self, record: ModelRecord) -> list[Mapping[str, Tensor]]:
        """The headers of the weights of the record's adapters; fetches only the header if an adapter is not here.

        Raises: as `folder`.
        """
        return [self._adapter_head(adapter) for adapter in (record.adapters or {}).values()]

    def _adapter_head(self, adapter_id: str) -> Mapping[str, Tensor]:
        folder = files.local_folder(self._options.models_dir, adapter_id)
        if folder is None:
            try:
                folder = hub.fetch_adapter(adapter_id, offline=True)
            except (FilesMissing, HubUnreachable):
                if self._options.offline:
                    raise
                return hub.adapter_head(adapter_id)
        return read_head(f"Adapter '{adapter_id}'", folder)

    def close(self) -> None:
        """Cancels all downloads and refuses new ones; downloaded bytes stay."""
        with self._lock:
            self._closed = True
            jobs = list(self._jobs.values())
        for job in jobs:
            if not job.over:
                job.cancel("The server is stopping; the download goes on from here when it is asked for again")
        end = time.monotonic() + _CLOSING
        for job in jobs:
            if job.thread is not None:
                job.thread.join(max(0.0, end - time.monotonic()))

    def _subscribe(self, record: ModelRecord, *, pin: bool) -> Job:
        """Subscribes to the job for the record's files, or starts one; a pinned job goes on without subscribers."""
        new = Job(record)
        with self._lock:
            if self._closed:
                raise Cancelled("The server is shutting down")
            before = self._jobs.get(new.key)
            job = new if before is None or before.over else before
            job.pinned = job.pinned or pin
            job.subscribers += not pin
            self._latest[record.model_id] = job
            if job is new:
                self._jobs[job.key] = job
                # A daemon thread: a silent connection must not delay the end of the process.
                job.thread = threading.Thread(
                    target=self._run, args=(job, before), name=f"download-{job.model_id}", daemon=True
                )
                job.thread.start()
        return job

    def _unsubscribe(self, job: Job) -> None:
        """Ends a subscription; cancels the job if it was the last one and the download itself was not asked for."""
        with self._lock:
            job.subscribers -= 1
            unwanted = not job.subscribers and not job.pinned
        if unwanted and not job.over:
            job.cancel()

    def _run(self, job: Job, before: Job | None) -> None:
        """Runs a job on its own thread."""
        drawing = threading.Thread(target=self._draw, args=(job,), name=f"{job.model_id}-bar", daemon=True)
        terminal = self._terminal or sys.stderr
        if self._terminal is not None or (terminal is not None and terminal.isatty()):
            drawing.start()
        try:
            while before is not None and before.thread is not None and before.thread.is_alive():
                job.progress.check()  # `before` was cancelled but has not ended yet
                before.thread.join(LOOK_AGAIN)
            started = time.monotonic()
            folder = files.local_folder(self._options.models_dir, job.model_id)
            adapters = sorted(job.adapters)
            with self._claims(adapters if folder is None else adapters[1:]) as claims:
                if folder is None:
                    folder = self._fetch(
                        job.model_id, job.revision, job.gguf_file, job.progress, resolved=job.resolved, claims=claims
                    )
                for adapter in adapters:
                    self._adapter(adapter, job.progress.part(), claims)
            if job.active:
                logger.info("downloaded %s in %.1f s", job.model_id, time.monotonic() - started)
            job.end(folder)
        except LocalLLMError as error:
            logger.info("download of %s: %s", job.model_id, error)
            job.end(error=error)
        except BaseException as error:
            logger.exception("download of %s failed", job.model_id)
            failure = LoadError(f"Model '{job.model_id}' could not be downloaded: {public(error)}")
            failure.__cause__ = error
            job.end(error=failure)

    def _fetch(
        self,
        model_id: str,
        revision: str | None,
        gguf_file: str | None,
        progress: Progress,
        *,
        offline: bool = False,
        resolved: Callable[[str], None] = lambda _: None,
        claims: DiskClaims | None = None,
    ) -> Path:
        return hub.fetch(
            model_id,
            allow_pickle=self._options.allow_pickle,
            trusted=self._options.trust_remote_code,
            revision=revision,
            gguf_file=gguf_file,
            progress=progress,
            offline=offline or self._options.offline,
            resolved=resolved,
            claims=claims,
        )

    def _adapter(self, adapter_id: str, progress: Progress, claims: DiskClaims) -> Path:
        folder = files.local_folder(self._options.models_dir, adapter_id)
        if folder is not None:
            return folder
        return hub.fetch_adapter(adapter_id, progress=progress, offline=self._options.offline, claims=claims)

    @contextmanager
    def _claims(self, adapters: Iterable[str]) -> Iterator[DiskClaims]:
        """Claims disk space for one piece of work; that of `adapters` at the start, because they are downloaded later.

        Raises:
            DiskFull: the disk lacks space for the adapters.
        """
        claims = self._disk.claims()
        try:
            for adapter in adapters:
                if not self._options.offline and files.local_folder(self._options.models_dir, adapter) is None:
                    try:
                        hub.claim_adapter(adapter, claims)
                    except DiskFull:
                        raise
                    except LocalLLMError as error:  # its own download reports it
                        logger.debug("the size of %s is unknown: %s", adapter, error)
            yield claims
        finally:
            claims.release()

    def _draw(self, job: Job) -> None:
        """Draws a bar on the terminal while the job runs."""
        from tqdm import tqdm

        with tqdm(
            desc=job.model_id, unit="B", unit_scale=True, delay=_BAR_AFTER, file=self._terminal, dynamic_ncols=True
        ) as bar:
            version = -1
            while True:
                version, moment = job.progress.wait(version, 1.0)
                bar.total = moment.total
                bar.update(moment.done - bar.n)
                if job.over:
                    return
                time.sleep(LOOK_AGAIN)


class _Mirror:
    """Copies one progress to another."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._seen: Moment | None = None

    def show(self, moment: Moment) -> None:
        """Catches up with `moment`.

        Raises:
            Cancelled: the progress that is written to is cancelled.
        """
        seen, self._seen = self._seen, moment
        if moment.phase != "waiting":
            if seen is None or seen.phase == "waiting":
                self._progress.begin("download", moment.total, moment.done)
            else:
                if moment.total is not None and moment.total != seen.total:
                    self._progress.expect(moment.total, seen.done)
                if moment.done != seen.done:
                    self._progress.advance(moment.done - seen.done)
            if moment.file is not None and (seen is None or moment.file != seen.file):
                self._progress.at(moment.file)
        self._progress.check()
