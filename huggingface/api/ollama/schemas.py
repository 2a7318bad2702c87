"""Ollama's bodies as pydantic models. Must not know models.

An empty field (`""`, `[]`) counts as missing, as with Ollama, whose clients send empty fields.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ..http.durations import seconds_of
from ..http.fields import note_ignored
from ..openai.bodies import MODEL, Count, Timeout
from ..openai.history import call_arguments
from ..openai.parts import Part, Replayed, Text, refuse
from ..openai.schemas import Tool as FunctionTool
from .options import OPTIONS, OptionsBody


def _seconds(value: Any) -> Any:
    """Converts a duration to seconds; the field's type checks any other value."""
    if isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value) and value is not True):
        return seconds_of(value)
    return value


KeepAlive = Annotated[
    float, BeforeValidator(_seconds), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
]
Inputs = Annotated[list[Text], Field(max_length=2048)]

_FORMAT = "`json`, or a JSON schema that the answer has to satisfy."

# Ollama's fields that must be empty here, and the reasons.
_UNSERVED = {
    "images": "models here read text",
    "suffix": "a text is continued only at its end",
    "template": "a model has its own chat template, and 'raw' takes a prompt without it",
    "context": "send the conversation to /api/chat",
}


def _unserved(value: Any, info: ValidationInfo) -> Any:
    if value:
        raise ValueError(f"must be left out or empty: {_UNSERVED[info.field_name or '']}")
    return value


def _format(value: Any) -> Any:
    if isinstance(value, str) and value not in ("", "json"):
        raise ValueError("must be 'json' or a JSON schema")
    return value


def _arguments(value: Any) -> Any:
    """A call's arguments as an object; OpenAI's clients send them as JSON text."""
    read = call_arguments(value) if isinstance(value, str) else None
    return value if read is None else read


class OllamaCalled(Replayed):
    """A call's function."""

    name: Text
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)] = Field(default_factory=dict)
    index: int | None = None


class OllamaCall(Replayed):
    """A call that an assistant made."""

    id: Text | None = None
    type: Text | None = None
    function: OllamaCalled


class OllamaTurn(Replayed):
    """A message of a chat."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: Text | None = None
    thinking: Text | None = None
    images: list[Any] | None = Field(None, description="Not served.")
    tool_calls: list[OllamaCall] | None = None
    tool_name: Text | None = Field(None, description="The function that gave this result.")
    tool_call_id: Text | None = None
    name: Text | None = None

    _no_images = field_validator("images")(_unserved)


class OllamaTool(FunctionTool):
    """A tool."""

    type: Literal["function"] = "function"


class OllamaChosen(Part):
    """A function by its name."""

    name: Text


class OllamaChoice(Part):
    """The function that must be called."""

    type: Literal["function"] = "function"
    name: Text | None = None
    function: OllamaChosen | None = None

    @property
    def called(self) -> str:
        """The function's name."""
        return self.name or (self.function.name if self.function is not None else "")


class OllamaAsked(Part):
    """The fields of all bodies that use a model."""

    model: str = Field(min_length=1, description=MODEL)
    options: OptionsBody | None = None
    keep_alive: KeepAlive | None = Field(
        None, description="Time in memory after this use: seconds, or `5m`; 0 is none, -1 for ever."
    )
    # This server's own.
    timeout: Timeout | None = Field(None, description="Seconds after which the request is cancelled.")
    adapter: Text | None = Field(None, min_length=1, description="Which of the model's adapters to use.")


# Other names of an option that clients use.
_ALIASES = {"max_output_tokens": "num_predict", "max_tokens": "num_predict"}


class OllamaAnswering(OllamaAsked):
    """The further fields of chats and completions. Some clients send options beside `options` instead of within it."""

    stream: bool | None = Field(None, description="Send the answer as it is generated, as lines of JSON. The default.")
    format: Annotated[Text | dict[str, Any], AfterValidator(_format)] | None = Field(None, description=_FORMAT)
    think: bool | Literal["low", "medium", "high"] | None = Field(
        None, description="Whether the model thinks before it answers, and how much, if its template supports it."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncate: bool | None = Field(None, description="No effect: a prompt that is too long is refused.")
    shift: Literal[False] | None = Field(None, description="Only false: at the end of the context an answer ends.")

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, value: Any) -> Any:
        """Moves options that stand beside `options` into it; its own values take precedence."""
        if not isinstance(value, dict) or not isinstance(value.get("options") or {}, dict):
            return value
        names = {name: _ALIASES.get(name, name) for name in value}
        beside = {name for name, option in names.items() if option in OPTIONS and value[name] is not None}
        if not beside:
            return value
        options = {name: item for name, item in (value.get("options") or {}).items() if item is not None}
        note_ignored(*(name for name in beside if names[name] in options))
        options = {names[name]: value[name] for name in beside} | options
        return {name: item for name, item in value.items() if name not in beside} | {"options": options}

    @property
    def streams(self) -> bool:
        """Whether to stream the answer."""
        return self.stream is not False

    @property
    def alternatives(self) -> int | None:
        """The number of alternatives for each token; None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _alternatives_of_something(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise refuse("top_logprobs", "needs logprobs to be true")
        return self


class OllamaChatBody(OllamaAnswering):
    """A chat to answer; without messages, the model is loaded, or unloaded where `keep_alive` is 0."""

    messages: list[OllamaTurn] | None = None
    tools: list[OllamaTool] | None = Field(None, description="Functions that the model may call.")
    tool_choice: Literal["none", "auto", "required"] | OllamaChoice | None = Field(
        None, description="OpenAI's field, not Ollama's: whether the model calls a function, or which one."
    )

    @property
    def choice(self) -> str:
        """The choice of a function: `none`, `auto`, `required`, or a name."""
        return self.tool_choice.called if isinstance(self.tool_choice, OllamaChoice) else self.tool_choice or "auto"

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise refuse("tools", "holds two functions of one name")
        if self.choice not in ("none", "auto", *(["required"] if names else ()), *names):
            raise refuse("tool_choice", "is none of the tools")
        return self


class OllamaGenerateBody(OllamaAnswering):
    """A prompt to answer; without one, the model is loaded, or unloaded where `keep_alive` is 0."""

    prompt: Text | None = None
    system: Text | None = Field(None, description="The system message: how the assistant behaves.")
    raw: bool | None = Field(None, description="Use the prompt without the chat template.")
    suffix: Text | None = Field(None, description="Not served.")
    template: Text | None = Field(None, description="Not served.")
    context: list[Any] | None = Field(None, description="Not served.")
    images: list[Any] | None = Field(None, description="Not served.")

    _not_served = field_validator(*_UNSERVED)(_unserved)

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.raw and self.system:
            raise refuse("system", "has no place in a raw prompt")
        return self


class OllamaEmbedBody(OllamaAsked):
    """Texts to make vectors of."""

    input: Text | Inputs = Field(description="A text, or several.")
    truncate: bool | None = Field(None, description="Cut a text that is longer than the model reads. The default.")
    dimensions: Count | None = Field(None, description="Keep only so many numbers of each vector, from its start.")


class OllamaEmbeddingsBody(OllamaAsked):
    """A text to make a vector of: the older route."""

    prompt: Text | None = None


class OllamaNamed(Part):
    """A model by its name."""

    model: Text | None = Field(None, description="The model's name.")
    name: Text | None = Field(None, description="The same; the older name of the field.")

    @property
    def called(self) -> str:
        """The model's name."""
        return self.model or self.name or ""

    @model_validator(mode="after")
    def _is_named(self) -> Self:
        if not self.called:
            raise refuse("model", "is required")
        return self


class OllamaShowBody(OllamaNamed):
    """The model to show."""

    verbose: bool | None = Field(None, description="Show all that its files say.")


class OllamaPullBody(OllamaNamed):
    """The model to download."""

    stream: bool | None = Field(None, description="Send its progress, as lines of JSON. The default.")
    insecure: bool | None = Field(None, description="No effect: the server's setting names the Hub.")


class OllamaDeleteBody(OllamaNamed):
    """The model to remove."""


class BlobPath(BaseModel):
    """A file by its digest."""

    digest: str
