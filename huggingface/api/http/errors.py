"""The one table from error to HTTP status, and the error bodies of all protocols.

The body is `{"success": false, "error": "…"}`; paths of other protocols have those protocols' bodies. The handlers are
registered on the app, because a blueprint's handlers never see the 404 or 405 of an unknown route. An unexpected error
is a 500 that says nothing private; the log has the traceback under the same reference.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from flask import Flask, Response, g, jsonify, request
from pydantic import ValidationError
from typing_extensions import TypedDict
from werkzeug.exceptions import HTTPException, InternalServerError, MethodNotAllowed, NotFound, RequestEntityTooLarge

from ... import errors
from .fields import fields_named
from .validation import request_error

logger = logging.getLogger(__name__)

STATUS: dict[type[errors.LocalLLMError], int] = {
    errors.InvalidRequest: 400,
    errors.DependencyMissing: 400,
    errors.ModelNotFound: 404,
    errors.ModelExists: 409,
    errors.ModelDisabled: 409,
    errors.ModelBusy: 409,
    errors.RegistryError: 500,
    errors.RegistryBusy: 503,
    errors.StorageFull: 507,
    errors.LoadError: 500,
    errors.FilesMissing: 404,
    errors.FilesGated: 403,
    errors.FilesRefused: 403,
    errors.FilesCorrupt: 422,
    errors.ModelUnsupported: 422,
    errors.HubUnreachable: 503,
    errors.DeviceMissing: 503,
    errors.DeviceFailed: 503,
    errors.DiskFull: 507,
    errors.OutOfMemory: 507,
    errors.NeverFits: 400,
    errors.MemoryHeld: 503,
    errors.ServerFull: 503,
    errors.QueueFull: 503,
    errors.RequestNotFound: 404,
    errors.DownloadNotFound: 404,
    errors.GenerationFailed: 500,
    errors.EngineFailed: 503,
    errors.RequestCancelled: 499,  # nginx's "client closed request": no standard status exists
    errors.DeadlineExceeded: 504,
    errors.NotReady: 503,
    errors.Cancelled: 503,
    errors.LocalLLMError: 500,
}


def status_of(error: errors.LocalLLMError) -> int:
    """The HTTP status of an error: that of the nearest class in the table."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def body(message: str) -> dict[str, Any]:
    """The documented body of a failure."""
    return {"success": False, "error": message}


class OpenAIError(TypedDict):
    """An error in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIFailure(TypedDict):
    """The body of every failure under `/v1`."""

    error: OpenAIError


def openai_body(message: str, status: int, error: errors.LocalLLMError | None = None) -> OpenAIFailure:
    """The body of a failure under `/v1`. Source: "Error codes", OpenAI API reference.

    `type` says whether the request or the server is at fault; `code` is OpenAI's, where OpenAI has one.
    """
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
    of_model = isinstance(error, errors.ModelNotFound | errors.UnsupportedTask)
    param = "model" if of_model else getattr(error, "field", None)
    kind = {403: "permission_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_CODES: dict[type[errors.LocalLLMError], str] = {
    errors.ModelNotFound: "model_not_found",
    errors.MissingField: "missing_required_parameter",
    errors.UnknownField: "unknown_parameter",
    errors.ContextExceeded: "context_length_exceeded",
}


def ollama_body(message: str, status: int, error: errors.LocalLLMError | None = None) -> dict[str, Any]:  # noqa: ARG001
    """The body of a failure on Ollama's routes. A missing model has Ollama's own message."""
    if isinstance(error, errors.ModelNotFound):
        message = message[:1].lower() + message[1:]
    return {"error": message}


def anthropic_body(
    message: str, status: int, error: errors.LocalLLMError | None, request_id: str | None
) -> dict[str, Any]:
    """The body of a failure on Anthropic's routes. Source: "Errors", Anthropic API reference.

    The message for a prompt that is too long is Anthropic's own: Claude Code reads it and shortens its conversation.
    """
    kind = _KINDS.get(status, "invalid_request_error" if status < 499 else "api_error")
    if isinstance(error, errors.QueueFull | errors.ServerFull | errors.MemoryHeld):
        kind = "overloaded_error"
    if isinstance(error, errors.ContextExceeded):
        message = f"prompt is too long: {error.tokens} tokens > {error.room} maximum. {message}"
    told: dict[str, Any] = {"type": kind, "message": message}
    if (details := _DETAILS.get(getattr(error, "field", None) or "")) is not None:
        told["details"] = details
    return {"type": "error", "error": told, "request_id": request_id}


# Details that Anthropic's client acts on, by the field at fault: without threads it sends the whole conversation.
_DETAILS = {"thread": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}}

_KINDS: dict[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}

# Paths that always speak Anthropic's protocol, and the list of models, which does so with Anthropic's header.
_ANTHROPIC = re.compile(r"/v1/messages(/|\Z)")
_ANTHROPIC_TOO = re.compile(r"/v1/models(/|\Z)")


def speaks_anthropic() -> bool:
    """Whether the present request is in Anthropic's protocol."""
    shared = _ANTHROPIC_TOO.match(request.path) and "anthropic-version" in request.headers
    return bool(shared or _ANTHROPIC.match(request.path))


# The other protocols' bodies of failures, by their paths.
_SHAPES: tuple[tuple[re.Pattern[str], Callable[[str, int, errors.LocalLLMError | None], Mapping[str, Any]]], ...] = (
    (re.compile(r"/v1(/|\Z)|/api/huggingface/models/.+/v1(/|\Z)"), openai_body),
    (re.compile(r"/api/(?!huggingface(/|\Z))"), ollama_body),
)


def _body(message: str, status: int, error: errors.LocalLLMError | None = None) -> Mapping[str, Any]:
    """The body of a failure of the present request, in its protocol."""
    if speaks_anthropic():  # which a header may decide, not only the path
        return anthropic_body(message, status, error, g.get("request_id"))
    shape = next((shape for paths, shape in _SHAPES if paths.match(request.path)), None)
    return body(message) if shape is None else shape(message, status, error)


def init_errors(app: Flask) -> None:
    """Gives every failure of `app`, routing errors included, the documented body."""
    app.register_error_handler(errors.LocalLLMError, _own)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unforeseen)
    dispatch = app.dispatch_request

    def dispatch_request() -> Any:
        with errors.no_panics():  # a panic would end the thread, and leave the client without an answer
            return dispatch()

    app.dispatch_request = dispatch_request  # type: ignore[method-assign]


def on_invalid_body(error: ValidationError) -> Response:
    """Translates a validation error; flask-openapi3 calls it when a body, path or query does not fit its model."""
    raise request_error(error, suggested=fields_named(error.title)) from error


def log(error: errors.LocalLLMError, where: str) -> int:
    """Logs an error at a level by its status, and returns the status; `where` names the request or stream."""
    status = status_of(error)
    if status == 500:
        logger.error("%s: %s", where, error, exc_info=error)
    elif status > 500:
        logger.info("%s: %s", where, error)
    return status


def _own(error: errors.LocalLLMError) -> tuple[Response, int]:
    status = log(error, f"{request.method} {request.path}")
    response = jsonify(_body(str(error), status, error))
    if status == 503:
        response.headers["Retry-After"] = str(getattr(error, "retry_after", 1))
    return response, status


def _http(error: HTTPException) -> tuple[Response, int]:
    status = error.code or 500
    if isinstance(error, InternalServerError):
        return _unforeseen(error.original_exception or error)
    if isinstance(error, NotFound):
        message = f"No such route: {request.method} {request.path}"
    elif isinstance(error, MethodNotAllowed):
        message = f"Method {request.method} is not allowed for {request.path}"
    elif isinstance(error, RequestEntityTooLarge):
        message = f"The request body is larger than {request.max_content_length} bytes"
    else:
        message = error.description or error.name
    response = jsonify(_body(message, status))
    for name, value in error.get_headers(request.environ):
        if name.lower() not in ("content-type", "content-length"):
            response.headers[name] = value
    return response, status


def _unforeseen(error: BaseException) -> tuple[Response, int]:
    reference = secrets.token_hex(4)
    logger.error("%s %s failed [%s]", request.method, request.path, reference, exc_info=error)
    return jsonify(_body(f"Internal server error; the server's log has the details under {reference}", 500)), 500
