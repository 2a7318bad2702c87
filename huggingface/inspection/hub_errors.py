"""Turns errors of `huggingface_hub`, or of a transfer from the Hub, into errors for the user.

The one module that knows their many kinds. Pure functions of an exception and its causes; any thread may call them.
Imports neither torch nor transformers, and must not know what was being done. Every result is a `LoadError` that names
the model, says what to do, and contains no path of this machine.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial

from ..errors import (
    DiskFull,
    FilesCorrupt,
    FilesGated,
    FilesMissing,
    HubUnreachable,
    LoadError,
    explained,
    public,
)

_LONGEST_WAIT = 300.0  # the longest wait in seconds that a Hub can ask for; its rate limits use windows of this length


class Damaged(Exception):
    """The received bytes are not what the Hub says of the file; they were deleted.

    `resumed`: a part of them came from an earlier attempt, so a new one may succeed.
    """

    def __init__(self, reason: str, *, resumed: bool) -> None:
        super().__init__(reason)
        self.resumed = resumed


class Stalled(ConnectionError):
    """The Hub, or its storage, sent nothing within the time allowed for a byte."""


def damaged(model_id: str, name: str, reason: str = "") -> FilesCorrupt:
    """The error for a file that differs from what the Hub says of it."""
    what = f" ({reason})" if reason else ""
    return FilesCorrupt(f"Model '{model_id}': {name} was damaged on its way from the Hub{what}; load the model again")


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error or its causes, if there is one."""
    for cause in _chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def is_absent(error: BaseException) -> bool:
    """Whether the Hub says that the file does not exist, by its own error code or a plain 404."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    known = any(isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError) for cause in _chain(error))
    return _status(error) == 404 and not known


def is_passing(error: BaseException) -> bool:
    """Whether another attempt may succeed.

    Not after a timeout, which has waited long enough already, except in the middle of a file, where a new connection
    often helps.
    """
    if isinstance(error, Damaged | Stalled):
        return isinstance(error, Stalled) or error.resumed
    status = _status(error)
    if status is not None:
        return status >= 500 or status == 429
    silent = any("Timeout" in type(cause).__name__ for cause in _chain(error))
    return _is_transport(error) and not silent


def pause_after(error: BaseException, attempt: int) -> float:
    """Seconds until the next attempt: as many as the Hub asks for, if it does."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers: Mapping[str, str] = next(
        (cause.response.headers for cause in _chain(error) if hasattr(cause, "response")), {}
    )
    limit = parse_ratelimit_headers(headers) if _status(error) == 429 else None
    asked = str(headers.get("Retry-After", ""))
    if limit is not None and limit.remaining == 0:
        asked = str(limit.reset_in_seconds)
    return min(_LONGEST_WAIT, max(float(attempt), float(asked) if asked.isdecimal() else 0.0))


def _is_transport(error: BaseException) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError

    return any(
        isinstance(cause, ConnectionError | TimeoutError | LocalEntryNotFoundError)
        or type(cause).__module__.startswith(("httpx", "httpcore"))
        for cause in _chain(error)
    )


def hub_errors(model_id: str, revision: str | None = None) -> AbstractContextManager[None]:
    """Turns any error of a call to the Hub in the block into a `LoadError` for the user, except `Cancelled`."""
    return explained(partial(_hub_error, model_id, revision))


def unknown_revision(model_id: str, revision: str) -> FilesMissing:
    """The error for a revision that the repository does not have."""
    return FilesMissing(f"Model '{model_id}' has no branch, tag or commit '{revision}' on the Hub; check its revision")


def _hub_error(model_id: str, revision: str | None, error: BaseException) -> LoadError:
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(_chain(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    status = _status(error)
    if caused_by(GatedRepoError):
        return FilesGated(
            f"Model '{model_id}' is gated on the Hub: accept its terms on its page there, then set HF_TOKEN to a token "
            "of that account"
        )
    if revision is not None and caused_by(RevisionNotFoundError):
        return unknown_revision(model_id, revision)
    if caused_by(RepositoryNotFoundError) or status == 404:
        return FilesMissing(
            f"Model '{model_id}' has no folder in the models folder and no repository on the Hub that this server may "
            "read. Check the id; if the repository is private, set HF_TOKEN"
        )
    if status in (401, 403):
        return FilesGated(f"Model '{model_id}': the Hub refuses access ({status}); set HF_TOKEN to a token that has it")
    if caused_by(OfflineModeIsEnabled):
        return HubUnreachable(
            f"Model '{model_id}' is not (completely) on this machine, and the Hub is switched off "
            "(LOCAL_LLM_OFFLINE or HF_HUB_OFFLINE). "
            "Put its files into the models folder, or allow the download"
        )
    if any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return DiskFull(f"Model '{model_id}' could not be downloaded: the disk of the Hub's cache is full")
    if status is not None:
        return HubUnreachable(f"Model '{model_id}' could not be downloaded: the Hub answered {status}; try again later")
    if _is_transport(error):
        return HubUnreachable(
            f"Model '{model_id}' is not (completely) on this machine, and the Hub cannot be reached. "
            "Check the connection, or put its files into the models folder"
        )
    if "Consistency check failed" in str(error):
        return damaged(model_id, "a file")
    return LoadError(f"Model '{model_id}' could not be downloaded: {public(error)}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
