"""The Hub's cache, as `huggingface_hub` lays it out: for each repository blobs, snapshots by commit, and references.

Any number of threads and processes have the same one; nothing here sends a packet. Must not know what a model is made
of, nor how a file comes.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

from .transfer import PARTIAL, partial_of

logger = logging.getLogger(__name__)

_STALE = 24 * 3600.0  # seconds after which a partial file that no download went on with is taken to be given up
# A tag that can be a file's name.
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def storage(model_id: str) -> Path:
    """The folder that the cache has, or would have, for the repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model_id, repo_type="model")


def find(model_id: str, name: str, revision: str | None) -> Path | None:
    """The file of the repository at a revision, or None where it is not here."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model_id, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def blob(model_id: str, etag: str | None) -> Path | None:
    """Where the cache keeps, or would keep, what has this tag; None for one that is no file's name."""
    if etag is None or not _TAG.fullmatch(etag):
        return None
    return storage(model_id) / "blobs" / etag


def lock(path: Path) -> Path:
    """The lock that `huggingface_hub` too takes to write the blob at `path`."""
    repository = path.parent.parent
    return repository.parent / ".locks" / repository.name / f"{path.name}.lock"


def present(model_id: str, etag: str | None, size: int) -> int:
    """How many of the `size` bytes of what has this tag are here, whole or in a partial file."""
    path = blob(model_id, etag)
    if path is None:
        return 0
    if path.exists():
        return size if path.stat().st_size == size else 0
    partial = partial_of(path)
    return min(size, partial.stat().st_size) if partial.exists() else 0


def partials(model_id: str) -> list[Path]:
    """The files of the repository of which only a part is here."""
    return sorted((storage(model_id) / "blobs").glob(f"*{PARTIAL}"))


def keep_commit(model_id: str, revision: str, commit: str) -> None:
    """Note that this commit is what the revision stands for, now that all of it is here.

    So that the next load without a Hub finds it, and not one that was begun later and never completed.
    """
    reference = storage(model_id) / "refs" / revision
    try:
        if not reference.is_file() or reference.read_text(encoding="utf-8") != commit:
            reference.parent.mkdir(parents=True, exist_ok=True)
            beside = reference.with_name(f"{reference.name}.{time.monotonic_ns()}")
            beside.write_text(commit, encoding="utf-8")
            beside.replace(reference)
    except OSError as error:  # a cache that others keep, and that is read only here
        logger.debug("the commit of %s could not be noted: %s", model_id, error)


def sweep(model_id: str) -> None:
    """Remove what is left of downloads that were given up long ago, perhaps as the file has changed since."""
    for path in partials(model_id):
        try:
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()
        except OSError as error:
            logger.debug("%s stays: %s", path.name, error)
