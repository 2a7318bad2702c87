"""OpenAI's answers as pydantic models: what the API's document says of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..documented.schemas import streaming


class _Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class OpenAIError(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIFailure(_Answer):
    """Every failure under `/v1`."""

    error: OpenAIError


def openai_failures() -> Any:
    """What any of the routes may answer besides what it is for."""
    return dict.fromkeys((400, 403, 404, 409, 413, 415, 422, 499, 500, 503, 504, 507), OpenAIFailure)


class OpenAIModel(_Answer):
    """A registered model."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When it was registered, in seconds since 1970.")
    owned_by: str
    type: Literal["llm", "embeddings", "other"] = Field(description="What it is for, as LM Studio has it.")
    max_model_len: int | None = Field(description="The most tokens of one sequence; null where it is not known.")
    context_length: int | None = Field(description="The same.")
    max_context_length: int | None = Field(description="The same.")
    capabilities: dict[str, bool] = Field(description="What it can do, as Mistral has it.")
    meta: dict[str, int | None] = Field(description="What its files tell, as llama.cpp has it.")


class OpenAIModels(_Answer):
    """The registered models."""

    object: Literal["list"]
    data: list[OpenAIModel]


class TokenCounts(_Answer):
    """Tokens, counted by the model's own tokenizer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = Field(
        None, description="`cached_tokens`: those of the prompt that were computed already."
    )
    completion_tokens_details: dict[str, int] | None = Field(
        None, description="`reasoning_tokens`: those of the reasoning, where the model thinks aloud."
    )


class ChatMessage(_Answer):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = Field(None, description="What it thought before, where the model thinks aloud.")
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(_Answer):
    """An answer."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(_Answer):
    """The answers to a chat. As a stream: `chat.completion.chunk` objects, and last `data: [DONE]`."""

    model_config = streaming("`chat.completion.chunk` objects, and last `[DONE]`.")

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str = Field(description="This server and its version.")
    choices: list[ChatChoice]
    usage: TokenCounts


class CompletionChoice(_Answer):
    """A text."""

    text: str
    index: int
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(_Answer):
    """The texts. As a stream: the same with pieces of them, and last `data: [DONE]`."""

    model_config = streaming("The same object with pieces of the texts, and last `[DONE]`.")

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str = Field(description="This server and its version.")
    choices: list[CompletionChoice]
    usage: TokenCounts


class ResponseAnswer(_Answer):
    """A response. As a stream: its events, of which the last one holds it whole."""

    model_config = {**streaming("The response's events, of which the last one holds it whole."), "extra": "allow"}

    id: str
    object: Literal["response"]
    created_at: float
    model: str
    status: Literal["completed", "incomplete"]
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class EmbeddedText(_Answer):
    """A vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class ReadTokens(_Answer):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(_Answer):
    """The vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[EmbeddedText]
    model: str
    usage: ReadTokens
    pooling: Literal["sentence-transformers", "mean"] = Field(
        description="What made one vector of a text's: the model's own modules, or the mean of its tokens' vectors."
    )


class Ranked(_Answer):
    """A document's place."""

    index: int = Field(description="Which of the documents, from 0.")
    relevance_score: float
    document: dict[str, str] | None = None


class RerankAnswer(_Answer):
    """The documents, the best first."""

    id: str
    object: Literal["list"]
    model: str
    results: list[Ranked]
    usage: ReadTokens
