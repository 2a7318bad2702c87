"""Routes that run a model: `/generate` and `/pipeline`.

Every view is parse, call, shape. A client that hangs up while it waits is noticed, and its work is given up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import request
from flask_openapi3 import APIBlueprint, Tag

from ..errors import InvalidRequest, MissingField
from ..records import Chunk, GenerationRequest, ModelRecord
from . import schemas
from .effective import generation_parameters, task_parameters
from .services import admitted, services

blueprint = APIBlueprint(
    "inference",
    __name__,
    url_prefix="/api/huggingface",
    abp_tags=[Tag(name="Inference", description="Generating text, and running tasks.")],
    abp_responses={**schemas.FAILURES, **schemas.BODY_FAILURES, **schemas.MODEL_FAILURES},
)


@blueprint.post("/generate", responses={200: schemas.GenerateAnswer})
def generate(body: schemas.GenerateBody) -> dict[str, Any]:
    """Generate text. The model is loaded if it is not in memory."""
    fields = body.model_dump(exclude_unset=True)
    source: dict[str, Any] = {name: fields.pop(name) for name in ("prompt", "messages") if name in fields}
    if len(source) != 1:
        raise MissingField("prompt") if not source else InvalidRequest("Give prompt or messages, not both", "messages")
    registry, manager = services().registry, services().manager
    record = registry.get(fields.pop("model_id"))
    parameters = generation_parameters(record, fields)
    with admitted(), manager.lease(record.model_id) as model:
        chunks = list(model.generate(_request(record, source, parameters), _client_gone()))
    registry.record_use(record.model_id)
    return _generated(record, source, chunks)


@blueprint.post("/pipeline", responses={200: schemas.PipelineAnswer})
def pipeline(body: schemas.PipelineBody) -> dict[str, Any]:
    """Run a task. The model is loaded if it is not in memory."""
    registry, manager = services().registry, services().manager
    record = registry.get(body.model_id)
    parameters = task_parameters(record, body.task, body.model_extra or {})
    with admitted(), manager.lease(record.model_id) as model:
        results = model.run(body.task, body.inputs, parameters, _client_gone())
    registry.record_use(record.model_id)
    return {
        "success": True,
        "results": results,
        "model_used": record.model_id,
        "task": body.task,
        "inputs": body.inputs,
        "model_info": record.summary(),
    }


def _client_gone() -> Callable[[], bool]:
    """Tells, from any thread, whether the client of this request has hung up; never, where the server can't tell."""
    check: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    return check


def _request(record: ModelRecord, source: dict[str, Any], parameters: dict[str, Any]) -> GenerationRequest:
    """What to generate from; the prompt of a conversational model is the user's turn of a chat."""
    if record.model_type == "conversational" and "prompt" in source:
        return GenerationRequest(parameters, messages=[{"role": "user", "content": source["prompt"]}])
    return GenerationRequest(parameters, **source)


def _generated(record: ModelRecord, source: dict[str, Any], chunks: list[Chunk]) -> dict[str, Any]:
    texts = [""] * (1 + max(chunk.index for chunk in chunks))
    for chunk in chunks:
        texts[chunk.index] += chunk.text
    return {
        "success": True,
        "response": texts[0],
        **({"responses": texts} if len(texts) > 1 else {}),
        "model_used": record.model_id,
        **source,
        "parameters": chunks[-1].parameters,
        "model_info": record.summary(),
    }
