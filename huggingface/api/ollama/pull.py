"""`POST /api/pull`: downloads a model, with progress in Ollama's form, and registers it.

When the client disconnects, the download is cancelled unless another request waits for it; what has arrived stays.
Serves any request thread, and the thread of its work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from flask import Response

from ...cancellation import Cancellation
from ...errors import InvalidRequest, LocalLLMError, ModelExists, ModelNotFound, ModelUnsupported
from ...progress import Moment, Progress
from ...registry.records import ModelRecord, check_model_id
from ..http.errors import ollama_body
from ..http.fields import note_ignored
from ..http.sse import NDJSON, Events, Writer, event_stream
from ..requests.fan_out import named
from ..requests.leasing import client_cancellation
from ..requests.services import Services, admitted, services
from ..requests.work import Work, moments
from .models import digest
from .names import Name, files_of, fits, parse
from .schemas import OllamaPullBody

# Ollama's choice in a repository of GGUF files for a name without a tag.
_DEFAULT = "Q4_K_M"


def pull(body: OllamaPullBody) -> dict[str, Any] | Response:
    """Downloads a model, and registers it.

    Raises: the errors of downloading; InvalidRequest where the name's tag names no file.
    """
    if body.insecure is not None:
        note_ignored("insecure")
    name, present = _wanted(body.called), services()

    def bring(cancellation: Cancellation, watch: Callable[[Progress], None] = lambda _: None) -> dict[str, Any]:
        return _bring(present, name, cancellation, watch)

    if body.stream is False:
        with admitted():
            bring(client_cancellation())
        return {"status": "success"}
    with ExitStack() as stack:
        stack.enter_context(admitted())
        work = stack.enter_context(Work(bring))
        return event_stream(moments(work), _Lines(name, work), stack, NDJSON)


def _wanted(called: str) -> Name:
    """Parses the name of a model, and checks its id.

    Raises:
        InvalidModelId: the id is invalid.
    """
    name = parse(called)
    with named({"model_id": "model"}):
        check_model_id(name.model_id)
    return name


def _bring(
    present: Services, name: Name, cancellation: Cancellation, watch: Callable[[Progress], None]
) -> dict[str, Any]:
    """Downloads and registers a model. May run on its own thread, so it must not use Flask's request."""
    progress = Progress()
    watch(progress)
    try:
        record = present.registry.get(name.model_id)
        if name.tag is not None and not fits(record, name.tag):
            registered = record.gguf_file or record.revision or "no tag"
            raise InvalidRequest(
                f"Invalid value for field 'model': '{record.model_id}' is registered with {registered}, so it cannot "
                f"be served with '{name.tag}' too; remove it first",
                "model",
            )
        new = False
    except ModelNotFound:
        record, new = _found(present, name), True
    present.manager.downloads.folder(record, progress, cancellation)
    if new:
        record = _described(present, record)
        with suppress(ModelExists):  # another pull was first
            present.registry.add(record)
    return {"status": "success"}


def _found(present: Services, name: Name) -> ModelRecord:
    """A new record for a model, with its file if the repository holds GGUF files.

    Raises:
        InvalidRequest: the tag names none of its files. ModelUnsupported: this server cannot run the model.
    """
    record = ModelRecord(name.model_id, name.model_id.rpartition("/")[2], "")
    details = present.preflight.look(record)
    ggufs: list[str] = details.get("gguf_files") or []
    if name.tag is not None or (ggufs and details["model_type"] is None):
        files = files_of(name.tag or _DEFAULT, ggufs)
        if len(files) != 1:
            there = f"its GGUF files are {', '.join(ggufs[:20])}" if ggufs else "it has no GGUF files"
            problem = "a tag is needed" if name.tag is None else f"tag '{name.tag}' names no file"
            raise InvalidRequest(f"Invalid value for field 'model': {problem} of '{name.model_id}': {there}", "model")
        return replace(record, gguf_file=files[0])
    if details["reachable"] and details["model_type"] is None:
        raise ModelUnsupported(details["problem"] or f"Model '{name.model_id}' does none of this server's tasks")
    return record


def _described(present: Services, record: ModelRecord) -> ModelRecord:
    """The record of a downloaded model, with its type.

    Raises:
        ModelUnsupported: its files do not show its type.
    """
    details: Mapping[str, Any] = present.preflight.look(record)
    if details["model_type"] is None:
        problem = details["problem"] or "its files do not tell what it is for"
        raise ModelUnsupported(f"Model '{record.model_id}' is downloaded, but was not registered: {problem}")
    return replace(record, model_type=details["model_type"], details=details)


class _Lines(Writer[Moment]):
    """The lines of a pull."""

    def __init__(self, name: Name, work: Work) -> None:
        self._work = work
        self._digest = digest(ModelRecord(name.model_id, "", "", revision=name.tag))
        self._begun = False

    def write(self, moment: Moment) -> Events:
        """The bytes that have arrived, of all files together."""
        yield from self._begin()
        if moment.phase == "download" and moment.total:
            yield {
                "status": f"pulling {self._digest[:12]}",
                "digest": f"sha256:{self._digest}",
                "total": moment.total,
                "completed": moment.done,
            }

    def end(self) -> Events:
        """The last lines: the model is there and registered."""
        yield from self._begin()
        yield {"status": "writing manifest"}
        yield self._work.result()

    def error(self, error: LocalLLMError) -> Events:
        """The error's body."""
        yield ollama_body(str(error), 500)

    def _begin(self) -> Events:
        if not self._begun:
            self._begun = True
            yield {"status": "pulling manifest"}
