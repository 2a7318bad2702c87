"""Ollama's answers as pydantic models, for the API's document."""

from __future__ import annotations

from typing import Any, Literal, cast

from flask_openapi3 import MediaType, Schema
from flask_openapi3.models.data_type import DataType
from pydantic import BaseModel, ConfigDict, Field


def lines(events: str) -> ConfigDict:
    """The config of an answer that comes as lines of JSON, unless `stream` is false; `events` describes them."""
    stream = MediaType(schema=Schema(type=DataType.STRING, description=events))
    content = {"application/x-ndjson": stream}
    return cast(ConfigDict, {"protected_namespaces": (), "openapi_extra": {"content": content}})


class _OllamaAnswer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class OllamaFailure(_OllamaAnswer):
    """Every failure."""

    error: str


def ollama_failures() -> Any:
    """The failures that any of the routes may answer."""
    return dict.fromkeys((400, 403, 404, 409, 413, 415, 422, 499, 500, 503, 504, 507), OllamaFailure)


class OllamaVersion(_OllamaAnswer):
    """The version of Ollama's API."""

    version: str = Field(description="The version of Ollama whose API this is; clients check it before they use it.")
    local_llm: str = Field(description="This server's own version.")


class OllamaDetails(_OllamaAnswer):
    """A model's details."""

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
    digest: str = Field(description="Identifies the model and its files, as far as they are known.")
    details: OllamaDetails


class OllamaModels(_OllamaAnswer):
    """The registered models."""

    models: list[OllamaModel]


class OllamaRunning(_OllamaAnswer):
    """A model in memory."""

    name: str
    model: str
    size: int = Field(description="Its memory in bytes.")
    digest: str
    details: OllamaDetails
    expires_at: str = Field(description="When it expires if it is not used; a date in the year 9999 for never.")
    size_vram: int = Field(description="The bytes outside of the CPU's memory.")
    context_length: int | None = None


class OllamaRunningModels(_OllamaAnswer):
    """The models in memory."""

    models: list[OllamaRunning]


class OllamaShown(_OllamaAnswer):
    """All details of a model."""

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
    """The assistant's message."""

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
    """The request has succeeded."""

    status: Literal["success"]


class OllamaPulled(OllamaStatus):
    """The model is downloaded and registered. As a stream: its progress; the last line is this answer."""

    model_config = lines('`{"status", "digest", "total", "completed"}` as bytes arrive, and last this answer.')
