"""Translates Anthropic's conversations into chat messages, and the other fields of a body into a `Wish`.

Pure functions on validated bodies. Must not know models; `openai.conversation` makes the requests to them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...errors import InvalidRequest
from ...types import Constraint
from ..http.fields import note_ignored
from ..openai.conversation import Conversation, Wish
from . import schemas

# Claude Code's first system block, for its maker's billing; it changes with each version, and models do not need it.
_BILLING = "x-anthropic-billing-header:"

# Efforts that templates with `reasoning_effort` do not know, and the nearest that they know.
_EFFORTS = {"xhigh": "high", "max": "high"}

# Variables of templates that switch thinking on or off.
_SWITCHES = ("enable_thinking", "thinking")


def chat_messages(body: schemas.MessagesBody) -> list[dict[str, Any]]:
    """The conversation as chat messages; neighbouring messages of one role become one.

    Raises:
        InvalidRequest: the conversation holds only instructions.
    """
    turns = _Turns()
    turns.instruct(body.system)
    for message in body.messages:
        match message:
            case schemas.SystemTurn():
                turns.instruct(message.content)
            case schemas.UserTurn():
                turns.add_user(message.content)
            case schemas.AssistantTurn():
                turns.add_assistant(message.content)
    if not turns.said:
        raise InvalidRequest("Invalid value for field 'messages': holds no message with text", "messages")
    system = [{"role": "system", "content": "\n".join(turns.system)}] if turns.system else []
    return [*system, *turns.said]


class _Turns:
    """Collects the messages of a chat."""

    def __init__(self) -> None:
        self.system: list[str] = []
        self.said: list[dict[str, Any]] = []
        self._ids: dict[str, str] = {}

    def instruct(self, content: schemas.PlainText | None) -> None:
        """Adds instructions. Few templates allow them within a conversation, so there they join the user's messages."""
        texts = [block.text for block in _blocks(content or "")]
        kept = [text for text in texts if text and not text.startswith(_BILLING)]
        if any(text.startswith(_BILLING) for text in texts):
            note_ignored("system.x-anthropic-billing-header")
        if not kept:
            return
        text = "\n".join(kept)
        if self.said:
            self._say("user", f"<system-reminder>\n{text}\n</system-reminder>")
        else:
            self.system.append(text)

    def add_user(self, content: schemas.UserContent) -> None:
        """Adds the user's text, and the results of tools."""
        for block in _blocks(content):
            if isinstance(block, schemas.ToolResultBlock):
                text = _text(block.content)
                text = f"Error: {text}" if block.is_error else text
                self.said.append({"role": "tool", "content": text, "tool_call_id": self._id(block.tool_use_id)})
            else:
                self._say("user", block.text)

    def add_assistant(self, content: schemas.SaidContent) -> None:
        """Adds the assistant's text and calls."""
        for block in _blocks(content):
            match block:
                case schemas.TextBlock():
                    self._say("assistant", block.text)
                case schemas.ToolUseBlock():
                    function = {"name": block.name, "arguments": _arguments(block.input)}
                    call = {"id": self._id(block.id), "type": "function", "function": function}
                    self._turn("assistant").setdefault("tool_calls", []).append(call)
                case schemas.LeftOutBlock():
                    note_ignored(f"messages.{block.type}")

    def _say(self, role: str, text: str) -> None:
        if not text:
            return
        turn = self._turn(role)
        turn["content"] = f"{turn['content']}\n{text}" if turn["content"] else text

    def _turn(self, role: str) -> dict[str, Any]:
        if not self.said or self.said[-1]["role"] != role:
            self.said.append({"role": role, "content": ""})
        return self.said[-1]

    def _id(self, id_: str) -> str:
        """A call's id for templates: Mistral's accept only nine letters and digits."""
        return self._ids.setdefault(id_, f"{len(self._ids):09d}")


def _blocks(content: Any) -> Sequence[Any]:
    return [schemas.TextBlock(type="text", text=content)] if isinstance(content, str) else content


def _text(content: schemas.PlainText | None) -> str:
    return "\n".join(block.text for block in _blocks(content or ""))


def _arguments(value: Any) -> dict[str, Any]:
    """A call's arguments as an object. Any other value is wrapped in one, since a client cannot correct its history."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {"input": value}
    if isinstance(value, dict):
        return value
    return {} if value is None else {"input": value}


# Wishes ---------------------------------------------------------------------------------------------------------------


def wish_of(body: schemas.MessagesBody) -> Wish:
    """Translates the body's fields about the answer into a `Wish`."""
    form, choice = body.form, body.tool_choice
    kinds = {"auto": "auto", "any": "required", "none": "none"}
    named = choice.name if isinstance(choice, schemas.ToolChoice) else kinds[choice.type] if choice else "auto"
    hints: dict[str, Any] = {}
    if isinstance(body.thinking, schemas.Enabled | schemas.Disabled):
        hints |= dict.fromkeys(_SWITCHES, body.thinking.type == "enabled")
    if (effort := _effort(body)) is not None:
        hints["reasoning_effort"] = _EFFORTS.get(effort, effort)
    return Wish(
        form=None if form is None else Constraint("json_schema", form.json_schema),
        tools=[_tool(tool) for tool in body.tools or ()],
        choice=named,
        parallel=not (choice is not None and choice.disable_parallel_tool_use),
        hints=hints,
    )


def _tool(tool: schemas.ClientTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _effort(body: schemas.MessagesBody) -> str | None:
    return body.output_config.effort if body.output_config is not None else None


def hides_thinking(body: schemas.MessagesBody, conversation: Conversation) -> bool:
    """Whether to leave reasoning out of the answer, because the model may think although the request disables it.

    Also names, in the response's header, the fields about thinking that have no effect on this model.
    """
    thinking = body.thinking
    switched = any(name in conversation.variables for name in _SWITCHES)
    if isinstance(thinking, schemas.Enabled) and thinking.budget_tokens is not None:
        note_ignored("thinking.budget_tokens")
    if thinking is not None and not switched and (isinstance(thinking, schemas.Disabled) or not conversation.thinks):
        note_ignored("thinking")
    if _effort(body) is not None and "reasoning_effort" not in conversation.variables:
        note_ignored("output_config.effort")
    if body.output_config is not None and body.output_config.task_budget is not None:
        note_ignored("output_config.task_budget")
    return isinstance(thinking, schemas.Disabled)
