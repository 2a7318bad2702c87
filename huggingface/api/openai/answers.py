"""OpenAI's answers except responses: typed dicts, which the writers return and the API's document describes.

Sources: "Chat", "Completions" and "Embeddings", OpenAI API reference. Fields are sent in the order in which they are
listed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from ...types import FinishReason
from ..documented.schemas import described
from ..http.errors import OpenAIFailure

Fingerprint = Annotated[str, Field(description="This server and its version.")]


def openai_failures() -> Any:
    """The failures that any of the routes may answer."""
    return dict.fromkeys((400, 403, 404, 409, 413, 415, 422, 499, 500, 503, 504, 507), described(OpenAIFailure))


class OpenAIModel(TypedDict):
    """A registered model."""

    id: str
    object: Literal["model"]
    created: Annotated[int, Field(description="When it was registered, in seconds since 1970.")]
    owned_by: str
    type: Annotated[Literal["llm", "embeddings", "other"], Field(description="Its purpose, in LM Studio's form.")]
    max_model_len: Annotated[
        int | None, Field(description="The most tokens of one sequence; null where it is not known.")
    ]
    context_length: Annotated[int | None, Field(description="The same.")]
    max_context_length: Annotated[int | None, Field(description="The same.")]
    capabilities: Annotated[dict[str, bool], Field(description="Its capabilities, in Mistral's form.")]
    meta: Annotated[dict[str, int | None], Field(description="Facts from its files, in llama.cpp's form.")]


class OpenAIModels(TypedDict):
    """The registered models."""

    object: Literal["list"]
    data: list[OpenAIModel]


class TokenCounts(TypedDict):
    """Tokens, counted by the model's own tokenizer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[
        Annotated[dict[str, int], Field(description="`cached_tokens`: tokens of the prompt that were in the cache.")]
    ]
    completion_tokens_details: NotRequired[
        Annotated[
            dict[str, int],
            Field(description="`reasoning_tokens`: tokens of the reasoning, if the model writes it."),
        ]
    ]


# Chats ----------------------------------------------------------------------------------------------------------------

ChatReason = Literal["stop", "length", "tool_calls"]


class Likelihood(TypedDict):
    """A token that was generated, or could have been."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(Likelihood):
    """A generated token, and its alternatives."""

    top_logprobs: list[Likelihood]


class ChatLogprobs(TypedDict):
    """The tokens of an answer."""

    content: list[ChosenToken]
    refusal: None


class AnsweredFunction(TypedDict):
    """The called function; the arguments are a JSON object as text."""

    name: str
    arguments: str


class AnsweredCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class ChatMessage(TypedDict):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[
        Annotated[str, Field(description="The reasoning before the answer, if the model writes it.")]
    ]
    tool_calls: NotRequired[list[AnsweredCall]]


class ChatChoice(TypedDict):
    """An answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatReason


class AboutChat(TypedDict):
    """The fields that are the same in an answer and in all events of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: Fingerprint


class ChatAnswer(AboutChat):
    """The answers to a chat. As a stream: `chat.completion.chunk` objects, and last `data: [DONE]`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: TokenCounts


class FunctionDelta(TypedDict):
    """A piece of a call."""

    name: NotRequired[str]
    arguments: str


class CallDelta(TypedDict):
    """A piece of the call with this `index`; the first piece has its id and name."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatDelta(TypedDict, total=False):
    """A piece of an answer."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[CallDelta]


class ChatPiece(TypedDict):
    """A piece of the answer with this `index`; the last piece has the finish reason."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatReason | None


class AboutChunk(AboutChat):
    """The fields that are the same in all events of a stream."""

    object: Literal["chat.completion.chunk"]


class ChatChunk(AboutChunk):
    """An event of a stream."""

    choices: list[ChatPiece]


class CountedChatChunk(ChatChunk):
    """An event of a stream with the counts."""

    usage: TokenCounts | None


# Completions ----------------------------------------------------------------------------------------------------------


class CompletionLogprobs(TypedDict):
    """The tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """A text."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class CompletionPiece(TypedDict):
    """A piece of a text; the last piece has the finish reason."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class AboutCompletion(TypedDict):
    """The fields that are the same in an answer and in all events of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: Fingerprint


class CompletionChunk(AboutCompletion):
    """An event of a stream."""

    choices: list[CompletionPiece]


class CountedCompletionChunk(CompletionChunk):
    """An event of a stream with the counts."""

    usage: TokenCounts | None


class CompletionAnswer(AboutCompletion):
    """The texts. As a stream: the same with pieces of them, and last `data: [DONE]`."""

    choices: list[CompletionChoice]
    usage: TokenCounts


# Vectors and documents ------------------------------------------------------------------------------------------------


Pooling = Literal["sentence-transformers", "mean"]


class EmbeddedText(TypedDict):
    """A vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class ReadTokens(TypedDict):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(TypedDict):
    """The vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[EmbeddedText]
    model: str
    usage: ReadTokens
    pooling: Annotated[
        Pooling,
        Field(description="How a text's vector is made: by the model's own modules, or as the mean over its tokens."),
    ]


class Ranked(TypedDict):
    """A ranked document."""

    index: Annotated[int, Field(description="The document's place in the request, from 0.")]
    relevance_score: float
    document: NotRequired[dict[str, str]]


class RerankAnswer(TypedDict):
    """The documents, the best first."""

    id: str
    object: Literal["list"]
    model: str
    results: list[Ranked]
    usage: ReadTokens
