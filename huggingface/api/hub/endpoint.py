"""The routes `/health` and `/info` of a model's address, as TGI and TEI answer them for Hugging Face's clients.

Nothing is loaded for them: for a model that is not in memory, they show what its files and the settings say. A model
whose own id ends like a route comes first. Source: https://huggingface.github.io/text-generation-inference.
"""

from __future__ import annotations

from typing import Any

from ...errors import EngineFailed
from ...host.devices import resolve_device
from ...registry.records import ModelRecord
from ...tasks import MODEL_TYPES
from ..documented import models, schemas
from ..documented.models import called, get_model
from ..documented.system import VERSION
from ..requests.services import services
from ..requests.waiting import at_once
from . import schemas as hub_schemas

# The limits in `hub_schemas`.
_MAX_BEST_OF = 64
_MAX_STOPS = 64


@models.blueprint.get(
    "/models/<path:model_id>/health",
    tags=[hub_schemas.TAG],
    responses={200: hub_schemas.EndpointHealth, 409: schemas.ErrorAnswer},
)
@at_once
def show_model_health(path: schemas.ModelPath) -> dict[str, Any]:
    """Check that a model accepts requests; it need not be in memory."""
    if (model := called(path.model_id, "health")) is not None:
        return dict(get_model(model))
    record = services().registry.usable(path.model_id)
    resident = services().manager.residents().get(record.model_id)
    if resident is not None and resident.model.failed:
        raise EngineFailed(record.model_id)
    return {"success": True, "status": "ok"}


@models.blueprint.get(
    "/models/<path:model_id>/info",
    tags=[hub_schemas.TAG],
    responses={200: hub_schemas.EndpointInfo},
)
@at_once
def show_model_info(path: schemas.ModelPath) -> dict[str, Any]:
    """Show a model's facts and limits in TGI's form."""
    if (model := called(path.model_id, "info")) is not None:
        return dict(get_model(model))
    record = services().registry.get(path.model_id)
    resident = services().manager.residents().get(record.model_id)
    device = resolve_device(services().options.device) if resident is None else resident.model.device
    engine = services().options.engine
    own = MODEL_TYPES.get(record.model_type)
    context = context_of(record)
    return {
        "success": True,
        "model_id": record.model_id,
        "model_sha": (record.details or {}).get("commit"),
        "model_dtype": None if resident is None else f"torch.{resident.model.dtype}",
        "model_device_type": device.partition(":")[0],
        "model_pipeline_tag": None if own is None else own.task,
        "max_concurrent_requests": (record.slots or engine.max_batch) + engine.max_queue,
        "max_best_of": _MAX_BEST_OF,
        "max_stop_sequences": _MAX_STOPS,
        "max_input_length": context,
        "max_input_tokens": context,
        "max_total_tokens": context,
        "router": "local-llm",
        "version": VERSION,
        "sha": None,
        "docker_label": None,
    }


def context_of(record: ModelRecord) -> int | None:
    """The most tokens of one sequence, by the model's files and settings; None where unknown."""
    known = [size for size in ((record.details or {}).get("context_length"), record.max_context) if size is not None]
    return min(known, default=None)
