"""`POST /models/<id>`: Hugging Face's inference protocol, for `huggingface_hub` and huggingface.js.

The task is the model's own; what is asked of it runs as `/pipeline` and `/generate` run it, and answers have the
published form. Sources: the JSON schemas in `@huggingface/tasks`; text generation is TGI's, features are TEI's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from flask import Response, jsonify
from flask_openapi3 import Tag

from ..errors import InvalidRequest, LocalLLMError, MissingField, UnknownField
from ..records import Chunk, Constraint, GenerationRequest, ModelRecord, Token
from ..tasks import MODEL_TYPES, canonical_task
from . import models, schemas
from .effective import hub_parameters, task_parameters
from .errors import body as error_body
from .hub_schemas import (
    HubAnswer,
    HubBody,
    HubFeatures,
    HubText2Text,
    HubTextGeneration,
    HubTokenClassification,
    TaskQuery,
)
from .lending import lent
from .parameters import validate
from .services import services
from .sse import Events, event_stream

_TAG = Tag(name="Hugging Face", description="The protocol of Hugging Face's own inference clients.")

_SIMILARITY = "sentence-similarity"
_FEATURES = "feature-extraction"


# On the models' own blueprint: of two that share an address, the API's document would show one.
@models.blueprint.post(
    "/models/<path:model_id>",
    tags=[_TAG],
    responses={200: HubAnswer, **schemas.BODY_FAILURES, **schemas.MODEL_FAILURES},
)
def infer(path: schemas.ModelPath, query: TaskQuery, body: HubBody) -> Response:
    """Run a model's task, in the protocol of Hugging Face's clients."""
    registry = services().registry
    record = registry.get(path.model_id)
    task = _task(record, query, body.inputs)
    extra = dict(body.model_extra or {})
    if task in (_FEATURES, _SIMILARITY):  # these have their parameters beside the inputs
        given = {name: value for name, value in extra.items() if value is not None} | (body.parameters or {})
    else:
        given = {name: value for name, value in (body.parameters or {}).items() if value is not None}
        for name in extra:
            raise UnknownField(name, ("inputs", "parameters", "options", "stream"))
    if task == "text-generation":
        return _generate(record, body, given)
    if body.stream:
        raise InvalidRequest(f"Invalid value for field 'stream': '{task}' has no text to stream", "stream")
    return jsonify(_run(record, task, body.inputs, given))


def _task(record: ModelRecord, query: TaskQuery, inputs: Any) -> str:
    """What is to be done. Both of a sentence-embedding model's tasks are its own: their inputs tell them apart."""
    own = MODEL_TYPES.get(record.model_type)
    task = query.task or (own.task if own is not None else record.model_type)
    if task == _SIMILARITY:
        return task
    name = canonical_task(task)
    if name == _FEATURES and query.task is None and isinstance(inputs, dict) and "source_sentence" in inputs:
        return _SIMILARITY
    return task if task.startswith("translation_") else name


def _run(record: ModelRecord, task: str, inputs: Any, given: dict[str, Any]) -> Any:
    """The answer of a task that makes no text token by token for the caller to watch."""
    registry = services().registry
    name = task if task == _SIMILARITY else canonical_task(task)
    if name in (_FEATURES, _SIMILARITY):
        wanted = validate(HubFeatures, given)
        shape: Callable[[Any], Any] = lambda result: result  # noqa: E731
        with lent(record, task, None) as (flight, model):
            result = _embed(model, name, inputs, wanted, flight.gone)
    else:
        asked, shape = _asked(name, given, inputs)
        parameters = task_parameters(record, task, asked)
        with lent(record, task, None) as (flight, model):
            result = model.run(task, inputs, parameters, flight.gone)
    registry.record_use(record.model_id)
    return shape(result)


def _asked(name: str, given: dict[str, Any], inputs: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """A task's parameters in the words of `/pipeline`, and what makes the published form of its result."""
    several = isinstance(inputs, list)
    match name:
        case "text2text-generation" | "summarization" | "translation":
            return _text2text(given), lambda result: result
        case "text-classification":
            # All labels, unless so many are asked for; each input has a list of its own.
            return {"top_k": None, **given}, lambda result: result if several else [result]
        case "token-classification":
            checked = validate(HubTokenClassification, given, "parameters.")
            return {"aggregation_strategy": "simple", **checked}, lambda result: result
        case "zero-shot-classification":

            def labels(result: Any) -> Any:
                return [
                    {"label": label, "score": score}
                    for label, score in zip(result["labels"], result["scores"], strict=True)
                ]

            return given, lambda result: [labels(each) for each in result] if several else labels(result)
        case "table-question-answering":
            return (
                given,
                lambda result: [_cells(each) for each in result] if isinstance(result, list) else _cells(result),
            )
    return given, lambda result: result


def _text2text(given: dict[str, Any]) -> dict[str, Any]:
    checked = validate(HubText2Text, given, "parameters.")
    asked = dict(checked.pop("generate_parameters", None) or {})
    for name in asked:
        if name in HubText2Text.model_fields:
            raise UnknownField(f"parameters.generate_parameters.{name}")
    if (truncation := checked.pop("truncation", None)) is not None:
        asked["truncation"] = truncation != "do_not_truncate"
        if truncation == "only_second":
            raise InvalidRequest("Invalid value for field 'parameters.truncation': there is no second text")
    return {**asked, **checked}


def _cells(answer: dict[str, Any]) -> dict[str, Any]:
    """With an aggregator even where the model has none: huggingface.js insists on it."""
    return {**answer, "aggregator": answer.get("aggregator", "NONE")}


def _embed(model: Any, name: str, inputs: Any, wanted: dict[str, Any], gone: Callable[[], bool]) -> Any:
    """Vectors of texts, or how much texts are alike."""
    if name == _SIMILARITY:
        if not isinstance(inputs, dict):
            raise InvalidRequest("Invalid value for field 'inputs': must hold source_sentence and sentences", "inputs")
        for field in ("source_sentence", "sentences"):
            if field not in inputs:
                raise MissingField(f"inputs.{field}")
        source, sentences = inputs["source_sentence"], inputs["sentences"]
        if not isinstance(source, str) or not isinstance(sentences, list):
            raise InvalidRequest(
                "Invalid value for field 'inputs': source_sentence must be text, and sentences a list of it", "inputs"
            )
        result = model.run("sentence-embeddings", [source, *sentences], _embedding(wanted), gone)
        first, *others = result["embeddings"]
        return [_cosine(first, other) for other in others]
    if model.pools:
        result = model.run("sentence-embeddings", inputs, _embedding(wanted), gone)
        vectors = result["embeddings"]
        if wanted.get("normalize"):
            vectors = [_unit(vector) for vector in vectors]
        return vectors if isinstance(inputs, list) else vectors[0]
    for field in ("normalize", "prompt_name", "dimensions"):
        if wanted.get(field):
            reason = "this model gives a vector for each token; only sentence-transformers models have it"
            raise InvalidRequest(f"Invalid value for field '{field}': {reason}", field)
    options = {} if wanted.get("truncate") is None else {"truncation": wanted["truncate"]}
    return model.run(_FEATURES, inputs, options, gone)


def _embedding(wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {name: wanted[name] for name in ("prompt_name", "truncate", "dimensions") if wanted.get(name) is not None}


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / max(math.hypot(*one) * math.hypot(*other), 1e-12)


def _unit(vector: Sequence[float]) -> list[float]:
    length = max(math.hypot(*vector), 1e-12)
    return [value / length for value in vector]


# Text generation ------------------------------------------------------------------------------------------------------


def _generate(record: ModelRecord, body: HubBody, given: dict[str, Any]) -> Response:
    wanted = validate(HubTextGeneration, given, "parameters.")
    if not isinstance(body.inputs, str):
        raise InvalidRequest("Invalid value for field 'inputs': must be text", "inputs")
    registry = services().registry
    count = wanted.get("best_of") or 1
    if body.stream and count > 1:
        raise InvalidRequest("Invalid value for field 'parameters.best_of': cannot be streamed", "parameters.best_of")
    parameters = hub_parameters(record, _generation(wanted))
    with ExitStack() as stack:
        flight, model = stack.enter_context(lent(record, "text-generation", None, bool(body.stream)))
        tokens = None
        if (most := wanted.get("truncate")) is not None:
            tokens = model.encode(body.inputs)[-most:]  # TGI too keeps the end
        alternatives = wanted.get("top_n_tokens")
        told = bool(body.stream or wanted.get("details") or alternatives or count > 1)
        request = GenerationRequest(
            parameters,
            prompt=None if tokens is not None else body.inputs,
            tokens=tokens,
            streams=bool(body.stream),
            logprobs=(alternatives or 0) if told else None,
            prompt_logprobs=bool(wanted.get("decoder_input_details")),
            constraint=_constraint(wanted.get("grammar")),
        )
        if not body.stream:
            answers = []
            for number in range(count):
                seeded = GenerationRequest(**{**_fields(request), "parameters": _seeded(parameters, number)})
                flight.attach(model.generate(seeded, flight.gone))
                answers.append(list(flight.chunks())[-1])
            answers.sort(key=_likelihood, reverse=count > 1)
            registry.record_use(record.model_id)
            return jsonify([_answer(answers, body.inputs, wanted, parameters)])
        ticket = flight.attach(model.generate(request, flight.gone))
        framing = _Framing(body.inputs, wanted, parameters, lambda: registry.record_use(record.model_id))
        response = event_stream(flight, ticket, framing)
        response.call_on_close(stack.pop_all().close)
        return response


def _fields(request: GenerationRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__dataclass_fields__}


def _seeded(parameters: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {**parameters, "seed": parameters["seed"] + number} if "seed" in parameters else dict(parameters)


def _likelihood(chunk: Chunk) -> float:
    values = [token.logprob or 0.0 for token in chunk.tokens]
    return sum(values) / max(len(values), 1)


def _generation(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """TGI's parameters in this server's words. As TGI, it samples only if `do_sample` or what goes with it says so."""
    same = ("do_sample", "frequency_penalty", "max_new_tokens", "repetition_penalty", "seed", "temperature")
    asked = {name: wanted[name] for name in (*same, "top_k", "top_p", "typical_p") if wanted.get(name) is not None}
    stops = [*(wanted.get("stop") or ()), *(wanted.get("stop_sequences") or ())]
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
        value = value["schema"]  # with its name beside it, as OpenAI has it
    return Constraint("json_schema", value)


def _reason(chunk: Chunk) -> str:
    """TGI's words for why it ended."""
    if chunk.finish_reason == "length":
        return "length"
    return "eos_token" if not chunk.tokens or chunk.tokens[-1].special else "stop_sequence"


def _token(token: Token) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "logprob": token.logprob, "special": token.special}


def _details(chunk: Chunk, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "finish_reason": _reason(chunk),
        "generated_tokens": chunk.usage.completion_tokens if chunk.usage is not None else 0,
        "seed": parameters.get("seed"),
    }


def _answer(
    chunks: Sequence[Chunk], prompt: str, wanted: Mapping[str, Any], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    def text(chunk: Chunk) -> str:
        return (prompt if wanted.get("return_full_text") else "") + (chunk.whole or "")

    def told(chunk: Chunk) -> dict[str, Any]:
        details = _details(chunk, parameters)
        details["prefill"] = [{"id": each.id, "text": each.text, "logprob": each.logprob} for each in chunk.prompt]
        details["tokens"] = [_token(token) for token in chunk.tokens]
        if wanted.get("top_n_tokens"):
            details["top_tokens"] = [[_token(each) for each in token.top] for token in chunk.tokens]
        return details

    best, *others = chunks
    answer: dict[str, Any] = {"generated_text": text(best)}
    if wanted.get("details") or wanted.get("decoder_input_details"):
        answer["details"] = told(best)
        if others:
            answer["details"]["best_of_sequences"] = [{"generated_text": text(each), **told(each)} for each in others]
    return answer


class _Framing:
    """TGI's events: one for each token, the last one with the whole text."""

    def __init__(
        self,
        prompt: str,
        wanted: Mapping[str, Any],
        parameters: Mapping[str, Any],
        done: Callable[[], None],
    ) -> None:
        self._prompt = prompt if wanted.get("return_full_text") else ""
        self._alternatives = bool(wanted.get("top_n_tokens"))
        self._parameters = parameters
        self._count = 0
        self._done = done

    def chunk(self, chunk: Chunk) -> Events:
        """An event for each token."""
        for place, token in enumerate(chunk.tokens):
            self._count += 1
            event: dict[str, Any] = {"index": self._count, "token": _token(token)}
            if self._alternatives:
                event["top_tokens"] = [_token(each) for each in token.top]
            last = chunk.finish_reason is not None and place == len(chunk.tokens) - 1
            event["generated_text"] = self._prompt + (chunk.whole or "") if last else None
            event["details"] = None
            if last:
                read = chunk.usage.prompt_tokens if chunk.usage is not None else 0
                event["details"] = {**_details(chunk, self._parameters), "input_length": read}
            yield event

    def position(self, request_id: str, position: int) -> Events:  # noqa: ARG002
        """TGI has no word for it."""
        return ()

    def end(self) -> Events:
        """Nothing: the last token's event was the end."""
        self._done()
        return ()

    def error(self, error: LocalLLMError) -> Events:
        """What ended it, where the clients look for it."""
        yield {**error_body(str(error)), "error_type": "generation"}
