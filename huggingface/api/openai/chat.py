"""`POST /v1/chat/completions`: answers a chat, whole or as a stream."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

from flask import Response

from ...chat.parser import AnswerReader, CallArguments, CallStart, Content, Part, Reasoning
from ...chat.seams import Seams
from ...errors import LocalLLMError
from ...registry.records import ModelRecord
from ...types import Chunk, Constraint, Token
from ..http.fields import note_ignored
from ..http.sse import Events, Writer, event_stream
from ..parameters.effective import openai_parameters
from ..requests.fan_out import begin, named
from ..requests.leasing import leased_model
from . import schemas
from .answers import (
    AboutChat,
    AboutChunk,
    AnsweredCall,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatMessage,
    ChatPiece,
    ChatReason,
    CountedChatChunk,
    FunctionDelta,
)
from .conversation import Conversation, Wish
from .history import readable
from .serving import DONE, FINGERPRINT, NAMES, Counted, Told, chat_logprobs, failure, new_id, now, within


def answer_chat(record: ModelRecord, body: schemas.ChatBody, model_name: str | None = None) -> ChatAnswer | Response:
    """Answers a chat. `model_name` is the model's name in the answer.

    Raises: the errors of loading and generating.
    """
    count = body.n or 1
    with ExitStack() as stack:
        flight, model = stack.enter_context(
            leased_model(record, "chat", body.timeout, bool(body.stream), body.keep_alive)
        )
        form, form_field = body.form() or (form_of(body.response_format), "response_format")
        wish = Wish(
            form=form,
            tools=[plain_tool(tool) for tool in body.tools or ()],
            choice=_choice(body.tool_choice),
            parallel=body.parallel_tool_calls is not False,
            thought=body.thought(),
            template=body.chat_template_kwargs,
        )
        asked = body.own() | body.penalties() | body.drawing()
        maximum, limit_field = body.limited()
        if maximum is not None and maximum >= 0:
            asked["max_new_tokens"] = maximum
        names = {**NAMES, **body.renamed()[1], **wish.names(form_field), "max_new_tokens": limit_field}
        if form is not None:
            names.setdefault(form.kind, form_field)
        conversation = Conversation(model.chat, plain_messages(body.messages), wish)
        note_ignored(*conversation.ignored)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        with named(names):
            unlimited = maximum is not None and maximum < 0
            parameters = openai_parameters(record, model.own_parameters, asked, unlimited=unlimited)
            requests = conversation.requests(
                parameters, count, streams=bool(body.stream), logprobs=logprobs, adapter=body.adapter
            )
            if (turn := _turn(body)) is not None:
                requests = [replace(request, turn=turn) for request in requests]
            ticket = begin(model, flight, requests)
        about: AboutChat = {
            "id": new_id("chatcmpl-"),
            "created": now(),
            "model": model_name or record.model_id,
            "system_fingerprint": FINGERPRINT,
        }
        counted = Counted(count)
        if not body.stream:
            return _whole(
                list(flight.chunks()), conversation, ticket.prompt_end, about, body, counted, model.count_tokens
            )
        writer = _Writer(
            lambda: conversation.parser(ticket.prompt_end), about, body, counted, conversation, model.count_tokens
        )
        return event_stream(flight.stream(), writer, stack)


# From OpenAI's form ---------------------------------------------------------------------------------------------------


def form_of(wanted: Any) -> Constraint | None:
    """The constraint that a `response_format` asks for; None for plain text."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type in ("regex", "grammar"):
        return Constraint(wanted.type, wanted.value)
    if wanted.type in ("json_object", "json"):
        schema = wanted.value
        return Constraint("json_object") if schema is None else Constraint("json_schema", schema)
    return Constraint("json_schema", wanted.json_schema.json_schema)


def plain_tool(tool: schemas.Tool) -> dict[str, Any]:
    """A tool in the form for templates and grammars."""
    function = tool.function.model_dump(exclude_none=True, exclude={"strict"})
    function.setdefault("description", "")
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def plain_messages(messages: Sequence[schemas.Message]) -> list[dict[str, Any]]:
    """Messages in the form for templates: with text as content, and objects as the arguments of calls."""
    result = []
    for message in messages:
        plain = message.model_dump(exclude_none=True, exclude={"function_call", "annotations", "refusal", "parsed"})
        plain["content"] = _text(message.content) or (getattr(message, "refusal", None) or "")
        if isinstance(message, schemas.FunctionMessage):
            plain["role"] = "tool"
        if isinstance(message, schemas.AssistantMessage):
            if message.function_call is not None and not message.tool_calls:
                plain["tool_calls"] = [{"function": message.function_call.model_dump()}]
            thought = _thought(message.content)
            if thought and not message.reasoning_content:
                plain["reasoning_content"] = thought
        result.append(plain)
    return readable(result)


def _text(content: Any) -> str:
    if not isinstance(content, list):
        return content or ""
    parts = [part for part in content if not isinstance(part, schemas.ThinkingPart | schemas.HiddenThinkingPart)]
    return "\n".join(part.refusal if isinstance(part, schemas.RefusalPart) else part.text for part in parts)


def _thought(content: Any) -> str:
    """The reasoning among the parts of a message."""
    parts = content if isinstance(content, list) else []
    return "\n".join(part.text for part in parts if isinstance(part, schemas.ThinkingPart))


def _turn(body: schemas.ChatBody) -> Literal["new", "continued", "none"] | None:
    """The turn after the messages, if the body sets it."""
    if body.continue_final_message:
        return "continued"
    if body.add_generation_prompt is None:
        return "new" if body.continue_final_message is False else None
    return "new" if body.add_generation_prompt else "none"


def _choice(choice: Any) -> str:
    if isinstance(choice, schemas.NamedTool):
        return choice.function.name
    return "required" if choice == "any" else choice or "auto"


# To OpenAI's form -----------------------------------------------------------------------------------------------------


def _whole(
    chunks: Sequence[Chunk],
    conversation: Conversation,
    prompt_end: str,
    about: AboutChat,
    body: schemas.ChatBody,
    counted: Counted,
    count_tokens: Callable[[str], int],
) -> ChatAnswer:
    by_index: dict[int, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        by_index[chunk.index].append(chunk)
        counted.add(chunk)
    choices: list[ChatChoice] = []
    thought = []
    for index, its in sorted(by_index.items()):
        text = its[-1].whole or ""
        parser = conversation.parser(prompt_end)
        message = message_of([*parser.feed(text), *parser.finish()], conversation)
        thought.append(message.get("reasoning_content", ""))
        calls = [call["function"]["arguments"] for call in message.get("tool_calls", ())]
        tokens = [token for chunk in its for token in chunk.tokens]
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": chat_logprobs(within(text, tokens)) if body.logprobs else None,
                "finish_reason": reason_of(its[-1], calls),
            }
        )
    counted.reasoning_tokens = sum(map(count_tokens, thought))
    return {**about, "object": "chat.completion", "choices": choices, "usage": counted.to_dict()}


def reason_of(last: Chunk, calls: Sequence[str]) -> ChatReason:
    """The finish reason of an answer whose calls have these arguments: `tool_calls` only if the last is complete."""
    reason = last.finish_reason or "stop"
    if reason == "length" or not calls:
        return reason
    try:
        json.loads(calls[-1])
    except ValueError:
        return reason
    return "tool_calls"


def message_of(parts: Sequence[Part], conversation: Conversation) -> ChatMessage:
    """The assistant's message. Where a call is required, content is the beginning of one and is left out."""
    content, reasoning = "", ""
    calls: list[AnsweredCall] = []
    for part in map(Seams().of, parts):
        match part:
            case Content():
                content += "" if conversation.must_call else part.text
            case Reasoning():
                reasoning += part.text
            case CallStart():
                calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}})
            case CallArguments():
                calls[part.index]["function"]["arguments"] += part.text
    if conversation.single_call:
        del calls[1:]
    nothing = None if calls or conversation.must_call else ""
    message: ChatMessage = {"role": "assistant", "content": content or nothing, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


class _Writer(Writer[Chunk]):
    """The events of a chat."""

    def __init__(
        self,
        parser: Callable[[], AnswerReader],
        about: AboutChat,
        body: schemas.ChatBody,
        counted: Counted,
        conversation: Conversation,
        count_tokens: Callable[[str], int],
    ) -> None:
        self._parser = parser
        self._told: dict[int, Told] = defaultdict(Told)
        self._parsers: dict[int, AnswerReader] = {}
        self._seams: dict[int, Seams] = defaultdict(Seams)
        self._arguments: dict[int, list[str]] = defaultdict(list)  # the arguments of each answer's calls
        self._about: AboutChunk = {**about, "object": "chat.completion.chunk"}
        self._logprobs = bool(body.logprobs)
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._always = bool(body.stream_options and body.stream_options.tells_always)
        self._counted = counted
        self._thought: dict[int, str] = defaultdict(str)
        self._count_tokens = count_tokens
        self._conversation = conversation

    def write(self, chunk: Chunk) -> Events:
        """The events of a piece of one of the answers: a delta for each part in it."""
        index = chunk.index
        self._counted.add(chunk)
        if index not in self._parsers:
            self._parsers[index] = self._parser()
            yield self._event(index, {"role": "assistant", "content": ""})
        parser = self._parsers[index]
        parts = parser.feed(chunk.text)
        if chunk.finish_reason is not None:
            parts = [*parts, *parser.finish()]
        joined = map(self._seams[index].of, parts)
        deltas = [delta for part in joined if (delta := self._delta(index, part)) is not None]
        tokens: Sequence[Token] = self._told[index].of(chunk) if self._logprobs else ()
        if tokens and not deltas:
            deltas = [{}]
        for place, delta in enumerate(deltas):
            yield self._event(index, delta, tokens=tokens if not place else ())
        if chunk.finish_reason is not None:
            yield self._event(index, {}, reason_of(chunk, self._arguments[index]))

    def _delta(self, index: int, part: Part) -> ChatDelta | None:
        match part:
            case Content():
                return None if self._conversation.must_call else {"content": part.text}
            case Reasoning():
                self._thought[index] += part.text
                return {"reasoning_content": part.text}
            case _ if self._conversation.single_call and part.index > 0:
                return None
            case CallStart():
                self._arguments[index].append("")
                function: FunctionDelta = {"name": part.name, "arguments": ""}
                return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": function}]}
            case CallArguments():
                self._arguments[index][-1] += part.text
                return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}

    def _event(
        self, index: int, delta: ChatDelta, reason: ChatReason | None = None, tokens: Sequence[Token] = ()
    ) -> ChatChunk | CountedChatChunk:
        logprobs = chat_logprobs(tokens) if tokens else None
        choice: ChatPiece = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if not self._usage:
            return {**self._about, "choices": [choice]}
        return {**self._about, "choices": [choice], "usage": self._counted.so_far() if self._always else None}

    def end(self) -> Events:
        """The counts, if the body asks for them, and the end."""
        if self._usage:
            self._counted.reasoning_tokens = sum(map(self._count_tokens, self._thought.values()))
            yield CountedChatChunk(**self._about, choices=[], usage=self._counted.to_dict())
        yield DONE

    def error(self, error: LocalLLMError) -> Events:
        """The error's event."""
        yield failure(error)
