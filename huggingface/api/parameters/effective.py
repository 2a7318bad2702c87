"""Computes the parameters in effect: the request's over the model's registered ones over the documented defaults.

Pure functions over plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ...errors import InvalidRequest
from ...registry.records import ModelRecord
from ...tasks import GENERATION_TASKS, MODEL_TYPES, canonical_task
from .schemas import TASK_PARAMETERS, GenerationParameters, Parameters, validate

# Section 2.1 of the API document.
GENERATE_DEFAULTS: Mapping[str, Any] = {
    "max_new_tokens": 100,
    "temperature": 0.7,
    "do_sample": True,
    "top_p": 0.9,
    "top_k": 50,
    "repetition_penalty": 1.1,
}

# Pairs of names for the same thing. transformers always prefers the first of a pair; here the one from the layer
# nearest to the request wins, so that none is accepted and then ignored.
_SAME = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"), ("stop_strings", "stop_sequence"))


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the layers' values, later layers over earlier ones, with keys in the order of their first appearance."""
    result: dict[str, Any] = {}
    for layer in layers:
        for one, other in _SAME:
            if one in layer:
                result.pop(other, None)
            if other in layer:
                result.pop(one, None)
        result.update(layer)
    return result


def _agreed(known: type[Parameters], effective: dict[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Validates the effective parameters; drops registered and default ones that contradict the requested ones.

    Raises:
        InvalidRequest: a requested parameter is invalid; names the field.
    """
    while True:
        try:
            checked = validate(known, effective)
            return {name: checked[name] for name in effective if name in checked}  # in the documented order
        except InvalidRequest as error:
            if error.field in asked or error.field not in effective:
                raise
            effective = {name: value for name, value in effective.items() if name != error.field}


def generation_parameters(record: ModelRecord, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The effective parameters of `/generate`; a temperature of 0 sets `do_sample` to false.

    Raises:
        InvalidRequest: a requested parameter contradicts another one; names the field.
    """
    registered = {name: value for name, value in record.parameters.items() if name in GenerationParameters.model_fields}
    effective = merge(GENERATE_DEFAULTS, registered, asked)
    if effective["temperature"] == 0 and asked.get("do_sample") and "temperature" not in asked:
        effective["temperature"] = GENERATE_DEFAULTS["temperature"]  # the request asks to sample, without a temperature
    if effective["temperature"] == 0:
        effective["do_sample"] = False
    return _agreed(GenerationParameters, effective, asked)


# OpenAI's defaults, for a model without its own.
OPENAI_DEFAULTS: Mapping[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


def openai_parameters(
    record: ModelRecord, own: Mapping[str, Any], asked: Mapping[str, Any], *, unlimited: bool = False
) -> dict[str, Any]:
    """The effective parameters of OpenAI's routes; `own` are those of the model's generation config.

    The request's come first, then the registered ones, then the model's own, then OpenAI's. With `unlimited`, no limit
    of the length is among them.

    Raises:
        InvalidRequest: requested parameters contradict each other; names the field.
    """
    asked = dict(asked)
    if "do_sample" not in asked and {"temperature", "top_p"} & asked.keys():
        asked["do_sample"] = True  # OpenAI always samples
    effective = _effective_text(asked, OPENAI_DEFAULTS, own, _registered_for_text(record))
    if unlimited:
        return {name: value for name, value in effective.items() if name not in ("max_new_tokens", "max_length")}
    return effective


# The published schema's defaults for text generation, and TGI's: 1,024 tokens, or as many as there is room for. TGI has
# no beams, which could not be streamed.
HUB_DEFAULTS: Mapping[str, Any] = {"max_new_tokens": 1024, "do_sample": False, "num_beams": 1}


def hub_parameters(record: ModelRecord, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The effective parameters of a text generation in Hugging Face's protocol.

    Raises:
        InvalidRequest: requested parameters contradict each other; names the field.
    """
    return _effective_text(asked, HUB_DEFAULTS, _registered_for_text(record))


def _registered_for_text(record: ModelRecord) -> dict[str, Any]:
    """The registered parameters of a generation, without the number of answers, which only a request sets."""
    known = GenerationParameters.model_fields.keys() - {"num_return_sequences"}
    return {name: value for name, value in record.parameters.items() if name in known}


def _effective_text(asked: Mapping[str, Any], *below: Mapping[str, Any]) -> dict[str, Any]:
    """The requested parameters over the layers below; a temperature of 0 means greedy."""
    effective = merge(*below, asked)
    if effective.get("temperature") == 0:
        effective["do_sample"] = False
    return _agreed(GenerationParameters, effective, asked)


def task_parameters(
    record: ModelRecord, task: str, asked: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The effective parameters of a task. Registered ones apply to the model's own task and to tasks that generate.

    For other tasks a name may have another meaning (`top_k` of a generation is not that of fill-mask). `defaults` are
    the protocol's, below the request's and the model's.

    Raises:
        InvalidRequest: a field is unknown, missing or wrong; names it.
    """
    name = canonical_task(task)
    registered: dict[str, Any] = {}
    own = MODEL_TYPES.get(record.model_type)  # a file written by hand or by a later version may have an unknown type
    if name in GENERATION_TASKS or (own is not None and name == own.task):
        known = TASK_PARAMETERS[name].model_fields
        registered = {key: value for key, value in record.parameters.items() if key in known}
    asked = TASK_PARAMETERS[name].given(asked)
    return _agreed(TASK_PARAMETERS[name], merge(defaults, registered, asked), asked)


def check_registered(model_type: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the default parameters of a model of this type, its task's and generation's; returns them as stored.

    Unknown ones are refused whatever the server's setting, because stored parameters would seem to have an effect.

    Raises:
        InvalidRequest: a field is unknown or wrong; names it as `parameters.<name>`.
    """
    own = TASK_PARAMETERS[MODEL_TYPES[model_type].task]
    # A field that a task requires of each request need not be a default of the model.
    required = {name: "label" for name, field in own.model_fields.items() if field.is_required()}
    parameters = own.given(parameters)
    mine = {name: value for name, value in parameters.items() if name in own.model_fields}
    validate(own, required | mine, "parameters.", lasts=True)
    rest = {name: value for name, value in parameters.items() if name not in own.model_fields}
    validate(GenerationParameters, rest, "parameters.", lasts=True)
    return parameters
