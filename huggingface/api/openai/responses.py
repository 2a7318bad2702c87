"""`POST /v1/responses`: one answer, whole or as events; nothing is stored between requests.

Source: "Responses" and "Streaming events", OpenAI API reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from flask import Response

from ...chat.parser import AnswerReader, CallArguments, CallStart, Content, Part, Reasoning
from ...errors import InvalidRequest, LocalLLMError
from ...registry.records import ModelRecord
from ...types import Chunk, Constraint, Token
from ..http.fields import note_ignored
from ..http.sse import Events, Writer, event_stream
from ..parameters.effective import openai_parameters
from ..requests.active import InFlight
from ..requests.fan_out import begin, named
from ..requests.leasing import leased_model
from . import response_schemas as schemas
from .conversation import Conversation, Wish
from .history import readable
from .response_answers import (
    AboutResponse,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputPart,
    OutputReasoning,
    OutputReasoningText,
    OutputText,
    ResponseAnswer,
    ResponseStatus,
    ResponseUsage,
)
from .serving import chat_logprobs, failure, new_id, now, within

# The names of the engine and of chats, and OpenAI's for the same.
_NAMES = {"messages": "input"}


def respond(record: ModelRecord, body: schemas.ResponseBody) -> ResponseAnswer | Response:
    """Answers a text or a conversation.

    Raises: the errors of loading and generating.
    """
    with ExitStack() as stack:
        flight, model = stack.enter_context(
            leased_model(record, "responses", body.timeout, bool(body.stream), body.keep_alive)
        )
        asked = body.own() | body.drawing()
        maximum, limit_field = body.limited()
        if maximum is not None and maximum >= 0:
            asked["max_new_tokens"] = maximum
        form, form_field = body.form() or (_form(body.text), "text.format")
        wish = _wish(body, form)
        told = "message.output_text.logprobs" in (body.include or ())
        logprobs = (body.top_logprobs or 0) if told or body.top_logprobs else None
        names = {**_NAMES, **body.renamed()[1], **wish.names(form_field), "max_new_tokens": limit_field}
        if form is not None:
            names.setdefault(form.kind, form_field)
        with named(names):
            unlimited = maximum is not None and maximum < 0
            parameters = openai_parameters(record, model.own_parameters, asked, unlimited=unlimited)
            conversation = Conversation(model.chat, _messages(body), wish)
            note_ignored(*conversation.ignored)
            requests = conversation.requests(
                parameters, 1, streams=bool(body.stream), logprobs=logprobs, adapter=body.adapter
            )
            ticket = begin(model, flight, requests)
        items = _Items(
            _about(record.model_id, body, parameters),
            lambda: conversation.parser(ticket.prompt_end),
            conversation,
            model.count_tokens,
            logprobs is not None,
        )
        if not body.stream:
            for chunk in flight.chunks():
                items.chunk(chunk)
            return items.response("completed")
        return event_stream(flight.stream(), _Writer(items, flight), stack)


# From OpenAI's form ---------------------------------------------------------------------------------------------------


def _wish(body: schemas.ResponseBody, form: Constraint | None) -> Wish:
    choice = body.tool_choice
    return Wish(
        form=form,
        tools=[_tool(tool) for tool in body.functions()],
        choice=choice.name if isinstance(choice, schemas.NamedFunctionTool) else choice or "auto",
        parallel=body.parallel_tool_calls is not False,
        thought=body.thought(),
        template=body.chat_template_kwargs,
    )


def _form(text: schemas.TextOptions | None) -> Constraint | None:
    if text is None or text.format is None or text.format.type == "text":
        return None
    if isinstance(text.format, schemas.OfSchema):
        return Constraint("json_schema", text.format.json_schema)
    return Constraint("json_object")


def _tool(tool: schemas.FunctionTool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description or "",
        "parameters": tool.parameters or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": function}


def _messages(body: schemas.ResponseBody) -> list[dict[str, Any]]:
    """The conversation as chat messages; neighbouring calls join one message."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        match item:
            case schemas.MessageItem():
                messages.append({"role": item.role, "content": _text(item.content)})
            case schemas.CallItem():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                if messages and messages[-1]["role"] == "assistant":
                    messages[-1].setdefault("tool_calls", []).append(call)
                else:
                    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            case schemas.ResultItem():
                messages.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
    if not messages:
        raise InvalidRequest("Invalid value for field 'input': holds no message", "input")
    return readable(messages)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, schemas.InputRefusal) else part.text for part in content)


# To OpenAI's form -----------------------------------------------------------------------------------------------------


def _about(model_id: str, body: schemas.ResponseBody, parameters: Mapping[str, Any]) -> AboutResponse:
    """The response's fields about its request."""
    chosen = body.tool_choice
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": now(),
        "model": model_id,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": False,
        "temperature": parameters["temperature"],
        "top_p": parameters["top_p"],
        "text": {"format": _shown_format(body.text)},
        "tool_choice": chosen.model_dump() if isinstance(chosen, schemas.NamedFunctionTool) else chosen or "auto",
        "tools": [{"strict": None, **tool.model_dump(exclude_unset=True)} for tool in body.functions()],
        "truncation": "disabled",
        "background": False,
        "service_tier": "default",
        "user": body.user,
    }


def _shown_format(text: schemas.TextOptions | None) -> dict[str, Any]:
    if text is None or text.format is None:
        return {"type": "text"}
    return text.format.model_dump(by_alias=True, exclude_none=True)


class _Items:
    """Makes the output items of an answer and their events, while the answer is generated."""

    def __init__(
        self,
        about: AboutResponse,
        parser: Callable[[], AnswerReader],
        conversation: Conversation,
        count: Callable[[str], int],
        logprobs: bool,
    ) -> None:
        """`about` holds the response's fields about its request, `count` counts the tokens of a text."""
        self._about = about
        self._count = count
        self._make_parser = parser
        self._parser: AnswerReader | None = None
        self._conversation = conversation
        self._logprobs = logprobs
        self._tokens: list[Token] = []
        self._output: list[OutputItem] = []
        self._calls: dict[int, OutputCall] = {}
        self._open: OutputItem | None = None
        self._text: OutputPart | None = None  # the part of the open item
        self._last: Chunk | None = None

    def chunk(self, chunk: Chunk) -> list[dict[str, Any]]:
        """The events of a piece of the answer."""
        if self._parser is None:
            self._parser = self._make_parser()
        self._tokens += chunk.tokens
        events = [event for part in self._parser.feed(chunk.text) for event in self._part(part)]
        if chunk.finish_reason is not None:
            self._last = chunk
            events += [event for part in self._parser.finish() for event in self._part(part)]
            if not self._output and not self._conversation.must_call:
                events += self._begin_message()
            events += self._close()
        return events

    def response(self, status: ResponseStatus) -> ResponseAnswer:
        """The response so far; its status is `incomplete` if the tokens ran out."""
        last = self._last
        details = None
        if status == "completed" and last is not None and last.finish_reason == "length":
            status, details = "incomplete", {"reason": "max_output_tokens"}
        usage: ResponseUsage | None = None
        if last is not None and last.usage is not None:
            read, made = last.usage.prompt_tokens, last.usage.completion_tokens
            usage = {
                "input_tokens": read,
                "input_tokens_details": {"cached_tokens": last.usage.cached_tokens},
                "output_tokens": made,
                "output_tokens_details": {"reasoning_tokens": self._thought()},
                "total_tokens": read + made,
            }
        about = self._about.copy()
        if status == "completed":
            about["completed_at"] = now()
        return {
            **about,
            "status": status,
            "error": None,
            "incomplete_details": details,
            "output": [item.copy() for item in self._output],
            "usage": usage,
        }

    def _thought(self) -> int:
        """The tokens of the reasoning, counted by the model's tokenizer from the text."""
        parts = [part for item in self._output if item["type"] == "reasoning" for part in item["content"]]
        return sum(self._count(part["text"]) for part in parts)

    def _part(self, part: Part) -> list[dict[str, Any]]:
        match part:
            case Content() if self._conversation.must_call:
                return []
            case Content():
                return self._write("message", part.text)
            case Reasoning():
                return self._write("reasoning", part.text)
            case _ if self._conversation.single_call and part.index > 0:
                return []
            case CallStart():
                self._calls[part.index] = {
                    "type": "function_call",
                    "id": new_id("fc_"),
                    "call_id": part.id,
                    "name": part.name,
                    "arguments": "",
                    "status": "in_progress",
                }
                return [*self._close(), *self._add(self._calls[part.index])]
            case CallArguments():
                item = self._calls[part.index]
                item["arguments"] += part.text
                return [self._event("response.function_call_arguments.delta", item, delta=part.text)]
        return []

    def _write(self, kind: Literal["message", "reasoning"], text: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if self._open is None or self._open["type"] != kind:
            events = [*self._close(), *(self._begin_message() if kind == "message" else self._begin_reasoning())]
        part = self._text
        assert part is not None  # noqa: S101 - just begun
        part["text"] += text
        extra: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
        delta = self._event(f"response.{part['type']}.delta", self._open, content_index=0, delta=text, **extra)
        return [*events, delta]

    def _begin_message(self) -> list[dict[str, Any]]:
        part: OutputText = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item: OutputMessage = {
            "type": "message",
            "id": new_id("msg_"),
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        events = self._add(item)
        item["content"] = [part]
        return [*events, self._begin_part(part)]

    def _begin_reasoning(self) -> list[dict[str, Any]]:
        part: OutputReasoningText = {"type": "reasoning_text", "text": ""}
        item: OutputReasoning = {"type": "reasoning", "id": new_id("rs_"), "summary": [], "content": []}
        events = self._add(item)
        item["content"] = [part]
        return [*events, self._begin_part(part)]

    def _begin_part(self, part: OutputPart) -> dict[str, Any]:
        self._text = part
        return self._event("response.content_part.added", self._open, content_index=0, part=part.copy())

    def _add(self, item: OutputItem) -> list[dict[str, Any]]:
        self._output.append(item)
        self._open = item
        return [self._event("response.output_item.added", None, item=item.copy())]

    def _close(self) -> list[dict[str, Any]]:
        """Ends the open item; returns its events."""
        item, part = self._open, self._text
        self._open = self._text = None
        if item is None:
            return []
        events: list[dict[str, Any]] = []
        cut = self._last is not None and self._last.finish_reason == "length"
        if item["type"] != "reasoning":
            item["status"] = "incomplete" if cut else "completed"
        if item["type"] == "function_call":
            named = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._event("response.function_call_arguments.done", item, **named))
        elif part is not None:
            extra: dict[str, Any] = {}
            if part["type"] == "output_text":
                if self._logprobs and self._last is not None:
                    part["logprobs"] = chat_logprobs(within(self._last.whole or "", self._tokens))["content"]
                extra = {"logprobs": part["logprobs"]}
            done = {"content_index": 0, "text": part["text"], **extra}
            events.append(self._event(f"response.{part['type']}.done", item, **done))
            events.append(self._event("response.content_part.done", item, content_index=0, part=part.copy()))
        events.append(self._event("response.output_item.done", None, item=item.copy()))
        return events

    def _event(self, kind: str, about: OutputItem | None, **fields: Any) -> dict[str, Any]:
        where = {"item_id": about["id"]} if about is not None else {}
        place = next((number for number, each in enumerate(self._output) if each is about), len(self._output) - 1)
        return {"type": kind, **where, "output_index": place, **fields}


class _Writer(Writer[Chunk]):
    """The events of a response, numbered."""

    def __init__(self, items: _Items, flight: InFlight) -> None:
        self._items = items
        self._flight = flight
        self._number = 0
        self._begun = False

    def write(self, chunk: Chunk) -> Events:
        """The events of a piece of the answer."""
        return self._numbered([*self._begin(), *self._items.chunk(chunk)])

    def silence(self) -> Events:
        """The response's first events, while the request waits in the queue."""
        return self._numbered(self._begin() if self._flight.position is not None else [])

    def end(self) -> Events:
        """The whole response."""
        response = self._items.response("completed")
        return self._numbered([{"type": f"response.{response['status']}", "response": response}])

    def error(self, error: LocalLLMError) -> Events:
        """The response so far, with the error."""
        told = failure(error)["error"]
        response = {**self._items.response("failed"), "error": {"code": "server_error", "message": told["message"]}}
        return self._numbered([*self._begin(), {"type": "response.failed", "response": response}])

    def _begin(self) -> Sequence[dict[str, Any]]:
        if self._begun:
            return []
        self._begun = True
        response = self._items.response("in_progress")
        return [{"type": f"response.{kind}", "response": response} for kind in ("created", "in_progress")]

    def _numbered(self, events: Sequence[dict[str, Any]]) -> Events:
        for event in events:
            yield {**event, "sequence_number": self._number}
            self._number += 1
