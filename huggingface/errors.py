"""The one tree of errors: what can go wrong, in the project's own words.

Errors are raised where they happen and know nothing of HTTP; `api/errors.py` holds the one table that gives each a
status. A message is written for the user who caused it: it names the field or the model and says what to do.
It must hold nothing private (no path of this machine, no token). Any thread may raise any of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_ABSOLUTE_PATH = re.compile(r"(?<![\w:/.])(?:[A-Za-z]:)?[/\\](?:[^\s'\"/\\]+[/\\])+")


class LocalLLMError(Exception):
    """Root of every error that this project raises on purpose; `str(error)` is the message for the user."""


class LibraryPanic(Exception):
    """Compiled code of a library gave up: a panic of Rust's, which Python does not count among its `Exception`s."""


@contextmanager
def no_panics() -> Iterator[None]:
    """Raise a panic within as a `LibraryPanic`, so that what catches errors catches it too.

    What ends the process or a generator passes as it is.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise LibraryPanic(str(panic)) from panic


# What the caller sent -------------------------------------------------------------------------------------------------


class InvalidRequest(LocalLLMError):
    """The request asks for something that cannot be honoured; `field` names the part at fault, where there is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ContextExceeded(InvalidRequest):
    """The prompt is longer than the model's context; `tokens` and `room` are both in tokens."""

    def __init__(self, message: str, field: str, tokens: int = 0, room: int = 0) -> None:
        super().__init__(message, field)
        self.tokens, self.room = tokens, room


class MissingField(InvalidRequest):
    """A required field is absent."""

    def __init__(self, field: str) -> None:
        super().__init__(f"Missing required field: {field}", field)


class UnknownField(InvalidRequest):
    """A field that nothing here honours."""

    def __init__(self, field: str, known: Iterable[str] = (), meant: str | None = None) -> None:
        names = ", ".join(sorted(known))
        more = f". Did you mean {meant}?" if meant else f". Accepted here: {names}" if names else ""
        super().__init__(f"Unknown field: {field}{more}", field)


class InvalidModelId(InvalidRequest):
    """The id is not one that the Hub would accept, so neither a folder nor a repository can carry it."""


class ProtectedField(InvalidRequest):
    """An update tries to change a field that only the server sets."""

    def __init__(self, field: str) -> None:
        super().__init__(f"Field '{field}' is protected and cannot be updated", field)


class UnsupportedTask(InvalidRequest):
    """The model cannot do what is asked of it; the message lists the tasks that it can do."""

    def __init__(self, model_id: str, task: str, supported: Iterable[str]) -> None:
        names = ", ".join(supported) or "none of this server's tasks"
        super().__init__(f"Model '{model_id}' cannot do '{task}'. It can do: {names}", "task")


class DependencyMissing(LocalLLMError):
    """Torch or transformers cannot be imported in this environment."""

    def __init__(self) -> None:
        super().__init__("Transformers library not available. Please install: pip install transformers torch")


# What the registry holds ----------------------------------------------------------------------------------------------


class ModelNotFound(LocalLLMError):
    """No model of that id is registered; `hint` says what could be done about it."""

    def __init__(self, model_id: str, hint: str = "") -> None:
        super().__init__(f"Model '{model_id}' not found{hint}")


class ModelExists(LocalLLMError):
    """A model of that id is registered already."""

    def __init__(self, model_id: str) -> None:
        super().__init__(f"Model '{model_id}' already exists")


class ModelDisabled(LocalLLMError):
    """The record's status says that the model is not to be used."""

    def __init__(self, model_id: str) -> None:
        super().__init__(f"Model '{model_id}' is disabled; set its status to 'available' to use it")


class RegistryError(LocalLLMError):
    """The registry's file could not be read or written; nothing was changed."""


class RegistryBusy(RegistryError):
    """Another process held the registry's lock for too long; nothing was changed, and a retry may succeed."""


class StorageFull(RegistryError):
    """The disk has no room for the change; nothing was changed."""


# A model's files and memory -------------------------------------------------------------------------------------------


class LoadError(LocalLLMError):
    """A registered model could not be brought into memory; the message names it and says what to do."""


class FilesMissing(LoadError):
    """Neither a folder of the models folder nor a Hub repository carries the id, or a needed file is not in it."""


class FilesGated(LoadError):
    """The Hub refuses the files: the repository is gated or private and no accepted token was given."""


class HubUnreachable(LoadError):
    """The files are not here, and the Hub cannot be asked: offline by choice or by circumstance."""


class FilesCorrupt(LoadError):
    """The files are there but are damaged, incomplete, or do not fit together."""


class FilesRefused(LoadError):
    """The files could be loaded only by running code that the settings do not allow: pickles, or remote code."""


class ModelUnsupported(LoadError):
    """The files are sound, but the installed libraries do not know such a model."""


class NotServed(ModelUnsupported):
    """The model is of a kind that does none of this server's tasks, whatever becomes of its files."""


class DeviceMissing(LoadError):
    """The device that the settings name is not there."""


class DeviceFailed(LoadError):
    """The device failed in a way that only a new process recovers from, as CUDA does after an error in a kernel."""

    def __init__(self, device: str, reason: str) -> None:
        said = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
        super().__init__(f"The device '{device}' has failed ({said}); restart the server to use it again")


class DownloadNotFound(LocalLLMError):
    """No download of that model runs, or ever did."""

    def __init__(self, model_id: str, more: str = "") -> None:
        super().__init__(f"No download of model '{model_id}'{more}")


class DiskFull(LoadError):
    """The disk has not enough room for a model's files."""


class OutOfMemory(LoadError):
    """The device has not enough memory for what was asked."""


class NeverFits(LoadError):
    """The model needs more memory than models may ever have here."""


class MemoryHeld(LoadError):
    """The model would fit, but for models that are in use or pinned; `retry_after` is in seconds."""

    retry_after = 5


class ModelBusy(LocalLLMError):
    """The model is in use, and whoever uses it did not finish within the time allowed."""


class ServerFull(LocalLLMError):
    """As many requests wait for models as may; the others shall still find a thread for what needs no model. Or as many
    bytes of requests are held as may be."""

    def __init__(self, message: str = "Too many requests are waiting for models; try again later") -> None:
        super().__init__(message)


# Work in progress -----------------------------------------------------------------------------------------------------


class GenerationFailed(LocalLLMError):
    """A step of the model raised, or gave no numbers; only the requests concerned are failed."""


class EngineFailed(LocalLLMError):
    """What computes for the model is broken for good; the next request loads the model again."""

    def __init__(self, model_id: str) -> None:
        super().__init__(f"Model '{model_id}' failed and is out of service; the next request loads it again")


class QueueFull(LocalLLMError):
    """As many requests wait for this model as may; `retry_after` is in how many seconds there should be room."""

    def __init__(self, model_id: str, waiting: int, retry_after: int) -> None:
        super().__init__(
            f"The queue of model '{model_id}' is full: {waiting} requests wait. Try again in {retry_after} s"
        )
        self.retry_after = retry_after


class NotReady(LocalLLMError):
    """Models that are to be in memory before the server counts as ready are not there yet, or failed to load."""


class Cancelled(LocalLLMError):
    """The work was given up: its client has left, or the model is being taken out of memory."""

    def __init__(self, message: str = "The request was cancelled, or the server is stopping") -> None:
        super().__init__(message)


class ConversionFailed(LocalLLMError):
    """A model has no graph; the message says why. `final` tells that another try would end alike."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class RequestCancelled(Cancelled):
    """Somebody cancelled the request by its id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"Request '{request_id}' was cancelled")


class DeadlineExceeded(Cancelled):
    """The request's own `timeout` ran out before its answer was ready."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request did not end within its timeout of {seconds:g} s")


class RequestNotFound(LocalLLMError):
    """No request of that id waits or runs."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"Request '{request_id}' not found")


def public(error: BaseException, *folders: Path) -> str:
    """An error's first line, fit for a client: file names keep their last part only.

    `folders` are those whose names the error may hold; a name that holds a space is recognized
    only when its folder is given.
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    for folder in folders:
        lines[0] = lines[0].replace(f"{folder}/", "").replace(str(folder), folder.name)
    return _ABSOLUTE_PATH.sub("", lines[0])[:300]
