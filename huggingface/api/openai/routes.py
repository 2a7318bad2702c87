"""The routes under `/v1`, and the chat routes that Hugging Face's clients use under a model's own address.

Every view is parse, call, shape.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from flask import Response
from flask_openapi3 import APIBlueprint, Tag

from ...registry.records import ModelRecord
from ...tasks import MODEL_TYPES
from ..anthropic import models as anthropic_models
from ..documented.schemas import ModelPath, described
from ..http.errors import speaks_anthropic
from ..hub.endpoint import context_of
from ..requests.services import services
from ..requests.waiting import at_once
from . import schemas, text_schemas
from .answers import (
    ChatAnswer,
    CompletionAnswer,
    EmbeddingsAnswer,
    OpenAIModel,
    OpenAIModels,
    RerankAnswer,
    openai_failures,
)
from .chat import answer_chat
from .completions import complete
from .embeddings import embed, rerank
from .response_answers import ResponseAnswer
from .response_schemas import ResponseBody
from .responses import respond

_FAILURES = openai_failures()
_CHAT = described(ChatAnswer, "`chat.completion.chunk` objects, and last `[DONE]`.")
_COMPLETION = described(CompletionAnswer, "The same object with pieces of the texts, and last `[DONE]`.")
_RESPONSE = described(ResponseAnswer, "The response's events, of which the last one holds it whole.")

blueprint = APIBlueprint(
    "openai",
    __name__,
    url_prefix="/v1",
    abp_tags=[Tag(name="OpenAI", description="OpenAI's API, for the clients that speak it.")],
    abp_responses=_FAILURES,
)

hub_chat = APIBlueprint(
    "hub-chat",
    __name__,
    url_prefix="/api/huggingface",
    abp_tags=[Tag(name="Hugging Face", description="The protocol of Hugging Face's own inference clients.")],
    abp_responses=_FAILURES,
)


@blueprint.get("/models", responses={200: described(OpenAIModels)})
@at_once
def list_models() -> OpenAIModels | dict[str, Any]:
    """List the registered models; in Anthropic's shape where the header `anthropic-version` is there."""
    if speaks_anthropic():
        return anthropic_models.shown_models(services().registry.list())
    return {"object": "list", "data": [_model(record) for record in services().registry.list()]}


@blueprint.get("/models/<path:model_id>", responses={200: described(OpenAIModel)})
@at_once
def get_model(path: ModelPath) -> OpenAIModel | dict[str, Any]:
    """Show one model; in Anthropic's shape where the header `anthropic-version` is there."""
    record = services().registry.get(path.model_id)
    return anthropic_models.shown_model(record) if speaks_anthropic() else _model(record)


@blueprint.post("/chat/completions", responses={200: _CHAT})
def chat_completions(body: schemas.ChatBody) -> ChatAnswer | Response:
    """Answer a chat."""
    return answer_chat(services().registry.get(body.model), body)


@blueprint.post("/completions", responses={200: _COMPLETION})
def completions(body: text_schemas.CompletionBody) -> CompletionAnswer | Response:
    """Continue texts, or score how likely they are."""
    return complete(services().registry.get(body.model), body)


@blueprint.post("/responses", responses={200: _RESPONSE})
def responses(body: ResponseBody) -> ResponseAnswer | Response:
    """Answer. Nothing is kept for later requests."""
    return respond(services().registry.get(body.model), body)


@blueprint.post("/embeddings", responses={200: described(EmbeddingsAnswer)})
def embeddings(body: text_schemas.EmbeddingBody) -> EmbeddingsAnswer:
    """Make vectors of texts."""
    return embed(services().registry.get(body.model), body)


@blueprint.post("/rerank", responses={200: described(RerankAnswer)})
def rerank_documents(body: text_schemas.RerankBody) -> RerankAnswer:
    """Sort documents by how well they answer a query."""
    return rerank(services().registry.get(body.model), body)


@hub_chat.post("/models/<path:model_id>/v1/chat/completions", responses={200: _CHAT})
def hub_chat_completions(path: ModelPath, body: schemas.HubChatBody) -> ChatAnswer | Response:
    """Answer a chat, by the model that the address names; the body's `model` is the client's name for it."""
    return answer_chat(services().registry.get(path.model_id), body, body.model or path.model_id)


@hub_chat.post("/models/<path:model_id>/v1/completions", responses={200: _COMPLETION})
def hub_completions(path: ModelPath, body: text_schemas.HubCompletionBody) -> CompletionAnswer | Response:
    """Continue texts, by the model that the address names."""
    if body.return_full_text is not None:
        body = body.model_copy(update={"echo": body.return_full_text})
    return complete(services().registry.get(path.model_id), body, body.model or path.model_id)


def _model(record: ModelRecord) -> OpenAIModel:
    """A model in OpenAI's form, with other servers' fields; from the registry only, as there may be thousands."""
    created = datetime.fromisoformat(record.added_date).replace(tzinfo=UTC)
    details, context = record.details or {}, context_of(record)
    own = MODEL_TYPES.get(record.model_type)
    tasks = {*(details.get("tasks") or ()), *([own.task] if own is not None else ())}
    writes = bool(tasks & {"text-generation", "text2text-generation"})
    embeds = record.model_type == "feature-extraction" or (bool(details.get("embedding")) and not writes)
    return {
        "id": record.model_id,
        "object": "model",
        "created": int(created.timestamp()),
        "owned_by": _owner(record),
        "type": "embeddings" if embeds else "llm" if writes else "other",
        "max_model_len": context,
        "context_length": context,
        "max_context_length": context,
        "capabilities": {
            "completion_chat": writes,
            "completion_fim": False,
            "function_calling": writes and bool(details.get("tools")),
            "embeddings": "feature-extraction" in tasks,
            "vision": False,
            "fine_tuning": False,
        },
        "meta": {
            "n_ctx_train": details.get("context_length"),
            "n_params": details.get("parameters"),
            "size": details.get("weights_bytes"),
        },
    }


def _owner(record: ModelRecord) -> str:
    return record.model_id.split("/")[0] if "/" in record.model_id else "local"
