"""What Hugging Face's clients ask of a model's address: `/health` and `/info`, as TGI and TEI answer.

Nothing is loaded for it: of a model that is not in memory, only what its files and the settings tell is told. A model
whose own name ends so comes first. Source: https://huggingface.github.io/text-generation-inference.
"""

from __future__ import annotations

from typing import Any

from ...errors import EngineFailed, ModelDisabled
from ...host.devices import resolve_device
from ...registry.records import ModelRecord
from ...tasks import MODEL_TYPES
from ..documented import models, schemas
from ..documented.models import called, get_model
from ..documented.system import VERSION
from ..requests.services import services
from ..requests.waiting import at_once
from . import schemas as hub_schemas

# As `hub_schemas` takes them.
_MOST_BEST_OF = 64
_MOST_STOPS = 64


@models.blueprint.get(
    "/models/<path:model_id>/health",
    tags=[hub_schemas.TAG],
    responses={200: hub_schemas.EndpointHealth, 409: schemas.ErrorAnswer},
)
@at_once
def show_model_health(path: schemas.ModelPath) -> dict[str, Any]:
    """Check that a model can be asked; it need not be in memory."""
    if (model := called(path.model_id, "health")) is not None:
        return dict(get_model(model))
    record = services().registry.get(path.model_id)
    if record.status == "disabled":
        raise ModelDisabled(record.model_id)
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
    """Show what a model is and what it takes, in TGI's words."""
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
        "max_best_of": _MOST_BEST_OF,
        "max_stop_sequences": _MOST_STOPS,
        "max_input_length": context,
        "max_input_tokens": context,
        "max_total_tokens": context,
        "router": "local-llm",
        "version": VERSION,
        "sha": None,
        "docker_label": None,
    }


def context_of(record: ModelRecord) -> int | None:
    """The most tokens of one sequence, as far as the model's files and settings tell."""
    known = [size for size in ((record.details or {}).get("context_length"), record.max_context) if size is not None]
    return min(known, default=None)
