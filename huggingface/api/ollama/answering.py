"""Answers in Ollama's form, whole or as lines of JSON, with counts and times.

Chats and completions share it; they differ in their requests to the model and in the shape of a piece of text. Serves
any request thread. `huggingface.chat` parses what models write.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from flask import Response

from ...chat.parser import AnswerReader, CallArguments, CallStart, Content, Reasoning
from ...chat.seams import Seams
from ...errors import LocalLLMError
from ...registry.records import ModelRecord
from ...types import Chunk, Constraint, GenerationRequest, Token
from ..http.errors import ollama_body, status_of
from ..http.fields import note_ignored
from ..http.sse import NDJSON, Events, Writer, event_stream
from ..openai.serving import Told, chat_logprobs, within
from ..parameters.effective import openai_parameters
from ..requests.fan_out import named
from ..requests.leasing import leased_model
from ..requests.services import services
from .options import NAMES, Wanted
from .schemas import OllamaAnswering

_NANOSECONDS = 10**9


class Source(Protocol):
    """Makes the requests to the model, and the parser of its answer: a `Conversation`, or a raw prompt."""

    def requests(
        self,
        parameters: Mapping[str, Any],
        count: int,
        *,
        streams: bool,
        logprobs: int | None,
        adapter: str | None = None,
    ) -> list[GenerationRequest]:
        """The generations to run."""

    def parser(self, prompt_end: str) -> AnswerReader:
        """The reader for an answer to a prompt with this end."""


@dataclass
class Said:
    """A piece of an answer; its `calls` are complete."""

    content: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.thinking or self.calls)


# Turns a piece of an answer into the fields of a line, or of the whole answer.
Shape = Callable[[Said], dict[str, Any]]


def form_of(wanted: str | dict[str, Any] | None) -> Constraint | None:
    """The constraint that a `format` asks for."""
    if isinstance(wanted, dict):
        return Constraint("json_schema", wanted)
    return Constraint("json_object") if wanted else None


def answer(
    record: ModelRecord,
    body: OllamaAnswering,
    task: str,
    source_of: Callable[[Any], Source],
    shape: Shape,
) -> dict[str, Any] | Response:
    """Answers a request; `source_of` makes the requests to the model.

    Raises: the errors of loading and generating.
    """
    begun = time.monotonic()
    wanted = Wanted.of(body.options)
    if body.truncate is not None:
        note_ignored("truncate")
    with ExitStack() as stack:
        flight, model = stack.enter_context(leased_model(record, task, body.timeout, body.streams, body.keep_alive))
        loaded = time.monotonic()
        asked = {"messages": "prompt"} if task == "generate" else {}
        with named({**NAMES, "json_schema": "format", "grammar": "format", **asked}):
            source = source_of(model)
            parameters = wanted.over(openai_parameters(record, model.own_parameters, wanted.asked))
            [request] = source.requests(
                parameters, 1, streams=body.streams, logprobs=body.alternatives, adapter=body.adapter
            )
            ticket = flight.attach(model.generate(request, flight.cancellation))
        wanted.check_prompt(ticket.prompt_tokens)
        lines = _Lines(body.model, shape, source.parser(ticket.prompt_end), Times(begun, loaded))
        if not body.streams:
            return lines.whole(list(flight.chunks()))
        return event_stream(flight.stream(), lines, stack, NDJSON)


def idle(record: ModelRecord, body: OllamaAnswering, task: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """Answers a request without a prompt: loads the model, or unloads it where `keep_alive` is 0.

    Raises: the errors of loading and unloading.
    """
    Wanted.of(body.options)
    if body.keep_alive == 0:
        services().manager.unload(record.model_id)
        reason = "unload"
    else:
        with leased_model(record, task, body.timeout, keep_alive=body.keep_alive):
            reason = "load"
    return {"model": body.model, "created_at": now(), **said, "done": True, "done_reason": reason}


def now() -> str:
    """The present time in RFC 3339's form."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Times:
    """When a request began, and when its model was loaded: readings of `time.monotonic`."""

    begun: float
    loaded: float

    def to_dict(self) -> dict[str, int]:
        """The durations of the request until now, and of getting the model, in nanoseconds."""
        return {
            "total_duration": round((time.monotonic() - self.begun) * _NANOSECONDS),
            "load_duration": round((self.loaded - self.begun) * _NANOSECONDS),
        }


class _Lines(Writer[Chunk]):
    """The lines of a stream, or the whole answer."""

    def __init__(self, name: str, shape: Shape, parser: AnswerReader, times: Times) -> None:
        self._name = name
        self._shape = shape
        self._reader = _Reader(parser)
        self._times = times
        self._last: Chunk | None = None
        self._told = Told()

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """The whole answer, from all chunks."""
        self._last = chunks[-1]
        text = self._last.whole or ""
        said = self._reader.read(text, last=True)
        tokens = [token for chunk in chunks for token in chunk.tokens]
        return self._line(said, within(text, tokens), self._ending())

    def write(self, chunk: Chunk) -> Events:
        """A line for a piece of text, unless nothing of it can be shown yet."""
        if chunk.finish_reason is not None:
            self._last = chunk
        said = self._reader.read(chunk.text, last=chunk.finish_reason is not None)
        tokens = self._told.of(chunk)
        if said or tokens:
            yield self._line(said, tokens, {"done": False})

    def end(self) -> Events:
        """The last line, with counts and times."""
        yield self._line(Said(), (), self._ending())

    def error(self, error: LocalLLMError) -> Events:
        """The error's body as the last line."""
        yield ollama_body(str(error), status_of(error), error)

    def _line(self, said: Said, tokens: Sequence[Token], rest: Mapping[str, Any]) -> dict[str, Any]:
        logprobs = {"logprobs": chat_logprobs(tokens)["content"]} if tokens else {}
        return {"model": self._name, "created_at": now(), **self._shape(said), **rest, **logprobs}

    def _ending(self) -> dict[str, Any]:
        last = self._last
        assert last is not None  # noqa: S101 - an answer that ends well has a last chunk
        usage, timings = last.usage, last.timings
        ending: dict[str, Any] = {"done": True, "done_reason": last.finish_reason, **self._times.to_dict()}
        if usage is not None and timings is not None:
            reading, all_of_it = timings.first_token - timings.queue, timings.total - timings.first_token
            ending["prompt_eval_count"] = usage.prompt_tokens
            ending["prompt_eval_duration"] = round(max(0.0, reading) * _NANOSECONDS)
            ending["eval_count"] = usage.completion_tokens
            ending["eval_duration"] = round(max(0.0, all_of_it) * _NANOSECONDS)
        return ending


class _Reader:
    """Reads a model's answer into pieces with complete calls: Ollama sends a call when its arguments are complete."""

    def __init__(self, parser: AnswerReader) -> None:
        self._parser = parser
        self._seams = Seams()
        self._call: CallStart | None = None
        self._arguments = ""

    def read(self, text: str, *, last: bool) -> Said:
        """Reads a piece of text; the `last` one ends the answer."""
        said = Said()
        for part in [*self._parser.feed(text), *(self._parser.finish() if last else ())]:
            match part:
                case CallArguments():
                    self._arguments += part.text
                case CallStart():
                    self._complete(said)
                    self._call = part
                    self._seams.of(part)
                case Content():
                    self._complete(said)
                    self._say(said, part)
                case Reasoning():
                    self._say(said, part)
        if last:
            self._complete(said)
        return said

    def _say(self, said: Said, part: Content | Reasoning) -> None:
        match self._seams.of(part):
            case Content(text):
                said.content += text
            case Reasoning(text):
                said.thinking += text

    def _complete(self, said: Said) -> None:
        """Ends the current call. A call whose arguments are not a JSON object, or are cut off, becomes text."""
        call, text = self._call, self._arguments
        if call is None:
            return
        self._call, self._arguments = None, ""
        try:
            arguments = json.loads(text or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            self._say(said, Content(f"{call.name} {text}"))
            return
        function = {"index": call.index, "name": call.name, "arguments": arguments}
        said.calls.append({"id": call.id, "function": function})
