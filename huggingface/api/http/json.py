"""JSON: parses request bodies into Python values, and encodes values as response bodies.

Parsing is stricter than the standard: a body is one JSON object, no key occurs twice (one value would be lost in
silence), and its text is valid UTF-8. NaN and infinities pass to the schemas, which refuse them by the field's name. A
parser holds the interpreter's lock while it makes values, so their number is limited and counted first. Serves any
request thread.
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

# Ollama accepts JSON under any media type, and its own examples send curl's default, a form's media type. A page of
# another origin may send that without a preflight request; `host_check` refuses it by its origin.
_UNTYPED = re.compile(r"/api/(?!huggingface(/|\Z))")


# The most values that a request needs: a million tokens to embed, or some thousands of messages and tools.
_MAX_VALUES = 1_000_000
_MAX_CONTAINERS = 100_000
_MANY = 10_000  # with more values, the faster parser makes a difference
_PIECE = 1 << 17  # bytes that are counted at a time: no other thread runs meanwhile
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_LARGE = b"0" * 19  # digits of an integer that may need more than 64 bits
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JSONRequest(Request):
    """A request whose body is a JSON object; an empty body counts as an empty object."""

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:  # noqa: ARG002
        """The body as a dict; the flags of Flask's method have no effect.

        Raises:
            InvalidRequest: the body is not a JSON object.
            UnsupportedMediaType: its media type is not JSON's.
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
    """Wraps the app so that a slash at the end of a path is ignored, on all routes."""

    def call(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        return app({**environ, "PATH_INFO": path[:-1] or "/"} if path.endswith("/") else environ, start_response)

    return call


def _check_size(data: bytes) -> None:
    """Refuses JSON of more values than a request needs: each costs many times its bytes, in time and memory.

    Raises:
        InvalidRequest: the body holds more.
    """
    if _fits(*_marks(data)):  # even with the marks within strings
        return
    values = containers = 0
    for texts, part in enumerate(_outside_strings(data)):
        more = _marks(part)
        values, containers = values + more[0], containers + more[1]
        if not _fits(max(values, texts), containers):
            raise InvalidRequest(
                f"The request body holds more than {_MAX_VALUES} values, or more than {_MAX_CONTAINERS} lists "
                "and objects"
            )


def _marks(data: bytes) -> tuple[int, int]:
    """The most values that a part of a body can hold, and its number of lists and objects."""
    containers = _count(data, b"[") + _count(data, b"{")
    return _count(data, b",") + containers, containers


def _count(data: bytes, mark: bytes) -> int:
    """`data.count(mark)`, piece by piece, so that other threads run in between."""
    if len(data) <= _PIECE:
        return data.count(mark)
    return sum(data[start : start + _PIECE].count(mark) for start in range(0, len(data), _PIECE))


def _fits(values: int, containers: int) -> bool:
    return values <= _MAX_VALUES and containers <= _MAX_CONTAINERS


def _outside_strings(data: bytes) -> Iterator[bytes]:
    """The parts of JSON between its strings; an unfinished string takes the rest of the body."""
    end = 0
    while (start := data.find(b'"', end)) >= 0:
        yield data[end:start]
        end = start + 1
        while (stop := data.find(b'"', end)) >= 0:
            text, end = data[end:stop], stop + 1
            if (len(text) - len(text.rstrip(b"\\"))) % 2 == 0:  # else the quote is escaped
                break
        else:
            return
    yield data[end:]


def _parsed(data: bytes) -> Any:
    """Parses a body; integers of any size stay exact.

    Raises:
        ValueError: it is not JSON, or not UTF-8. RecursionError: it is nested too deeply.
        InvalidRequest: an object has a field twice.
    """
    # orjson takes a third of the time, but neither reports a repeated field nor keeps large integers. A body of one
    # object with as many colons as fields has no repeated field.
    if _count(data, b",") > _MANY and _count(data, b"{") == 1 and _LARGE not in data.translate(_DIGITS):
        try:
            with _uncollected():
                value = orjson.loads(data)
        except orjson.JSONDecodeError:  # NaN and infinities too; the other parser reports the error
            pass
        else:
            if isinstance(value, dict) and _count(data, b":") == len(value):
                return value
    text = data.decode("utf-8")
    with _uncollected():
        value = json.loads(text, object_pairs_hook=_object)
    if "\\" in text and _SURROGATE.search(text):  # the search for one character is fifteen times as fast
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails for half a surrogate pair
    return value


@contextmanager
def _uncollected() -> Iterator[None]:
    """Switches the garbage collector off while values are made: it would scan the whole process again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def check_query() -> None:
    """Refuses a query that gives a field twice, since one value would be lost in silence.

    Raises:
        InvalidRequest: names the field.
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
    """Encodes a value as JSON on one line."""
    try:
        return orjson.dumps(value)
    except TypeError:  # integers of more than 64 bits, or deep nesting, from a caller or a model
        return json.dumps(value, separators=(",", ":"), default=_plain).encode()


def _plain(value: Any) -> Any:
    """Converts a value without a JSON form as orjson does: a dataclass becomes an object."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else orjson.loads(orjson.dumps(value))


class JSONProvider(DefaultJSONProvider):
    """Encodes responses with orjson: several times faster on a long list, with fields in their given order."""

    sort_keys = False

    def response(self, *args: Any, **kwargs: Any) -> Response:
        """Returns a response whose body is the argument as JSON."""
        value = self._prepare_response_obj(args, kwargs)
        return Response(encoded(value) + b"\n", mimetype=self.mimetype)
