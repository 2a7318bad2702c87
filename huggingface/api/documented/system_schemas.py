"""The contract on the server itself as pydantic models: requests, statistics, health, packages. See `schemas`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .schemas import Answer


class RunningRequest(BaseModel):
    """A request that waits or runs."""

    model_config = ConfigDict(protected_namespaces=())

    request_id: str = Field(description="The server's id of the request; DELETE takes it.")
    client_request_id: str | None = Field(description="The client's `X-Request-Id`.")
    model_id: str
    task: str = Field(description="`generate`, or the task of `/pipeline`.")
    stream: bool
    state: Literal["loading", "waiting", "running"] = Field(description="`loading`: until the model is in memory.")
    position: int | None = Field(description="Its place in the queue, from 1, where it waits.")
    prompt_tokens: int
    completion_tokens: int = Field(description="Tokens generated so far.")
    started: str = Field(description="When it arrived: ISO 8601, UTC.")
    age: float = Field(description="Seconds since then.")


class RequestsAnswer(Answer):
    """The requests that wait or run, oldest first."""

    requests: list[RunningRequest]
    count: int


class RequestPath(BaseModel):
    """A request in a path."""

    request_id: str = Field(description="The server's id of a request.")


class MostUsed(BaseModel):
    """The model with the most generate and pipeline calls."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    name: str
    usage_count: int


class Latency(BaseModel):
    """Quantiles of the seconds from a request's arrival to its answer's end; null where there was none."""

    p50: float | None
    p95: float | None
    p99: float | None


class LoadTimes(BaseModel):
    """Seconds that loads took."""

    mean: float | None
    last: float | None


class ModelStatistics(BaseModel):
    """Statistics of one model."""

    requests: int = Field(description="Requests that it answered.")
    latency_seconds: Latency
    tokens: int = Field(description="Tokens that it generated.")
    tokens_per_second: float | None = Field(description="Tokens by the seconds of the requests that generated them.")
    loads: int
    load_seconds: LoadTimes
    cache_hits: int = Field(description="Requests that found it in memory.")
    cache_misses: int = Field(description="Requests that had to wait for its load.")
    evictions: int = Field(description="How often it was evicted for another model.")
    errors: dict[str, int] = Field(description="Requests and loads that failed, by kind.")


class Statistics(BaseModel):
    """Sums over the registry."""

    model_config = ConfigDict(protected_namespaces=())

    total_models: int
    total_usage: int
    model_types: dict[str, int]
    last_updated: str | None
    most_used: MostUsed | None
    models: dict[str, ModelStatistics] = Field(description="Statistics of each model, also from earlier runs.")


class StatisticsAnswer(Answer):
    """Usage statistics."""

    statistics: Statistics


class ModelTypesAnswer(Answer):
    """The distinct types of the registered models, sorted."""

    model_config = ConfigDict(protected_namespaces=())

    model_types: list[str]


class Dependencies(BaseModel):
    """The libraries and the hardware that can be used here."""

    transformers: bool
    torch: bool
    cuda_available: bool


class DependenciesAnswer(Answer):
    """Whether models can run here."""

    dependencies: Dependencies


class HealthAnswer(Answer):
    """The server answers."""

    status: Literal["ok"]


class ReadyAnswer(Answer):
    """The models of LOCAL_LLM_PRELOAD are in memory."""

    status: Literal["ready"]


class ServerAnswer(Answer):
    """The server's state."""

    name: str
    version: str
    uptime_seconds: float
    device: str = Field(description="The device that models run on by default.")
    loaded_models: list[str]
    warnings: list[str] = Field(description="What the person who runs this server should know.")
    documentation: str = Field(description="Path of the interactive API page.")
