"""Base classes of OpenAI's bodies. Must not know models."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ..documented.schemas import KeepAlive
from ..http.fields import note_ignored
from ..parameters.schemas import GenerationParameters
from .hints import Hinted, Hints, hint
from .neighbours import Neighbours
from .parts import Part, Text

MODEL = "Id of a registered model."

# This server's parameters that OpenAI has under another name, or that its answers do not support.
_NOT_OURS = frozenset(
    {
        "max_new_tokens",
        "max_length",
        "min_length",
        "stop_strings",
        "temperature",
        "top_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "num_return_sequences",
        "num_beams",
        "length_penalty",
        "early_stopping",
    }
)


def _without_empty(stops: Any) -> Any:
    """The stop strings without empty ones."""
    return [stop for stop in stops if stop != ""] if isinstance(stops, list) else stops


Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=64), BeforeValidator(_without_empty)]
Timeout = Annotated[float, Field(gt=0, le=86400)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
# Names of tools may be longer than OpenAI's, and may have other servers' colons.
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]

# The number of seeds, less a few for further answers.
_SEEDS = 2**63 - 256


def _checked_limit(value: int) -> int:
    """Checks a limit of tokens.

    Raises:
        ValueError: the limit is 0.
    """
    if value == 0:
        raise ValueError("must be at least 1, or -1 for no limit")
    return value


# The limit of new tokens; LM Studio's and llama.cpp's clients send -1 for no limit.
Limit = Annotated[int, Field(ge=-1, le=2**31 - 1), AfterValidator(_checked_limit)]


class Drawn(Part):
    """The fields of generating bodies in any protocol: the model, the request's handling, this server's parameters."""

    model: str = Field(description=MODEL)
    temperature: float | None = Field(None, ge=0, le=10, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, ge=0, le=1, description="0 takes the likeliest token.")
    stream: bool | None = Field(None, description="Send the answer as it is generated, as server-sent events.")
    timeout: Timeout | None = Field(None, description="Seconds after which the request is cancelled.")
    keep_alive: KeepAlive | None = Field(None, description="Seconds in memory after this use; -1 is for ever.")
    adapter: Text | None = Field(None, min_length=1, description="Which of the model's adapters to use.")
    # This server's parameters, under transformers' names.
    do_sample: bool | None = Field(None, description="False takes the likeliest token.")
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0, or vLLM's -1, is no limit.")
    min_p: float | None = Field(None, ge=0, le=1)
    top_h: float | None = Field(None, gt=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    epsilon_cutoff: float | None = Field(None, ge=0, lt=1)
    eta_cutoff: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0)
    repeat_last_n: int | None = Field(None, ge=-1, le=2**31 - 1, description="Last tokens that penalties look at.")
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=2**31 - 1)
    encoder_repetition_penalty: float | None = Field(None, gt=0)
    encoder_no_repeat_ngram_size: int | None = Field(None, ge=0, le=2**31 - 1)
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    min_new_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    max_time: float | None = Field(None, gt=0)
    eos_token_id: int | list[int] | None = None
    guidance_scale: float | None = Field(None, ge=1, le=100)

    def drawing(self) -> dict[str, Any]:
        """The parameters of sampling from OpenAI's fields."""
        given: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        if self.top_p == 0:  # only the likeliest token
            given["top_p"], given["top_k"] = None, 1
        return {name: value for name, value in given.items() if value is not None}

    def own(self) -> dict[str, Any]:
        """The given fields that are this server's own parameters."""
        names = set(GenerationParameters.model_fields) - _NOT_OURS
        given = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        if self.top_k == -1:
            given["top_k"] = 0
        return given


class Asked(Drawn, Neighbours, Hints):
    """The fields of all of OpenAI's bodies that generate text."""

    def own(self) -> dict[str, Any]:
        """The given fields that are this server's own parameters, also under another server's name."""
        given = super().own()
        if self.ignore_eos is False:
            del given["ignore_eos"]
        return given | self.renamed()[0]


class StreamOptions(Hinted):
    """How to stream."""

    place = "stream_options"

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="Send the counts with every piece.")
    include_obfuscation: bool | None = hint("No effect: this server never obfuscates.")

    @property
    def tells_always(self) -> bool:
        """Whether every piece has the counts; as in vLLM, only if the end has them too."""
        return bool(self.include_usage and self.continuous_usage_stats)


class Penalized(Asked):
    """The further fields of chats and completions."""

    empties = frozenset({"stop", "logit_bias", "metadata"})

    n: int | None = Field(None, ge=1, le=128, description="How many answers.")
    stop: Stop | Stops | None = None
    seed: int | None = Field(None, description="Any integer; seeds that are equal modulo 2^63 - 256 are the same.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[TokenKey, Bias] | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            note_ignored("stream_options")
        return self

    def penalties(self) -> dict[str, Any]:
        """These fields as parameters."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        given = {
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias or None,
            "stop_strings": stops or None,
            "seed": None if self.seed is None else self.seed % _SEEDS,
        }
        return {name: value for name, value in given.items() if value is not None}
