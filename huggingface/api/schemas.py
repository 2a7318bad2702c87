"""The contract as pydantic models: what a body may hold, and what an answer holds.

The routes validate with these models and the OpenAPI document is made from them, so the two cannot differ.
Nothing here works on a model or a file. Unknown fields are refused, and values are not converted from other types.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, cast

from flask_openapi3 import MediaType, Schema
from flask_openapi3.models.data_type import DataType
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool

from ..tasks import TASKS
from .effective import GENERATE_DEFAULTS
from .parameters import TASK_PARAMETERS, GenerationParameters

# Thirty years: what is kept longer, is kept for ever.
MOST_SECONDS = 10**9

_MODEL_ID_TEXT = "Hugging Face model id: `name` or `org/name`."


class Strict(BaseModel):
    """A body or query that takes what it names and nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Answer(BaseModel):
    """A response."""

    model_config = ConfigDict(protected_namespaces=())

    success: Literal[True] = True


def streaming(events: str) -> ConfigDict:
    """The config of an answer that comes as server-sent events too, where `stream` asks for it; `events` says which."""
    stream = MediaType(schema=Schema(type=DataType.STRING, description=events))
    return cast(ConfigDict, {"protected_namespaces": (), "openapi_extra": {"content": {"text/event-stream": stream}}})


class ErrorAnswer(BaseModel):
    """Every failure, whatever its status."""

    success: Literal[False] = False
    error: str = Field(description="What went wrong and what to do about it.")


# What routes may answer besides what they are for: any of them, those with a body, those of the registry, and those
# that bring a model into memory.
FAILURES: dict[int | str, type[BaseModel]] = dict.fromkeys((400, 403, 500), ErrorAnswer)
BODY_FAILURES: dict[int | str, type[BaseModel]] = dict.fromkeys((413, 415), ErrorAnswer)
REGISTRY_FAILURES: dict[int | str, type[BaseModel]] = dict.fromkeys((404, 503, 507), ErrorAnswer)
MODEL_FAILURES: dict[int | str, type[BaseModel]] = dict.fromkeys((404, 409, 422, 499, 503, 504, 507), ErrorAnswer)


# Models ---------------------------------------------------------------------------------------------------------------


def _timestamp(value: str) -> str:
    try:
        date = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("must be an ISO 8601 date and time") from None
    if date.tzinfo is not None:
        date = date.astimezone(UTC).replace(tzinfo=None)
    return date.isoformat(timespec="microseconds")


def _optional(description: str, **constraints: Any) -> Any:
    """A field that need not be given; its default stands for that, is never read, and is refused from a caller."""
    return Field(default=None, description=description, **constraints)


def _shown(description: str) -> Any:
    """A field of an answer that is there only where it is set."""
    return Field(default=None, description=description)


def _drop_defaults(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        if field.get("default") is None:
            field.pop("default", None)


class ModelPath(BaseModel):
    """A model in a path; a slash in the id may be written raw or as `%2F`."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str = Field(description=_MODEL_ID_TEXT)


class Settings(Strict):
    """How a model is loaded. What is left out is the server's choice."""

    model_config = ConfigDict(json_schema_extra=_drop_defaults)

    device: str | None = _optional("`auto`, `cpu`, `cuda`, `cuda:1` or `mps`.", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str] | None = _optional(
        "accelerate's: `auto`, `balanced`, `balanced_low_0`, `sequential`, or devices by module; `disk` offloads."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = _optional(
        "Of the weights in memory. `auto`: float32 on a CPU without native bfloat16, else the weights' own."
    )
    quantization: Literal["int8", "int4"] | None = _optional(
        "A lossy form of the weights that takes less memory; none is the default."
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        _optional("How transformers computes attention.")
    )
    compile: bool | None = _optional(
        "Compile a model that classifies, fills or embeds with `torch.compile`, at its first use; it takes a while."
    )
    engine: Literal["auto", "torch", "openvino"] | None = _optional(
        "What computes the model. `auto`: OpenVINO on a CPU, where it gives torch's numbers for it, else torch."
    )
    max_context: int | None = _optional("The most tokens of one sequence.", ge=1)
    slots: int | None = _optional("The most sequences in one batch.", ge=1, le=1024)


class Registered(Settings):
    """What may be said of a model beyond what is documented."""

    model_config = ConfigDict(json_schema_extra=_drop_defaults)

    revision: str | None = _optional("A branch, tag or commit of the repository.", min_length=1, max_length=250)
    gguf_file: str | None = _optional(
        "The file of the repository or folder that holds the weights as GGUF.", min_length=1, max_length=500
    )
    adapters: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,96}$")], str] | None = _optional(
        "LoRA adapters by the name that requests choose one by, each an id."
    )
    pinned: bool | None = _optional("Never take it out of memory to make room for another.")
    keep_alive: float | None = _optional(
        "Seconds in memory after the last use; 0 for none, -1 for ever.", ge=-1, le=MOST_SECONDS
    )


class TypeQuery(Strict):
    """Filter of the model list."""

    type: str | None = Field(None, description="Only models of this type.")


class NewModel(Registered):
    """A model to register."""

    model_config = ConfigDict(json_schema_extra=_drop_defaults)

    model_id: str = Field(description=_MODEL_ID_TEXT, examples=["microsoft/DialoGPT-medium"])
    name: str = Field(min_length=1, description="Display name.", examples=["DialoGPT Medium"])
    model_type: str | None = Field(
        None,
        description="What the model is for; it may be left out where the model's config tells.",
        examples=["conversational"],
    )
    description: str = Field("", description="Anything that helps to tell the model from others.")
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Default parameters: of `/generate`, and of `/pipeline` for the model's own task.",
        examples=[{"max_new_tokens": 100, "temperature": 0.7}],
    )


class ModelChanges(Registered):
    """What to change of a registered model. A field that is left out stays as it is.

    `model_id`, `added_date` and `usage_count` cannot be changed: another value than the present one is refused.
    """

    model_config = ConfigDict(json_schema_extra=_drop_defaults)

    name: str = _optional("Display name.", min_length=1)
    model_type: str = _optional("What the model is for.")
    description: str = _optional("Anything that helps to tell the model from others.")
    parameters: dict[str, Any] = _optional("Replaces all default parameters.")
    status: Literal["available", "disabled"] = _optional("A disabled model is not loaded or used.")
    last_used: Annotated[str, AfterValidator(_timestamp)] | None = _optional(
        "When the model was last used (ISO 8601, UTC), or null."
    )
    model_id: str = _optional("Protected.")
    added_date: str = _optional("Protected.")
    usage_count: int = _optional("Protected.")
    details: dict[str, Any] | None = _optional("Protected.")


class LoadBody(Settings):
    """How to load."""

    model_config = ConfigDict(json_schema_extra=_drop_defaults, openapi_extra={"required": False})  # type: ignore[typeddict-unknown-key]

    force_reload: StrictBool = Field(False, description="Load anew a model that is in memory already.")
    stream: StrictBool = Field(False, description="Tell how far it is, as server-sent events.")
    keep_alive: float | None = _optional(
        "Seconds in memory from now on, if nobody uses it; -1 is for ever.", ge=-1, le=MOST_SECONDS
    )


class EmptyBody(Strict):
    """Nothing; it may be left out."""

    model_config = ConfigDict(openapi_extra={"required": False})  # type: ignore[typeddict-unknown-key]


class WarmBody(Strict):
    """What to load."""

    model_config = ConfigDict(protected_namespaces=())

    model_ids: list[str] = Field(min_length=1, description="Registered models, in the order to load them in.")


class EstimateQuery(BaseModel):
    """Settings to estimate with, over the registered ones."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_drop_defaults)

    device: str | None = _optional("As in a load.", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = _optional("As in a load.")
    quantization: str | None = _optional("As in a load.")
    engine: Literal["auto", "torch", "openvino"] | None = _optional("As in a load.")
    slots: int | None = _optional("As in a load.", ge=1, le=1024)


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
    pinned: bool | None = _shown("Whether it is never taken out of memory to make room.")
    keep_alive: float | None = _shown("Seconds in memory after the last use; -1 is for ever.")
    device: str | None = _shown("Where it is loaded.")
    device_map: str | dict[str, int | str] | None = _shown("accelerate's map of devices.")
    dtype: str | None = _shown("Of the weights in memory.")
    quantization: str | None = _shown("The lossy form of its weights.")
    attn_implementation: str | None = _shown("How attention is computed.")
    compile: bool | None = _shown("Whether it is compiled.")
    engine: str | None = _shown("What computes the model.")
    max_context: int | None = _shown("The most tokens of one sequence.")
    slots: int | None = _shown("The most sequences in one batch.")
    details: dict[str, Any] | None = _shown("What its config and the headers of its files tell.")


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
    quantization: str | None
    attn_implementation: str | None
    compile: bool
    engine: Literal["torch", "openvino"]
    max_context: int | None = Field(description="Null for the model's own.")
    slots: int


class LoadedAnswer(Answer):
    """The model is in memory."""

    model_config = streaming('`{"progress": …}` while it is loaded, and last this answer, or a failure.')

    message: str
    model_info: ModelInfo
    device: str = Field(examples=["cpu", "cuda", "cuda:1"])
    settings: EffectiveSettings


class UnloadedAnswer(Answer):
    """The model is not in memory any more."""

    message: str
    bytes: int = Field(description="What the model had.")
    freed_bytes: int = Field(description="What came back, as the system tells: other work at the time is in it too.")


class DeviceEstimate(BaseModel):
    """Memory of one device."""

    bytes: int
    available_bytes: int | None = Field(description="What could be taken now; null where nothing tells.")
    limit_bytes: int | None = Field(description="What models may have there, all together.")


class EstimateAnswer(Answer):
    """What a load would take, in bytes, told from config and headers."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    bytes: int = Field(description="All of it: weights, copies and KV cache.")
    weights_bytes: int
    copies_bytes: int = Field(description="Weights kept in a second form too, because products are faster with it.")
    kv_cache_bytes: int = Field(description="KV cache of the first generations; it grows with their number and length.")
    kv_cache_bytes_per_token: int
    device: str
    dtype: str
    quantization: str | None
    engine: Literal["torch", "openvino"] = Field(description="What would compute it.")
    devices: dict[str, DeviceEstimate]
    fits: bool = Field(description="Whether a load would succeed now, with `evicts` gone.")
    possible: bool = Field(description="Whether it could ever fit.")
    evicts: list[str] = Field(description="The models that would go for it.")


class WarmAnswer(Answer):
    """How far each model is."""

    message: str
    models: dict[str, Literal["waiting", "loading", "ready", "failed"]]


# Inference ------------------------------------------------------------------------------------------------------------


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class GenerateBody(GenerationParameters):
    """Text to continue, or a chat to answer, and how. Give exactly one of `prompt` and `messages`.

    What is left out comes from the model's registered parameters, then from the defaults named here.
    """

    model_id: str = Field(description=_MODEL_ID_TEXT)
    prompt: str = _optional("Input text. For a conversational model it is the user's turn of a new chat.")
    messages: list[Message] = _optional("A chat, oldest turn first.", min_length=1)
    stream: bool = _optional("Send the text as it is made, as server-sent events.")
    timeout: float = _optional("Seconds, from now, after which no answer is wanted any more.", gt=0, le=86400)
    keep_alive: float = _optional(
        "Seconds that the model stays in memory after this use; -1 is for ever.", ge=-1, le=MOST_SECONDS
    )
    adapter: str = _optional("Which of the model's adapters to use; without it, none.", min_length=1)
    json_schema: dict[str, Any] = _optional("The text is to be JSON of this schema. At most one of these five.")
    json_object: Literal[True] = _optional("The text is to be a JSON object.")
    regex: str = _optional("The text is to match this regular expression, whole.", min_length=1)
    choice: list[str] = _optional("The text is to be one of these.", min_length=1)
    grammar: str = _optional("The text is to be of this grammar, in llguidance's dialect of Lark.", min_length=1)

    @classmethod
    def model_json_schema(cls, *arguments: Any, **options: Any) -> dict[str, Any]:
        """The schema as pydantic makes it, with the defaults that are in effect where a model has none of its own."""
        schema = super().model_json_schema(*arguments, **options)
        for name, value in GENERATE_DEFAULTS.items():
            schema["properties"][name]["default"] = value
        return schema


class Usage(BaseModel):
    """Tokens, counted by the model's own tokenizer, special ones included."""

    prompt_tokens: int
    completion_tokens: int = Field(description="Of all returned texts together.")
    total_tokens: int


class Timings(BaseModel):
    """Where the time went, in seconds since the request reached the model."""

    queue: float = Field(description="Until it was let into the batch.")
    first_token: float = Field(description="Until its first token was made.")
    total: float = Field(description="Until its last token was made.")
    tokens_per_second: float = Field(description="Tokens made, by the time after the queue.")


class GenerateAnswer(Answer):
    """The new text."""

    model_config = streaming(
        '`{"index": 0, "text": "…"}` for what was made, `{"request_id": "…", "position": 3}` in the queue, and last '
        "this answer, or a failure."
    )

    response: str = Field(description="The new text only, without the prompt.")
    responses: list[str] | None = Field(None, description="All texts, where `num_return_sequences` asks for several.")
    model_used: str
    prompt: str | None = Field(None, description="The prompt as sent.")
    messages: list[Message] | None = Field(None, description="The messages as sent.")
    parameters: dict[str, Any] = Field(description="The parameters that were in effect.")
    model_info: ModelInfo
    finish_reason: Literal["stop", "length"] = Field(
        description="`stop`: an end token or a stop string came; `length`: a limit was reached."
    )
    finish_reasons: list[Literal["stop", "length"]] | None = Field(None, description="One for each of `responses`.")
    usage: Usage
    timings: Timings


class PipelineBody(BaseModel):
    """A task for a model. Every further field is a parameter of the task; one that it does not have is refused."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    model_id: str = Field(description=_MODEL_ID_TEXT)
    task: str = Field(description="What to do; `translation_xx_to_yy` names the languages.")
    inputs: Any = Field(description="One item or a list of them, in the form that the task takes.")
    timeout: float = _optional("Seconds, from now, after which no answer is wanted any more.", gt=0, le=86400)
    keep_alive: float = _optional(
        "Seconds that the model stays in memory after this use; -1 is for ever.", ge=-1, le=MOST_SECONDS
    )
    adapter: str = _optional("Which of the model's adapters to use; without it, none.", min_length=1)

    @classmethod
    def model_json_schema(cls, *arguments: Any, **options: Any) -> dict[str, Any]:
        """The schema as pydantic makes it, and for each task the further fields that a body with it may have."""
        schema = super().model_json_schema(*arguments, **options)
        for name in ("timeout", "keep_alive", "adapter"):
            del schema["properties"][name]["default"]  # none is given: it stands for that
        schema["anyOf"] = []
        for name, parameters in TASK_PARAMETERS.items():
            fields = parameters.model_json_schema(*arguments, **options)
            schema.setdefault("$defs", {}).update(fields.get("$defs", {}))
            task: dict[str, Any] = {"enum": [*TASKS[name].aliases, name]}
            if name == "translation":
                task = {"anyOf": [task, {"pattern": "^translation_[^_]+_to_[^_]+$"}]}
            branch = {"title": name, "properties": {"task": task, **fields["properties"]}}
            schema["anyOf"].append({**branch, "required": ["task", *fields.get("required", [])]})
        return schema


class PipelineAnswer(Answer):
    """What the task gives, as `transformers` gives it."""

    model_config = ConfigDict(protected_namespaces=())

    results: Any
    model_used: str
    task: str
    inputs: Any
    model_info: ModelInfo


# System ---------------------------------------------------------------------------------------------------------------


class CacheQuery(Strict):
    """Which model to take out of memory."""

    model_id: str | None = Field(None, description="Only this model; all models where it is left out.")


class EngineState(BaseModel):
    """What the engine of a model in memory is doing."""

    state: Literal["starting", "running", "failed"] = Field(
        description="`starting`: how it is served best is being found out; `failed`: the next request loads it anew."
    )
    mode: Literal["batched", "one at a time"] | None = Field(description="How generations are served.")
    reason: str | None = Field(description="Why one at a time.")
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
    dtype: str = Field(description="Of its weights in memory.")
    bytes: int = Field(description="All that it takes: weights, copies and KV cache.")
    weights_bytes: int
    copies_bytes: int = Field(description="Weights kept in a second form too, because products are faster with it.")
    kv_cache_bytes: int
    peak_bytes: int = Field(description="The most that it took since the load.")
    devices: dict[str, int] = Field(description="Bytes by device.")
    in_use: int = Field(description="Requests that have it at this moment.")
    queue: int = Field(description="Generations that wait for a place in its batch.")
    expires_at: str | None = Field(description="When it goes if nobody uses it (ISO 8601, UTC); null for never.")
    pinned: bool = Field(description="It never goes to make room for another.")
    load_seconds: float
    commit: str | None = Field(description="Of its repository on the Hub; null for a local folder.")
    adapters: dict[str, str] = Field(description="Its LoRA adapters: model ids, by the names that requests choose by.")
    settings: EffectiveSettings
    engine_reason: str | None = Field(description="Why torch computes it, and not OpenVINO; null where that does.")


class LoadProgress(BaseModel):
    """How far a load is."""

    phase: Literal["waiting", "download", "read", "convert", "ready", "failed", "cancelled"]
    bytes_done: int
    bytes_total: int | None
    bytes_per_second: int
    seconds_left: float | None
    fraction: float | None = Field(description="The part of the phase that is done.")
    file: str | None
    error: str | None


class CacheAnswer(Answer):
    """What is in memory."""

    cached_models: dict[str, CachedModel]
    cached_pipelines: list[str] = Field(description="`<model id>_<task>` for each task that was run since the load.")
    total_cached: int = Field(description="Models in memory.")
    loading: dict[str, LoadProgress] = Field(description="The loads under way.")
    memory: dict[str, DeviceEstimate] = Field(description="What models have on each device, and what they may have.")


class RunningRequest(BaseModel):
    """A request that waits or runs."""

    model_config = ConfigDict(protected_namespaces=())

    request_id: str = Field(description="Made by the server; DELETE takes it.")
    client_request_id: str | None = Field(description="What the client sent as `X-Request-Id`.")
    model_id: str
    task: str = Field(description="`generate`, or the task of `/pipeline`.")
    stream: bool
    state: Literal["loading", "waiting", "running"] = Field(description="`loading`: until the model is in memory.")
    position: int | None = Field(description="Its place in the queue, from 1, where it waits.")
    prompt_tokens: int
    completion_tokens: int = Field(description="Tokens made so far.")
    started: str = Field(description="When it arrived: ISO 8601, UTC.")
    age: float = Field(description="Seconds since then.")


class RequestsAnswer(Answer):
    """The requests that wait or run, oldest first."""

    requests: list[RunningRequest]
    count: int


class RequestPath(BaseModel):
    """A request in a path."""

    request_id: str = Field(description="The server's name of a request.")


class MessageAnswer(Answer):
    """It is done."""

    message: str


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
    """How a model did."""

    requests: int = Field(description="Requests that it answered.")
    latency_seconds: Latency
    tokens: int = Field(description="Tokens that it made.")
    tokens_per_second: float | None = Field(description="Tokens by the seconds of the requests that made them.")
    loads: int
    load_seconds: LoadTimes
    cache_hits: int = Field(description="Requests that found it in memory.")
    cache_misses: int = Field(description="Requests that had to wait for its load.")
    evictions: int = Field(description="How often it went to make room for another.")
    errors: dict[str, int] = Field(description="Requests and loads that failed, by kind.")


class Statistics(BaseModel):
    """Sums over the registry."""

    model_config = ConfigDict(protected_namespaces=())

    total_models: int
    total_usage: int
    model_types: dict[str, int]
    last_updated: str | None
    most_used: MostUsed | None
    models: dict[str, ModelStatistics] = Field(description="How each model did, also before the last start.")


class StatisticsAnswer(Answer):
    """Usage statistics."""

    statistics: Statistics


class ModelTypesAnswer(Answer):
    """The types of the registered models, each once, sorted."""

    model_config = ConfigDict(protected_namespaces=())

    model_types: list[str]


class Dependencies(BaseModel):
    """What can be imported, and used, here."""

    transformers: bool
    torch: bool
    cuda_available: bool


class DependenciesAnswer(Answer):
    """Whether models can be run here."""

    dependencies: Dependencies


class HealthAnswer(Answer):
    """The server answers."""

    status: Literal["ok"]


class ReadyAnswer(Answer):
    """The models that are to be loaded at the start are in memory."""

    status: Literal["ready"]


class ServerAnswer(Answer):
    """What is running."""

    name: str
    version: str
    uptime_seconds: float
    device: str = Field(description="Where models are put.")
    loaded_models: list[str]
    warnings: list[str] = Field(description="What the person who runs this server should know.")
    documentation: str = Field(description="Path of the interactive API page.")
