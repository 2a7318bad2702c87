"""Stores what is made of a model's files in `.local-llm/` in its folder, complete or not at all.

The name of what is stored identifies what it was made of; it is written under another name and renamed when all of it
is on the disk. That nothing can be made of a model is recorded there too, so that it is not tried again. Must not know
backends or records.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = ".local-llm"

_ABANDONED = 24 * 3600  # seconds after which an incomplete folder counts as abandoned


class KeptFolder:
    """The folder of one thing that is made of a model's files."""

    def __init__(self, folder: Path, kind: str, made_of: Any) -> None:
        """`folder` is the model's; a folder of the same `kind` that was made of something else is deleted."""
        of_all = json.dumps(made_of, sort_keys=True, default=str)
        self._folder = folder / FOLDER
        self._prefix = f"{kind}-"
        self._name = f"{kind}-{hashlib.sha256(of_all.encode()).hexdigest()[:16]}"

    @property
    def path(self) -> Path:
        """Where it is stored."""
        return self._folder / self._name

    @property
    def key(self) -> str:
        """What identifies it."""
        return os.fspath(self.path)

    @property
    def refused(self) -> str | None:
        """Why nothing can be made, if that is recorded."""
        try:
            reason = json.loads((self.path / "about.json").read_text("utf-8")).get("refused")
        except (OSError, ValueError, AttributeError):
            return None
        return None if reason is None else str(reason)

    def refuse(self, reason: str) -> None:
        """Records that nothing can be made, in place of what is stored."""
        with suppress(OSError):
            shutil.rmtree(self.path, ignore_errors=True)
            self.write(lambda folder: write_json(folder / "about.json", {"refused": reason}))

    def write(self, write: Callable[[Path], None]) -> None:
        """Writes the folder, and gives it its name when all of it is on the disk.

        Raises: OSError, and any error of `write`.
        """
        self._folder.mkdir(exist_ok=True)
        unfinished = self._folder / f".{self._name}.{uuid.uuid4().hex[:8]}.tmp"
        unfinished.mkdir()
        try:
            write(unfinished)
            for path in unfinished.iterdir():
                _sync(path)
            _sync(unfinished)
            self._clean()
            try:
                unfinished.rename(self.path)
            except OSError:
                if not (self.path / "about.json").exists():  # otherwise another process was as fast
                    raise
            _sync(self._folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _clean(self) -> None:
        """Deletes folders of the same kind that were made of something else, and abandoned incomplete ones."""
        for path in self._folder.iterdir():
            old = path.name.startswith(self._prefix) and path.name != self._name
            with suppress(OSError):
                if old or (path.name.endswith(".tmp") and time.time() - path.stat().st_mtime > _ABANDONED):
                    shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(content), "utf-8")


def _sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
