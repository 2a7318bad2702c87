"""Ollama's answers as pydantic models: what the API's document says of them."""

from __future__ import annotations

from typing import Any, Literal, cast

from flask_openapi3 import MediaType, Schema
from flask_openapi3.models.data_type import DataType
from pydantic import BaseModel, ConfigDict, Field


def lines(events: str) -> ConfigDict:
    """The config of an answer that comes as lines of JSON, unless `stream` is false; `events` says which."""
    stream = MediaType(schema=Schema(type=DataType.STRING, description=events))
    content = {"application/x-ndjson": stream}
    return cast(ConfigDict, {"protected_namespaces": (), "openapi_extra": {"content": content}})


class _OllamaAnswer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class OllamaFailure(_OllamaAnswer):
    """Every failure."""

    error: str


def ollama_failures() -> Any:
    """What any of the routes may answer besides what it is for."""
    return dict.fromkeys((400, 403, 404, 409, 413, 415, 422, 499, 500, 503, 504, 507), OllamaFailure)


class OllamaVersion(_OllamaAnswer):
    """Which Ollama's API this is."""

    version: str = Field(description="The version of Ollama whose API is spoken: clients ask for what they may use.")
    local_llm: str = Field(description="This server's own.")


class OllamaDetails(_OllamaAnswer):
    """What a model is."""

    parent_model: str
    format: Literal["safetensors", "gguf", "pytorch"]
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(_OllamaAnswer):
    """A registered model."""

    name: str
    model: str
    modified_at: str = Field(description="When it was registered.")
    size: int = Field(description="Bytes of the files with its weights.")
    digest: str = Field(description="Tells it and its files from any other, as far as they are known.")
    details: OllamaDetails


class OllamaModels(_OllamaAnswer):
    """The registered models."""

    models: list[OllamaModel]


class OllamaRunning(_OllamaAnswer):
    """A model in memory."""

    name: str
    model: str
    size: int = Field(description="Bytes that it takes.")
    digest: str
    details: OllamaDetails
    expires_at: str = Field(description="When it expires if it is not used; a date in the year 9999 for never.")
    size_vram: int = Field(description="Those of the bytes that do not lie in the CPU's memory.")
    context_length: int | None = None


class OllamaRunningModels(_OllamaAnswer):
    """The models in memory."""

    models: list[OllamaRunning]


class OllamaShown(_OllamaAnswer):
    """All that is known of a model."""

    modified_at: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[Literal["completion", "tools", "thinking", "embedding"]]
    modelfile: str
    template: str = Field(description="Its chat template, in Jinja.")
    parameters: str = Field(description="The registered parameters, a line each.")
    license: str | None = None


class _Timed(_OllamaAnswer):
    total_duration: int | None = Field(None, description="Nanoseconds, as the other durations.")
    load_duration: int | None = None
    prompt_eval_count: int | None = None


class _Made(_Timed):
    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    logprobs: list[dict[str, Any]] | None = None


class OllamaMessage(_OllamaAnswer):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class OllamaChatAnswer(_Made):
    """The answer to a chat. As a stream: the same with pieces of it; the last line has the counts and times."""

    model_config = lines("The same object with pieces of the message; the last one has the counts and times.")

    message: OllamaMessage


class OllamaGenerateAnswer(_Made):
    """The answer to a prompt. As a stream: the same with pieces of it; the last line has the counts and times."""

    model_config = lines("The same object with pieces of the response; the last one has the counts and times.")

    response: str
    thinking: str | None = None


class OllamaEmbeddings(_Timed):
    """The vectors, in the order of the texts; each has the length 1."""

    model: str
    embeddings: list[list[float]]


class OllamaEmbedding(_OllamaAnswer):
    """The vector."""

    embedding: list[float]


class OllamaStatus(_OllamaAnswer):
    """It is done."""

    status: Literal["success"]


class OllamaPulled(OllamaStatus):
    """It is here, and registered. As a stream: how far it is; the last line is this very answer."""

    model_config = lines('`{"status", "digest", "total", "completed"}` as bytes arrive, and last this very answer.')
