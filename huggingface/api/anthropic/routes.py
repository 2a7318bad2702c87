"""The routes under `/v1/messages`. Every view is parse, call, shape."""

from __future__ import annotations

from typing import Any

from flask import Response, g
from flask_openapi3 import APIBlueprint, Tag

from ...errors import ModelNotFound
from ...registry.records import ModelRecord
from ..requests.services import services
from . import schemas
from .answers import AnthropicMessage, CountAnswer, anthropic_failures
from .messages import answer, count

_MAX_NAMES = 10  # models that an error lists

blueprint = APIBlueprint(
    "anthropic",
    __name__,
    url_prefix="/v1/messages",
    abp_tags=[Tag(name="Anthropic", description="Anthropic's API, for the clients that speak it.")],
    abp_responses=anthropic_failures(),
)


@blueprint.post("", responses={200: AnthropicMessage})
def create_message(body: schemas.MessagesBody) -> dict[str, Any] | Response:
    """Continue a conversation."""
    return answer(_record(body.model), body)


@blueprint.post("/count_tokens", responses={200: CountAnswer})
def count_tokens(body: schemas.CountBody) -> dict[str, Any]:
    """Count a conversation's tokens."""
    return count(_record(body.model), body)


@blueprint.after_request
def name_request(response: Response) -> Response:
    """Adds the request's id under the header's name that Anthropic's clients read."""
    if (own := g.get("request_id")) is not None:
        response.headers["request-id"] = own
    return response


def _record(model_id: str) -> ModelRecord:
    """The record of a model. Anthropic's programs ask for one of Anthropic's models unless they are configured.

    Raises:
        ModelNotFound: lists the registered models.
    """
    registry = services().registry
    try:
        return registry.get(model_id)
    except ModelNotFound as error:
        names = [record.model_id for record in registry.list()]
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        shown = ", ".join(names[:_MAX_NAMES]) or "none"
        hint = f". Registered here: {shown}{more}. Claude Code takes one from ANTHROPIC_MODEL"
        raise ModelNotFound(model_id, hint) from error
