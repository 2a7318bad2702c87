"""The body of `POST /v1/responses` as pydantic models: create, stateless. What needs a memory on the server is refused.

Source: https://platform.openai.com/docs/api-reference/responses/create.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from .bodies import Asked, Count, Part, Replayed, StreamOptions, Text, ToolName, of_an_object, one_of, refuse


class InputText(Replayed):
    """Text of a message."""

    place = "input"

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputRefusal(Replayed):
    """A refusal that was given before."""

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
    call_id: Text
    name: ToolName
    arguments: Text
    id: Text | None = None
    status: Text | None = None
    parsed_arguments: Any = None  # what OpenAI's own client adds, and sends back
    caller: None = None
    namespace: None = None
    async_: None = Field(None, alias="async")


class ResultItem(Replayed):
    """What a call gave."""

    place = "input"

    type: Literal["function_call_output"]
    call_id: Text
    output: ItemContent
    caller: None = None
    id: Text | None = None
    status: Text | None = None


class ReasoningItem(Replayed):
    """What the model thought before; models are not shown it again, as their templates have it."""

    place = "input"

    type: Literal["reasoning"]
    id: Text | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: None = None
    status: Text | None = None


_ITEMS = {"message": MessageItem, "function_call": CallItem, "function_call_output": ResultItem}
_ALL_ITEMS = {**_ITEMS, "reasoning": ReasoningItem}

if TYPE_CHECKING:
    Item = MessageItem | CallItem | ResultItem | ReasoningItem
else:
    Item = one_of("type", _ALL_ITEMS, f"must be one of {', '.join(_ALL_ITEMS)}", default="message")


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
    """A function that is to be called."""

    type: Literal["function"]
    name: ToolName


class PlainText(Part):
    """Any text."""

    type: Literal["text"]


class AnyObject(Part):
    """Any JSON object."""

    type: Literal["json_object"]


class OfSchema(Part):
    """JSON of a schema."""

    type: Literal["json_schema"]
    name: Text
    json_schema: dict[str, Any] = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


_FORMATS = {"text": PlainText, "json_object": AnyObject, "json_schema": OfSchema}

if TYPE_CHECKING:
    Format = PlainText | AnyObject | OfSchema
    Tool = FunctionTool
else:
    Format = one_of("type", _FORMATS, f"must be one of {', '.join(_FORMATS)}")
    Tool = one_of("type", {"function": FunctionTool}, "must be 'function': other tools are OpenAI's own")


class TextOptions(Part):
    """What the text is to be."""

    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Part):
    """How much to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: None = None
    generate_summary: None = None


class ResponseBody(Asked):
    """Something to answer."""

    input: Text | list[Item] = Field(description="A text, or the items of a conversation.")
    instructions: Text | None = Field(None, description="What the assistant is to be like.")
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[Literal["message.output_text.logprobs"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    # Nothing is kept between requests: only the value that says so is taken.
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    max_tool_calls: None = None
    prompt: None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        names = [tool.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise refuse("tools", "holds two functions of one name")
        if isinstance(self.tool_choice, NamedFunctionTool) and self.tool_choice.name not in names:
            raise refuse("tool_choice", f"names '{self.tool_choice.name}', which is not among the tools")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise refuse("tool_choice", "needs tools")
        if not isinstance(self.input, str) and not self.input:
            raise refuse("input", "must not be empty")
        formatted = self.text is not None and self.text.format is not None and self.text.format.type != "text"
        if formatted and names and self.tool_choice != "none":
            raise refuse("text", "cannot have a format where tools may be called")
        return self
