"""`POST /v1/completions`: continues texts, and scores how likely they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from flask import Response

from ...errors import InvalidRequest, LocalLLMError
from ...registry.records import ModelRecord
from ...served import ServedModel
from ...types import Chunk, Constraint, GenerationRequest, Token
from ..http.sse import Events, Writer, event_stream
from ..parameters.effective import openai_parameters
from ..requests.fan_out import begin, likelihood, named, seeded
from ..requests.leasing import leased_model
from .answers import (
    AboutCompletion,
    CompletionAnswer,
    CompletionChoice,
    CompletionChunk,
    CompletionPiece,
    CountedCompletionChunk,
    TokenCounts,
)
from .chat import form_of
from .serving import DONE, FINGERPRINT, NAMES, Counted, Places, completion_logprobs, failure, new_id, now, within
from .text_schemas import CompletionBody

_DEFAULT_TOKENS = 16  # OpenAI's own
_MAX_STREAMS = 128


def complete(record: ModelRecord, body: CompletionBody, model_name: str | None = None) -> CompletionAnswer | Response:
    """Continues texts. `model_name` is the model's name in the answer.

    Raises: the errors of loading and generating.
    """
    prompts = body.prompts()
    n = body.n or 1
    made = max(body.best_of or n, n)
    if body.stream and len(prompts) * n > _MAX_STREAMS:
        raise InvalidRequest(
            f"Invalid value for field 'prompt': at most {_MAX_STREAMS} texts can be streamed at once", "prompt"
        )
    with ExitStack() as stack:
        flight, model = stack.enter_context(
            leased_model(record, "completions", body.timeout, bool(body.stream), body.keep_alive)
        )
        parameters = _parameters(record, model, body)
        ranked = made > n
        requests = [
            _request(body, prompt, seeded(parameters, number), ranked=ranked)
            for prompt in prompts
            for number in range(made)
        ]
        with named(_names(body)):
            begin(model, flight, requests)
        shape = _Shape(body, model_name or record.model_id, [_echoed(body, model, prompt) for prompt in prompts], made)
        if not body.stream:
            return shape.whole(list(flight.chunks()))
        return event_stream(flight.stream(), _Writer(shape), stack)


def _parameters(record: ModelRecord, model: ServedModel, body: CompletionBody) -> dict[str, Any]:
    asked = body.own() | body.penalties() | body.drawing()
    maximum, _ = body.limited()
    if maximum is not None and maximum >= 0:
        asked["max_new_tokens"] = max(maximum, 1)  # for 0, which asks for the prompt alone, one token is not shown
    with named(_names(body)):
        parameters = openai_parameters(record, model.own_parameters, asked, unlimited=_unlimited(body))
    if not _unlimited(body) and not {"max_new_tokens", "max_length"} & parameters.keys():
        parameters["max_new_tokens"] = _DEFAULT_TOKENS
    return parameters


def _names(body: CompletionBody) -> dict[str, str]:
    """The engine's names, and the body's for the same."""
    names = {**NAMES, **body.renamed()[1], "max_new_tokens": body.limited()[1]}
    if (formed := _form(body)) is not None:
        names[formed[0].kind] = formed[1]
    return names


def _unlimited(body: CompletionBody) -> bool:
    maximum, _ = body.limited()
    return maximum is not None and maximum < 0


def _form(body: CompletionBody) -> tuple[Constraint, str] | None:
    """The constraint of the texts, and the field that sets it; None without one."""
    if (formed := body.form()) is not None:
        return formed
    form = form_of(body.response_format)
    return None if form is None else (form, "response_format")


def _request(
    body: CompletionBody, prompt: str | list[int], parameters: Mapping[str, Any], *, ranked: bool
) -> GenerationRequest:
    formed = _form(body)
    return GenerationRequest(
        parameters,
        fills=_unlimited(body),
        constraint=None if formed is None else formed[0],
        prompt=prompt if isinstance(prompt, str) else None,
        tokens=None if isinstance(prompt, str) else prompt,
        streams=bool(body.stream),
        logprobs=body.logprobs if body.logprobs is not None else 0 if ranked else None,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        adapter=body.adapter,
    )


def _echoed(body: CompletionBody, model: ServedModel, prompt: str | list[int]) -> str:
    """The prompt's text if the answer repeats it, else an empty text."""
    if not body.echo:
        return ""
    return prompt if isinstance(prompt, str) else str(model.decode(prompt))


class _Shape:
    """Turns the chunks of a completion into OpenAI's form."""

    def __init__(self, body: CompletionBody, model_id: str, echoes: Sequence[str], made: int) -> None:
        """`made` is the number of texts generated for each prompt, of which `n` are shown."""
        self._body = body
        self.n = body.n or 1
        self._made = made
        self._echoes = echoes
        self.about: AboutCompletion = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": now(),
            "model": model_id,
            "system_fingerprint": FINGERPRINT,
        }
        self._shows_text = body.limited()[0] != 0
        self.stream_options = body.stream_options
        self.counted = Counted(made, None)

    def whole(self, chunks: Sequence[Chunk]) -> CompletionAnswer:
        """The whole answer, from all chunks."""
        by_index: dict[int, list[Chunk]] = defaultdict(list)
        for chunk in chunks:
            by_index[chunk.index].append(chunk)
            self.counted.add(chunk)
        choices: list[CompletionChoice] = []
        for prompt in range(len(self._echoes)):
            texts = [_joined(by_index[prompt * self._made + number]) for number in range(self._made)]
            if self._made > self.n:
                texts.sort(key=likelihood, reverse=True)
            for rank, chunk in enumerate(texts[: self.n]):
                index = prompt * self.n + rank
                piece = self.piece(chunk, index, self.places(index))
                choices.append({**piece, "finish_reason": chunk.finish_reason or "stop"})
        return {**self.about, "choices": choices, "usage": self.usage()}

    def usage(self) -> TokenCounts:
        """The counts; where only the prompt is asked for, no generated token counts."""
        return self._shown(self.counted.to_dict())

    def usage_so_far(self) -> TokenCounts:
        """The counts so far."""
        return self._shown(self.counted.so_far())

    def _shown(self, usage: TokenCounts) -> TokenCounts:
        if self._shows_text:
            return usage
        return {**usage, "completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}

    def places(self, index: int) -> Places:
        """The `Places` of a text's tokens."""
        return Places(self._echoes[index // self.n])

    def piece(self, chunk: Chunk, index: int, places: Places, *, first: bool = True) -> CompletionPiece:
        """A text, or a piece of one; the `first` begins with the echo."""
        text = chunk.text if self._shows_text else ""
        logprobs = None
        if self._body.logprobs is not None:
            made: Sequence[Token] = chunk.tokens if self._shows_text else ()
            offsets = places.of_prompt(chunk.prompt) + places.of_made(made)
            logprobs = completion_logprobs([*chunk.prompt, *made], offsets, self._body.logprobs)
        told = places.echo * first + text
        return {"text": told, "index": index, "logprobs": logprobs, "finish_reason": chunk.finish_reason}


class _Writer(Writer[Chunk]):
    """The events of a completion."""

    def __init__(self, shape: _Shape) -> None:
        self._shape = shape
        self._places: dict[int, Places] = {}
        self._usage = bool(shape.stream_options and shape.stream_options.include_usage)
        self._always = bool(shape.stream_options and shape.stream_options.tells_always)

    def write(self, chunk: Chunk) -> Events:
        """A piece of one of the texts."""
        shape, index = self._shape, chunk.index
        shape.counted.add(chunk)
        first = index not in self._places
        if not (first or chunk.text or chunk.tokens or chunk.finish_reason):
            return
        places = self._places.setdefault(index, shape.places(index))
        piece = shape.piece(chunk, index, places, first=first)
        if not self._usage:
            event: CompletionChunk = {**shape.about, "choices": [piece]}
            yield event
            return
        usage = shape.usage_so_far() if self._always else None
        yield CountedCompletionChunk(**shape.about, choices=[piece], usage=usage)

    def end(self) -> Events:
        """The counts, if the body asks for them, and the end."""
        if self._usage:
            yield CountedCompletionChunk(**self._shape.about, choices=[], usage=self._shape.usage())
        yield DONE

    def error(self, error: LocalLLMError) -> Events:
        """The error's event."""
        yield failure(error)


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    """Joins the chunks of one text."""
    last = chunks[-1]
    tokens = [token for chunk in chunks for token in chunk.tokens]
    if last.finish_reason == "stop" and tokens and not tokens[-1].special:
        tokens = within(last.whole or "", tokens)  # a stop string is not part of the text
    return replace(last, text=last.whole or "", tokens=tokens, prompt=chunks[0].prompt)
