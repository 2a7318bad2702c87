"""The body of `POST /v1/responses` as pydantic models. Fields that need a state on the server are refused.

Source: https://platform.openai.com/docs/api-reference/responses/create.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..http.fields import note_ignored
from .bodies import Asked, Limit, StreamOptions, ToolName
from .hints import Hinted, ResponseHints, hint
from .parts import Elsewhere, Part, Replayed, Text, of_an_object, one_of, refuse
from .thinking import Thinks


class InputText(Replayed):
    """Text of a message."""

    place = "input"

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputRefusal(Replayed):
    """An earlier refusal."""

    place = "input"

    type: Literal["refusal"]
    refusal: Text


_TEXT_KINDS = {"input_text": InputText, "output_text": InputText, "text": InputText, "refusal": InputRefusal}

if TYPE_CHECKING:
    ItemContent = str | list[InputText | InputRefusal]
else:
    ItemContent = Text | list[one_of("type", _TEXT_KINDS, "must be input_text or output_text: this server reads text")]


class MessageItem(Replayed):
    """A message."""

    place = "input"

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: ItemContent
    id: Text | None = None
    status: Text | None = None
    phase: Text | None = None


class CallItem(Replayed):
    """A call that the model made."""

    place = "input"

    type: Literal["function_call"]
    call_id: Text = ""
    name: Text
    arguments: Text | dict[str, Any] = ""
    id: Text | None = None
    status: Text | None = None
    parsed_arguments: Any = None  # OpenAI's own client adds it, and sends it back


class ResultItem(Replayed):
    """The result of a call."""

    place = "input"

    type: Literal["function_call_output"]
    call_id: Text = ""
    output: ItemContent = ""
    id: Text | None = None
    status: Text | None = None


class ReasoningItem(Replayed):
    """The model's earlier reasoning; as templates have it, the model does not see it again."""

    place = "input"

    type: Literal["reasoning"]
    id: Text | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    status: Text | None = None


# Items of OpenAI's own tools, and of tools other than functions, in a conversation.
_OF_OTHER_TOOLS = re.compile(r"\w*_(call|output|request|response|list_tools|snapshot|trigger|summary)|compaction")

_ITEMS = {"message": MessageItem, "function_call": CallItem, "function_call_output": ResultItem}
_ALL_ITEMS = {**_ITEMS, "reasoning": ReasoningItem}

if TYPE_CHECKING:
    Item = MessageItem | CallItem | ResultItem | ReasoningItem | Elsewhere
else:
    _ITEM_KINDS = f"must be one of {', '.join(_ALL_ITEMS)}"
    Item = one_of("type", _ALL_ITEMS, _ITEM_KINDS, default="message", others=_OF_OTHER_TOOLS)


class FunctionTool(Replayed):
    """A function that the model may call."""

    place = "tools"

    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return of_an_object(value)


class NamedFunctionTool(Part):
    """A function that must be called."""

    type: Literal["function"]
    name: ToolName


class PlainText(Part):
    """Any text."""

    type: Literal["text"]


class AnyObject(Part):
    """Any JSON object."""

    type: Literal["json_object"]


class OfSchema(Part):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    name: Text
    json_schema: dict[str, Any] = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


_FORMATS = {"text": PlainText, "json_object": AnyObject, "json_schema": OfSchema}

if TYPE_CHECKING:
    Format = PlainText | AnyObject | OfSchema
    Tool = FunctionTool | Elsewhere
else:
    Format = one_of("type", _FORMATS, f"must be one of {', '.join(_FORMATS)}")
    Tool = one_of("type", {"function": FunctionTool}, "must be text: a kind of tool", others=re.compile(r".+"))


class TextOptions(Hinted):
    """The form of the text."""

    place = "text"

    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = hint()


# The values of `include`; only the first has an effect.
_TOLD = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
]


class ResponseBody(ResponseHints, Asked, Thinks):
    """A text or a conversation to answer."""

    input: Text | list[Item] = Field(description="A text, or the items of a conversation.")
    instructions: Text | None = Field(None, description="The system message: how the assistant behaves.")
    max_output_tokens: Limit | None = None
    text: TextOptions | None = None
    tools: list[Tool] | None = Field(None, description="Functions; other tools are left out.")
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[_TOLD] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Nothing is kept between requests.
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        names = [tool.name for tool in self.functions()]
        if len(set(names)) < len(names):
            raise refuse("tools", "holds two functions of one name")
        if isinstance(self.tool_choice, NamedFunctionTool) and self.tool_choice.name not in names:
            raise refuse("tool_choice", f"names '{self.tool_choice.name}', which is not among the tools")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise refuse("tool_choice", "needs tools")
        if not isinstance(self.input, str) and not self.input:
            raise refuse("input", "must not be empty")
        return self

    @model_validator(mode="after")
    def _ignored(self) -> Self:
        for tool in self.tools or ():
            if isinstance(tool, Elsewhere):
                tool.note("tools")
        for item in self.input if isinstance(self.input, list) else ():
            if isinstance(item, Elsewhere):
                item.note("input")
        note_ignored(*(f"include.{told}" for told in self.include or () if told != "message.output_text.logprobs"))
        if not self.functions():
            note_ignored(*(name for name in ("tool_choice", "parallel_tool_calls") if getattr(self, name) is not None))
        if self.stream_options is not None and not self.stream:
            note_ignored("stream_options")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        for name in self.form_fields():
            if self.text is not None and self.text.format is not None and self.text.format.type != "text":
                raise refuse(name, "cannot be given together with text.format")
        self.limited()
        return self

    def functions(self) -> list[FunctionTool]:
        """The tools that the model can use."""
        return [tool for tool in self.tools or () if isinstance(tool, FunctionTool)]

    def limited(self) -> tuple[int | None, str]:
        """The limit of new tokens, and the field that sets it; below 0 is no limit."""
        return self.limit(("max_output_tokens",))
