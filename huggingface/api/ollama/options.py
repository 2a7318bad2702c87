"""Ollama's `options` in ONE table, which gives both the body's schema and its translation.

An option is one of this server's parameters under another name; or it has no effect (it is accepted, and named in the
response header); or it is accepted only with the values that this server always has. Source: `api/types.go` and
"Parameters" in `docs/modelfile` of Ollama. Pure except for the header's names. Must not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, create_model

from ...errors import InvalidRequest
from ..http.fields import note_ignored
from ..openai.bodies import Stop, Stops
from ..openai.parts import Part

# The parameters that an option sets; None removes a parameter, even a registered one.
Asked = Mapping[str, Any]

_SEEDS = 2**63 - 256  # as many as the other routes take


def _few(value: Any) -> Any:
    """The stop strings, one or several, without empty ones."""
    if isinstance(value, list):
        return [text for text in value if text != ""]
    return [] if value == "" else value


Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Texts = Annotated[Stop | Stops, BeforeValidator(_few)]


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its type, its description, and one of three kinds.

    `asks` returns the parameters for a value. `so_anyway` are the values that match the server's fixed behaviour;
    others are refused with `reason`. With neither, the option has no effect.
    """

    kind: Any
    text: str
    parameter: str | None = None  # the parameter's name in the engine's errors
    asks: Callable[[Any], Asked] | None = None
    so_anyway: Collection[Any] = ()
    reason: str = ""


def _same(name: str) -> Callable[[Any], Asked]:
    return lambda value: {name: value}


def _max_tokens(value: int) -> Asked:
    return {"max_new_tokens": value} if value > 0 else {"max_new_tokens": None, "max_length": None}


def _share(value: float) -> Asked:
    return {"top_p": min(value, 1.0)} if value > 0 else {"top_k": 1}


def _typical(value: float) -> Asked:
    return {"typical_p": value} if 0 < value < 1 else {"typical_p": None}


def _stops(value: str | list[str]) -> Asked:
    return {"stop_strings": value} if value else {}


def _seed(value: int) -> Asked:
    return {"seed": value % _SEEDS if value >= 0 else None}


_IDLE = "No effect."
_SAMPLING = "this way of sampling is not supported"

OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        # Options that set parameters.
        "num_predict": Option(Whole, "Most tokens to generate; below 1: until the end.", "max_new_tokens", _max_tokens),
        "temperature": Option(float, "0 takes the likeliest token.", "temperature", _same("temperature")),
        "top_k": Option(
            Whole,
            "Sample among this many likeliest tokens; below 1 is no limit.",
            "top_k",
            lambda value: {"top_k": min(max(value, 0), 2**31 - 1)},
        ),
        "top_p": Option(float, "Sample among the likeliest tokens that add up to this share.", "top_p", _share),
        "min_p": Option(float, "Sample among tokens at least this share of the likeliest.", "min_p", _same("min_p")),
        "typical_p": Option(float, "Sample among the most typical tokens; 1 is off.", "typical_p", _typical),
        "seed": Option(Whole, "Seed of the sampling; below 0 is a random one.", "seed", _seed),
        "stop": Option(Texts, "Text, or several, at which the answer ends.", "stop_strings", _stops),
        "repeat_penalty": Option(
            float,
            "Above 1 makes tokens of prompt and answer less likely.",
            "repetition_penalty",
            _same("repetition_penalty"),
        ),
        "presence_penalty": Option(
            float, "Subtracted for tokens generated so far.", "presence_penalty", _same("presence_penalty")
        ),
        "frequency_penalty": Option(float, "The same for each time.", "frequency_penalty", _same("frequency_penalty")),
        "repeat_last_n": Option(
            Whole,
            "How many of the last tokens are penalized; -1 all, 0 none.",
            "repeat_last_n",
            _same("repeat_last_n"),
        ),
        # See `Wanted`.
        "num_ctx": Option(Whole, "A prompt of more tokens is refused; the context itself is the model's."),
        # Options that are accepted only with the server's fixed behaviour.
        "penalize_newline": Option(
            bool, "Only true.", so_anyway=(True,), reason="newlines are penalized as all tokens"
        ),
        "mirostat": Option(Whole, "Only 0.", so_anyway=(0,), reason=_SAMPLING),
        "tfs_z": Option(float, "Only 1.", so_anyway=(1.0,), reason=_SAMPLING),
        "vocab_only": Option(bool, "Only false.", so_anyway=(False,), reason="a model is loaded with its weights"),
        "embedding_only": Option(bool, "Only false.", so_anyway=(False,), reason="the route says what is computed"),
        # How another server computes: no difference to an answer.
        "mirostat_tau": Option(float, _IDLE),
        "mirostat_eta": Option(float, _IDLE),
        "num_keep": Option(Whole, _IDLE),
        "num_batch": Option(Whole, _IDLE),
        "num_gpu": Option(Whole, _IDLE),
        "main_gpu": Option(Whole, _IDLE),
        "num_thread": Option(Whole, _IDLE),
        "numa": Option(bool, _IDLE),
        "low_vram": Option(bool, _IDLE),
        "f16_kv": Option(bool, _IDLE),
        "logits_all": Option(bool, _IDLE),
        "use_mmap": Option(bool, _IDLE),
        "use_mlock": Option(bool, _IDLE),
        "draft_num_predict": Option(Whole, _IDLE),
        "use_imagegen_runner": Option(bool, _IDLE),
    }
)

# The engine's names of parameters, and the fields that its errors name instead.
NAMES: Mapping[str, str] = MappingProxyType(
    {option.parameter: f"options.{name}" for name, option in OPTIONS.items() if option.parameter is not None}
)


class Options(Part):
    """Parameters of the generation. Missing ones come from the model's registered parameters, or from its own."""

    place = "options"


# The table as fields of the class, which pydantic reads; mypy does not know their types.
_FIELDS: dict[str, Any] = {
    name: (option.kind | None, Field(None, description=option.text)) for name, option in OPTIONS.items()
}
OptionsBody: type[Options] = create_model("OptionsBody", __base__=Options, __module__=__name__, **_FIELDS)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The effect of options: `asked` are parameters, `cleared` the names of parameters to remove."""

    asked: Mapping[str, Any] = field(default_factory=dict)
    cleared: frozenset[str] = frozenset()
    num_ctx: int | None = None

    @classmethod
    def of(cls, given: Options | None) -> Wanted:
        """Reads options; names those without effect in the response's header.

        Raises:
            InvalidRequest: an option asks for something that is not supported.
        """
        values = given.model_dump(exclude_none=True) if given is not None else {}
        asked: dict[str, Any] = {}
        for name, value in values.items():
            option = OPTIONS[name]
            if option.asks is not None:
                asked |= option.asks(value)
            elif option.so_anyway and value not in option.so_anyway:
                raise refused(name, f"must be {_shown(option.so_anyway)}: {option.reason}")
            elif name != "num_ctx":
                note_ignored(f"options.{name}")
        cleared = frozenset(name for name, value in asked.items() if value is None)
        asked = {name: value for name, value in asked.items() if value is not None}
        return cls(asked, cleared, values.get("num_ctx"))

    def over(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The effective parameters without the cleared ones."""
        return {name: value for name, value in parameters.items() if name not in self.cleared}

    def check_prompt(self, tokens: int) -> None:
        """Checks that a prompt fits into the requested context.

        Raises:
            InvalidRequest: the prompt is longer; it is never cut.
        """
        if self.num_ctx is None:
            return
        if tokens > self.num_ctx:
            raise refused("num_ctx", f"the prompt has {tokens} tokens, and is not cut to {self.num_ctx}")
        note_ignored("options.num_ctx")


def refused(name: str, reason: str) -> InvalidRequest:
    """The error for an option that cannot be honoured."""
    return InvalidRequest(f"Invalid value for field 'options.{name}': {reason}", f"options.{name}")


def _shown(values: Collection[Any]) -> str:
    return " or ".join(str(value).lower() if isinstance(value, bool) else f"{value:g}" for value in values)
