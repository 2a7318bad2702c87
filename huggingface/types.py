"""The plain data that folders pass to each other.

Frozen dataclasses of JSON-like values: safe to share between threads, free of HTTP, torch and pydantic. Standard
library only, so that any module may import it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args


def timestamp() -> str:
    """The current time as the API writes it: ISO 8601, UTC, microseconds, no offset (`2025-06-26T21:45:00.000000`)."""
    return datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")


Backend = Literal["llama.cpp", "openvino", "torch"]
# The backends, in the order in which `auto` tries them.
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How models are loaded: from where, onto which device, and what code their files may run.

    `backend` (a name in `BACKENDS`, or `auto`) computes models where neither their record nor the load names one.
    """

    models_dir: Path
    device: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: frozenset[str] = frozenset()
    offline: bool = False
    backend: str = "torch"
    engine: EngineOptions = field(default_factory=lambda: EngineOptions())


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and generated, counted by the model's own tokenizer (special tokens included).

    `cached_tokens` are the prompt's tokens that were in the KV cache already.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, in seconds since the model received it.

    `tokens_per_second` counts from the end of its wait in the queue to its end.
    """

    queue: float
    first_token: float
    total: float
    tokens_per_second: float

    @classmethod
    def of(cls, submitted: float, started: float, first: float, ended: float, tokens: int) -> Timings:
        """Computes the timings from four readings of `time.monotonic` and the number of generated tokens."""
        rate = tokens / max(ended - started, 1e-6)
        return cls(
            round(started - submitted, 6), round(first - submitted, 6), round(ended - submitted, 6), round(rate, 3)
        )


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form of a whole text: `value` is a JSON schema, a regular expression, a list of choices or a Lark grammar.

    `json_object` allows any JSON object and ignores `value`. A grammar is in llguidance's dialect of Lark or, with JSON
    in it, an object of `chat.grammar`.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    value: Any = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt (exactly one of `prompt`, `tokens` and `messages`), and the effective parameters.

    Attributes:
        tokens: the prompt's token ids.
        template: further variables of the chat template, `tools` among them.
        streams: text is delivered as it is generated; otherwise the last chunk holds all of it.
        fills: where the parameters set no limit, generates as many tokens as there is room for.
        logprobs: how many alternatives each token is reported with; None reports no tokens.
        prompt_logprobs: the prompt's tokens are reported too.
        constraint: the text's form, or a function that returns it, given the end of the prompt that the chat template
            laid out.
        special_tokens: these special tokens stay in the text, others do not.
        adapter: one of the model's adapters; None for the model itself.
        turn: what follows the last message: the assistant's `new` turn, the rest of the last message (`continued`), or
            `none` of both. None means `continued` after an assistant's message, else `new`.
        fallbacks: the same messages laid out otherwise, for a template that refuses them or leaves `told` out.
    """

    parameters: Mapping[str, Any]
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    streams: bool = False
    fills: bool = False
    tokens: Sequence[int] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: bool = False
    constraint: Constraint | Callable[[str], Constraint | None] | None = None
    special_tokens: Sequence[str] = ()
    adapter: str | None = None
    turn: Literal["new", "continued", "none"] | None = None
    fallbacks: Sequence[Sequence[Mapping[str, Any]]] = ()
    told: str = ""


@dataclass(frozen=True, slots=True)
class ChatTraits:
    """How a model lays chats out.

    `template` is its chat template, or several by name. `added_tokens` are the ids of tokens added to its vocabulary,
    by text; `special_tokens` are those that texts leave out. `response_template` is the tokenizer's own description of
    its model's answers, in transformers' words.
    """

    template: str | Mapping[str, str] | None
    added_tokens: Mapping[str, int]
    special_tokens: frozenset[str]
    response_template: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A token and how likely the model found it, before the request's parameters changed that.

    `text` is the token's text, `raw` its bytes (which may be a part of a character). `logprob` is the natural logarithm
    of its probability, None for a prompt's first token. `top` are the likeliest tokens in its place.
    """

    id: int
    text: str
    raw: bytes
    logprob: float | None
    special: bool = False
    top: Sequence[Token] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of generated text.

    A sequence's last chunk has its `finish_reason` and the `whole` text; a request's last chunk has the counts, the
    times and the effective parameters.

    Attributes:
        index: which of several returned sequences the text belongs to.
        so_far: the counts up to a chunk that is not the last.
        parameters: the request's, as far as the model has room for them.
        tokens: those generated since the chunk before, if the request asks for them.
        prompt: the prompt's tokens, in the first chunk, if the request asks for them.
        stop: the stop string that ended the sequence, if one did.
    """

    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    parameters: Mapping[str, Any] | None = None
    timings: Timings | None = None
    whole: str | None = None
    tokens: Sequence[Token] = ()
    prompt: Sequence[Token] = ()
    so_far: Usage | None = None
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The limits of a model's engine: sequences in one batch, requests that wait, and bytes of KV cache.

    `findings` are what the engines of this server have measured on this machine, so that each thing is measured once.
    """

    max_batch: int = 64
    max_queue: int = 64
    kv_cache_bytes: int = 2 * 1024**3
    findings: MutableMapping[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)


# The part of a model's memory that grows and shrinks with its work, recorded bit by bit before it is allocated.
PASSING = "generation"


@dataclass(frozen=True, slots=True)
class _Bytes:
    weights: int
    copies: int
    kv_cache: int

    @property
    def total(self) -> int:
        """The bytes of weights, copies and KV cache together."""
        return self.weights + self.copies + self.kv_cache


@dataclass(frozen=True, slots=True)
class Sizes(_Bytes):
    """How many bytes a model in memory takes.

    `copies` are weights held a second time, in a layout that makes products faster. `peak` is the most that weights,
    copies and KV cache were together. `devices` are the bytes by device.
    """

    peak: int
    devices: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Estimate(_Bytes):
    """The bytes that a load would take, computed from config and headers.

    `kv_cache` is what the first generations take, `token_bytes` the KV cache of one token. `devices` are the bytes by
    device. `conversion` is what a second process takes meanwhile to convert the model. `own_dtype` is the dtype of the
    weights in their files; they have it in memory too if it `is_stored`, and `dtype` in what is computed.
    """

    token_bytes: int
    device: str
    dtype: str
    quantization: str | None
    devices: Mapping[str, int]
    backend: str = "torch"
    conversion: int = 0
    own_dtype: str | None = None
    is_stored: bool = False


@dataclass(frozen=True, slots=True)
class Pending:
    """What a backend lacks for a model, and makes while another backend answers.

    `key` identifies it; `size` computes the bytes that making it takes, from the model's number of parameters.
    """

    backend: str
    key: str
    size: Callable[[int], int] = field(compare=False)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Whether a load would succeed: its estimate, the bytes that are available on each device and their limits.

    `fits` says whether the load succeeds now, `possible` whether it could ever. `evicts` are the models that it would
    evict.
    """

    estimate: Estimate
    available: Mapping[str, int]
    limits: Mapping[str, int]
    fits: bool
    possible: bool
    evicts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The result of an unload: whether the model was loaded, the bytes that it had, and the bytes that came back."""

    was_loaded: bool
    bytes: int
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What an engine is doing. `mode` is `batched`, or `one at a time` with its `reason`; None until it is known."""

    state: Literal["starting", "running", "failed"]
    mode: Literal["batched", "one at a time"] | None
    reason: str | None
    running: int
    waiting: int
    tasks: int
    slots: int
    resting_slots: int
    kv_cache_bytes: int
    kv_cache_limit: int
