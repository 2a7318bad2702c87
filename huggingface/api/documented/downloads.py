"""Routes of the downloads: bringing a registered model's files here, how far that is, and giving it up.

A download is a job of the server, which any number of callers share: a client that leaves does not end it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from flask import Response, request
from flask_openapi3 import APIBlueprint, Tag

from ...errors import DownloadNotFound, InvalidRequest, ServerFull
from ...hub.downloads import Downloads
from ...hub.job import Job
from ...progress import Moment
from ..http.errors import body as failure
from ..http.errors import log
from ..http.sse import SSE
from ..requests.services import services
from ..requests.waiting import at_once
from . import download_schemas, schemas
from .models import called, get_model, remove_model

blueprint = APIBlueprint(
    "downloads",
    __name__,
    url_prefix="/api/huggingface",
    abp_tags=[Tag(name="Downloads", description="Bringing the files of models here from the Hugging Face Hub.")],
    abp_responses={**schemas.FAILURES, **schemas.REGISTRY_FAILURES},
)

# Seconds. An answer is held back for so long, as most jobs find at once that there is nothing to do, or that they
# cannot; then events come at most so often; and so often something is sent in silence.
_HOLD = 1.0
_BETWEEN = 0.1
_KEEP_ALIVE = 2.0


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
    message = f"Download of model '{path.model_id}' {'is under way' if under_way else 'started'}"
    if job.over:
        job.result()
        message = f"Model '{path.model_id}' is {'downloaded' if job.brought else 'here already'}"
    return _stream(job, message) if body.stream else _answer(job, message)


@blueprint.get("/models/<path:model_id>/download", responses={200: download_schemas.DownloadState})
@at_once
def show_download(path: schemas.ModelPath) -> dict[str, Any]:
    """Show the progress of a model's latest download, or what an earlier run of this server left of one."""
    if (model := called(path.model_id, "download")) is not None:
        return dict(get_model(model))
    record, downloads = services().registry.get(path.model_id), _downloads()
    job = downloads.get(path.model_id)
    if job is not None:
        return {"success": True, "download": _shape(job)}
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
    """Wait a moment for a job to be over, or to have something to bring."""
    end, version = time.monotonic() + _HOLD, -1
    while not job.over and (left := end - time.monotonic()) > 0:
        version, moment = job.progress.wait(version, left)
        if moment.total is not None and moment.done < moment.total:
            return


def _shape(job: Job) -> dict[str, Any]:
    ids = {"model_id": job.model_id, "revision": job.revision, "commit": job.commit}
    return {**ids, **job.progress.now().to_dict()}


def _answer(job: Job, message: str) -> dict[str, Any]:
    return {"success": True, "message": message, "download": _shape(job)}


def _stream(job: Job, message: str) -> Response:
    """How far the job is as events. It has a thread of the server, so it counts among what waits for models.

    `message` is that of a job that is over already.

    Raises:
        ServerFull: as many wait as may.
    """
    places = services().places
    if not places.acquire(blocking=False):
        raise ServerFull
    message = message if job.over else f"Model '{job.model_id}' is downloaded"
    response = SSE.response(_events(job, message))
    response.call_on_close(places.release)
    return response


def _events(job: Job, message: str) -> Iterator[bytes]:
    version = -1
    while not job.over:
        seen, _ = job.progress.wait(version, _KEEP_ALIVE)
        if seen == version:
            yield SSE.silence
        else:
            version = seen
            yield from SSE.encoded([_shape(job)])
            job.wait(_BETWEEN)
    if job.error is not None:
        log(job.error, "a download")
        yield from SSE.encoded([failure(str(job.error))])
    else:
        yield from SSE.encoded([_answer(job, message)])
