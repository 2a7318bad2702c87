"""Routes of the models in memory: what is there, and taking it out."""

from __future__ import annotations

from typing import Any

from flask import request
from flask_openapi3 import APIBlueprint, Tag

from ..errors import InvalidRequest, ModelNotFound
from . import schemas
from .services import services

blueprint = APIBlueprint(
    "cache",
    __name__,
    url_prefix="/api/huggingface",
    abp_tags=[Tag(name="Cache", description="The models in memory.")],
    abp_responses={**schemas.FAILURES},
)


@blueprint.get("/cache", responses={200: schemas.CacheAnswer})
def show_cache() -> dict[str, Any]:
    """Show which models are in memory."""
    loaded = services().manager.loaded()
    types = _types()
    return {
        "success": True,
        "cached_models": {
            model_id: {
                "loaded_at": model.loaded_at,
                "device": model.device,
                "model_type": types.get(model_id, model.model_type),
                "engine": model.status,  # the encoder writes it as its fields
            }
            for model_id, model in loaded.items()
        },
        "cached_pipelines": [f"{model_id}_{task}" for model_id, model in loaded.items() for task in model.opened_tasks],
        "total_cached": len(loaded),
    }


@blueprint.delete("/cache", responses={200: schemas.MessageAnswer, 404: schemas.ErrorAnswer, 409: schemas.ErrorAnswer})
def clear_cache(query: schemas.CacheQuery) -> dict[str, Any]:
    """Take models out of memory, after those who use them are done."""
    if request.get_json():
        raise InvalidRequest("DELETE takes no body here; name the model in the query: ?model_id=", "model_id")
    manager = services().manager
    if query.model_id is None:
        manager.unload_all()
        return {"success": True, "message": "All caches cleared"}
    if query.model_id not in manager.loaded() and query.model_id not in _types():
        raise ModelNotFound(query.model_id)
    manager.unload(query.model_id)
    return {"success": True, "message": f"Cache cleared for model '{query.model_id}'"}


def _types() -> dict[str, str]:
    """The registered models' types, by id."""
    return {record.model_id: record.model_type for record in services().registry.list()}
