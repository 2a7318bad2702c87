"""`POST /v1/messages`: continues a conversation, whole or as a stream; and counts a conversation's tokens.

Source: "Messages" and "Streaming messages", Anthropic API reference.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from flask import Response
from pydantic_core import from_json

from ...chat.parser import AnswerReader, CallArguments, CallStart, Content, Part, Reasoning
from ...errors import LocalLLMError
from ...registry.records import ModelRecord
from ...types import Chunk
from ..http.errors import anthropic_body, status_of
from ..http.sse import NAMED_SSE, Events, Writer, event_stream
from ..openai.chat import reason_of
from ..openai.conversation import Conversation
from ..openai.serving import new_id
from ..parameters.effective import openai_parameters
from ..requests.fan_out import begin, named
from ..requests.leasing import leased_model
from . import schemas
from .turns import chat_messages, hides_thinking, wish_of

# The engine's names, and Anthropic's for the same.
_NAMES = {"max_new_tokens": "max_tokens", "stop_strings": "stop_sequences"}

# OpenAI's finish reasons, and Anthropic's for the same.
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def answer(record: ModelRecord, body: schemas.MessagesBody) -> dict[str, Any] | Response:
    """Continues a conversation.

    Raises: the errors of loading and generating.
    """
    streams = bool(body.stream)
    with ExitStack() as stack:
        flight, model = stack.enter_context(leased_model(record, "messages", body.timeout, streams, body.keep_alive))
        asked = body.own() | body.drawing() | {"max_new_tokens": body.max_tokens}
        if body.stop_sequences:
            asked["stop_strings"] = body.stop_sequences
        wish = wish_of(body)
        with named({**_NAMES, **wish.names("output_config.format")}):
            conversation = Conversation(model.chat, chat_messages(body), wish)
            hidden = hides_thinking(body, conversation)
            parameters = openai_parameters(record, model.own_parameters, asked)
            requests = conversation.requests(parameters, 1, streams=streams, logprobs=None, adapter=body.adapter)
            ticket = begin(model, flight, requests)
        blocks = _Blocks(
            record.model_id,
            lambda: conversation.parser(ticket.prompt_end),
            conversation,
            ticket.prompt_tokens,
            body,
            hidden,
        )
        if not streams:
            for chunk in flight.chunks():
                blocks.chunk(chunk)
            return blocks.message()
        return event_stream(flight.stream(), _Writer(blocks, flight.request_id), stack, NAMED_SSE)


def count(record: ModelRecord, body: schemas.CountBody) -> dict[str, Any]:
    """Counts the tokens of a conversation, rendered by the model's template.

    Raises: the errors of loading.
    """
    with leased_model(record, "count_tokens", body.timeout, keep_alive=body.keep_alive) as (flight, model):
        conversation = Conversation(model.chat, chat_messages(body), wish_of(body))
        hides_thinking(body, conversation)
        [request] = conversation.requests({}, 1, streams=False, logprobs=None, adapter=body.adapter)
        return {"input_tokens": model.count_prompt(request, flight.cancellation)}


class _Blocks:
    """Makes the blocks of an answer and their events, while the answer is generated."""

    def __init__(
        self,
        model_id: str,
        parser: Callable[[], AnswerReader],
        conversation: Conversation,
        prompt_tokens: int,
        body: schemas.MessagesBody,
        hidden: bool,
    ) -> None:
        """`hidden` says whether the model's reasoning is left out."""
        self._about = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model_id}
        self._make_parser = parser
        self._parser: AnswerReader | None = None
        self._conversation = conversation
        self._prompt_tokens = prompt_tokens
        self._stops = body.stop_sequences or ()
        self._hidden = hidden
        self._omitted = getattr(body.thinking, "display", None) == "omitted"
        self._blocks: list[dict[str, Any]] = []
        self._open = False  # whether the last block is being written
        self._arguments: list[str] = []  # the arguments of each call
        self._last: Chunk | None = None

    def chunk(self, chunk: Chunk) -> list[dict[str, Any]]:
        """The events of a piece of the answer."""
        if self._parser is None:
            self._parser = self._make_parser()
        events = [event for part in self._parser.feed(chunk.text) for event in self._part(part)]
        if chunk.finish_reason is not None:
            self._last = chunk
            events += [event for part in self._parser.finish() for event in self._part(part)]
            events += self._close()
        return events

    def message(self) -> dict[str, Any]:
        """The answer so far."""
        calls = iter(self._arguments)
        blocks = [{**block, "input": _object(next(calls))} if "input" in block else block for block in self._blocks]
        return {**self._about, "content": blocks, **self.ending(), "usage": self.usage()}

    def ending(self) -> dict[str, Any]:
        """The reason for the answer's end."""
        last = self._last
        if last is None:
            return {"stop_reason": None, "stop_sequence": None}
        if last.stop is not None and last.stop in self._stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": last.stop}
        return {"stop_reason": _REASONS[reason_of(last, self._arguments) or "stop"], "stop_sequence": None}

    def usage(self) -> dict[str, int]:
        """The counts of tokens. As Anthropic counts, tokens from the cache are not among the input's."""
        used = self._last.usage if self._last is not None else None
        cached = used.cached_tokens if used is not None else 0
        return {
            "input_tokens": (used.prompt_tokens if used is not None else self._prompt_tokens) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": used.completion_tokens if used is not None else 0,
        }

    def _part(self, part: Part) -> list[dict[str, Any]]:
        match part:
            case Content() if self._conversation.must_call:
                return []
            case Content():
                return self._write("text", "text", part.text)
            case Reasoning() if self._hidden:
                return []
            case Reasoning():
                return self._write("thinking", "thinking", "" if self._omitted else part.text)
            case _ if self._conversation.single_call and part.index > 0:
                return []
            case CallStart():
                self._arguments.append("")
                return self._begin({"type": "tool_use", "id": new_id("toolu_"), "name": part.name, "input": {}})
            case CallArguments():
                self._arguments[-1] += part.text
                return [self._delta({"type": "input_json_delta", "partial_json": part.text})]
        return []

    def _write(self, kind: str, field: str, text: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if not self._open or self._blocks[-1]["type"] != kind:
            events = self._begin({"type": kind, field: "", **({"signature": ""} if kind == "thinking" else {})})
        self._blocks[-1][field] += text
        return [*events, self._delta({"type": f"{kind}_delta", field: text})] if text else events

    def _begin(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        events = self._close()
        self._blocks.append(block)
        self._open = True
        return [*events, {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": {**block}}]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        """Ends the open block; returns its events."""
        if not self._open:
            return []
        self._open = False
        stop = {"type": "content_block_stop", "index": len(self._blocks) - 1}
        signed = self._blocks[-1]["type"] == "thinking"
        return [self._delta({"type": "signature_delta", "signature": ""}), stop] if signed else [stop]


def _object(arguments: str) -> dict[str, Any]:
    """A call's arguments; incomplete ones, where the tokens ran out, as far as they go."""
    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class _Writer(Writer[Chunk]):
    """The events of an answer."""

    def __init__(self, blocks: _Blocks, request_id: str) -> None:
        self._blocks = blocks
        self._request_id = request_id
        self._begun = False

    def write(self, chunk: Chunk) -> Events:
        """The events of a piece of the answer."""
        return [*self._begin(), *self._blocks.chunk(chunk)]

    def silence(self) -> Events:
        """A ping."""
        return [*self._begin(), {"type": "ping"}]

    def end(self) -> Events:
        """The reason for the end, and the counts."""
        yield {"type": "message_delta", "delta": self._blocks.ending(), "usage": self._blocks.usage()}
        yield {"type": "message_stop"}

    def error(self, error: LocalLLMError) -> Events:
        """The error's body."""
        yield anthropic_body(str(error), status_of(error), error, self._request_id)

    def _begin(self) -> list[dict[str, Any]]:
        if self._begun:
            return []
        self._begun = True
        return [{"type": "message_start", "message": self._blocks.message()}]
