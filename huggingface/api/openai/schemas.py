"""The bodies of OpenAI's chats as pydantic models, also in the form of Hugging Face's clients.

Must not know models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, Field, field_validator, model_validator

from ..http.fields import note_ignored
from .bodies import Limit, Penalized, ToolName
from .hints import ChatHints
from .parts import Part, Replayed, Text, of_an_object, one_of, refuse
from .thinking import Thinks


class TextPart(Replayed):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


class RefusalPart(Replayed):
    """A part of an assistant's message."""

    type: Literal["refusal"]
    refusal: Text


class ThinkingPart(Replayed):
    """The assistant's reasoning, which other servers put among the parts of a message."""

    type: Literal["thinking", "reasoning"]
    text: Text = Field("", validation_alias=AliasChoices("thinking", "text"))


class HiddenThinkingPart(Replayed):
    """Reasoning that only its provider can read; it is dropped."""

    type: Literal["redacted_thinking"]


class CalledFunction(Replayed):
    """A call's function."""

    name: Text
    arguments: Text | dict[str, Any] = Field(
        "", description="A JSON object as text; the model sees any other value as text."
    )
    parsed_arguments: Any = None  # OpenAI's own client adds it, and sends it back


class ToolCall(Replayed):
    """A call that an assistant made."""

    id: Text = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # some clients send back the calls of a stream


_TEXT_ONLY = "must be 'text': this server reads text"
if TYPE_CHECKING:
    Content = str | list[TextPart]
    SaidContent = str | list[TextPart | RefusalPart | ThinkingPart | HiddenThinkingPart]
else:
    _TEXTS = dict.fromkeys(("text", "input_text", "output_text"), TextPart)
    _SAID = {**_TEXTS, "refusal": RefusalPart, "thinking": ThinkingPart, "reasoning": ThinkingPart}
    Content = Text | list[one_of("type", _TEXTS, _TEXT_ONLY)]
    SaidContent = Text | list[one_of("type", {**_SAID, "redacted_thinking": HiddenThinkingPart}, _TEXT_ONLY)]


class SystemMessage(Replayed):
    """The system message: how the assistant behaves."""

    role: Literal["system", "developer"]
    content: Content
    name: Text | None = None


class UserMessage(Replayed):
    """The user's message."""

    role: Literal["user"]
    content: Content
    name: Text | None = None


class AssistantMessage(Replayed):
    """The assistant's message."""

    role: Literal["assistant"]
    content: SaidContent | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None
    tool_calls: list[ToolCall] | None = None
    name: Text | None = None
    function_call: CalledFunction | None = Field(None, description="A call in OpenAI's older form.")
    annotations: list[Any] | None = None
    parsed: Any = None  # OpenAI's own client adds it, and sends it back
    reasoning: Text | None = None


class ToolMessage(Replayed):
    """The result of a tool."""

    role: Literal["tool"]
    content: Content = ""
    tool_call_id: Text = ""
    name: Text | None = None


class FunctionMessage(Replayed):
    """The result of a function in OpenAI's older form."""

    role: Literal["function"]
    name: Text
    content: Content = ""


_ROLES: dict[str, type[BaseModel]] = {
    "system": SystemMessage,
    "developer": SystemMessage,
    "user": UserMessage,
    "assistant": AssistantMessage,
    "tool": ToolMessage,
    "function": FunctionMessage,
}
if TYPE_CHECKING:
    Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage
else:
    Message = one_of("role", _ROLES, f"must be one of {', '.join(_ROLES)}")


class Function(Replayed):
    """A function that the model may call."""

    place = "tools"

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments, an object.")
    strict: bool | None = Field(None, description="No effect: a required call's arguments always satisfy the schema.")

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return of_an_object(value)


class Tool(Replayed):
    """A tool."""

    place = "tools"

    type: Literal["function"] = "function"
    function: Function


if TYPE_CHECKING:
    AnyTool = Tool
else:
    AnyTool = one_of("type", {"function": Tool}, "must be 'function': other tools are OpenAI's own", "function")


class NamedFunction(Part):
    """A function by its name."""

    name: ToolName


class NamedTool(Part):
    """A tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class NamedSchema(Part):
    """A JSON schema."""

    name: Text | None = None
    description: Text | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Part):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Part):
    """A JSON object, or JSON that satisfies a schema (llama.cpp's `schema`, TGI's `value`)."""

    type: Literal["json_object", "json"]
    value: dict[str, Any] | None = Field(None, validation_alias=AliasChoices("value", "schema"))


class SchemaFormat(Part):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexFormat(Part):
    """Text that matches a regular expression (TGI's `value`, others' `pattern` or `regex`)."""

    type: Literal["regex"]
    value: Text = Field(min_length=1, validation_alias=AliasChoices("value", "pattern", "regex"))


class GrammarFormat(Part):
    """Text that follows a grammar: GBNF, or llguidance's Lark."""

    type: Literal["grammar"]
    value: Text = Field(min_length=1, validation_alias=AliasChoices("grammar", "value"))


if TYPE_CHECKING:
    ResponseFormat = TextFormat | ObjectFormat | SchemaFormat | RegexFormat | GrammarFormat
else:
    _FORMATS = {"text": TextFormat, "json_object": ObjectFormat, "json": ObjectFormat, "json_schema": SchemaFormat}
    _FORMATS |= {"regex": RegexFormat, "grammar": GrammarFormat}
    ResponseFormat = one_of("type", _FORMATS, f"must be one of {', '.join(_FORMATS)}")


class ChatBody(Penalized, Thinks, ChatHints):
    """A chat to answer."""

    empties = Penalized.empties | {"functions", "suffix"}

    messages: list[Message] = Field(min_length=1)
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[AnyTool] | None = None
    tool_choice: Literal["none", "auto", "required", "any"] | NamedTool | None = Field(
        None, description="`any` is Mistral's word for `required`."
    )
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template.")
    add_generation_prompt: bool | None = Field(None, description="Whether to begin the assistant's turn.")
    continue_final_message: bool | None = Field(None, description="Whether to continue the last message.")
    # Not supported; only null, which means not given, is accepted.
    audio: None = None
    functions: None = None
    suffix: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            if self.top_logprobs:
                raise refuse("top_logprobs", "needs logprobs to be true")
            note_ignored("top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise refuse("continue_final_message", "cannot be given together with add_generation_prompt")
        self.limited()
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise refuse("tools", "holds two functions of one name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise refuse("tool_choice", f"names '{self.tool_choice.function.name}', which is not among the tools")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise refuse("tool_choice", "needs tools")
        if not names:
            note_ignored(*(name for name in ("tool_choice", "parallel_tool_calls") if getattr(self, name) is not None))
        return self

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        for name in self.form_fields():
            if self.response_format is not None and self.response_format.type != "text":
                raise refuse(name, "cannot be given together with response_format")
        return self

    def limited(self) -> tuple[int | None, str]:
        """The limit of new tokens, and the field that sets it; below 0 is no limit."""
        return self.limit(("max_completion_tokens", "max_tokens"))


class HubChatBody(ChatBody):
    """A chat to answer, by a model that the address names."""

    model: str | None = Field(None, description="The client's name for the model.")  # type: ignore[assignment]
