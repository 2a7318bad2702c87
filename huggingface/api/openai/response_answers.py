"""Responses as typed dicts, which their writer returns and the API's document describes.

Source: "Responses", OpenAI API reference. Fields are sent in the order in which they are listed.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from .answers import ChosenToken

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(TypedDict):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChosenToken]


class OutputMessage(TypedDict):
    """The assistant's message."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class OutputReasoningText(TypedDict):
    """The text of the reasoning."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(TypedDict):
    """The reasoning before the message."""

    type: Literal["reasoning"]
    id: str
    summary: list[Any]
    content: list[OutputReasoningText]


class OutputCall(TypedDict):
    """A call of a function; the arguments are a JSON object as text."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputPart = OutputText | OutputReasoningText
OutputItem = OutputMessage | OutputReasoning | OutputCall


class ResponseUsage(TypedDict):
    """Tokens, counted by the model's own tokenizer."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseError(TypedDict):
    """The error of a failed response."""

    code: str
    message: str


class AboutResponse(TypedDict):
    """A response's fields about its request."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    top_p: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    truncation: str
    background: bool
    service_tier: str
    user: str | None
    completed_at: NotRequired[int]


class ResponseAnswer(AboutResponse):
    """A response. As a stream: its events; the last one holds the whole response."""

    status: ResponseStatus
    error: ResponseError | None
    incomplete_details: dict[str, str] | None
    output: list[OutputItem]
    usage: ResponseUsage | None
