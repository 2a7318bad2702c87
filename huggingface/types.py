"""The plain data that folders pass to each other.

Frozen dataclasses of JSON-like values: safe to share between threads, free of HTTP, torch and pydantic.
Standard library only, so that anyone may import it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args


def timestamp() -> str:
    """The present as the API writes it: ISO 8601, UTC, microseconds, no offset (`2025-06-26T21:45:00.000000`)."""
    return datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")


Backend = Literal["openvino", "torch"]
# What computes models, in the order in which `auto` asks.
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How models are brought into memory: from where, onto what, and what code their files may run.

    `backend` computes them where neither their record nor the load names one: a name of `BACKENDS`, or `auto`.
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
    """Tokens read and made, counted by the model's own tokenizer (special tokens included).

    `cached_tokens` are those of the prompt that were in the KV cache already.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, in seconds from its arrival at the model.

    `tokens_per_second` is from the end of its wait in the queue to its end.
    """

    queue: float
    first_token: float
    total: float
    tokens_per_second: float

    @classmethod
    def of(cls, submitted: float, started: float, first: float, ended: float, tokens: int) -> Timings:
        """From four readings of `time.monotonic`, and how many tokens were made."""
        rate = tokens / max(ended - started, 1e-6)
        return cls(
            round(started - submitted, 6), round(first - submitted, 6), round(ended - submitted, 6), round(rate, 3)
        )


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a text must be, whole: `value` is a JSON schema, a regular expression, a list of choices or a Lark grammar.

    `json_object` is any JSON object; its value is not looked at. Grammars are in llguidance's dialect of Lark, or, with
    JSON in them, an object of `chat.grammar`.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    value: Any = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate from, and how: exactly one of `prompt`, `tokens` and `messages`, and the effective parameters.

    `tokens` are a prompt's token ids. `template` are further variables of the chat template (`tools` among them).
    `streams` tells whether text is wanted as it is made; else the last chunk holds all of it. `fills` asks for as many
    tokens as there is room for, where the parameters set no limit. `logprobs` is how many alternatives of each token
    are to be named with it, None for no tokens at all; `prompt_logprobs` asks for those of the prompt too. `constraint`
    is what the text has to be, or a function that tells it from the end of the prompt as the chat template has laid it
    out. `special_tokens` are left in the text, other special tokens are not. `adapter` names one of the model's, None
    is the model itself. `turn` says what follows the last of the messages: the assistant's `new` turn, what was left
    out of the last message (`continued`), or `none` of both; None is `continued` behind the assistant's words, else
    `new`. `fallbacks` are the same messages laid out otherwise, for a template that refuses them or leaves `told` out.
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
    """How a model lays chats out: its template, or several by name, and the tokens that were added to its vocabulary by
    their texts; `special_tokens` are those that are left out of texts. `response_template` is the tokenizer's own
    description of its model's answers, in transformers' words.
    """

    template: str | Mapping[str, str] | None
    added_tokens: Mapping[str, int]
    special_tokens: frozenset[str]
    response_template: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A token and how likely the model found it, before any parameter of the request changed that.

    `text` is what it alone stands for, `raw` its bytes (a part of a character, it may be). `logprob` is the natural
    logarithm of its probability, None for the first one of a prompt. `top` are the likeliest tokens in its place.
    """

    id: int
    text: str
    raw: bytes
    logprob: float | None
    special: bool = False
    top: Sequence[Token] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of generated text; the last one of a sequence carries why it ended and the whole text, and the last one
    of a request the counts, the times and what was in effect.

    `index` tells which of several returned sequences the text belongs to. `so_far` counts up to a piece that is not the
    last. `parameters` are the request's, as far as the
    model has room for them. `tokens` are those made since the chunk before, `prompt` those of the prompt, in the first
    chunk; both only where the request asks for them. `stop` is the stop string that ended the sequence, if one did.
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
    """How much a model's engine may take on: sequences in one batch, requests that wait, and bytes of KV cache.

    `findings` are what the engines of this server have found out about this machine, so that it is found out once.
    """

    max_batch: int = 64
    max_queue: int = 64
    kv_cache_bytes: int = 2 * 1024**3
    findings: MutableMapping[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)


# The part of a model's memory that comes and goes with its work, noted before it is taken, bit by bit.
PASSING = "generation"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many bytes a model in memory takes: its weights, copies of some of them that lie as products want them, and
    its KV cache; `peak` is the most that these were together. `devices` are the bytes by device.
    """

    weights: int
    copies: int
    kv_cache: int
    peak: int
    devices: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.copies + self.kv_cache


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a load would take, in bytes, told from config and headers: its weights, copies of some of them, and the KV
    cache that the first generations take. `token_bytes` is the KV cache of one token. `devices` are the bytes by
    device. `conversion` is what another process takes besides, for a while, to convert the model.
    """

    weights: int
    copies: int
    kv_cache: int
    token_bytes: int
    device: str
    dtype: str
    quantization: str | None
    devices: Mapping[str, int]
    backend: str = "torch"
    conversion: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.copies + self.kv_cache


@dataclass(frozen=True, slots=True)
class Pending:
    """What a backend lacks for a model, and what is made while another one answers.

    `key` tells it from any other; `size` gives the bytes that making it takes for a while, for a model of so many
    numbers.
    """

    backend: str
    key: str
    size: Callable[[int], int] = field(compare=False)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Whether a load would succeed: its estimate, the bytes that are to be had on each device now and at most, and the
    models that would go for it. `possible` tells whether it could ever fit.
    """

    estimate: Estimate
    available: Mapping[str, int]
    limits: Mapping[str, int]
    fits: bool
    possible: bool
    evicts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Unloaded:
    """What came of an unload: whether the model was there, the bytes that it had, and those that came back."""

    was_loaded: bool
    bytes: int
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What an engine is doing. `mode` is `batched`, or `one at a time` with the `reason` why; None while it is being
    found out.
    """

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
