"""Routes of the registered models: list, add, show, change, remove, load.

Every view is parse, call, shape. Ids may hold a slash, raw or as `%2F`: both reach the routes as one path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from flask import Response
from flask_openapi3 import APIBlueprint, Tag

from ...cancellation import Cancellation
from ...errors import InvalidRequest, LocalLLMError, MissingField, ModelExists, ModelNotFound
from ...progress import Moment, Progress
from ...registry import records
from ...tasks import MODEL_TYPES
from ..http.errors import body as failure
from ..http.sse import Events, Writer, event_stream
from ..parameters.effective import check_registered
from ..requests.leasing import client_cancellation
from ..requests.services import Services, admitted, services
from ..requests.waiting import at_once
from ..requests.work import Work, moments
from . import model_schemas, schemas

blueprint = APIBlueprint(
    "models",
    __name__,
    url_prefix="/api/huggingface",
    abp_tags=[Tag(name="Models", description="Which models are registered, and bringing them into memory.")],
    abp_responses={**schemas.FAILURES, **schemas.REGISTRY_FAILURES},
)


@blueprint.get("/models", responses={200: model_schemas.ModelsAnswer})
@at_once
def list_models(query: model_schemas.TypeQuery) -> dict[str, Any]:
    """List the registered models."""
    models = [schemas.with_old_names(record.to_dict()) for record in services().registry.list(query.type)]
    return {"success": True, "models": models, "count": len(models)}


@blueprint.post(
    "/models",
    responses={
        200: model_schemas.ChangedAnswer,
        **schemas.BODY_FAILURES,
        409: schemas.ErrorAnswer,
        422: schemas.ErrorAnswer,
    },
)
def add_model(body: model_schemas.NewModel) -> dict[str, Any]:
    """Register a model. Nothing is downloaded or loaded yet; facts from its config and headers are kept in `details`.

    A missing `model_type` is read from the model's config, if the config shows it. A model that does none of this
    server's tasks is refused.
    """
    records.check_model_id(body.model_id)
    registry = services().registry
    _check_new(body.model_id)
    given = body.model_dump(exclude_unset=True)
    if body.model_type is not None:
        _check_type(body.model_type)
        given["parameters"] = check_registered(body.model_type, body.parameters)
    record = records.ModelRecord(**{"model_type": "", **given})
    _check_settings(record)
    details = services().preflight.look(record, strict=True)
    if body.model_type is None:
        if details["model_type"] is None:
            error = MissingField("model_type")
            if details["source"] is not None:
                told = details["problem"] or "its files do not tell what it is for"
                error.args = (f"{error}. It may be left out only where the model's files tell it: {told}",)
            raise error
        model_type = details["model_type"]
        record = replace(record, model_type=model_type, parameters=check_registered(model_type, body.parameters))
    _check_revision(record, details)
    return _changed(registry.add(replace(record, details=details)), "added")


def _check_revision(record: records.ModelRecord, details: Mapping[str, Any]) -> None:
    if record.revision is not None and details["source"] == "local":
        raise InvalidRequest(
            f"Invalid value for field 'revision': model '{record.model_id}' has a folder in the models folder, which "
            "is used as it is",
            "revision",
        )


def _check_new(model_id: str) -> None:
    """Refuses an id that is registered, before its files are searched."""
    try:
        services().registry.get(model_id)
    except ModelNotFound:
        return
    raise ModelExists(model_id)


def _check_settings(record: records.ModelRecord) -> None:
    """Refuses settings that are wrong for every model."""
    if record.device is not None and record.device_map is not None:
        raise InvalidRequest("Give device or device_map, not both", "device_map")
    if record.keep_alive is not None and -1 < record.keep_alive < 0:
        raise InvalidRequest("Invalid value for field 'keep_alive': must be -1 (for ever), 0 or more", "keep_alive")
    for name, adapter in (record.adapters or {}).items():
        try:
            records.check_model_id(adapter)
        except InvalidRequest as error:
            message = str(error).replace("'model_id'", f"'adapters.{name}'")
            raise InvalidRequest(message, f"adapters.{name}") from error
    file = record.gguf_file
    if file is not None and (
        not file.lower().endswith(".gguf") or "\\" in file or {"", ".", ".."} & {*file.split("/")}
    ):
        raise InvalidRequest(
            "Invalid value for field 'gguf_file': must be the name of a .gguf file in the model's folder or repository",
            "gguf_file",
        )


@blueprint.get("/models/<path:model_id>", responses={200: model_schemas.ModelAnswer})
@at_once
def get_model(path: schemas.ModelPath) -> dict[str, Any]:
    """Show one model."""
    return {"success": True, "model": schemas.with_old_names(services().registry.get(path.model_id).to_dict())}


@blueprint.put("/models/<path:model_id>", responses={200: model_schemas.ChangedAnswer, **schemas.BODY_FAILURES})
def update_model(path: schemas.ModelPath, body: model_schemas.ModelChanges) -> dict[str, Any]:
    """Change a model. Fields that are left out stay; `parameters` are replaced as a whole."""
    registry = services().registry
    changes = body.model_dump(exclude_unset=True)
    record = registry.get(path.model_id)
    model_type = changes.get("model_type", record.model_type)
    if "parameters" in changes or model_type != record.model_type:
        _check_type(model_type)
        kept = check_registered(model_type, changes.get("parameters", record.parameters))
        if "parameters" in changes:
            changes["parameters"] = kept
    wanted = replace(record, **{name: changes[name] for name in changes if name in records.OPTIONAL_FIELDS})
    _check_settings(wanted)
    if wanted.revision is not None and wanted.revision != record.revision:
        _check_revision(wanted, services().preflight.look(wanted))
    updated = registry.update(path.model_id, changes)
    looked_at = (record.revision, record.gguf_file, record.adapters)
    if (wanted.revision, wanted.gguf_file, wanted.adapters) != looked_at:
        updated = registry.describe(updated, services().preflight.look(updated))
    return _changed(updated, "updated")


def called(model_id: str, last: str) -> schemas.ModelPath | None:
    """The path of a registered model whose id ends as a route does. It comes before the route, since no other address
    shows it."""
    whole = f"{model_id}/{last}"
    try:
        services().registry.get(whole)
    except ModelNotFound:
        return None
    return schemas.ModelPath(model_id=whole)


@blueprint.delete("/models/<path:model_id>", responses={200: model_schemas.RemovedAnswer, 409: schemas.ErrorAnswer})
def remove_model(path: schemas.ModelPath) -> dict[str, Any]:
    """Remove a model from the registry and from memory. Its files stay."""
    data = services().manager.remove(path.model_id)
    return {"success": True, "message": f"Model '{path.model_id}' removed successfully", "models_data": data}


@blueprint.post(
    "/models/<path:model_id>/load",
    responses={200: model_schemas.LoadedAnswer, **schemas.BODY_FAILURES, **schemas.MODEL_FAILURES},
)
def load_model(path: schemas.ModelPath, body: model_schemas.LoadBody) -> dict[str, Any] | Response:
    """Load a model; its files are downloaded if they are not on this machine. The body may be left out.

    The settings named are in effect over the registered ones until the model is unloaded. With `stream` the answer is
    server-sent events: `{"progress"}` with the phase (download, read, ready), bytes and time left, and last this very
    answer, or an error's body.
    """
    present = services()
    manager, record = present.manager, present.registry.get(path.model_id)
    given = body.model_dump(exclude_unset=True)
    settings = {name: given[name] for name in records.LOAD_SETTINGS if name in given}
    _check_settings(replace(record, keep_alive=body.keep_alive, **settings))

    def load(cancellation: Cancellation, watch: Callable[[Progress], None] = lambda _: None) -> dict[str, Any]:
        model = manager.load(
            record.model_id,
            force_reload=body.force_reload,
            settings=records.LoadSettings(**settings) if settings else None,
            keep_alive=body.keep_alive,
            wait_for_graph=body.wait_for_graph,
            cancellation=cancellation,
            watch=watch,
        )
        _describe(present, record, model.setup.commit)
        answer = {
            "success": True,
            "message": f"Model '{record.model_id}' loaded successfully",
            "model_info": record.summary(),
            "device": model.device,
            "settings": schemas.with_old_names(model.effective),
            "backend_reason": model.backend_reason,
        }
        return schemas.with_old_names(answer)

    if not body.stream:
        with admitted():
            return load(client_cancellation())
    with ExitStack() as stack:
        stack.enter_context(admitted())
        work = stack.enter_context(Work(load))
        return event_stream(moments(work), _Writer(work), stack)


class _Writer(Writer[Moment]):
    """The events of a load: its progress, and last the documented answer or error."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def write(self, moment: Moment) -> Events:
        """The load's progress."""
        yield {"progress": moment.to_dict()}

    def end(self) -> Events:
        """The documented answer."""
        yield self._work.result()

    def error(self, error: LocalLLMError) -> Events:
        """The error's documented body."""
        yield failure(str(error))


def _describe(present: Services, record: records.ModelRecord, commit: str | None) -> None:
    """Stores preflight's details of a model that could not be inspected before, or whose commit has changed."""
    known = record.details or {}
    if not known.get("reachable") or known.get("commit") != commit:
        details = present.preflight.look(record)
        if details["reachable"]:
            with suppress(ModelNotFound):  # the model was removed meanwhile
                present.registry.describe(record, details)


@blueprint.post(
    "/models/<path:model_id>/unload",
    responses={200: model_schemas.UnloadedAnswer, **schemas.BODY_FAILURES, 409: schemas.ErrorAnswer},
)
def unload_model(path: schemas.ModelPath, body: model_schemas.EmptyBody) -> dict[str, Any]:  # noqa: ARG001 - it is checked
    """Unload a model after its users are done; the answer says how much memory came back."""
    services().registry.get(path.model_id)
    unloaded = services().manager.unload(path.model_id)
    what = "unloaded successfully" if unloaded.was_loaded else "was not in memory"
    return {
        "success": True,
        "message": f"Model '{path.model_id}' {what}",
        "bytes": unloaded.bytes,
        "freed_bytes": unloaded.freed_bytes,
    }


@blueprint.get(
    "/models/<path:model_id>/estimate", responses={200: model_schemas.EstimateAnswer, **schemas.MODEL_FAILURES}
)
def estimate_model(path: schemas.ModelPath, query: model_schemas.EstimateQuery) -> dict[str, Any]:
    """Estimate what a load would take, whether it fits, and which models it would evict. Nothing is loaded."""
    if (model := called(path.model_id, "estimate")) is not None:
        return dict(get_model(model))
    given = query.model_dump(exclude_unset=True)
    forecast = services().manager.forecast(path.model_id, records.LoadSettings(**given), client_cancellation())
    estimate = forecast.estimate
    answer = {
        "success": True,
        "model_id": path.model_id,
        "bytes": estimate.total,
        "weights_bytes": estimate.weights,
        "copies_bytes": estimate.copies,
        "kv_cache_bytes": estimate.kv_cache,
        "kv_cache_bytes_per_token": estimate.token_bytes,
        "device": estimate.device,
        "dtype": estimate.dtype,
        "weights_dtype": estimate.own_dtype if estimate.is_stored else None,
        "quantization": estimate.quantization,
        "backend": estimate.backend,
        "conversion_bytes": estimate.conversion,
        "devices": {
            device: {
                "bytes": size,
                "available_bytes": forecast.available.get(device),
                "limit_bytes": forecast.limits.get(device),
            }
            for device, size in estimate.devices.items()
        },
        "fits": forecast.fits,
        "possible": forecast.possible,
        "evicts": forecast.evicts,
    }
    return schemas.with_old_names(answer)


def _check_type(model_type: str) -> None:
    if model_type not in MODEL_TYPES:
        raise InvalidRequest(
            f"Invalid value for field 'model_type': {model_type!r} is none of {', '.join(MODEL_TYPES)}", "model_type"
        )


def _changed(record: records.ModelRecord, what: str) -> dict[str, Any]:
    return {
        "success": True,
        "model": schemas.with_old_names(record.to_dict()),
        "message": f"Model '{record.model_id}' {what} successfully",
    }
