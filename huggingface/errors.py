"""The one tree of errors: what can go wrong, in the project's own words.

Errors are raised where they happen and know nothing of HTTP; `api/http/errors.py` holds the one table that gives each a
status. A message is written for the user who caused it: it names the field or the model and says what to do. It must
hold nothing private (no path of this machine, no token). Any thread may raise any of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_ABSOLUTE_PATH = re.compile(r"(?<![\w:/.])(?:[A-Za-z]:)?[/\\](?:[^\s'\"/\\]+[/\\])+")


class LocalLLMError(Exception):
    """Root of all errors that this project raises on purpose; `str(error)` is the message for the user."""


class LibraryPanic(Exception):
    """A library's compiled code panicked: a panic in Rust, which is not one of Python's `Exception`s."""


@contextmanager
def no_panics() -> Iterator[None]:
    """Raises a panic in the block as a `LibraryPanic`, so that handlers of `Exception` catch it too.

    Exceptions that end the process or a generator pass unchanged.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise LibraryPanic(str(panic)) from panic


@contextmanager
def explained(explain: Callable[[Exception], LocalLLMError]) -> Iterator[None]:
    """Raises any error in the block, a panic too, as the one that `explain` returns for it.

    A `LocalLLMError` passes unchanged.
    """
    try:
        with no_panics():
            yield
    except LocalLLMError:
        raise
    except Exception as error:
        raise explain(error) from error


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
    """A field that no part of the request honours."""

    def __init__(self, field: str, known: Iterable[str] = (), meant: str | None = None) -> None:
        names = ", ".join(sorted(known))
        more = f". Did you mean {meant}?" if meant else f". Accepted here: {names}" if names else ""
        super().__init__(f"Unknown field: {field}{more}", field)


class InvalidModelId(InvalidRequest):
    """The Hub would not accept the id, so no folder or repository can have it."""


class ProtectedField(InvalidRequest):
    """An update tries to change a field that only the server sets."""

    def __init__(self, field: str) -> None:
        super().__init__(f"Field '{field}' is protected and cannot be updated", field)


class UnsupportedTask(InvalidRequest):
    """The model cannot do the task; the message lists the tasks that it can do."""

    def __init__(self, model_id: str, task: str, supported: Iterable[str]) -> None:
        names = ", ".join(supported) or "none of this server's tasks"
        super().__init__(f"Model '{model_id}' cannot do '{task}'. It can do: {names}", "task")


class DependencyMissing(LocalLLMError):
    """Torch or transformers cannot be imported in this environment."""

    def __init__(self) -> None:
        super().__init__("Transformers library not available. Please install: pip install transformers torch")


# What the registry holds ----------------------------------------------------------------------------------------------


class ModelNotFound(LocalLLMError):
    """No model with that id is registered; `hint` says what the user can do."""

    def __init__(self, model_id: str, hint: str = "") -> None:
        super().__init__(f"Model '{model_id}' not found{hint}")


class ModelExists(LocalLLMError):
    """A model with that id is registered already."""

    def __init__(self, model_id: str) -> None:
        super().__init__(f"Model '{model_id}' already exists")


class ModelDisabled(LocalLLMError):
    """The record's status is `disabled`."""

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
    """A registered model could not be loaded; the message names it and says what to do."""


class FilesMissing(LoadError):
    """No folder in the models folder and no Hub repository has the id, or a needed file is missing."""


class FilesGated(LoadError):
    """The Hub refuses the files: the repository is gated or private, and no accepted token was given."""


class HubUnreachable(LoadError):
    """The files are not here, and the Hub cannot be asked: it is switched off or cannot be reached."""


class FilesCorrupt(LoadError):
    """The files are damaged, incomplete, or do not fit together."""


class FilesRefused(LoadError):
    """Loading the files would run code that the settings do not allow: pickles, or remote code."""


class ModelUnsupported(LoadError):
    """The files are sound, but the installed libraries do not support the model."""


class NotServed(ModelUnsupported):
    """The model is of a kind that does none of this server's tasks, whatever its files are."""


class DeviceMissing(LoadError):
    """The machine has no such device as the settings name."""


class DeviceFailed(LoadError):
    """The device failed so that only a new process can use it again, as CUDA does after an error in a kernel."""

    def __init__(self, device: str, reason: str) -> None:
        said = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
        super().__init__(f"The device '{device}' has failed ({said}); restart the server to use it again")


class DownloadNotFound(LocalLLMError):
    """No download of that model runs or has run."""

    def __init__(self, model_id: str, more: str = "") -> None:
        super().__init__(f"No download of model '{model_id}'{more}")


class DiskFull(LoadError):
    """The disk has not enough room for a model's files."""


class OutOfMemory(LoadError):
    """The device has not enough free memory for what was asked."""


class NeverFits(LoadError):
    """The model needs more memory than models may ever have here."""


class MemoryHeld(LoadError):
    """The model would fit if others were not in use or pinned; `retry_after` is in seconds."""

    retry_after = 5


class ModelBusy(LocalLLMError):
    """The model is in use, and its requests did not end within the allowed time."""


class ServerFull(LocalLLMError):
    """Too many requests wait for models, so that no thread would be left for other requests; or the bodies of requests
    hold too many bytes."""

    def __init__(self, message: str = "Too many requests are waiting for models; try again later") -> None:
        super().__init__(message)


# Work in progress -----------------------------------------------------------------------------------------------------


class GenerationFailed(LocalLLMError):
    """A step of the model raised, or its logits were not numbers; only the requests concerned fail."""


class EngineFailed(LocalLLMError):
    """The model's engine is broken for good; the next request loads the model again."""

    def __init__(self, model_id: str) -> None:
        super().__init__(f"Model '{model_id}' failed and is out of service; the next request loads it again")


class QueueFull(LocalLLMError):
    """The model's queue is full; `retry_after` is the seconds until there should be room."""

    def __init__(self, model_id: str, waiting: int, retry_after: int) -> None:
        super().__init__(
            f"The queue of model '{model_id}' is full: {waiting} requests wait. Try again in {retry_after} s"
        )
        self.retry_after = retry_after


class NotReady(LocalLLMError):
    """Models that must be in memory before the server is ready are not loaded yet, or failed to load."""


class Cancelled(LocalLLMError):
    """The work was cancelled: its client has left, or the model is being unloaded."""

    def __init__(self, message: str = "The request was cancelled, or the server is stopping") -> None:
        super().__init__(message)


class ConversionFailed(LocalLLMError):
    """A model has no graph; the message says why. `final`: another attempt would fail in the same way."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class RequestCancelled(Cancelled):
    """The request was cancelled by its id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"Request '{request_id}' was cancelled")


class DeadlineExceeded(Cancelled):
    """The request's own `timeout` ran out before its answer was ready."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request did not end within its timeout of {seconds:g} s")


class RequestNotFound(LocalLLMError):
    """No active request has that id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"Request '{request_id}' not found")


def public(error: BaseException, *folders: Path) -> str:
    """An error's first line, safe for a client: paths are cut down to the file's name.

    `folders` are folders whose names the error may contain: a name with a space in it is recognized only if its folder
    is given.
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    for folder in folders:
        lines[0] = lines[0].replace(f"{folder}/", "").replace(str(folder), folder.name)
    return _ABSOLUTE_PATH.sub("", lines[0])[:300]
