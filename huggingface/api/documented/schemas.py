"""The contract as pydantic models: the parts that several bodies and answers share.

The rest is in the other files here whose names end in `schemas`. The routes validate with these models and the OpenAPI
document is made from them, so the two cannot differ. Unknown fields are refused, and values are not converted from
other types; `http/fields.py` defines what null means. Must not know models or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from flask_openapi3 import MediaType, Schema
from flask_openapi3.models.data_type import DataType
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

from ..http.durations import seconds
from ..http.fields import Fields

# Thirty years: a longer time means for ever.
MAX_SECONDS = 10**9

MODEL_ID_TEXT = "Hugging Face model id: `name` or `org/name`."

# How long a model stays in memory after a use; a text is a duration as Go and Ollama write it: `5m`, `1h30m`, `-1s`.
KeepAlive = Annotated[float, BeforeValidator(seconds, json_schema_input_type=float | str), Field(ge=-1, le=MAX_SECONDS)]


# Renamed fields of settings and answers, with their old names, which clients may still use.
OLD_NAMES = {"backend": "engine", "backend_reason": "engine_reason"}


def with_old_names(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer with its renamed fields under their old names too."""
    return {**answer, **{old: answer[name] for name, old in OLD_NAMES.items() if name in answer}}


def renamed(name: str, description: str, **constraints: Any) -> Any:
    """An optional field that may also be given under its old name."""
    return optional(description, validation_alias=AliasChoices(name, OLD_NAMES[name]), **constraints)


def old_name(of: str) -> Any:
    """A field of an answer that repeats another one under its old name."""
    return Field(description=f"The old name of `{of}`.", deprecated=True)


class Strict(Fields):
    """A body or query that refuses unknown fields whatever the server's setting."""

    lasts = True

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Answer(BaseModel):
    """A response."""

    model_config = ConfigDict(protected_namespaces=())

    success: Literal[True]


def streaming(events: str) -> ConfigDict:
    """The config of an answer that `stream` turns into server-sent events; `events` describes them."""
    stream = MediaType(schema=Schema(type=DataType.STRING, description=events))
    return cast(ConfigDict, {"protected_namespaces": (), "openapi_extra": {"content": {"text/event-stream": stream}}})


def described(answer: Any, events: str | None = None) -> type[BaseModel]:
    """A typed dict as a model for the API's document; `events` describes its server-sent events, if it has some."""
    adapter = TypeAdapter[Any](answer)
    fields = {
        "__module__": answer.__module__,
        "model_config": ConfigDict() if events is None else streaming(events),
        "model_json_schema": classmethod(lambda _, **how: adapter.json_schema(**how)),
    }
    return type(answer.__name__, (BaseModel,), fields)


class ErrorAnswer(BaseModel):
    """Every failure, whatever its status."""

    success: Literal[False]
    error: str = Field(description="What went wrong and what to do about it.")


# The failures that routes may answer: all routes, routes with a body, the registry's, and routes that load a model.
FAILURES: dict[int | str, type[BaseModel]] = dict.fromkeys((400, 403, 500), ErrorAnswer)
BODY_FAILURES: dict[int | str, type[BaseModel]] = dict.fromkeys((413, 415), ErrorAnswer)
REGISTRY_FAILURES: dict[int | str, type[BaseModel]] = dict.fromkeys((404, 503, 507), ErrorAnswer)
MODEL_FAILURES: dict[int | str, type[BaseModel]] = dict.fromkeys((404, 409, 422, 499, 503, 504, 507), ErrorAnswer)


def optional(description: str, **constraints: Any) -> Any:
    """An optional field; its default None means that it is not given."""
    return Field(default=None, description=description, **constraints)


class ModelPath(BaseModel):
    """A model in a path; a slash in the id may be written raw or as `%2F`."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str = Field(description=MODEL_ID_TEXT)


class MessageAnswer(Answer):
    """A message that the request has succeeded."""

    message: str
