"""The contract on models in memory as pydantic models: `/cache`, and preloading several models. See `schemas`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .model_schemas import DeviceEstimate, EffectiveSettings
from .schemas import Answer, Strict, old_name


class WarmBody(Strict):
    """The models to load."""

    model_config = ConfigDict(protected_namespaces=())

    model_ids: list[str] = Field(min_length=1, description="Registered models, in the order to load them in.")


class WarmAnswer(Answer):
    """The state of each model's load."""

    message: str
    models: dict[str, Literal["waiting", "loading", "ready", "failed"]]


class CacheQuery(Strict):
    """The model to unload."""

    model_id: str | None = Field(None, description="Only this model; all models where it is left out.")


class EngineState(BaseModel):
    """The state of the engine of a model in memory."""

    state: Literal["starting", "running", "failed"] = Field(
        description="`starting`: the server tests how to serve it best; `failed`: the next request loads it again."
    )
    mode: Literal["batched", "one at a time"] | None = Field(description="How generations are served.")
    reason: str | None = Field(description="Why generations run one at a time; null where they do not.")
    running: int = Field(description="Generations that run.")
    waiting: int = Field(description="Generations that wait.")
    tasks: int = Field(description="Task calls that run or wait.")
    slots: int = Field(description="Slots of the KV cache that running generations have.")
    resting_slots: int = Field(description="Slots kept for prompts that begin alike.")
    kv_cache_bytes: int = Field(description="Memory taken for the KV cache.")
    kv_cache_limit: int = Field(description="Most memory that it may take.")


class CachedModel(BaseModel):
    """A model in memory."""

    model_config = ConfigDict(protected_namespaces=())

    loaded_at: str
    device: str
    model_type: str
    engine: EngineState | None
    dtype: str = Field(description="Type in which it is computed; see `weights_dtype` in its settings.")
    bytes: int = Field(description="All of its memory: weights, copies and KV cache.")
    weights_bytes: int
    copies_bytes: int = Field(description="Weights kept in a second form too, because products are faster with it.")
    kv_cache_bytes: int
    peak_bytes: int = Field(description="The most that it took since the load.")
    devices: dict[str, int] = Field(description="Bytes by device.")
    in_use: int = Field(description="Requests that use it at this moment.")
    queue: int = Field(description="Generations that wait for a place in its batch.")
    expires_at: str | None = Field(description="When it expires if it is not used (ISO 8601, UTC); null for never.")
    pinned: bool = Field(description="It is never evicted for another model.")
    load_seconds: float
    commit: str | None = Field(description="Commit of its repository on the Hub; null for a local folder.")
    adapters: dict[str, str] = Field(description="Its LoRA adapters: model ids, by the names that requests choose by.")
    settings: EffectiveSettings
    backend_reason: str | None = Field(description="Why torch computes it, and not OpenVINO; null where that does.")
    engine_reason: str | None = old_name("backend_reason")


class LoadProgress(BaseModel):
    """The progress of a load."""

    phase: Literal["waiting", "download", "read", "convert", "ready", "failed", "cancelled"]
    bytes_done: int
    bytes_total: int | None
    bytes_per_second: int
    seconds_left: float | None
    fraction: float | None = Field(description="The part of the phase that is done.")
    file: str | None
    error: str | None


class ConversionState(BaseModel):
    """The conversion of a model into OpenVINO's graph; torch computes the model until it is done."""

    state: Literal["waiting", "converting", "opening", "failed"] = Field(
        description="`opening`: the graph is ready, and OpenVINO takes over between two requests; `failed`: torch "
        "computes the model until it is unloaded."
    )
    reason: str | None = Field(description="Why it waits, or failed.")
    bytes: int = Field(description="Memory of the process that makes the graph; it counts in the budget.")
    progress: LoadProgress


class CacheAnswer(Answer):
    """The models in memory."""

    cached_models: dict[str, CachedModel]
    cached_pipelines: list[str] = Field(description="`<model id>_<task>` for each task that was run since the load.")
    total_cached: int = Field(description="Models in memory.")
    loading: dict[str, LoadProgress] = Field(description="The loads under way.")
    conversions: dict[str, ConversionState] = Field(
        description="The conversions for OpenVINO under way, by model; torch answers meanwhile."
    )
    memory: dict[str, DeviceEstimate] = Field(description="The memory of models on each device, and its limit.")
