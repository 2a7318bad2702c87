"""The routes under `/api` for Ollama's clients.

Every view is parse, call, shape. Routes that would make models answer with what to use instead.
"""

from __future__ import annotations

from typing import Any

from flask import Response
from flask_openapi3 import APIBlueprint, Tag

from ...errors import InvalidRequest
from ..documented.system import VERSION
from ..requests.services import services
from ..requests.waiting import at_once
from . import answers, schemas
from .chat import chat
from .embeddings import embed, embed_prompt
from .generate import generate
from .models import running, show, tags
from .names import find
from .pull import pull

# The first version of Ollama with all features that are here: `think`, `capabilities`, `dimensions`, and last
# `logprobs`. Clients check it to know which features they may use; some refuse a lower version.
_SPOKEN = "0.12.11"

blueprint = APIBlueprint(
    "ollama",
    __name__,
    url_prefix="/api",
    abp_tags=[Tag(name="Ollama", description="Ollama's API, for the clients that speak it.")],
    abp_responses=answers.ollama_failures(),
)


@blueprint.get("/version", responses={200: answers.OllamaVersion})
@at_once
def show_version() -> dict[str, Any]:
    """Show which version of Ollama's API this is."""
    return {"version": _SPOKEN, "local_llm": VERSION}


@blueprint.get("/tags", responses={200: answers.OllamaModels})
@at_once
def list_models() -> dict[str, Any]:
    """List the registered models."""
    return {"models": tags()}


@blueprint.get("/ps", responses={200: answers.OllamaRunningModels})
@at_once
def list_running() -> dict[str, Any]:
    """List the models in memory."""
    return {"models": running()}


@blueprint.post("/show", responses={200: answers.OllamaShown})
def show_model(body: schemas.OllamaShowBody) -> dict[str, Any]:
    """Show a model's details."""
    return show(body.called, verbose=bool(body.verbose))


@blueprint.post("/chat", responses={200: answers.OllamaChatAnswer})
def answer_chat(body: schemas.OllamaChatBody) -> dict[str, Any] | Response:
    """Answer a chat. Without messages the model is loaded, or unloaded where `keep_alive` is 0."""
    return chat(body)


@blueprint.post("/generate", responses={200: answers.OllamaGenerateAnswer})
def answer_prompt(body: schemas.OllamaGenerateBody) -> dict[str, Any] | Response:
    """Answer a prompt. Without one the model is loaded, or unloaded where `keep_alive` is 0."""
    return generate(body)


@blueprint.post("/embed", responses={200: answers.OllamaEmbeddings})
def make_vectors(body: schemas.OllamaEmbedBody) -> dict[str, Any]:
    """Make vectors of texts."""
    return embed(body)


@blueprint.post("/embeddings", responses={200: answers.OllamaEmbedding})
def make_vector(body: schemas.OllamaEmbeddingsBody) -> dict[str, Any]:
    """Make a vector of a text: the older route."""
    return embed_prompt(body)


@blueprint.post("/pull", responses={200: answers.OllamaPulled})
def pull_model(body: schemas.OllamaPullBody) -> dict[str, Any] | Response:
    """Download a model from the Hugging Face Hub, and register it."""
    return pull(body)


@blueprint.delete("/delete", responses={200: answers.OllamaStatus})
def delete_model(body: schemas.OllamaDeleteBody) -> dict[str, Any]:
    """Remove a model from the registry and from memory. Its files stay."""
    services().manager.remove(find(body.called).model_id)
    return {"status": "success"}


_INSTEAD = {
    "create": "register a model of the models folder or the Hub with POST /api/huggingface/models",
    "copy": "a model has one name here; register another with POST /api/huggingface/models",
    "push": "this server downloads models from the Hugging Face Hub, and uploads none",
    "blobs": "put a model's files into the models folder, and register it with POST /api/huggingface/models",
}


def _refused(route: str) -> InvalidRequest:
    return InvalidRequest(f"/api/{route} is not served: {_INSTEAD[route]}")


@blueprint.post("/create", responses={400: answers.OllamaFailure})
@at_once
def create_model() -> Response:
    """Refused: models are registered, not made."""
    raise _refused("create")


@blueprint.post("/copy", responses={400: answers.OllamaFailure})
@at_once
def copy_model() -> Response:
    """Refused: a model has one name."""
    raise _refused("copy")


@blueprint.post("/push", responses={400: answers.OllamaFailure})
@at_once
def push_model() -> Response:
    """Refused: nothing is uploaded to the Hub."""
    raise _refused("push")


@blueprint.post("/blobs/<path:digest>", responses={400: answers.OllamaFailure})
@at_once
def put_blob(path: schemas.BlobPath) -> Response:  # noqa: ARG001
    """Refused: put files into the models folder."""
    raise _refused("blobs")


@blueprint.get("/blobs/<path:digest>", responses={400: answers.OllamaFailure})
@at_once
def show_blob(path: schemas.BlobPath) -> Response:  # noqa: ARG001
    """Refused: files are in the models folder."""
    raise _refused("blobs")
