"""OpenAI's chats as pydantic models, and as Hugging Face's clients send them.

Nothing here works on a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from .bodies import Count, Part, Penalized, Replayed, Text, ToolName, of_an_object, one_of, refuse


class TextPart(Replayed):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class RefusalPart(Replayed):
    """A part of an assistant's message."""

    type: Literal["refusal"]
    refusal: Text


class CalledFunction(Replayed):
    """A call's function."""

    name: ToolName
    arguments: Text = Field(description="A JSON object, as text.")
    parsed_arguments: Any = None  # what OpenAI's own client adds, and sends back


class ToolCall(Replayed):
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


class SystemMessage(Replayed):
    """What the assistant is to be like."""

    role: Literal["system", "developer"]
    content: Content
    name: Text | None = None


class UserMessage(Replayed):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: Text | None = None


class AssistantMessage(Replayed):
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


class ToolMessage(Replayed):
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


class Function(Replayed):
    """A function that the model may call."""

    place = "tools"

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments, an object.")
    strict: bool | None = Field(None, description="Arguments of a call that must be made always fit the schema.")

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return of_an_object(value)


class Tool(Replayed):
    """A tool."""

    place = "tools"

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
