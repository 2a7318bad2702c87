"""What an error of `huggingface_hub` means to the user: the one place that knows its many kinds.

Pure functions of an exception and what it came from; any thread may call them. Imports neither torch nor transformers,
and must not know what was being done. Every result is a `LoadError` that names the model, says what to do, and holds no
path of this machine.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from . import files
from .errors import FilesCorrupt, FilesGated, FilesMissing, HubUnreachable, LoadError


def damaged(model_id: str, name: str) -> FilesCorrupt:
    """The error of a file that arrived, but not as the Hub says that it is."""
    return FilesCorrupt(f"Model '{model_id}': {name} was damaged on its way from the Hub; load the model again")


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error came from, if it came from one."""
    for cause in _chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def is_absent(error: BaseException) -> bool:
    """Whether the Hub says that there is no such file, in its own words (an error code) or by a plain 404."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    known = any(isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError) for cause in _chain(error))
    return _status(error) == 404 and not known


def is_passing(error: BaseException) -> bool:
    """Whether another attempt may go better: not after a silence, which was waited for long enough already."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status == 429
    silent = any("Timeout" in type(cause).__name__ for cause in _chain(error))
    return isinstance(error, FilesCorrupt) or (_is_transport(error) and not silent)


def _is_transport(error: BaseException) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError

    return any(
        isinstance(cause, ConnectionError | TimeoutError | LocalEntryNotFoundError)
        or type(cause).__module__.startswith(("httpx", "httpcore"))
        for cause in _chain(error)
    )


@contextmanager
def hub_errors(model_id: str) -> Iterator[None]:
    """Turn whatever a call to the Hub raises within the block into a `LoadError` for the user."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        raise _hub_error(model_id, error) from error


def _hub_error(model_id: str, error: BaseException) -> LoadError:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    causes = list(_chain(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    status = _status(error)
    if caused_by(GatedRepoError):
        return FilesGated(
            f"Model '{model_id}' is gated on the Hub: accept its terms on its page there, then set HF_TOKEN to a token "
            "of that account"
        )
    if caused_by(RepositoryNotFoundError) or status == 404:
        return FilesMissing(
            f"Model '{model_id}' has no folder in the models folder and no repository on the Hub that this server may "
            "read. Check the id; if the repository is private, set HF_TOKEN"
        )
    if status in (401, 403):
        return FilesGated(f"Model '{model_id}': the Hub refuses access ({status}); set HF_TOKEN to a token that has it")
    if caused_by(OfflineModeIsEnabled):
        return HubUnreachable(
            f"Model '{model_id}' is not (completely) on this machine, and the Hub is switched off (HF_HUB_OFFLINE). "
            "Put its files into the models folder, or allow the download"
        )
    if any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return LoadError(f"Model '{model_id}' could not be downloaded: the disk is full")
    if status is not None:
        return HubUnreachable(f"Model '{model_id}' could not be downloaded: the Hub answered {status}; try again later")
    if _is_transport(error):
        return HubUnreachable(
            f"Model '{model_id}' is not (completely) on this machine, and the Hub cannot be reached. "
            "Check the connection, or put its files into the models folder"
        )
    if "Consistency check failed" in str(error):
        return damaged(model_id, "a file")
    return LoadError(f"Model '{model_id}' could not be downloaded: {files.public(error)}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
