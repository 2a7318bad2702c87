"""Routes that start, show and cancel the download of a registered model's files.

A download is a job of the server, shared by any number of callers: it goes on when a client disconnects.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from flask import Response, request
from flask_openapi3 import APIBlueprint, Tag

from ...cancellation import before_wait
from ...errors import DownloadNotFound, InvalidRequest, LocalLLMError
from ...hub.downloads import Downloads
from ...hub.job import Job
from ...progress import Moment
from ..http.errors import body as failure
from ..http.sse import HOLD, Events, Writer, event_stream
from ..requests.services import admitted, services
from ..requests.waiting import at_once
from ..requests.work import moments
from . import download_schemas, schemas
from .models import called, get_model, remove_model

blueprint = APIBlueprint(
    "downloads",
    __name__,
    url_prefix="/api/huggingface",
    abp_tags=[Tag(name="Downloads", description="Bringing the files of models here from the Hugging Face Hub.")],
    abp_responses={**schemas.FAILURES, **schemas.REGISTRY_FAILURES},
)


@blueprint.post(
    "/models/<path:model_id>/download",
    responses={200: download_schemas.DownloadAnswer, **schemas.BODY_FAILURES, **schemas.MODEL_FAILURES},
)
def start_download(path: schemas.ModelPath, body: download_schemas.DownloadBody) -> dict[str, Any] | Response:
    """Download a model's files, from where an earlier download stopped. The body may be left out.

    The answer comes when it has begun; with `stream` the events send its progress, and the last one is that answer.
    """
    record, downloads = services().registry.get(path.model_id), _downloads()
    under_way = downloads.running(path.model_id)
    job = downloads.start(record)
    _settle(job)
    told = moments(job, hold=0)
    if job.over:
        job.result()
        told, message = iter(()), f"Model '{path.model_id}' is {'downloaded' if job.active else 'here already'}"
    elif body.stream:
        message = f"Model '{path.model_id}' is downloaded"
    else:
        message = f"Download of model '{path.model_id}' {'is under way' if under_way else 'started'}"
    if not body.stream:
        return _answer(job, message)
    with ExitStack() as stack:
        stack.enter_context(admitted())
        return event_stream(told, _Writer(job, message), stack)


@blueprint.get("/models/<path:model_id>/download", responses={200: download_schemas.DownloadState})
@at_once
def show_download(path: schemas.ModelPath) -> dict[str, Any]:
    """Show the progress of a model's latest download, or what an earlier run of this server left of one."""
    if (model := called(path.model_id, "download")) is not None:
        return dict(get_model(model))
    record, downloads = services().registry.get(path.model_id), _downloads()
    job = downloads.get(path.model_id)
    if job is not None:
        return {"success": True, "download": _shape(job, job.progress.now())}
    left = downloads.left_behind(path.model_id)
    if left is None:
        raise DownloadNotFound(path.model_id)
    moment = Moment("waiting", left, None, 0.0, None).to_dict()
    ids = {"model_id": path.model_id, "revision": record.revision, "commit": None}
    return {"success": True, "download": {**ids, **moment, "phase": "interrupted"}}


@blueprint.delete("/models/<path:model_id>/download", responses={200: schemas.MessageAnswer})
def cancel_download(path: schemas.ModelPath) -> dict[str, Any]:
    """Cancel a download for all of its callers. What has arrived stays, and the next one continues from there."""
    if request.get_json():
        raise InvalidRequest("DELETE takes no body here")
    if (model := called(path.model_id, "download")) is not None:
        return dict(remove_model(model))
    services().registry.get(path.model_id)
    if not _downloads().cancel(path.model_id):
        raise DownloadNotFound(path.model_id, " is under way")
    return {"success": True, "message": f"Download of model '{path.model_id}' cancelled; what has arrived is kept"}


def _downloads() -> Downloads:
    return services().manager.downloads


def _settle(job: Job) -> None:
    """Waits briefly until a job is over or has bytes to download; most jobs have nothing to download."""
    before_wait()
    end, version = time.monotonic() + HOLD, -1
    while not job.over and (left := end - time.monotonic()) > 0:
        version, moment = job.progress.wait(version, left)
        if moment.total is not None and moment.done < moment.total:
            return


def _shape(job: Job, moment: Moment) -> dict[str, Any]:
    return {"model_id": job.model_id, "revision": job.revision, "commit": job.commit, **moment.to_dict()}


def _answer(job: Job, message: str) -> dict[str, Any]:
    return {"success": True, "message": message, "download": _shape(job, job.progress.now())}


class _Writer(Writer[Moment]):
    """The events of a download, and last `message` with its final state."""

    def __init__(self, job: Job, message: str) -> None:
        self._job = job
        self._message = message

    def write(self, moment: Moment) -> Events:
        """The download's progress."""
        yield _shape(self._job, moment)

    def end(self) -> Events:
        """The documented answer."""
        yield _answer(self._job, self._message)

    def error(self, error: LocalLLMError) -> Events:
        """The error's documented body."""
        yield failure(str(error))
