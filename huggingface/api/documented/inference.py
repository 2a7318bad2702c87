"""Routes that run a model: `/generate` and `/pipeline`.

Every view is parse, call, shape. When a client disconnects while it waits, its work is cancelled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

from flask import Response
from flask_openapi3 import APIBlueprint, Tag

from ...errors import InvalidRequest, LocalLLMError, MissingField
from ...registry.records import ModelRecord
from ...types import Chunk, Constraint, GenerationRequest
from ..http.errors import body as failure
from ..http.sse import Events, Writer, event_stream
from ..parameters.effective import generation_parameters, task_parameters
from ..requests.active import InFlight
from ..requests.fan_out import named
from ..requests.leasing import leased_model
from ..requests.services import services
from . import inference_schemas, schemas

blueprint = APIBlueprint(
    "inference",
    __name__,
    url_prefix="/api/huggingface",
    abp_tags=[Tag(name="Inference", description="Generating text, and running tasks.")],
    abp_responses={**schemas.FAILURES, **schemas.BODY_FAILURES, **schemas.MODEL_FAILURES},
)


# The fields that constrain the text; each is a kind of `Constraint`.
_FORMS: tuple[Literal["json_schema", "json_object", "regex", "choice", "grammar"], ...] = (
    "json_schema",
    "json_object",
    "regex",
    "choice",
    "grammar",
)


@blueprint.post("/generate", responses={200: inference_schemas.GenerateAnswer})
def generate(body: inference_schemas.GenerateBody) -> dict[str, Any] | Response:
    """Generate text. The model is loaded if it is not in memory.

    With `stream` the answer is server-sent events: `{"index", "text"}` for each piece of text, `{"request_id",
    "position"}` for a place in the queue, and last this very answer, or an error's body.
    """
    fields = body.model_dump(exclude_unset=True)
    source: dict[str, Any] = {name: fields.pop(name) for name in ("prompt", "messages") if name in fields}
    if len(source) != 1:
        raise MissingField("prompt") if not source else InvalidRequest("Give prompt or messages, not both", "messages")
    streams, timeout, keep_alive = (fields.pop(name, None) for name in ("stream", "timeout", "keep_alive"))
    adapter = fields.pop("adapter", None)
    if stops := fields.pop("stop", None):
        if fields.get("stop_strings", stops) != stops:
            raise InvalidRequest("Invalid value for field 'stop': says something else than stop_strings", "stop")
        fields["stop_strings"] = stops
    forms: dict[str, Any] = {name: fields.pop(name) for name in _FORMS if name in fields}
    if len(forms) > 1:
        raise InvalidRequest(f"Give only one of {', '.join(forms)}", next(iter(forms)))
    constraint = next((Constraint(kind, forms[kind]) for kind in _FORMS if kind in forms), None)
    record = services().registry.get(fields.pop("model_id"))
    parameters = generation_parameters(record, fields)
    with ExitStack() as stack:
        flight, model = stack.enter_context(leased_model(record, "generate", timeout, bool(streams), keep_alive))
        with named({} if "messages" in source else {"messages": "prompt"}):
            request = _request(record, source, parameters, bool(streams), constraint, adapter)
            flight.attach(model.generate(request, flight.cancellation))

        def answer(chunks: list[Chunk]) -> dict[str, Any]:
            return _generated(record, source, chunks, forms | ({"adapter": adapter} if adapter is not None else {}))

        if not streams:
            return answer(list(flight.chunks()))
        return event_stream(flight.stream(), _Writer(flight, answer), stack)


@blueprint.post("/pipeline", responses={200: inference_schemas.PipelineAnswer})
def pipeline(body: inference_schemas.PipelineBody) -> dict[str, Any]:
    """Run a task. The model is loaded if it is not in memory."""
    registry = services().registry
    record = registry.get(body.model_id)
    parameters = task_parameters(record, body.task, body.model_extra or {})
    with leased_model(record, body.task, body.timeout, keep_alive=body.keep_alive) as (flight, model):
        results = model.run(body.task, body.inputs, parameters, flight.cancellation, body.adapter)
    registry.record_use(record.model_id)
    return {
        "success": True,
        "results": results,
        "model_used": record.model_id,
        "task": body.task,
        "inputs": body.inputs,
        "model_info": record.summary(),
    }


def _request(
    record: ModelRecord,
    source: dict[str, Any],
    parameters: dict[str, Any],
    streams: bool,
    constraint: Constraint | None,
    adapter: str | None,
) -> GenerationRequest:
    """The request to the engine; a conversational model's prompt becomes the user's turn of a chat."""
    if record.model_type == "conversational" and "prompt" in source:
        source = {"messages": [{"role": "user", "content": source["prompt"]}]}
    return GenerationRequest(parameters, **source, streams=streams, constraint=constraint, adapter=adapter)


def _generated(
    record: ModelRecord, source: dict[str, Any], chunks: list[Chunk], further: dict[str, Any]
) -> dict[str, Any]:
    """The documented answer, made of each sequence's last chunk."""
    last = sorted((chunk for chunk in chunks if chunk.finish_reason is not None), key=lambda chunk: chunk.index)
    texts, reasons = [chunk.whole for chunk in last], [chunk.finish_reason for chunk in last]
    several = len(texts) > 1
    usage, timings = last[-1].usage, last[-1].timings
    assert usage is not None  # noqa: S101 - the last chunk of a request has it
    return {
        "success": True,
        "response": texts[0],
        **({"responses": texts} if several else {}),
        "model_used": record.model_id,
        **source,
        "parameters": {**(last[-1].parameters or {}), **further},
        "model_info": record.summary(),
        "finish_reason": reasons[0],
        **({"finish_reasons": reasons} if several else {}),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
        "timings": timings,  # the encoder writes it as its fields
    }


class _Writer(Writer[Chunk]):
    """The events of `/generate`: pieces of text, and last the documented answer."""

    def __init__(self, flight: InFlight, shape: Callable[[list[Chunk]], dict[str, Any]]) -> None:
        """`shape` makes the answer from the sequences' last chunks."""
        self._flight = flight
        self._shape = shape
        self._last: list[Chunk] = []
        self._position: int | None = None  # the last position that was sent

    def write(self, chunk: Chunk) -> Events:
        """A piece of text with its sequence's index."""
        if chunk.finish_reason is not None:
            self._last.append(chunk)
        if chunk.text:
            yield {"index": chunk.index, "text": chunk.text}

    def silence(self) -> Events:
        """The place in the queue, if it has changed."""
        position = self._flight.position
        if position not in (None, self._position):
            self._position = position
            yield {"request_id": self._flight.request_id, "position": position}

    def end(self) -> Events:
        """The documented answer."""
        yield self._shape(self._last)

    def error(self, error: LocalLLMError) -> Events:
        """The error's documented body."""
        yield failure(str(error))
