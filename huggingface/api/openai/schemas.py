"""OpenAI's bodies as pydantic models. A field that means nothing here is refused by its name, and so is an unknown one.

`null` stands for a field that is left out, as OpenAI has it. Nothing here works on a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..parameters import GenerationParameters

_MODEL = "Id of a registered model."

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


class Part(BaseModel):
    """Some of a body."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)


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

    model: str = Field(description=_MODEL)
    temperature: float | None = Field(None, ge=0, le=10, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = Field(None, description="Send the answer as it is made, as server-sent events.")
    user: Text | None = Field(None, description="Who asks; it makes no difference.")
    timeout: Timeout | None = Field(None, description="Seconds after which no answer is wanted any more.")
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


# Chats ----------------------------------------------------------------------------------------------------------------


class TextPart(Part):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class RefusalPart(Part):
    """A part of an assistant's message."""

    type: Literal["refusal"]
    refusal: Text


class CalledFunction(Part):
    """A call's function."""

    name: ToolName
    arguments: Text = Field(description="A JSON object, as text.")
    parsed_arguments: Any = None  # what OpenAI's own client adds, and sends back


class ToolCall(Part):
    """A call that an assistant made."""

    id: Text
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None  # some clients send back what they got from a stream


_TEXT_ONLY = "must be 'text': this server reads text"
if TYPE_CHECKING:
    Content = str | list[TextPart]
    SaidContent = str | list[TextPart | RefusalPart]
else:
    Content = Text | list[one_of("type", {"text": TextPart}, _TEXT_ONLY)]
    SaidContent = Text | list[one_of("type", {"text": TextPart, "refusal": RefusalPart}, _TEXT_ONLY)]


class SystemMessage(Part):
    """What the assistant is to be like."""

    role: Literal["system", "developer"]
    content: Content
    name: Text | None = None


class UserMessage(Part):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: Text | None = None


class AssistantMessage(Part):
    """What the assistant said."""

    role: Literal["assistant"]
    content: SaidContent | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None
    tool_calls: list[ToolCall] | None = None
    name: Text | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    parsed: Any = None  # what OpenAI's own client adds, and sends back
    reasoning: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.refusal is None and not self.tool_calls:
            raise refuse("content", "is required where there are no tool_calls")
        return self


class ToolMessage(Part):
    """What a tool gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Text
    name: Text | None = None


_ROLES: dict[str, type[BaseModel]] = {
    "system": SystemMessage,
    "developer": SystemMessage,
    "user": UserMessage,
    "assistant": AssistantMessage,
    "tool": ToolMessage,
}
if TYPE_CHECKING:
    Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage
else:
    Message = one_of("role", _ROLES, f"must be one of {', '.join(_ROLES)}")


class Function(Part):
    """A function that the model may call."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments, an object.")
    strict: bool | None = Field(None, description="Arguments of a call that must be made always fit the schema.")

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return of_an_object(value)


class Tool(Part):
    """A tool."""

    type: Literal["function"]
    function: Function


if TYPE_CHECKING:
    AnyTool = Tool
else:
    AnyTool = one_of("type", {"function": Tool}, "must be 'function': other tools are OpenAI's own")


class NamedFunction(Part):
    """A function by its name."""

    name: ToolName


class NamedTool(Part):
    """A tool that is to be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class NamedSchema(Part):
    """A JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Part):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Part):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Part):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


if TYPE_CHECKING:
    ResponseFormat = TextFormat | ObjectFormat | SchemaFormat
else:
    ResponseFormat = one_of(
        "type",
        {"text": TextFormat, "json_object": ObjectFormat, "json_schema": SchemaFormat},
        "must be one of text, json_object, json_schema",
    )


class ChatBody(Penalized):
    """A chat to answer."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[AnyTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template.")
    # They make no difference here, and so are taken with the one value that says so, or as mere names.
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    verbosity: Literal["medium"] | None = None
    # They mean nothing here, and null is the same as nothing.
    audio: None = None
    function_call: None = None
    functions: None = None
    prediction: None = None
    prompt_cache_retention: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", "needs logprobs to be true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise refuse("max_tokens", "says something else than max_completion_tokens")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise refuse("tools", "holds two functions of one name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise refuse("tool_choice", f"names '{self.tool_choice.function.name}', which is not among the tools")
        if self.tool_choice not in (None, "none") and not names:
            raise refuse("tool_choice", "needs tools")
        if self.parallel_tool_calls is not None and not names:
            raise refuse("parallel_tool_calls", "needs tools")
        formatted = self.response_format is not None and self.response_format.type != "text"
        if formatted and names and self.tool_choice != "none":
            raise refuse("response_format", "cannot be had from an answer that may call a tool")
        return self


class HubObjectFormat(Part):
    """A JSON object, perhaps of a schema, as TGI's clients ask for it."""

    type: Literal["json_object", "json"]
    value: dict[str, Any] | None = None


class HubRegexFormat(Part):
    """Text of a regular expression, as TGI's clients ask for it."""

    type: Literal["regex"]
    value: Text


if TYPE_CHECKING:
    HubFormat = TextFormat | HubObjectFormat | HubRegexFormat | SchemaFormat
else:
    _HUB_FORMATS = {"text": TextFormat, "json_schema": SchemaFormat, "regex": HubRegexFormat}
    _HUB_FORMATS |= {"json_object": HubObjectFormat, "json": HubObjectFormat}
    HubFormat = one_of("type", _HUB_FORMATS, f"must be one of {', '.join(_HUB_FORMATS)}")


class HubChatBody(ChatBody):
    """A chat to answer, by a model that the address names."""

    model: str | None = Field(None, description="What the client calls the model.")  # type: ignore[assignment]
    response_format: HubFormat | None = None  # type: ignore[assignment]


# Completions ----------------------------------------------------------------------------------------------------------

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
MOST_PROMPTS = 2048


def _texts_or_tokens(value: Any, what: str) -> Any:
    """See that a value is a text, or a list of some; which kind of list, the field's type says."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("rule", "{reason}", {"reason": "must be text, or a list of texts or tokens"})
    if isinstance(value, list):
        if not value:
            raise ValueError("must not be empty")
        if not all(isinstance(item, int) for item in value) and len(value) > MOST_PROMPTS:
            raise ValueError(f"must hold at most {MOST_PROMPTS} {what}")
    return value


class CompletionBody(Penalized):
    """Text to continue."""

    prompt: Text | list[Text] | list[TokenId] | list[TokenIds] = Field(
        description="A text, several, or the same as token ids."
    )
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="16 where nothing else sets a limit.")
    echo: bool | None = Field(None, description="Give the prompt back before the text.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives to name for each token.")
    best_of: int | None = Field(None, ge=1, le=128, description="Make so many, and answer with the likeliest `n`.")
    suffix: None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _of_one_kind(cls, value: Any) -> Any:
        return _texts_or_tokens(value, "prompts")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise refuse("best_of", "must be at least n")
            if self.stream and self.best_of > (self.n or 1):
                raise refuse("best_of", "cannot be streamed")
        if self.max_tokens == 0 and not self.echo:
            raise refuse("max_tokens", "must be at least 1, unless echo asks for the prompt")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class HubCompletionBody(CompletionBody):
    """Text to continue, by a model that the address names: what huggingface.js sends for a text generation."""

    model: str | None = Field(None, description="What the client calls the model.")  # type: ignore[assignment]
    return_full_text: bool | None = Field(None, description="The same as echo.")

    @model_validator(mode="after")
    def _echoed_once(self) -> Self:
        if self.echo is not None and self.return_full_text not in (None, self.echo):
            raise refuse("return_full_text", "says something else than echo")
        return self


# Embeddings -----------------------------------------------------------------------------------------------------------

Filled = Annotated[str, Field(min_length=1)]


class EmbeddingBody(Part):
    """Texts to make vectors of."""

    model: str = Field(description=_MODEL)
    input: Filled | list[Filled] | list[TokenId] | list[TokenIds] = Field(
        description="A text, several, or the same as token ids, which are taken as they are."
    )
    dimensions: Count | None = Field(None, description="The first so many of each vector's numbers.")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: little-endian float32.")
    user: Text | None = Field(None, description="Who asks; it makes no difference.")
    truncate: bool | None = Field(None, description="Cut a text that is longer than the model reads.")
    prompt_name: Text | None = Field(None, description="Which of a sentence-transformers model's prompts to use.")
    timeout: Timeout | None = Field(None, description="Seconds after which no answer is wanted any more.")

    @field_validator("input", mode="before")
    @classmethod
    def _of_one_kind(cls, value: Any) -> Any:
        return _texts_or_tokens(value, "texts")


class Document(Part):
    """A document."""

    text: Text


class RerankBody(Part):
    """Documents to sort by how well they answer a query."""

    model: str = Field(description=_MODEL)
    query: Filled
    documents: list[Text | Document] = Field(min_length=1, max_length=MOST_PROMPTS)
    top_n: Count | None = Field(None, description="Only the best so many.")
    return_documents: bool | None = Field(None, description="Give the documents back, too.")
    truncate: bool | None = Field(None, description="Cut documents that are longer than the model reads.")
    timeout: Timeout | None = Field(None, description="Seconds after which no answer is wanted any more.")
