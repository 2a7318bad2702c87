"""The Hub's cache, as `huggingface_hub` lays it out: for each repository blobs, snapshots by commit, and references.

Many threads and processes share it; nothing here sends a packet. Must not know what a model consists of, or how a file
is downloaded.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

from .transfer import PARTIAL, partial_of

logger = logging.getLogger(__name__)

_STALE = 24 * 3600.0  # seconds after which a partial file that no download continued counts as abandoned
# A tag that can be a file name.
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def storage(model_id: str) -> Path:
    """The cache's folder for the repository, whether it exists or not."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model_id, repo_type="model")


def find(model_id: str, name: str, revision: str | None) -> Path | None:
    """The repository's file at a revision; None where it is not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model_id, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def blob(model_id: str, etag: str | None) -> Path | None:
    """The path of the blob with this tag, whether it exists or not; None for a tag that cannot be a file name."""
    if etag is None or not _TAG.fullmatch(etag):
        return None
    return storage(model_id) / "blobs" / etag


def lock(path: Path) -> Path:
    """The lock for writing the blob at `path`; `huggingface_hub` takes it too."""
    repository = path.parent.parent
    return repository.parent / ".locks" / repository.name / f"{path.name}.lock"


def present(model_id: str, etag: str | None, size: int) -> int:
    """How many of the `size` bytes of the blob with this tag are here, complete or in a partial file."""
    path = blob(model_id, etag)
    if path is None:
        return 0
    if path.exists():
        return size if path.stat().st_size == size else 0
    partial = partial_of(path)
    return min(size, partial.stat().st_size) if partial.exists() else 0


def partials(model_id: str) -> list[Path]:
    """The partial files of the repository."""
    return sorted((storage(model_id) / "blobs").glob(f"*{PARTIAL}"))


def keep_commit(model_id: str, revision: str, commit: str) -> None:
    """Records the commit that a revision stands for, once all of its files are here.

    So the next load without a Hub finds it, and not a commit whose download was never completed.
    """
    reference = storage(model_id) / "refs" / revision
    try:
        if not reference.is_file() or reference.read_text(encoding="utf-8") != commit:
            reference.parent.mkdir(parents=True, exist_ok=True)
            beside = reference.with_name(f"{reference.name}.{time.monotonic_ns()}")
            beside.write_text(commit, encoding="utf-8")
            beside.replace(reference)
    except OSError as error:  # a shared cache that is read-only here
        logger.debug("the commit of %s could not be recorded: %s", model_id, error)


def sweep(model_id: str) -> None:
    """Deletes partial files that were abandoned long ago, perhaps because the file has changed since."""
    for path in partials(model_id):
        try:
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()
        except OSError as error:
            logger.debug("%s could not be deleted: %s", path.name, error)
