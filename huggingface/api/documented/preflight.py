"""Routes that inspect models before they are loaded: one by its id, and all models in the models folder.

Every view is parse, call, shape. An id may hold a slash, raw or as `%2F`. Nothing is registered, downloaded or loaded.
"""

from __future__ import annotations

from typing import Any

from flask_openapi3 import APIBlueprint, Tag

from ...errors import ModelNotFound
from ...registry import records
from ..requests.services import services
from . import preflight_schemas, schemas
from .models import called, get_model

blueprint = APIBlueprint(
    "preflight",
    __name__,
    url_prefix="/api/huggingface",
    abp_tags=[Tag(name="Models", description="Which models are registered, and bringing them into memory.")],
    abp_responses={**schemas.FAILURES, **schemas.REGISTRY_FAILURES},
)


@blueprint.get("/models/available", responses={200: preflight_schemas.AvailableAnswer})
def list_available(query: preflight_schemas.AvailableQuery) -> dict[str, Any]:
    """List the models in the models folder, registered or not."""
    registered = {record.model_id for record in services().registry.list()}
    models = []
    for found in services().preflight.available():
        details = found.pop("details")
        entry = {**found, "registered": found["model_id"] in registered, "problem": details["problem"]}
        models.append({**entry, "details": details} if query.details == "true" else entry)
    return {"success": True, "models": models, "count": len(models)}


@blueprint.get("/models/<path:model_id>/preflight", responses={200: preflight_schemas.PreflightAnswer})
def look_at_model(path: schemas.ModelPath, query: preflight_schemas.PreflightQuery) -> dict[str, Any]:
    """Show what a model is, registered or not, from its config and the headers of its files. Looked up each time."""
    if (model := called(path.model_id, "preflight")) is not None:
        return dict(get_model(model))
    model_id = records.check_model_id(path.model_id)
    try:
        record = services().registry.get(model_id)
    except ModelNotFound:
        record = None
    details = services().preflight.look_at(
        model_id,
        revision=query.revision or (record.revision if record else None),
        gguf_file=query.gguf_file or (record.gguf_file if record else None),
        model_type=record.model_type if record else None,
        adapters=record.adapters if record else None,
    )
    if record is not None and details["reachable"] and not query.revision and not query.gguf_file:
        services().registry.describe(record, details)
    return {"success": True, "model_id": model_id, "details": details}
