"""Text generation in Hugging Face's inference protocol: TGI's parameters, details and events.

Source: https://huggingface.co/docs/text-generation-inference. Must not know the other tasks.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from flask import Response, jsonify

from ...errors import InvalidRequest, LocalLLMError
from ...registry.records import ModelRecord
from ...types import Chunk, Constraint, GenerationRequest, Token
from ..http.errors import body as error_body
from ..http.sse import Events, Writer, event_stream
from ..parameters.effective import hub_parameters
from ..parameters.schemas import validate
from ..requests.fan_out import begin, likelihood, named, seeded
from ..requests.leasing import leased_model
from .schemas import HubBody, OneText

# The engine's names, and the body's for the same.
_WORDS = {
    "stop_strings": "parameters.stop",
    "json_schema": "parameters.grammar.value",
    "regex": "parameters.grammar.value",
    "echo": "parameters.decoder_input_details",
    "adapter": "parameters.adapter_id",
}


def generate_text(record: ModelRecord, body: HubBody, wanted: Mapping[str, Any], fields: Mapping[str, str]) -> Response:
    """Continues a text; `wanted` are the checked parameters, `fields` maps their names to those in the body.

    Raises: the errors of loading and generating.
    """
    prompt = validate(OneText, {"inputs": body.inputs})["inputs"]
    count, streams, maximum = wanted.get("best_of", 1), bool(body.stream), wanted.get("truncate")
    with ExitStack() as stack, named({**_WORDS, **fields}):
        parameters = hub_parameters(record, _generation(wanted))
        if count > 1:
            _check_best_of(streams, parameters)
        flight, model = stack.enter_context(leased_model(record, "text-generation", None, streams))
        alternatives = wanted.get("top_n_tokens")
        told = streams or _detailed(wanted) or count > 1
        # As TGI, `truncate` keeps the end.
        kept = None if maximum is None else model.encode(prompt, flight.cancellation)[-maximum:]
        request = GenerationRequest(
            parameters,
            prompt=prompt if maximum is None else None,
            tokens=kept,
            streams=streams,
            logprobs=(alternatives or 0) if told else None,
            prompt_logprobs=bool(wanted.get("decoder_input_details")),
            constraint=_constraint(wanted.get("grammar")),
            adapter=wanted.get("adapter_id"),
        )
        if not streams:
            requests = [replace(request, parameters=seeded(parameters, number)) for number in range(count)]
            begin(model, flight, requests)
            made = sorted(flight.chunks(), key=lambda chunk: chunk.index)
            made.sort(key=likelihood, reverse=True)
            return jsonify([_answer(made, prompt, wanted, parameters)])
        flight.attach(model.generate(request, flight.cancellation))
        return event_stream(flight.stream(), _Writer(prompt, wanted, parameters), stack)


def _check_best_of(streams: bool, parameters: Mapping[str, Any]) -> None:
    """Refuses `best_of` as TGI does: with a stream, and without sampling, where all texts are the same."""
    reason = "cannot be streamed" if streams else "needs do_sample, without which all texts are the same"
    if streams or not parameters.get("do_sample"):
        raise InvalidRequest(f"Invalid value for field 'parameters.best_of': {reason}", "parameters.best_of")


def _detailed(wanted: Mapping[str, Any]) -> bool:
    """Whether the answer has details; parameters about tokens ask for them too."""
    return any(wanted.get(name) for name in ("details", "decoder_input_details", "top_n_tokens"))


def _generation(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """TGI's parameters with this server's names. As in TGI, `do_sample` or a sampling parameter turns sampling on."""
    same = ("do_sample", "frequency_penalty", "max_new_tokens", "repetition_penalty", "seed", "temperature")
    asked = {name: wanted[name] for name in (*same, "top_k", "top_p", "typical_p") if name in wanted}
    stops = [*wanted.get("stop", ()), *wanted.get("stop_sequences", ())]
    if stops:
        asked["stop_strings"] = stops
    draws = any(name in asked for name in ("temperature", "top_k", "top_p", "typical_p"))
    if "do_sample" not in asked and draws and asked.get("temperature") != 0:
        asked["do_sample"] = True
    return asked


def _constraint(grammar: Mapping[str, Any] | None) -> Constraint | None:
    if grammar is None:
        return None
    if grammar["type"] == "regex":
        return Constraint("regex", grammar["value"])
    value = grammar["value"]
    if grammar["type"] == "json_schema" and isinstance(value, dict) and "schema" in value:
        value = value["schema"]  # OpenAI's form, which has a name beside the schema
    return Constraint("json_schema", value)


def _reason(chunk: Chunk, prompt: str, made: str, parameters: Mapping[str, Any]) -> str:
    """TGI's reason for the end. A stop string may begin with the end of the prompt.

    The last token cannot decide it: not all end tokens are special, and a complete constrained text needs none.
    """
    if chunk.finish_reason == "length":
        return "length"
    stops = parameters.get("stop_strings", ())
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop in prompt[max(0, len(prompt) - len(stop) + 1) :] + made:
            return "stop_sequence"
    return "eos_token"


def _told(token: Token, shown: str | None = None) -> dict[str, Any]:
    return {
        "id": token.id,
        "text": token.text if shown is None else shown,
        "logprob": token.logprob,
        "special": token.special,
    }


def _texts(tokens: Sequence[Token]) -> list[str]:
    """The text that each token adds; of a character in several tokens, the last one adds all of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(token.raw, final=place == len(tokens)) for place, token in enumerate(tokens, 1)]


def _details(chunk: Chunk, prompt: str, made: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """TGI's details; `made` is the text of all generated tokens."""
    return {
        "finish_reason": _reason(chunk, prompt, made, parameters),
        "generated_tokens": chunk.usage.completion_tokens if chunk.usage is not None else 0,
        "seed": parameters.get("seed"),
    }


def _answer(
    chunks: Sequence[Chunk], prompt: str, wanted: Mapping[str, Any], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    def whole(chunk: Chunk) -> str:
        return (prompt if wanted.get("return_full_text") else "") + (chunk.whole or "")

    def told(chunk: Chunk) -> dict[str, Any]:
        shown_tokens = _texts(chunk.tokens)
        details = _details(chunk, prompt, "".join(shown_tokens), seeded(parameters, chunk.index))
        read = zip(chunk.prompt, _texts(chunk.prompt), strict=True)
        details["prefill"] = [{"id": token.id, "text": shown, "logprob": token.logprob} for token, shown in read]
        made = zip(chunk.tokens, shown_tokens, strict=True)
        details["tokens"] = [_told(token, shown) for token, shown in made]
        if wanted.get("top_n_tokens"):
            details["top_tokens"] = [[_told(each) for each in token.top] for token in chunk.tokens]
        return details

    best, *others = chunks
    answer: dict[str, Any] = {"generated_text": whole(best)}
    if _detailed(wanted):
        answer["details"] = told(best)
        if others:
            answer["details"]["best_of_sequences"] = [{"generated_text": whole(each), **told(each)} for each in others]
    return answer


class _Writer(Writer[Chunk]):
    """TGI's events: one for each token, the last one with the whole text.

    The tokens' texts add up to that text, so that clients can print them: a special token outside of the text has an
    empty one, and a character in several tokens comes with the last of them.
    """

    def __init__(self, prompt: str, wanted: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
        self._prompt = prompt
        self._before = prompt if wanted.get("return_full_text") else ""
        self._alternatives = bool(wanted.get("top_n_tokens"))
        self._parameters = parameters
        self._count = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._untold = ""
        self._made = ""

    def write(self, chunk: Chunk) -> Events:
        """An event for each token."""
        self._untold += chunk.text
        for place, token in enumerate(chunk.tokens, 1):
            own = self._decoder.decode(token.raw)
            self._count += 1
            self._made += own
            latest = place == len(chunk.tokens)
            event: dict[str, Any] = {"index": self._count, "token": _told(token, self._tell(own, latest=latest))}
            if self._alternatives:
                event["top_tokens"] = [_told(each) for each in token.top]
            last = latest and chunk.finish_reason is not None
            event["generated_text"] = self._before + (chunk.whole or "") if last else None
            event["details"] = None
            if last:
                read = chunk.usage.prompt_tokens if chunk.usage is not None else 0
                details = _details(chunk, self._prompt, self._made, self._parameters)
                event["details"] = {**details, "input_length": read}
            yield event

    def _tell(self, own: str, *, latest: bool) -> str:
        """The text for a token's event; a chunk's last token gets all that is left."""
        length = len(self._untold) if latest else len(own) if self._untold.startswith(own) else 0
        told, self._untold = self._untold[:length], self._untold[length:]
        return told

    def error(self, error: LocalLLMError) -> Events:
        """The error in the form that clients look for."""
        yield {**error_body(str(error)), "error_type": "generation"}
