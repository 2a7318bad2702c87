"""One download that any number of callers share: what it is of, how far it is, and how it ended.

Any thread may call anything here. It must not know what brings the files, nor what else is being downloaded.
"""

from __future__ import annotations

import threading
from pathlib import Path

from ..errors import Cancelled, LocalLLMError
from ..progress import Progress
from ..registry.records import ModelRecord

Key = tuple[str, str | None, str | None, frozenset[str]]


class Job:
    """One download. `commit` and `folder` are known in its course, `error` is what it ended with, if it failed."""

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
        # Of `Downloads`, under its lock.
        self.wanted = 0
        self.kept = False
        self.thread: threading.Thread | None = None

    @property
    def key(self) -> Key:
        """What there is one job for at a time."""
        return self.model_id, self.revision, self.gguf_file, self.adapters

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""
        return self._ended.is_set()

    @property
    def brought(self) -> bool:
        """Whether any byte came from the Hub in the last seconds."""
        return self.progress.now().speed > 0

    def wait(self, seconds: float) -> bool:
        """Wait for its end; returns whether it came."""
        return self._ended.wait(seconds)

    def result(self) -> Path:
        """The folder with the files, of a job that is over.

        Raises: what it failed of.
        """
        if self.folder is None:
            raise self.error or Cancelled
        return self.folder

    def resolved(self, commit: str) -> None:
        """Note which commit the revision stands for."""
        self.commit = commit

    def end(self, folder: Path | None = None, error: LocalLLMError | None = None) -> None:
        """Come to the end; who comes second with this changes nothing."""
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
        """Be over at once. Its thread ends when it next looks, which a silent connection may put off for seconds."""
        self.end(error=Cancelled(reason))
        self.progress.cancel()
