"""Routes of the registered models: list, add, show, change, remove, load.

Every view is parse, call, shape. Ids may hold a slash, raw or as `%2F`: both reach the routes as one path.
"""

from __future__ import annotations

from typing import Any

from flask_openapi3 import APIBlueprint, Tag

from .. import records
from ..errors import InvalidRequest
from ..tasks import MODEL_TYPES
from . import schemas
from .effective import check_registered
from .services import admitted, services

blueprint = APIBlueprint(
    "models",
    __name__,
    url_prefix="/api/huggingface",
    abp_tags=[Tag(name="Models", description="Which models are registered, and bringing them into memory.")],
    abp_responses={**schemas.FAILURES, **schemas.REGISTRY_FAILURES},
)


@blueprint.get("/models", responses={200: schemas.ModelsAnswer})
def list_models(query: schemas.TypeQuery) -> dict[str, Any]:
    """List the registered models."""
    models = [record.to_dict() for record in services().registry.list(query.type)]
    return {"success": True, "models": models, "count": len(models)}


@blueprint.post("/models", responses={200: schemas.ChangedAnswer, **schemas.BODY_FAILURES, 409: schemas.ErrorAnswer})
def add_model(body: schemas.NewModel) -> dict[str, Any]:
    """Register a model. Nothing is downloaded or loaded yet."""
    records.check_model_id(body.model_id)
    _check_type(body.model_type)
    check_registered(body.model_type, body.parameters)
    record = services().registry.add(records.ModelRecord(**body.model_dump(exclude_unset=True)))
    return _changed(record, "added")


@blueprint.get("/models/<path:model_id>", responses={200: schemas.ModelAnswer})
def get_model(path: schemas.ModelPath) -> dict[str, Any]:
    """Show one model."""
    return {"success": True, "model": services().registry.get(path.model_id).to_dict()}


@blueprint.put("/models/<path:model_id>", responses={200: schemas.ChangedAnswer, **schemas.BODY_FAILURES})
def update_model(path: schemas.ModelPath, body: schemas.ModelChanges) -> dict[str, Any]:
    """Change a model. Fields that are left out stay; `parameters` are replaced as a whole."""
    registry = services().registry
    changes = body.model_dump(exclude_unset=True)
    record = registry.get(path.model_id)
    model_type = changes.get("model_type", record.model_type)
    if "parameters" in changes or model_type != record.model_type:
        _check_type(model_type)
        check_registered(model_type, changes.get("parameters", record.parameters))
    return _changed(registry.update(path.model_id, changes), "updated")


@blueprint.delete("/models/<path:model_id>", responses={200: schemas.RemovedAnswer, 409: schemas.ErrorAnswer})
def remove_model(path: schemas.ModelPath) -> dict[str, Any]:
    """Remove a model from the registry and from memory. Its files stay."""
    data = services().manager.remove(path.model_id)
    return {"success": True, "message": f"Model '{path.model_id}' removed successfully", "models_data": data}


@blueprint.post(
    "/models/<path:model_id>/load",
    responses={200: schemas.LoadedAnswer, **schemas.BODY_FAILURES, **schemas.MODEL_FAILURES},
)
def load_model(path: schemas.ModelPath, body: schemas.LoadBody) -> dict[str, Any]:
    """Bring a model into memory. The body may be left out."""
    record = services().registry.get(path.model_id)
    with admitted():
        model = services().manager.load(path.model_id, force_reload=body.force_reload)
    return {
        "success": True,
        "message": f"Model '{path.model_id}' loaded successfully",
        "model_info": record.summary(),
        "device": model.device,
    }


def _check_type(model_type: str) -> None:
    if model_type not in MODEL_TYPES:
        raise InvalidRequest(
            f"Invalid value for field 'model_type': {model_type!r} is none of {', '.join(MODEL_TYPES)}", "model_type"
        )


def _changed(record: records.ModelRecord, what: str) -> dict[str, Any]:
    return {
        "success": True,
        "model": record.to_dict(),
        "message": f"Model '{record.model_id}' {what} successfully",
    }
