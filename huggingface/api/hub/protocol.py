"""`POST /models/<id>`: Hugging Face's inference protocol, for `huggingface_hub` and huggingface.js.

The task is the model's own; it runs as in `/pipeline` and `/generate`, and answers have the published form. Sources:
the JSON schemas in `@huggingface/tasks`; text generation is TGI's, features are TEI's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flask import Response, jsonify

from ...errors import InvalidRequest, UnknownField
from ...registry.records import ModelRecord
from ...tasks import MODEL_TYPES, canonical_task
from ..documented import models, schemas
from ..http.fields import refuse_unknown
from ..parameters.effective import task_parameters
from ..parameters.schemas import Parameters, validate
from ..requests.fan_out import named
from ..requests.leasing import leased_model
from ..requests.services import services
from .schemas import PUBLISHED, TAG, ComparedTexts, HubAnswer, HubBody, HubText2Text, SomeTexts, TaskQuery
from .text import generate_text

_SIMILARITY = "sentence-similarity"
_FEATURES = "feature-extraction"
_ZERO_SHOT = "zero-shot-classification"


# On the models' own blueprint: of two blueprints that share an address, the API's document would show only one.
@models.blueprint.post(
    "/models/<path:model_id>",
    tags=[TAG],
    responses={200: HubAnswer, **schemas.BODY_FAILURES, **schemas.MODEL_FAILURES},
)
def infer(path: schemas.ModelPath, query: TaskQuery, body: HubBody) -> Response:
    """Run a model's task, in the protocol of Hugging Face's clients."""
    record = services().registry.get(path.model_id)
    task = _task(record, query, body)
    name = task if task == _SIMILARITY else canonical_task(task)
    given, fields = _given(name, body)
    if name == "text-generation":
        return generate_text(record, body, given, fields)
    if body.stream:
        raise InvalidRequest(f"Invalid value for field 'stream': '{task}' has no text to stream", "stream")
    if name in (_FEATURES, _SIMILARITY):
        return jsonify(_embed(record, name, body.inputs, given, fields))
    return jsonify(_run(record, task, name, body.inputs, given, fields))


def _task(record: ModelRecord, query: TaskQuery, body: HubBody) -> str:
    """The task to run. Where a model can have two tasks, the body decides."""
    if query.task is not None:
        return query.task
    own = MODEL_TYPES.get(record.model_type)
    task = own.task if own is not None else canonical_task(record.model_type)
    if task == "text2text-generation":
        return "text-generation"  # the clients have one method for both
    if task == _FEATURES and isinstance(body.inputs, dict) and "source_sentence" in body.inputs:
        return _SIMILARITY
    if task == "text-classification" and (body.parameters or {}).get("candidate_labels") is not None:
        return _ZERO_SHOT
    return task


def _given(name: str, body: HubBody) -> tuple[dict[str, Any], dict[str, str]]:
    """Checks a task's parameters; returns them, and each one's name in the body. Null means not given.

    Raises:
        MissingField, UnknownField, InvalidRequest: names the field.
    """
    schema, beside, parameters = PUBLISHED[name], dict(body.model_extra or {}), body.parameters or {}
    if name not in (_FEATURES, _SIMILARITY):
        for field in [field for field, value in beside.items() if value is not None]:
            refuse_unknown(field, HubBody.model_fields)
        beside = {}
    for field in beside.keys() & parameters.keys():
        raise InvalidRequest(f"Field given twice: {field}", field)
    given = _checked(schema, beside, "") | _checked(schema, parameters, "parameters.")
    fields = {field: f"parameters.{field}" for field in parameters} | {"input": "inputs", "prompt": "inputs"}
    return given, fields


def _checked(schema: type[Parameters], values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    for field in [field for field, value in values.items() if value is not None and field not in schema.model_fields]:
        refuse_unknown(prefix + field, schema.model_fields)
    if not values and not prefix:
        return {}  # required fields are expected among `parameters`, not here
    return validate(schema, {field: value for field, value in values.items() if value is not None}, prefix)


# Tasks that are not streamed ------------------------------------------------------------------------------------------


def _run(
    record: ModelRecord, task: str, name: str, inputs: Any, given: Mapping[str, Any], fields: Mapping[str, str]
) -> Any:
    """Runs a task as its pipeline does; returns the answer in the published form."""
    asked, defaults, shape = dict(given), _DEFAULTS.get(name, {}), _SHAPES.get(name, _as_it_is)
    if PUBLISHED[name] is HubText2Text:
        asked, fields = _text2text(given, fields)
    if name == "table-question-answering":
        asked = {field: value for field, value in given.items() if field not in ("model", "padding")}
        inputs = [_question(each) for each in inputs] if isinstance(inputs, list) else _question(inputs)
    with named(fields):
        parameters = task_parameters(record, task, asked, defaults)
        with leased_model(record, task, None) as (flight, model):
            result = model.run(task, inputs, parameters, flight.cancellation)
    services().registry.record_use(record.model_id)
    return shape(result, isinstance(inputs, list))


def _text2text(given: Mapping[str, Any], fields: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters with the names of `/pipeline`, and each one's name in the body."""
    asked = dict(given)
    making: dict[str, Any] = asked.pop("generate_parameters", None) or {}
    inner = {field: f"parameters.generate_parameters.{field}" for field in making}
    for field in making:
        if field in _BESIDE:
            raise UnknownField(inner[field])
    if (truncation := asked.pop("truncation", None)) is not None:
        if truncation == "only_second":
            reason = "there is no second text"
            raise InvalidRequest(f"Invalid value for field 'parameters.truncation': {reason}", "parameters.truncation")
        asked["truncation"] = truncation not in (False, "do_not_truncate")
    for field, value in asked.items():
        if making.get(field) not in (None, value):
            raise InvalidRequest(f"Field given twice: {field}", f"parameters.{field}")
    return making | asked, {**inner, **fields}


# Fields that are not parameters of a generation.
_BESIDE = frozenset({"generate_parameters", "truncation", "clean_up_tokenization_spaces", "src_lang", "tgt_lang"})


def _question(value: Any) -> Any:
    """A question about a table with the name of `/pipeline`: the published name differs from the clients'."""
    if isinstance(value, dict) and "question" in value and "query" not in value:
        return {"query" if field == "question" else field: part for field, part in value.items()}
    return value


# The published, or hosted, defaults below the request's and the model's: all labels, and whole entities.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "text-classification": {"top_k": None},
    "token-classification": {"aggregation_strategy": "simple"},
}


def _as_it_is(result: Any, several: bool) -> Any:  # noqa: ARG001 - as the other shapes
    return result


def _labels(result: Any, several: bool) -> Any:
    """A list of labels for each input, even for a single one."""
    if several:
        return [each if isinstance(each, list) else [each] for each in result]
    return [result if isinstance(result, list) else [result]]


def _zero_shot(result: Any, several: bool) -> Any:
    def labels(each: Mapping[str, Any]) -> list[dict[str, Any]]:
        pairs = zip(each["labels"], each["scores"], strict=True)
        return [{"label": label, "score": score} for label, score in pairs]

    if several and len(result) == 1:  # huggingface.js checks for the published form of one text
        return labels(result[0])
    return [labels(each) for each in result] if several else labels(result)


def _cells(result: Any, several: bool) -> Any:
    """Adds an aggregator where the model has none, since huggingface.js requires one."""
    if isinstance(result, list):
        return [_cells(each, several) for each in result]
    return {**result, "aggregator": result.get("aggregator", "NONE")}


# Functions from a pipeline's result, and whether several inputs were given, to the published form.
_SHAPES: Mapping[str, Callable[[Any, bool], Any]] = {
    "text-classification": _labels,
    _ZERO_SHOT: _zero_shot,
    "table-question-answering": _cells,
}


# Vectors --------------------------------------------------------------------------------------------------------------


def _embed(
    record: ModelRecord, name: str, inputs: Any, wanted: Mapping[str, Any], fields: Mapping[str, str]
) -> list[Any]:
    """Computes vectors of texts, or the similarity of texts."""
    asked = validate(ComparedTexts if name == _SIMILARITY else SomeTexts, {"inputs": inputs})["inputs"]
    if name == _SIMILARITY:
        asked = [asked["source_sentence"], *asked["sentences"]]
    options = {field: wanted[field] for field in ("prompt_name", "truncate", "dimensions") if field in wanted}
    with named(fields), leased_model(record, name, None) as (flight, model):
        if name == _FEATURES and not model.pools:
            result = model.run(_FEATURES, asked, _token_features(record, wanted), flight.cancellation)
        else:
            result = model.run("sentence-embeddings", asked, options, flight.cancellation)["embeddings"]
            if name == _SIMILARITY:
                result = [_cosine(result[0], other) for other in result[1:]]
            else:
                result = [_unit(vector) for vector in result] if wanted.get("normalize") else result
                result = result if isinstance(inputs, list) else result[0]
    services().registry.record_use(record.model_id)
    return list(result)


def _token_features(record: ModelRecord, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters for a model that gives a vector for each token.

    Raises:
        InvalidRequest: a parameter applies only to vectors of whole texts.
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
