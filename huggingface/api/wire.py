"""JSON on the wire: how a request's body becomes Python values, and values become a response's body.

Reading is stricter than the standard: a body is one JSON object, no key stands in it twice (one of the two values would
be dropped in silence), and its text can be written as UTF-8. NaN and infinities are let through to the schemas, which
refuse them by the field's name. Serves any request thread.
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson
from flask import Request, Response, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import UnsupportedMediaType

from ..errors import InvalidRequest

# Ollama takes JSON under any media type, and its own examples send it under curl's default, that of a form. A page of
# another origin may send that too without asking; `guard` refuses it by its origin.
_UNTYPED = re.compile(r"/api/(?!huggingface(/|\Z))")


class JSONRequest(Request):
    """A request whose body is a JSON object, or nothing, which counts as an empty object."""

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:  # noqa: ARG002
        """The body as a dict; the flags of Flask's method are taken and make no difference.

        Raises:
            InvalidRequest: the body is not such an object.
            UnsupportedMediaType: it is said to be something other than JSON.
            RequestEntityTooLarge: it is longer than the app allows.
        """
        data = self.get_data()
        if not data.strip():
            return {}
        if not self.is_json and not _UNTYPED.match(self.path):
            raise UnsupportedMediaType(
                f"Content-Type must be application/json, not {self.mimetype or 'left out'!r}"
                if self.mimetype
                else "Content-Type must be application/json"
            )
        try:
            value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
            if "\\u" in data.decode("utf-8"):
                json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
        except UnicodeError as error:
            raise InvalidRequest("The request body is not valid UTF-8 text") from error
        except ValueError as error:
            raise InvalidRequest(f"The request body is not valid JSON: {error}") from error
        except RecursionError as error:
            raise InvalidRequest("The request body is nested too deeply") from error
        if not isinstance(value, dict):
            raise InvalidRequest("The request body must be a JSON object")
        return value


def check_query() -> None:
    """Refuse a query that gives a field twice, of which one would be dropped in silence.

    Raises:
        InvalidRequest: naming the field.
    """
    for name, values in request.args.lists():
        if len(values) > 1:
            raise InvalidRequest(f"Field given twice: {name[:100]}", name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise InvalidRequest(f"Field given twice: {name[:100]}", name)
        result[name] = value
    return result


def encoded(value: Any) -> bytes:
    """A value as JSON, on one line."""
    try:
        return orjson.dumps(value)
    except TypeError:  # integers of more than 64 bits, or deep nesting, which a caller sent or a model wrote
        return json.dumps(value, separators=(",", ":")).encode()


class JSONProvider(DefaultJSONProvider):
    """Responses by orjson: several times faster on a long list, fields in the order they are given."""

    sort_keys = False

    def response(self, *args: Any, **kwargs: Any) -> Response:
        """A response whose body is the argument as JSON."""
        value = self._prepare_response_obj(args, kwargs)
        return Response(encoded(value) + b"\n", mimetype=self.mimetype)
