"""The production server around the app: waitress, its limits, its signals, and what it prints at the start.

Knows sockets and threads; nothing of models. Errors that waitress answers by itself (a malformed request line, a body
beyond any limit) get the documented JSON body, and the headers for browsers, here: they never reach the app.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from typing import Any

from flask import Flask
from waitress.channel import HTTPChannel
from waitress.server import MultiSocketServer, create_server
from waitress.task import ErrorTask
from waitress.utilities import RequestEntityTooLarge

from config import Settings
from huggingface.api.guard import EXTENSION as GUARD
from huggingface.api.guard import Guard

# Beyond the app's own limit, so that the app can answer a body that is too large after its sender has finished sending;
# a client that is cut off in mid-sending sees a broken connection instead of the answer.
_BODY_SLACK = 16

_LOCAL = ("127.0.0.1", "::1", "0.0.0.0", "::")  # noqa: S104 - addresses that this machine calls localhost


class _JSONErrorTask(ErrorTask):  # type: ignore[misc]
    """Answers a request that waitress refuses by itself, in the documented shape."""

    def execute(self) -> None:
        error = self.request.error
        message = f"{error.reason}: {error.body}"
        if isinstance(error, RequestEntityTooLarge):
            limit = self.channel.server.adj.max_request_body_size // _BODY_SLACK
            message = f"The request body is larger than {limit} bytes"
        body = json.dumps({"success": False, "error": message}).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        # A failure of the app has a new request here, without the headers that were sent.
        sent = (self.channel.requests or [self.request])[0].headers
        self.response_headers.extend(self.channel.server.guard.answer_headers(sent.get("ORIGIN"), sent.get("HOST", "")))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Channel(HTTPChannel):  # type: ignore[misc]
    error_task_class = _JSONErrorTask


def serve(app: Flask, settings: Settings) -> None:
    """Serve `app` until SIGINT or SIGTERM; then no new request is taken, and those that run get seconds to end."""
    try:
        server = _listen(app, settings)
    except (OSError, ValueError) as error:  # ValueError: what waitress says of a name that it cannot resolve
        reason = getattr(error, "strerror", None) or error
        sys.exit(f"Cannot listen on {settings.host}, port {settings.port}: {reason}")
    host, port = _use_channel(server, app.extensions[GUARD])[0]
    signal.signal(signal.SIGTERM, _stop)
    url = f"http://{'localhost' if host in _LOCAL else f'[{host}]' if ':' in host else host}:{port}"
    greeting = f"\nLocal LLM is at {url}  (the API, to read and try: {url}/docs)\n\nTry:\n\n{_example(url)}\n"
    with suppress(OSError):  # its reader may be gone by now, as that of `| head`
        print(greeting, flush=True)  # noqa: T201
    server.run()


def _listen(app: Flask, settings: Settings) -> Any:
    return create_server(
        app,
        host=settings.host,
        port=settings.port,
        threads=settings.threads,
        connection_limit=settings.connection_limit,
        channel_request_lookahead=1,  # lets a route ask whether its client is still there
        max_request_body_size=settings.max_body_bytes * _BODY_SLACK,
        ident="local-llm",
        clear_untrusted_proxy_headers=True,
    )


def _use_channel(server: Any, guard: Guard) -> list[tuple[str, int]]:
    """Have every listening socket use our channel, which asks `guard`; returns their addresses."""
    if not isinstance(server, MultiSocketServer):
        server.channel_class, server.guard = _Channel, guard
        return [(server.effective_host, server.effective_port)]
    for listener in server.map.values():
        if hasattr(listener, "channel_class"):
            listener.channel_class, listener.guard = _Channel, guard
    return list(server.effective_listen)


def _stop(*_: object) -> None:
    # waitress ends its loop, and its threads, on this exception.
    raise SystemExit(0)


def _example(url: str) -> str:
    return (
        f"  curl -X POST {url}/api/huggingface/generate \\\n"
        '    -H "Content-Type: application/json" \\\n'
        '    -d \'{"model_id": "HuggingFaceTB/SmolLM2-135M-Instruct", "prompt": "Hello, how are you?"}\''
    )
