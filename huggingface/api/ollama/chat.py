"""`POST /api/chat`: answers a chat in Ollama's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import Response

from ...served import ServedModel
from ..http.fields import note_ignored
from ..openai.chat import plain_tool
from ..openai.conversation import Conversation, Wish
from .answering import Said, Source, answer, form_of, idle
from .names import find
from .schemas import OllamaChatBody, OllamaTurn
from .thinking import variables


def chat(body: OllamaChatBody) -> dict[str, Any] | Response:
    """Answers a chat; without messages, loads or unloads the model.

    Raises: the errors of loading and generating.
    """
    record = find(body.model)
    if not body.messages:
        return idle(record, body, "chat", message_of(Said()))
    messages = plain_messages(body.messages)
    if body.tool_choice == "auto" or (body.tool_choice == "none" and not body.tools):
        note_ignored("tool_choice")  # the default behaviour

    def conversation(model: ServedModel) -> Source:
        traits = model.chat
        wish = Wish(
            form=form_of(body.format),
            tools=[plain_tool(tool) for tool in body.tools or ()],
            choice=body.choice,
            template=variables(body.think, traits, body.model),
        )
        return Conversation(traits, messages, wish)

    return answer(record, body, "chat", conversation, message_of)


def message_of(said: Said) -> dict[str, Any]:
    """An assistant's message, or a piece of one."""
    message: dict[str, Any] = {"role": "assistant", "content": said.content}
    if said.thinking:
        message["thinking"] = said.thinking
    if said.calls:
        message["tool_calls"] = said.calls
    return {"message": message}


def plain_messages(messages: Sequence[OllamaTurn]) -> list[dict[str, Any]]:
    """The messages as a `Conversation` takes them: with ids of calls, which Ollama's clients need not give.

    A result belongs to the call of its `tool_call_id`, else to the first one without a result that has its `tool_name`,
    else to the first one without a result.
    """
    result: list[dict[str, Any]] = []
    made = 0
    waiting: list[tuple[str, str]] = []  # ids and names of the calls that have no result yet
    for message in messages:
        plain: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.name:
            plain["name"] = message.name
        if message.thinking:
            plain["reasoning_content"] = message.thinking
        if message.role == "tool":
            plain["tool_call_id"] = _answered(message, waiting)
        elif message.role == "assistant" and message.tool_calls:
            plain["tool_calls"] = []
            for call in message.tool_calls:
                made += 1
                # Of nine digits: the templates of some models take no other ids.
                called = {"id": call.id or f"{made:09d}", "name": call.function.name}
                waiting.append((called["id"], called["name"]))
                function = {"name": called["name"], "arguments": call.function.arguments}
                plain["tool_calls"].append({"id": called["id"], "type": "function", "function": function})
        result.append(plain)
    return result


def _answered(message: OllamaTurn, waiting: list[tuple[str, str]]) -> str:
    """Removes the call that a tool's message answers from the waiting ones; returns its id, empty if there is none."""
    name = message.tool_name or message.name
    found = next((call for call in waiting if message.tool_call_id == call[0]), None)
    found = found or next((call for call in waiting if name == call[1]), None)
    found = found or (waiting[0] if waiting and name is None else None)
    if found is None:
        return message.tool_call_id or ""
    waiting.remove(found)
    return found[0]
