"""`POST /v1/chat/completions`: a chat is answered, whole or as it is written."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from flask import Response

from ...chat.parser import AnswerParser, CallArguments, CallStart, Content, Part, Reasoning
from ...errors import LocalLLMError
from ...records import Chunk, Constraint, ModelRecord, Token
from ..effective import openai_parameters
from ..generating import begin, named
from ..lending import lent
from ..services import services
from ..sse import Events, event_stream
from . import schemas
from .conversation import Conversation, Wish, call_arguments
from .serving import DONE, NAMES, Counted, chat_logprobs, failure, new_id, now, within


def answer_chat(
    record: ModelRecord, body: schemas.ChatBody, model_name: str | None = None
) -> dict[str, Any] | Response:
    """Answer a chat. `model_name` is what the answer calls the model.

    Raises: what loading and generating raise.
    """
    registry = services().registry
    count = body.n or 1
    with ExitStack() as stack:
        flight, model = stack.enter_context(lent(record, "chat", body.timeout, bool(body.stream), body.keep_alive))
        wish = Wish(
            form=form_of(body.response_format),
            tools=[plain_tool(tool) for tool in body.tools or ()],
            choice=_choice(body.tool_choice),
            parallel=body.parallel_tool_calls is not False,
            effort=body.reasoning_effort,
            template=body.chat_template_kwargs,
        )
        asked = body.own() | body.penalties() | body.drawing()
        most = body.max_completion_tokens or body.max_tokens
        if most is not None:
            asked["max_new_tokens"] = most
        names = {**NAMES, **wish.names("response_format")}
        if body.max_completion_tokens:
            names["max_new_tokens"] = "max_completion_tokens"
        conversation = Conversation(model.chat, plain_messages(body.messages), wish)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        with named(names):
            parameters = openai_parameters(record, model.own_parameters, asked)
            requests = conversation.requests(
                parameters, count, streams=bool(body.stream), logprobs=logprobs, adapter=body.adapter
            )
            ticket = begin(model, flight, requests)
        about = {"id": new_id("chatcmpl-"), "created": now(), "model": model_name or record.model_id}
        if not body.stream:
            answer = _whole(list(flight.chunks()), conversation, ticket.prompt_end, about, body, count)
            registry.record_use(record.model_id)
            return answer
        framing = _Framing(
            lambda: conversation.parser(ticket.prompt_end),
            about,
            body,
            count,
            conversation,
            lambda: registry.record_use(record.model_id),
        )
        response = event_stream(flight, ticket, framing)
        response.call_on_close(stack.pop_all().close)
        return response


# From OpenAI's words --------------------------------------------------------------------------------------------------


def form_of(wanted: Any) -> Constraint | None:
    """What a `response_format` asks of the text.

    Raises:
        InvalidRequest: its schema is none.
    """
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "regex":
        return Constraint("regex", wanted.value)
    if wanted.type in ("json_object", "json"):
        schema = getattr(wanted, "value", None)
        return Constraint("json_object") if schema is None else Constraint("json_schema", schema)
    return Constraint("json_schema", wanted.json_schema.json_schema)


def plain_tool(tool: schemas.Tool) -> dict[str, Any]:
    """A tool as templates and grammars know it."""
    function = tool.function.model_dump(exclude_none=True, exclude={"strict"})
    function.setdefault("description", "")
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def plain_messages(messages: Sequence[schemas.Message]) -> list[dict[str, Any]]:
    """Messages with text as their content, and calls with objects as their arguments, as templates want them.

    Raises:
        InvalidRequest: a call's arguments are not a JSON object.
    """
    result = []
    for number, message in enumerate(messages):
        plain = message.model_dump(exclude_none=True, exclude={"audio", "function_call", "annotations", "refusal"})
        plain["content"] = _text(message.content) or (getattr(message, "refusal", None) or "")
        if "tool_calls" in plain:
            plain["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {
                        "name": call["function"]["name"],
                        "arguments": call_arguments(
                            call["function"]["arguments"], f"messages.{number}.tool_calls.{place}.function.arguments"
                        ),
                    },
                }
                for place, call in enumerate(plain["tool_calls"])
            ]
            if not plain["tool_calls"]:
                del plain["tool_calls"]
        result.append(plain)
    return result


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part.text if part.type == "text" else part.refusal for part in content)
    return content or ""


def _choice(choice: Any) -> str:
    if isinstance(choice, schemas.NamedTool):
        return choice.function.name
    return choice or "auto"


# To OpenAI's words ----------------------------------------------------------------------------------------------------


def _whole(
    chunks: Sequence[Chunk],
    conversation: Conversation,
    prompt_end: str,
    about: Mapping[str, Any],
    body: schemas.ChatBody,
    count: int,
) -> dict[str, Any]:
    by_index: dict[int, list[Chunk]] = defaultdict(list)
    counted = Counted(count)
    for chunk in chunks:
        by_index[chunk.index].append(chunk)
        counted.add(chunk)
    choices = []
    for index, its in sorted(by_index.items()):
        text = its[-1].whole or ""
        parser = conversation.parser(prompt_end)
        message = message_of([*parser.feed(text), *parser.finish()], conversation)
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
    return {**about, "object": "chat.completion", "choices": choices, "usage": counted.to_dict()}


def reason_of(last: Chunk, calls: Sequence[str]) -> str | None:
    """Why an answer ended that makes calls with these arguments: for a call's sake only if that is whole."""
    if last.finish_reason == "length" or not calls:
        return last.finish_reason
    try:
        json.loads(calls[-1])
    except ValueError:
        return last.finish_reason
    return "tool_calls"


def message_of(parts: Sequence[Part], conversation: Conversation) -> dict[str, Any]:
    """An assistant's message. Where a call must be made, what is none is the beginning of one, and not told."""
    content, reasoning = "", ""
    calls: list[dict[str, Any]] = []
    for part in parts:
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
    message: dict[str, Any] = {"role": "assistant", "content": content or nothing, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


class _Framing:
    """The events of a chat."""

    def __init__(
        self,
        parser: Callable[[], AnswerParser],
        about: Mapping[str, Any],
        body: schemas.ChatBody,
        count: int,
        conversation: Conversation,
        done: Callable[[], None],
    ) -> None:
        self._parser = parser
        self._parsers: dict[int, AnswerParser] = {}
        self._arguments: dict[int, list[str]] = defaultdict(list)  # of the calls of each answer
        self._about = {**about, "object": "chat.completion.chunk"}
        self._logprobs = bool(body.logprobs)
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._counted = Counted(count)
        self._conversation = conversation
        self._done = done

    def chunk(self, chunk: Chunk) -> Events:
        """What a piece of one of the answers becomes: a delta for each kind of thing in it."""
        index = chunk.index
        self._counted.add(chunk)
        if index not in self._parsers:
            self._parsers[index] = self._parser()
            yield self._event(index, {"role": "assistant", "content": ""})
        parser = self._parsers[index]
        parts = parser.feed(chunk.text)
        if chunk.finish_reason is not None:
            parts = [*parts, *parser.finish()]
        deltas = [delta for part in parts if (delta := self._delta(index, part)) is not None]
        tokens: Sequence[Token] = [token for token in chunk.tokens if not token.special] if self._logprobs else ()
        if tokens and not deltas:
            deltas = [{}]
        for place, delta in enumerate(deltas):
            yield self._event(index, delta, tokens=tokens if not place else ())
        if chunk.finish_reason is not None:
            yield self._event(index, {}, reason_of(chunk, self._arguments[index]))

    def _delta(self, index: int, part: Part) -> dict[str, Any] | None:
        match part:
            case Content():
                return None if self._conversation.must_call else {"content": part.text}
            case Reasoning():
                return {"reasoning_content": part.text}
            case _ if self._conversation.single_call and part.index > 0:
                return None
            case CallStart():
                self._arguments[index].append("")
                function = {"name": part.name, "arguments": ""}
                return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": function}]}
            case CallArguments():
                self._arguments[index][-1] += part.text
                return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}

    def _event(
        self, index: int, delta: dict[str, Any], reason: str | None = None, tokens: Sequence[Token] = ()
    ) -> dict[str, Any]:
        logprobs = chat_logprobs(tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._about, "choices": [choice], **({"usage": None} if self._usage else {})}

    def position(self, request_id: str, position: int) -> Events:  # noqa: ARG002
        """OpenAI has no word for it."""
        return ()

    def end(self) -> Events:
        """The counts, where they were asked for, and the end."""
        self._done()
        if self._usage:
            yield {**self._about, "choices": [], "usage": self._counted.to_dict()}
        yield DONE

    def error(self, error: LocalLLMError) -> Events:
        """What ended it."""
        yield failure(error)
