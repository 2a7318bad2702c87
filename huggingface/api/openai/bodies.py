"""What OpenAI's bodies have in common. Nothing here works on a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from ..fields import Fields
from ..parameters import GenerationParameters

MODEL = "Id of a registered model."

# Own parameters that OpenAI has under another name, or that cannot be had with its answers.
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

Text = Annotated[str, Field(min_length=0)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=64)]
Timeout = Annotated[float, Field(gt=0, le=86400)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def refuse(field: str, reason: str) -> PydanticCustomError:
    """An error of a rule over several fields."""
    return PydanticCustomError("rule", "{reason}", {"field": field, "reason": reason})


# Seeds there are here, with some left for further answers.
_SEEDS = 2**63 - 256


def of_an_object(parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """See that the schema of a function's arguments is one of an object.

    Raises:
        ValueError: it is not.
    """
    if parameters is not None and parameters.get("type", "object") != "object":
        raise ValueError("must be the schema of an object")
    return parameters


class Part(Fields):
    """Some of a body."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)


class Replayed(Part):
    """What a program sends back as it got it, from here or elsewhere: unknown fields are dropped."""

    drops = True
    place = "messages"


def one_of(field: str, kinds: Mapping[str, type[BaseModel]], reason: str, default: str | None = None) -> Any:
    """One of several models, told apart by a field; one that is none of them is refused by that field's name.

    `default` is the kind of those that lack the field.
    """

    def kind_of(value: Any) -> Any:
        return value.get(field, default) if isinstance(value, dict) else getattr(value, field, default)

    def check(value: Any) -> Any:
        if not isinstance(value, dict | BaseModel):
            raise PydanticCustomError("rule", "{reason}", {"reason": "must be an object"})
        if isinstance(value, dict) and kind_of(value) not in list(kinds):
            raise refuse(field, reason)
        return value

    members: Any = None
    for kind, model in kinds.items():
        member: Any = Annotated[model, Tag(f"[{kind}]")]  # the brackets keep it out of what a complaint calls the field
        members = member if members is None else members | member
    if len(kinds) == 1:
        return Annotated[next(iter(kinds.values())), BeforeValidator(check)]
    return Annotated[members, Discriminator(lambda value: f"[{kind_of(value)}]"), BeforeValidator(check)]


class Asked(Part):
    """What all bodies that make text have."""

    model: str = Field(description=MODEL)
    temperature: float | None = Field(None, ge=0, le=10, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = Field(None, description="Send the answer as it is made, as server-sent events.")
    user: Text | None = Field(None, description="Who asks; it makes no difference.")
    timeout: Timeout | None = Field(None, description="Seconds after which no answer is wanted any more.")
    keep_alive: float | None = Field(
        None, ge=-1, le=10**9, description="Seconds in memory after this use; -1 is for ever."
    )
    adapter: Text | None = Field(None, min_length=1, description="Which of the model's adapters to use.")
    # Ours: transformers' own, under its names.
    do_sample: bool | None = Field(None, description="False takes the likeliest token.")
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    top_h: float | None = Field(None, gt=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    epsilon_cutoff: float | None = Field(None, ge=0, lt=1)
    eta_cutoff: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0)
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
        """How tokens are to be drawn, in OpenAI's fields."""
        given = {"temperature": self.temperature, "top_p": self.top_p}
        return {name: value for name, value in given.items() if value is not None}

    def own(self) -> dict[str, Any]:
        """The fields that are this server's own parameters, as they were given."""
        names = set(GenerationParameters.model_fields) - _NOT_OURS
        return {name: value for name in names if (value := getattr(self, name, None)) is not None}


class StreamOptions(Part):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Penalized(Asked):
    """What chats and completions have besides."""

    n: int | None = Field(None, ge=1, le=128, description="How many answers.")
    stop: Stop | Stops | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[TokenKey, Bias] | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "is for streams only")
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
