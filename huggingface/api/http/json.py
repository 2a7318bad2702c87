"""JSON on the wire: how a request's body becomes Python values, and values become a response's body.

Reading is stricter than the standard: a body is one JSON object, no key stands in it twice (one of the two values would
be dropped in silence), and its text can be written as UTF-8. NaN and infinities are let through to the schemas, which
refuse them by the field's name. A parser keeps the interpreter to itself while it makes values, so how many there may
be is bounded, and counted before. Serves any request thread.
"""

from __future__ import annotations

import codecs
import gc
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import orjson
from flask import Request, Response, g, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import UnsupportedMediaType

from ...errors import InvalidRequest
from .bodies import unpacked

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

# Ollama takes JSON under any media type, and its own examples send it under curl's default, that of a form. A page of
# another origin may send that too without asking; `host_check` refuses it by its origin.
_UNTYPED = re.compile(r"/api/(?!huggingface(/|\Z))")


# A request has use for so many values at most: a million tokens to embed, or some thousands of messages and tools.
_MOST_VALUES = 1_000_000
_MOST_CONTAINERS = 100_000
_MANY = 10_000  # values, from which on the faster parser makes a difference
_PIECE = 1 << 17  # bytes that are counted at a time: no other thread runs meanwhile
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_LARGE = b"0" * 19  # digits of an integer that may need more than 64 bits
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JSONRequest(Request):
    """A request whose body is a JSON object, or nothing, which counts as an empty object."""

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:  # noqa: ARG002
        """The body as a dict; the flags of Flask's method are taken and make no difference.

        Raises:
            InvalidRequest: the body is not such an object.
            UnsupportedMediaType: it is said to be something other than JSON.
            RequestEntityTooLarge: it is longer than the app allows.
        """
        data = unpacked(
            self.get_data(),
            self.headers.get("Content-Encoding", ""),
            self.max_content_length or sys.maxsize,
            g.unpacked,
        ).removeprefix(codecs.BOM_UTF8)
        if not data.strip():
            return {}
        if not self.is_json and not _UNTYPED.match(self.path):
            raise UnsupportedMediaType(
                f"Content-Type must be application/json, not {self.mimetype or 'left out'!r}"
                if self.mimetype
                else "Content-Type must be application/json"
            )
        if data.startswith((codecs.BOM_UTF16_BE, codecs.BOM_UTF16_LE)) or b"\0" in data[:4]:
            raise InvalidRequest("The request body must be UTF-8 text, not UTF-16 or UTF-32")
        _check_size(data)
        try:
            value = _parsed(data)
        except UnicodeError as error:
            raise InvalidRequest("The request body is not valid UTF-8 text") from error
        except ValueError as error:
            raise InvalidRequest(f"The request body is not valid JSON: {error}") from error
        except RecursionError as error:
            raise InvalidRequest("The request body is nested too deeply") from error
        if not isinstance(value, dict):
            raise InvalidRequest("The request body must be a JSON object")
        return value


def without_slash(app: WSGIApplication) -> WSGIApplication:
    """The app, for which a path with a slash at its end is the path without it, whatever route that is."""

    def call(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        return app({**environ, "PATH_INFO": path[:-1] or "/"} if path.endswith("/") else environ, start_response)

    return call


def _check_size(data: bytes) -> None:
    """Refuse JSON of more values than a request has a use for: each costs many times its bytes, in time and memory.

    Raises:
        InvalidRequest: it holds more.
    """
    if _fits(*_marks(data)):  # without a look at which of them are within texts
        return
    values = containers = 0
    for texts, part in enumerate(_outside_strings(data)):
        more = _marks(part)
        values, containers = values + more[0], containers + more[1]
        if not _fits(max(values, texts), containers):
            raise InvalidRequest(
                f"The request body holds more than {_MOST_VALUES} values, or more than {_MOST_CONTAINERS} lists "
                "and objects"
            )


def _marks(data: bytes) -> tuple[int, int]:
    """How many values a part of a body has at most, and how many of them are lists and objects."""
    containers = _count(data, b"[") + _count(data, b"{")
    return _count(data, b",") + containers, containers


def _count(data: bytes, mark: bytes) -> int:
    """`data.count(mark)`, piece by piece, so that other threads run in between."""
    if len(data) <= _PIECE:
        return data.count(mark)
    return sum(data[start : start + _PIECE].count(mark) for start in range(0, len(data), _PIECE))


def _fits(values: int, containers: int) -> bool:
    return values <= _MOST_VALUES and containers <= _MOST_CONTAINERS


def _outside_strings(data: bytes) -> Iterator[bytes]:
    """What stands between the texts of JSON; where a text does not end, the rest of the body is one."""
    end = 0
    while (start := data.find(b'"', end)) >= 0:
        yield data[end:start]
        end = start + 1
        while (stop := data.find(b'"', end)) >= 0:
            text, end = data[end:stop], stop + 1
            if (len(text) - len(text.rstrip(b"\\"))) % 2 == 0:  # else the quote is of the text
                break
        else:
            return
    yield data[end:]


def _parsed(data: bytes) -> Any:
    """The value of a body, integers of any size exact.

    Raises:
        ValueError: it is no JSON, or no UTF-8. RecursionError: it is nested too deeply.
        InvalidRequest: an object has a field twice.
    """
    # orjson takes a third of the time, and neither tells of a field given twice nor keeps large integers. A body of one
    # object, with as many colons as fields, has none twice.
    if _count(data, b",") > _MANY and _count(data, b"{") == 1 and _LARGE not in data.translate(_DIGITS):
        try:
            with _uncollected():
                value = orjson.loads(data)
        except orjson.JSONDecodeError:  # NaN and infinities, too; what is wrong is said by the other parser
            pass
        else:
            if isinstance(value, dict) and _count(data, b":") == len(value):
                return value
    text = data.decode("utf-8")
    with _uncollected():
        value = json.loads(text, object_pairs_hook=_object)
    if "\\" in text and _SURROGATE.search(text):  # one character is found fifteen times as fast
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    return value


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector off what is being made: it would pass over the whole process again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


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
        return json.dumps(value, separators=(",", ":"), default=_plain).encode()


def _plain(value: Any) -> Any:
    """What orjson makes of a value that is none of JSON's: of a dataclass, an object."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else orjson.loads(orjson.dumps(value))


class JSONProvider(DefaultJSONProvider):
    """Responses by orjson: several times faster on a long list, fields in the order they are given."""

    sort_keys = False

    def response(self, *args: Any, **kwargs: Any) -> Response:
        """A response whose body is the argument as JSON."""
        value = self._prepare_response_obj(args, kwargs)
        return Response(encoded(value) + b"\n", mimetype=self.mimetype)
