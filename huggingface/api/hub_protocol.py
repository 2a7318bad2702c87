"""`POST /models/<id>`: Hugging Face's inference protocol, for `huggingface_hub` and huggingface.js.

The task is the model's own; what is asked of it runs as `/pipeline` and `/generate` run it, and answers have the
published form. Sources: the JSON schemas in `@huggingface/tasks`; text generation is TGI's, features are TEI's.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from flask import Response, jsonify
from flask_openapi3 import Tag

from ..errors import InvalidRequest, LocalLLMError, UnknownField
from ..records import Chunk, Constraint, GenerationRequest, ModelRecord, Token
from ..tasks import MODEL_TYPES, canonical_task
from . import models, schemas
from .effective import hub_parameters, task_parameters
from .errors import body as error_body
from .generating import begin, likelihood, named, seeded
from .hub_schemas import PUBLISHED, ComparedTexts, HubAnswer, HubBody, HubText2Text, OneText, SomeTexts, TaskQuery
from .lending import lent
from .parameters import Parameters, validate
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
    record = services().registry.get(path.model_id)
    task = _task(record, query, body.inputs)
    name = task if task == _SIMILARITY else canonical_task(task)
    given, fields = _given(name, body)
    if name == "text-generation":
        return _generate(record, body, given, fields)
    if body.stream:
        raise InvalidRequest(f"Invalid value for field 'stream': '{task}' has no text to stream", "stream")
    if name in (_FEATURES, _SIMILARITY):
        return jsonify(_embed(record, name, body.inputs, given, fields))
    return jsonify(_run(record, task, name, body.inputs, given, fields))


def _task(record: ModelRecord, query: TaskQuery, inputs: Any) -> str:
    """What is to be done. Both of a sentence-embedding model's tasks are its own: their inputs tell them apart."""
    if query.task is not None:
        return query.task
    own = MODEL_TYPES.get(record.model_type)
    task = own.task if own is not None else canonical_task(record.model_type)
    if task == "text2text-generation":
        return "text-generation"  # the clients have one method for both
    if task == _FEATURES and isinstance(inputs, dict) and "source_sentence" in inputs:
        return _SIMILARITY
    return task


def _given(name: str, body: HubBody) -> tuple[dict[str, Any], dict[str, str]]:
    """A task's parameters, checked, and what each is called in the body. Null is the same as nothing.

    Raises:
        MissingField, UnknownField, InvalidRequest: naming the field.
    """
    schema, beside, parameters = PUBLISHED[name], dict(body.model_extra or {}), body.parameters or {}
    if name not in (_FEATURES, _SIMILARITY):
        for field in beside:
            raise UnknownField(field, HubBody.model_fields)
    for field in beside.keys() & parameters.keys():
        raise InvalidRequest(f"Field given twice: {field}", field)
    given = _checked(schema, beside, "") | _checked(schema, parameters, "parameters.")
    fields = {field: f"parameters.{field}" for field in parameters} | {"input": "inputs", "prompt": "inputs"}
    return given, fields


def _checked(schema: type[Parameters], values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    for field in values:
        if field not in schema.model_fields:
            raise UnknownField(prefix + field, schema.model_fields)
    if not values and not prefix:
        return {}  # what the schema requires is not looked for here
    return validate(schema, {field: value for field, value in values.items() if value is not None}, prefix)


# Tasks whose answer comes whole ---------------------------------------------------------------------------------------


def _run(
    record: ModelRecord, task: str, name: str, inputs: Any, given: Mapping[str, Any], fields: Mapping[str, str]
) -> Any:
    """The answer of a task as its pipeline gives it, in the published form."""
    asked, defaults, shape = dict(given), _DEFAULTS.get(name, {}), _SHAPES.get(name, _as_it_is)
    if PUBLISHED[name] is HubText2Text:
        asked, fields = _text2text(given, fields)
    if name == "table-question-answering":
        asked = {field: value for field, value in given.items() if field not in ("model", "padding")}
        inputs = [_question(each) for each in inputs] if isinstance(inputs, list) else _question(inputs)
    with named(fields):
        parameters = task_parameters(record, task, asked, defaults)
        with lent(record, task, None) as (flight, model):
            result = model.run(task, inputs, parameters, flight.gone)
    services().registry.record_use(record.model_id)
    return shape(result, isinstance(inputs, list))


def _text2text(given: Mapping[str, Any], fields: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters in the words of `/pipeline`, and what these are called in the body."""
    asked = dict(given)
    making: dict[str, Any] = asked.pop("generate_parameters", None) or {}
    inner = {field: f"parameters.generate_parameters.{field}" for field in making}
    for field in making:
        if field in HubText2Text.model_fields:
            raise UnknownField(inner[field])
    if (truncation := asked.pop("truncation", None)) is not None:
        if truncation == "only_second":
            reason = "there is no second text"
            raise InvalidRequest(f"Invalid value for field 'parameters.truncation': {reason}", "parameters.truncation")
        asked["truncation"] = truncation != "do_not_truncate"
    return making | asked, {**fields, **inner}


def _question(value: Any) -> Any:
    """A question about a table as `/pipeline` has it: the published name of its text is another than its clients'."""
    if isinstance(value, dict) and "question" in value and "query" not in value:
        return {"query" if field == "question" else field: part for field, part in value.items()}
    return value


# What is published, or hosted, where neither the request nor the model says anything: all labels, and whole entities.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "text-classification": {"top_k": None},
    "token-classification": {"aggregation_strategy": "simple"},
}


def _as_it_is(result: Any, several: bool) -> Any:  # noqa: ARG001 - as the other shapes
    return result


def _labels(result: Any, several: bool) -> Any:
    """Each input has a list of labels of its own, a single one too."""
    if several:
        return [each if isinstance(each, list) else [each] for each in result]
    return [result if isinstance(result, list) else [result]]


def _zero_shot(result: Any, several: bool) -> Any:
    def labels(each: Mapping[str, Any]) -> list[dict[str, Any]]:
        pairs = zip(each["labels"], each["scores"], strict=True)
        return [{"label": label, "score": score} for label, score in pairs]

    return [labels(each) for each in result] if several else labels(result)


def _cells(result: Any, several: bool) -> Any:
    """With an aggregator even where the model has none: huggingface.js insists on it."""
    if isinstance(result, list):
        return [_cells(each, several) for each in result]
    return {**result, "aggregator": result.get("aggregator", "NONE")}


# A pipeline's result, and whether several inputs were given, to the published form.
_SHAPES: Mapping[str, Callable[[Any, bool], Any]] = {
    "text-classification": _labels,
    "zero-shot-classification": _zero_shot,
    "table-question-answering": _cells,
}


# Vectors --------------------------------------------------------------------------------------------------------------


def _embed(
    record: ModelRecord, name: str, inputs: Any, wanted: Mapping[str, Any], fields: Mapping[str, str]
) -> list[Any]:
    """Vectors of texts, or how much texts are alike."""
    asked = validate(ComparedTexts if name == _SIMILARITY else SomeTexts, {"inputs": inputs})["inputs"]
    if name == _SIMILARITY:
        asked = [asked["source_sentence"], *asked["sentences"]]
    options = {field: wanted[field] for field in ("prompt_name", "truncate", "dimensions") if field in wanted}
    with named(fields), lent(record, name, None) as (flight, model):
        if name == _FEATURES and not model.pools:
            result = model.run(_FEATURES, asked, _token_features(record, wanted), flight.gone)
        else:
            result = model.run("sentence-embeddings", asked, options, flight.gone)["embeddings"]
            if name == _SIMILARITY:
                result = [_cosine(result[0], other) for other in result[1:]]
            else:
                result = [_unit(vector) for vector in result] if wanted.get("normalize") else result
                result = result if isinstance(inputs, list) else result[0]
    services().registry.record_use(record.model_id)
    return list(result)


def _token_features(record: ModelRecord, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a model that gives a vector for each token.

    Raises:
        InvalidRequest: for what only a vector of the whole text can have.
    """
    for field in ("normalize", "prompt_name", "dimensions"):
        if wanted.get(field):
            reason = "this model gives a vector for each token; only sentence-transformers models have it"
            raise InvalidRequest(f"Invalid value for field '{field}': {reason}", field)
    asked = {"truncation": wanted["truncate"]} if "truncate" in wanted else {}
    with named({"truncation": "truncate"}):
        return task_parameters(record, _FEATURES, asked)


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / max(math.hypot(*one) * math.hypot(*other), 1e-12)


def _unit(vector: Sequence[float]) -> list[float]:
    length = max(math.hypot(*vector), 1e-12)
    return [value / length for value in vector]


# Text generation ------------------------------------------------------------------------------------------------------

# What the engine calls otherwise.
_WORDS = {
    "stop_strings": "parameters.stop",
    "json_schema": "parameters.grammar.value",
    "regex": "parameters.grammar.value",
    "echo": "parameters.decoder_input_details",
}


def _generate(record: ModelRecord, body: HubBody, wanted: Mapping[str, Any], fields: Mapping[str, str]) -> Response:
    prompt = validate(OneText, {"inputs": body.inputs})["inputs"]
    count, streams, most = wanted.get("best_of", 1), bool(body.stream), wanted.get("truncate")
    registry = services().registry
    with ExitStack() as stack, named({**_WORDS, **fields}):
        parameters = hub_parameters(record, _generation(wanted))
        if count > 1:
            _check_best_of(streams, parameters)
        flight, model = stack.enter_context(lent(record, "text-generation", None, streams))
        alternatives = wanted.get("top_n_tokens")
        told = streams or _detailed(wanted) or count > 1
        request = GenerationRequest(
            parameters,
            prompt=prompt if most is None else None,
            tokens=None if most is None else model.encode(prompt)[-most:],  # TGI too keeps the end
            streams=streams,
            logprobs=(alternatives or 0) if told else None,
            prompt_logprobs=bool(wanted.get("decoder_input_details")),
            constraint=_constraint(wanted.get("grammar")),
        )
        if not streams:
            requests = [replace(request, parameters=seeded(parameters, number)) for number in range(count)]
            begin(model, flight, requests)
            made = sorted(flight.chunks(), key=lambda chunk: chunk.index)
            made.sort(key=likelihood, reverse=True)
            registry.record_use(record.model_id)
            return jsonify([_answer(made, prompt, wanted, parameters)])
        ticket = flight.attach(model.generate(request, flight.gone))
        framing = _Framing(prompt, wanted, parameters, lambda: registry.record_use(record.model_id))
        response = event_stream(flight, ticket, framing)
        response.call_on_close(stack.pop_all().close)
        return response


def _check_best_of(streams: bool, parameters: Mapping[str, Any]) -> None:
    """As TGI: there is no best of texts that are shown as they are made, nor of texts that are all the same."""
    reason = "cannot be streamed" if streams else "needs do_sample, without which all texts are the same"
    if streams or not parameters.get("do_sample"):
        raise InvalidRequest(f"Invalid value for field 'parameters.best_of': {reason}", "parameters.best_of")


def _detailed(wanted: Mapping[str, Any]) -> bool:
    """Whether the answer tells of tokens; what is asked about these asks for that too."""
    return any(wanted.get(name) for name in ("details", "decoder_input_details", "top_n_tokens"))


def _generation(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """TGI's parameters in this server's words. As TGI, it samples only if `do_sample` or what goes with it says so."""
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
        value = value["schema"]  # with its name beside it, as OpenAI has it
    return Constraint("json_schema", value)


def _reason(chunk: Chunk, prompt: str, made: str, parameters: Mapping[str, Any]) -> str:
    """TGI's words for why it ended. A stop string may begin with the end of the prompt.

    The last token does not tell: not all that end a model's texts are special, and a form that is whole needs none.
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
    """What each token adds to the text: one that is a part of a character nothing, and the last part all of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(token.raw, final=place == len(tokens)) for place, token in enumerate(tokens, 1)]


def _details(chunk: Chunk, prompt: str, made: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`made` is the text of all tokens that were made after the prompt."""
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


class _Framing:
    """TGI's events: one for each token, the last one with the whole text.

    The tokens' texts add up to that text: a special token that is not part of it has none, and a character that takes
    several tokens comes with the last of them, for whoever prints them as they come.
    """

    def __init__(
        self,
        prompt: str,
        wanted: Mapping[str, Any],
        parameters: Mapping[str, Any],
        done: Callable[[], None],
    ) -> None:
        self._prompt = prompt
        self._before = prompt if wanted.get("return_full_text") else ""
        self._alternatives = bool(wanted.get("top_n_tokens"))
        self._parameters = parameters
        self._count = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._untold = ""
        self._made = ""
        self._done = done

    def chunk(self, chunk: Chunk) -> Events:
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
        """The part of the text that goes with a token: all that is there with a chunk's last one, as with most."""
        length = len(self._untold) if latest else len(own) if self._untold.startswith(own) else 0
        told, self._untold = self._untold[:length], self._untold[length:]
        return told

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
