"""The contract on models as pydantic models: registering, changing, loading and unloading them. See `schemas`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool

from ...types import Backend
from ..http.fields import Fields
from .schemas import MODEL_ID_TEXT, Answer, KeepAlive, Strict, old_name, optional, renamed, streaming


def _timestamp(value: str) -> str:
    try:
        date = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("must be an ISO 8601 date and time") from None
    if date.tzinfo is not None:
        date = date.astimezone(UTC).replace(tzinfo=None)
    return date.isoformat(timespec="microseconds")


def _shown(description: str, **more: Any) -> Any:
    """A field of an answer that is left out where it is not set."""
    return Field(default=None, description=description, **more)


class Settings(Strict):
    """How a model is loaded. The server chooses missing settings."""

    device: str | None = optional("`auto`, `cpu`, `cuda`, `cuda:1` or `mps`.", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str] | None = optional(
        "accelerate's: `auto`, `balanced`, `balanced_low_0`, `sequential`, or devices by module; `disk` offloads."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = optional(
        "Type of the weights in memory. `auto`: float32 on a CPU where that could fit, else the files' type."
    )
    quantization: Literal["int8", "int4"] | None = optional(
        "A lossy form of the weights that takes less memory; none is the default."
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        optional("How transformers computes attention.")
    )
    compile: bool | None = optional(
        "Compile a model that classifies, fills or embeds with `torch.compile`, at its first use; it takes a while."
    )
    backend: Literal["auto", Backend] | None = renamed(
        "backend",
        "The backend. `auto`: on a CPU llama.cpp for a GGUF file, and OpenVINO where it gives torch's numbers for this "
        "model; else torch.",
    )
    kv_cache_dtype: Literal["float32", "float16", "bfloat16"] | None = optional(
        "Type of the keys and values of earlier tokens. `dtype` is the default; llama.cpp has `float16` too, which "
        "takes half the memory, is faster for several callers, and rounds."
    )
    max_context: int | None = optional("The most tokens of one sequence.", ge=1)
    slots: int | None = optional("The most sequences in one batch.", ge=1, le=1024)


class Registered(Settings):
    """The settings of a record."""

    revision: str | None = optional("A branch, tag or commit of the repository.", min_length=1, max_length=250)
    gguf_file: str | None = optional(
        "The file of the repository or folder that holds the weights as GGUF, or one of its parts.",
        min_length=1,
        max_length=500,
    )
    adapters: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,96}$")], str] | None = optional(
        "LoRA adapters by the name that requests choose one by, each an id."
    )
    pinned: bool | None = optional("Never evict it for another model.")
    keep_alive: KeepAlive | None = optional("Seconds in memory after the last use; 0 for none, -1 for ever.")


class TypeQuery(Strict):
    """Filter of the model list."""

    type: str | None = Field(None, description="Only models of this type.")


class NewModel(Registered):
    """A model to register."""

    model_id: str = Field(description=MODEL_ID_TEXT, examples=["microsoft/DialoGPT-medium"])
    name: str = Field(min_length=1, description="Display name.", examples=["DialoGPT Medium"])
    model_type: str | None = Field(
        None,
        description="The model's main task; it may be left out where the model's config shows it.",
        examples=["conversational"],
    )
    description: str = Field("", description="Anything that helps to tell the model from others.")
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Default parameters: of `/generate`, and of `/pipeline` for the model's own task.",
        examples=[{"max_new_tokens": 100, "temperature": 0.7}],
    )


class ModelChanges(Registered):
    """Changes of a registered model. A missing field stays unchanged; null unsets a setting.

    `model_id`, `added_date` and `usage_count` cannot be changed: a value other than the present one is refused.
    """

    nulls = Registered.known_names() | {"last_used", "details"}

    name: str = optional("Display name.", min_length=1)
    model_type: str = optional("The model's main task.")
    description: str = optional("Anything that helps to tell the model from others.")
    parameters: dict[str, Any] = optional("Replaces all default parameters.")
    status: Literal["available", "disabled"] = optional("A disabled model is not loaded or used.")
    last_used: Annotated[str, AfterValidator(_timestamp)] | None = optional(
        "When the model was last used (ISO 8601, UTC), or null."
    )
    model_id: str = optional("Protected.")
    added_date: str = optional("Protected.")
    usage_count: int = optional("Protected.")
    details: dict[str, Any] | None = optional("Protected.")


class LoadBody(Settings):
    """How to load."""

    model_config = ConfigDict(openapi_extra={"required": False})  # type: ignore[typeddict-unknown-key]

    force_reload: StrictBool = Field(False, description="Load a model again that is in memory already.")
    stream: StrictBool = Field(False, description="Send its progress, as server-sent events.")
    keep_alive: KeepAlive | None = optional("Seconds in memory without use; -1 is for ever.")
    wait_for_graph: StrictBool = Field(
        False, description="Answer only when OpenVINO computes the model, or when it is certain that torch will."
    )


class EmptyBody(Strict):
    """An empty object; it may be left out."""

    model_config = ConfigDict(openapi_extra={"required": False})  # type: ignore[typeddict-unknown-key]


class EstimateQuery(Fields):
    """Settings for the estimate, over the registered ones."""

    lasts = True

    model_config = ConfigDict(extra="forbid")

    device: str | None = optional("As in a load.", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = optional("As in a load.")
    quantization: str | None = optional("As in a load.")
    backend: Literal["auto", Backend] | None = renamed("backend", "As in a load.")
    kv_cache_dtype: Literal["float32", "float16", "bfloat16"] | None = optional("As in a load.")
    slots: int | None = optional("As in a load.", ge=1, le=1024)


class ModelInfo(BaseModel):
    """A model in short."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    name: str
    model_type: str


class Model(ModelInfo):
    """A registered model. Dates are ISO 8601 in UTC, with microseconds."""

    description: str
    parameters: dict[str, Any]
    added_date: str
    last_used: str | None
    usage_count: int
    status: Literal["available", "disabled"]
    revision: str | None = _shown("A branch, tag or commit of its repository.")
    gguf_file: str | None = _shown("The file that holds the weights, as GGUF.")
    adapters: dict[str, str] | None = _shown("LoRA adapters by name.")
    pinned: bool | None = _shown("Whether it is never evicted for another model.")
    keep_alive: float | None = _shown("Seconds in memory after the last use; -1 is for ever.")
    device: str | None = _shown("Device that it is loaded on.")
    device_map: str | dict[str, int | str] | None = _shown("accelerate's map of devices.")
    dtype: str | None = _shown("Type of the weights in memory.")
    quantization: str | None = _shown("The lossy form of its weights.")
    attn_implementation: str | None = _shown("How attention is computed.")
    compile: bool | None = _shown("Whether it is compiled.")
    backend: str | None = _shown("The backend that computes the model.")
    engine: str | None = _shown("The old name of `backend`.", deprecated=True)
    kv_cache_dtype: str | None = _shown("Type of the keys and values of earlier tokens.")
    max_context: int | None = _shown("The most tokens of one sequence.")
    slots: int | None = _shown("The most sequences in one batch.")
    details: dict[str, Any] | None = _shown("Facts from its config and the headers of its files.")


class ModelsAnswer(Answer):
    """The registered models."""

    models: list[Model]
    count: int


class ModelAnswer(Answer):
    """A registered model."""

    model: Model


class ChangedAnswer(ModelAnswer):
    """A registered model after the change."""

    message: str


class ModelsData(BaseModel):
    """The registry's content, as its file holds it."""

    model_config = ConfigDict(protected_namespaces=())

    models: list[Model]
    last_updated: str
    count: int


class RemovedAnswer(Answer):
    """The registry without the removed model."""

    model_config = ConfigDict(protected_namespaces=())

    message: str
    models_data: ModelsData


class EffectiveSettings(BaseModel):
    """How a model in memory was loaded."""

    device: str | None = Field(description="Null where a device map spreads it.")
    device_map: dict[str, str] | None
    dtype: str
    weights_dtype: str | None = Field(
        description="The weights' 16 bits, computed with in `dtype`; null for `dtype` itself."
    )
    quantization: str | None
    attn_implementation: str | None
    compile: bool
    backend: Backend
    engine: Backend = old_name("backend")
    kv_cache_dtype: str
    max_context: int | None = Field(description="Null for the model's own.")
    slots: int


class LoadedAnswer(Answer):
    """The model is in memory."""

    model_config = streaming('`{"progress": …}` while it is loaded, and last this answer, or a failure.')

    message: str
    model_info: ModelInfo
    device: str = Field(examples=["cpu", "cuda", "cuda:1"])
    settings: EffectiveSettings
    backend_reason: str | None = Field(description="Why torch computes it, and not OpenVINO; null where that does.")
    engine_reason: str | None = old_name("backend_reason")


class UnloadedAnswer(Answer):
    """The model is not in memory any more."""

    message: str
    bytes: int = Field(description="Memory that the model had.")
    freed_bytes: int = Field(description="Memory that the system got back; it includes other work at the time.")


class DeviceEstimate(BaseModel):
    """Memory of one device."""

    bytes: int
    available_bytes: int | None = Field(description="Memory that a load could take now; null where that is unknown.")
    limit_bytes: int | None = Field(description="The most memory that all models together may have there.")


class EstimateAnswer(Answer):
    """The memory that a load would take, in bytes, computed from config and headers."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    bytes: int = Field(description="All of it: weights, copies and KV cache.")
    weights_bytes: int
    copies_bytes: int = Field(description="Weights kept in a second form too, because products are faster with it.")
    kv_cache_bytes: int = Field(description="KV cache of the first generations; it grows with their number and length.")
    kv_cache_bytes_per_token: int
    device: str
    dtype: str
    weights_dtype: str | None = Field(
        description="The weights' 16 bits, computed with in `dtype`; null for `dtype` itself."
    )
    quantization: str | None
    backend: Backend = Field(description="The backend that would compute it.")
    engine: Backend = old_name("backend")
    conversion_bytes: int = Field(
        description="Further memory during the first load, for the process that converts the model."
    )
    devices: dict[str, DeviceEstimate]
    fits: bool = Field(description="Whether a load would succeed now, after evicting `evicts`.")
    possible: bool = Field(description="Whether it could ever fit.")
    evicts: list[str] = Field(description="The models that it would evict.")
