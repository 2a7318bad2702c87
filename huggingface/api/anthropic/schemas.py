"""Anthropic's requests as pydantic models.

Parts that programs send back (messages, blocks, tools) are accepted without their unknown fields. Fields without effect
here are accepted and named as ignored. Must not know models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..http.fields import note_ignored
from ..openai.bodies import Count, Drawn, Stop
from ..openai.parts import Part, Replayed, Text, of_an_object, one_of, refuse

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]

# Messages -------------------------------------------------------------------------------------------------------------


class TextBlock(Replayed):
    """Text."""

    type: Literal["text"]
    text: Text


class ThinkingBlock(Replayed):
    """The assistant's reasoning; the model does not see it again."""

    type: Literal["thinking"]
    thinking: Text | None = None
    signature: Text | None = None


class RedactedThinkingBlock(Replayed):
    """The encrypted reasoning of another server's model."""

    type: Literal["redacted_thinking"]
    data: Text | None = None


class ToolUseBlock(Replayed):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: Text
    name: ToolName
    input: Any = Field(None, description="The arguments, an object.")


class LeftOutBlock(BaseModel):
    """The work of a tool on Anthropic's own servers; the model does not see it."""

    model_config = ConfigDict(extra="ignore")

    type: str


_TEXT_ONLY = "this server reads text"
_SERVERS = (
    *("server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result"),
    *("bash_code_execution_tool_result", "text_editor_code_execution_tool_result", "tool_search_tool_result"),
    *("mcp_tool_use", "mcp_tool_result", "container_upload"),
)
if TYPE_CHECKING:
    PlainText = str | list[TextBlock]
else:
    PlainText = Text | list[one_of("type", {"text": TextBlock}, f"must be 'text': {_TEXT_ONLY}")]


class ToolResultBlock(Replayed):
    """The result of a tool."""

    type: Literal["tool_result"]
    tool_use_id: Text
    content: PlainText | None = None
    is_error: bool | None = None


if TYPE_CHECKING:
    UserContent = str | list[TextBlock | ToolResultBlock]
    SaidContent = str | list[TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | LeftOutBlock]
else:
    _USERS = {"text": TextBlock, "tool_result": ToolResultBlock}
    UserContent = Text | list[one_of("type", _USERS, f"must be one of {', '.join(_USERS)}: {_TEXT_ONLY}")]
    _SAID = {"text": TextBlock, "thinking": ThinkingBlock, "redacted_thinking": RedactedThinkingBlock}
    _SAID |= {"tool_use": ToolUseBlock}
    _WHAT = f"must be one of {', '.join(_SAID)}: {_TEXT_ONLY}"
    SaidContent = Text | list[one_of("type", {**_SAID, **dict.fromkeys(_SERVERS, LeftOutBlock)}, _WHAT)]


class UserTurn(Replayed):
    """The user's text, and the results of tools."""

    role: Literal["user"]
    content: UserContent


class AssistantTurn(Replayed):
    """The assistant's message."""

    role: Literal["assistant"]
    content: SaidContent


class SystemTurn(Replayed):
    """Instructions within a conversation."""

    role: Literal["system"]
    content: PlainText


if TYPE_CHECKING:
    Message = UserTurn | AssistantTurn | SystemTurn
else:
    _ROLES = {"user": UserTurn, "assistant": AssistantTurn, "system": SystemTurn}
    Message = one_of("role", _ROLES, f"must be one of {', '.join(_ROLES)}")

# Tools ----------------------------------------------------------------------------------------------------------------


class ClientTool(Replayed):
    """A tool that the client runs."""

    place = "tools"

    type: Literal["custom"] = "custom"
    name: ToolName
    description: Text | None = None
    input_schema: Annotated[dict[str, Any], BeforeValidator(lambda value: _object_schema(value))] = Field(
        description="JSON schema of the input, an object."
    )


def _object_schema(value: Any) -> Any:
    return of_an_object(value) if isinstance(value, dict) else value


def _without_anthropics(value: Any) -> Any:
    """The client's tools, without Anthropic's own, whose schemas only Claude knows."""
    if not isinstance(value, list):
        return value
    kept = []
    for tool in value:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "custom":
            note_ignored(f"tools.{kind}")
        else:
            kept.append(tool)
    return kept


Tools = Annotated[list[ClientTool], BeforeValidator(_without_anthropics)]


class _Choice(Part):
    disable_parallel_tool_use: bool | None = None


class AutoChoice(_Choice):
    """The model chooses a call or a text."""

    type: Literal["auto"]


class AnyChoice(_Choice):
    """The model makes a call."""

    type: Literal["any"]


class ToolChoice(_Choice):
    """The model calls this tool."""

    type: Literal["tool"]
    name: ToolName


class NoChoice(_Choice):
    """The model makes no call."""

    type: Literal["none"]


if TYPE_CHECKING:
    Choice = AutoChoice | AnyChoice | ToolChoice | NoChoice
else:
    _CHOICES = {"auto": AutoChoice, "any": AnyChoice, "tool": ToolChoice, "none": NoChoice}
    Choice = one_of("type", _CHOICES, f"must be one of {', '.join(_CHOICES)}")

# Thinking and form ----------------------------------------------------------------------------------------------------

Display = Literal["summarized", "omitted"]


class Enabled(Part):
    """Think before the answer."""

    type: Literal["enabled"]
    budget_tokens: Count | None = Field(None, description="No effect: the model itself ends its thinking.")
    display: Display | None = None


class Adaptive(Part):
    """Think as the model does by default."""

    type: Literal["adaptive", "between_tools"]
    display: Display | None = None


class Disabled(Part):
    """Do not think."""

    type: Literal["disabled"]


if TYPE_CHECKING:
    Thinking = Enabled | Adaptive | Disabled
else:
    _THINKING = {"enabled": Enabled, "adaptive": Adaptive, "between_tools": Adaptive, "disabled": Disabled}
    Thinking = one_of("type", _THINKING, f"must be one of {', '.join(_THINKING)}")


class OutputFormat(Part):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")
    name: Text | None = None


class OutputConfig(Part):
    """The form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None
    task_budget: dict[str, Any] | None = None


# Bodies ---------------------------------------------------------------------------------------------------------------

# Fields without effect on this server.
_IGNORED = (
    *("metadata", "service_tier", "cache_control", "container", "context_management", "inference_geo", "speed"),
    *("diagnostics", "fallbacks", "user"),
)


class MessagesBody(Drawn):
    """A conversation to continue."""

    max_tokens: Count = Field(description="Most tokens to generate; fewer where the model's context has no more room.")
    messages: list[Message] = Field(min_length=1)
    system: PlainText | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=64)] | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="The same as output_config.format.")
    mcp_servers: list[Any] | None = None
    user: Text | None = None
    thread: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Text | None = None
    cache_control: dict[str, Any] | None = None
    container: Text | dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    inference_geo: Text | None = None
    speed: Text | None = None
    diagnostics: dict[str, Any] | None = None
    fallbacks: Text | list[Any] | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.mcp_servers:
            raise refuse("mcp_servers", "must be empty: this server connects to no MCP servers")
        if self.thread is not None:
            raise refuse("thread", "cannot be kept: this server holds no conversations, send it whole")
        if self.output_format is not None and self.output_config is not None and self.output_config.format is not None:
            raise refuse("output_format", "cannot be given together with output_config.format")
        names = [tool.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise refuse("tools", "holds two tools of one name")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.name not in names:
            raise refuse("tool_choice", f"names '{self.tool_choice.name}', which is not among the tools")
        if isinstance(self.tool_choice, AnyChoice) and not names:
            raise refuse("tool_choice", "needs tools")
        note_ignored(*(name for name in _IGNORED if getattr(self, name) is not None))
        return self

    @property
    def form(self) -> OutputFormat | None:
        """The form of the text, if the body sets one."""
        return self.output_format or (self.output_config.format if self.output_config is not None else None)


class CountBody(MessagesBody):
    """A conversation whose tokens are counted."""

    max_tokens: Count | None = None  # type: ignore[assignment]


class ModelsPage(BaseModel):
    """The page of models to list."""

    limit: int = Field(20, ge=1, le=1000)
    after_id: str | None = None
    before_id: str | None = None
