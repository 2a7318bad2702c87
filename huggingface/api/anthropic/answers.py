"""Anthropic's answers as pydantic models, for the API's document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from ..documented.schemas import streaming


class AnthropicError(BaseModel):
    """An error in Anthropic's shape."""

    type: str
    message: str
    details: dict[str, Any] | None = Field(None, description="Details that a client may act on.")


class AnthropicFailure(BaseModel):
    """Every failure of Anthropic's routes."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str | None = Field(description="The request's id, as in the header `request-id`.")


def anthropic_failures() -> Any:
    """The failures that any of the routes may answer."""
    return dict.fromkeys((400, 403, 404, 409, 413, 415, 422, 499, 500, 503, 504, 507), AnthropicFailure)


class UsedTokens(BaseModel):
    """Tokens, counted by the model's own tokenizer."""

    input_tokens: int = Field(description="Tokens of the prompt that were not in the cache.")
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(BaseModel):
    """The assistant's message. As a stream: Anthropic's named events, from `message_start` to `message_stop`."""

    model_config = streaming("Anthropic's named events, from `message_start` to `message_stop`.")

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]] = Field(description="Blocks: `thinking`, `text` and `tool_use`.")
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: UsedTokens


class CountAnswer(BaseModel):
    """A conversation's tokens."""

    input_tokens: int
