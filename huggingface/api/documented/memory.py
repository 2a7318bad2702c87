"""Routes that show, preload and unload the models in memory."""

from __future__ import annotations

import time
from typing import Any

from flask import request
from flask_openapi3 import APIBlueprint, Tag

from ...errors import InvalidRequest, ModelDisabled, ModelNotFound
from ...host.devices import indexed, resolve_device
from ...manager.conversions import ConversionStatus
from ...manager.table import Resident
from ..requests.services import services
from ..requests.waiting import at_once, may_wait
from . import memory_schemas as cache_schemas
from . import schemas

blueprint = APIBlueprint(
    "cache",
    __name__,
    url_prefix="/api/huggingface",
    abp_tags=[Tag(name="Cache", description="The models in memory.")],
    abp_responses={**schemas.FAILURES},
)


# Seconds that an answer waits for just loaded models until it is known how they are served: for most models that takes
# a moment, and for a large one waiting longer is not worth it.
_SETTLE = 0.5


@blueprint.get("/cache", responses={200: cache_schemas.CacheAnswer})
@at_once
def show_cache() -> dict[str, Any]:
    """Show which models are in memory, what they take there, and what is being loaded."""
    manager = services().manager
    residents, conversions = manager.residents(), manager.conversions.shown()
    types = _types()
    until = time.monotonic() + (_SETTLE if residents and may_wait() else 0.0)
    for resident in residents.values():
        resident.model.preparation.settles(max(0.0, until - time.monotonic()))
    return {
        "success": True,
        "cached_models": {
            model_id: _resident(resident, types.get(model_id, resident.model.model_type))
            for model_id, resident in residents.items()
        },
        "cached_pipelines": [
            f"{model_id}_{task}" for model_id, resident in residents.items() for task in resident.model.opened_tasks
        ],
        "total_cached": len(residents),
        "loading": {model_id: progress.now().to_dict() for model_id, progress in manager.loading().items()},
        "conversions": {model_id: _conversion(status) for model_id, status in conversions.items()},
        "memory": {
            device: {
                "bytes": size,
                "available_bytes": manager.budget.available(device),
                "limit_bytes": manager.budget.maximum(device),
            }
            for device, size in (
                manager.budget.held() or {indexed(resolve_device(services().options.device)): 0}
            ).items()
        },
    }


def _resident(resident: Resident, model_type: str) -> dict[str, Any]:
    model = resident.model
    sizes, status = model.sizes, model.status
    answer = {
        "loaded_at": model.loaded_at,
        "device": model.device,
        "model_type": model_type,
        "engine": status,  # the encoder writes it as its fields
        "dtype": model.dtype,
        "bytes": sizes.total,
        "weights_bytes": sizes.weights,
        "copies_bytes": sizes.copies,
        "kv_cache_bytes": sizes.kv_cache,
        "peak_bytes": sizes.peak,
        "devices": sizes.devices,
        "in_use": resident.users,
        "queue": status.waiting if status is not None else 0,
        "expires_at": resident.expires_at,
        "pinned": resident.pinned,
        "load_seconds": round(resident.load_seconds, 3),
        "commit": model.setup.commit,
        "adapters": dict(model.setup.record.adapters or {}),
        "settings": schemas.with_old_names(model.effective),
        "backend_reason": model.backend_reason,
    }
    return schemas.with_old_names(answer)


def _conversion(status: ConversionStatus) -> dict[str, Any]:
    return {
        "state": status.state,
        "reason": status.reason,
        "bytes": status.bytes,
        "progress": status.progress.to_dict(),
    }


@blueprint.post(
    "/cache/warm",
    responses={
        200: cache_schemas.WarmAnswer,
        **schemas.BODY_FAILURES,
        404: schemas.ErrorAnswer,
        409: schemas.ErrorAnswer,
    },
)
def warm_cache(body: cache_schemas.WarmBody) -> dict[str, Any]:
    """Load models in the background, one after the other."""
    records = {record.model_id: record for record in services().registry.list()}
    for model_id in body.model_ids:
        if model_id not in records:
            raise ModelNotFound(model_id)
        if records[model_id].status == "disabled":
            raise ModelDisabled(model_id)
    states = services().warmup.add(dict.fromkeys(body.model_ids))
    return {"success": True, "message": f"Loading {len(states)} models in the background", "models": states}


@blueprint.delete("/cache", responses={200: schemas.MessageAnswer, 404: schemas.ErrorAnswer, 409: schemas.ErrorAnswer})
def clear_cache(query: cache_schemas.CacheQuery) -> dict[str, Any]:
    """Unload models after their users are done."""
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
    """The types of the registered models, by id."""
    return {record.model_id: record.model_type for record in services().registry.list()}
