"""One download that any number of callers share: what it downloads, its progress, and its result.

Any thread may call anything here. Must not know how files are downloaded, or which other downloads run.
"""

from __future__ import annotations

import threading
from pathlib import Path

from ..errors import Cancelled, LocalLLMError
from ..progress import Progress
from ..registry.records import ModelRecord

Key = tuple[str, str | None, str | None, frozenset[str]]


class Job:
    """One download. `commit` and `folder` become known while it runs; `error` is set if it fails."""

    def __init__(self, record: ModelRecord) -> None:
        self.model_id = record.model_id
        self.revision = record.revision
        self.gguf_file = record.gguf_file
        self.adapters = frozenset((record.adapters or {}).values())
        self.progress = Progress()
        self.commit: str | None = None
        self.folder: Path | None = None
        self.error: LocalLLMError | None = None
        self._ended = threading.Event()
        self._ending = threading.Lock()
        # Guarded by the lock of `Downloads`.
        self.subscribers = 0
        self.pinned = False
        self.thread: threading.Thread | None = None

    @property
    def key(self) -> Key:
        """What identifies the download: at most one job with this key runs at a time."""
        return self.model_id, self.revision, self.gguf_file, self.adapters

    @property
    def over(self) -> bool:
        """Whether the job has ended."""
        return self._ended.is_set()

    @property
    def active(self) -> bool:
        """Whether bytes came from the Hub in the last seconds."""
        return self.progress.now().speed > 0

    def wait(self, seconds: float) -> bool:
        """Waits for the end of the job; returns whether it has ended."""
        return self._ended.wait(seconds)

    def result(self) -> Path:
        """The folder with the files, for a job that has ended.

        Raises: the error that ended the job.
        """
        if self.folder is None:
            raise self.error or Cancelled
        return self.folder

    def resolved(self, commit: str) -> None:
        """Records the commit that the revision stands for."""
        self.commit = commit

    def end(self, folder: Path | None = None, error: LocalLLMError | None = None) -> None:
        """Ends the job; a second call changes nothing."""
        with self._ending:
            if self._ended.is_set():
                return
            self.folder, self.error = folder, error
            if error is None:
                self.progress.end("ready")
            else:
                self.progress.end("cancelled" if isinstance(error, Cancelled) else "failed", str(error))
            self._ended.set()

    def cancel(self, reason: str = "The download was cancelled") -> None:
        """Ends the job at once. Its thread ends at its next check, which a silent connection may delay for seconds."""
        self.end(error=Cancelled(reason))
        self.progress.cancel()
