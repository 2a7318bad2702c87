"""The production server around the app: its limits, its signals, and the text that it prints at the start.

Knows settings and the process; `connections` owns the sockets. Must not know models.
"""

from __future__ import annotations

import importlib.util
import logging
import signal
import sys
import threading
from contextlib import suppress
from typing import Any

from flask import Flask

from config import Settings
from connections import Limits, listen
from dispatcher import Dispatcher
from huggingface.api.documented.system import PROBES
from huggingface.api.http.bodies import EXTENSION as BODIES
from huggingface.api.http.host_check import EXTENSION as GUARD

logger = logging.getLogger(__name__)

# Open files of the process besides its connections, and the most for one connection: its socket, and temporary files
# for a long body and a long answer.
_OTHER_FILES = 512
_FILES_EACH = 3

# Seconds after which a thread that computes lets another one run, if Python code runs in both. Python's own 5 ms add up
# for the thread of the connections, which asks for the interpreter after each call of the system.
_SWITCH_INTERVAL = 0.001

_LOCAL = ("127.0.0.1", "::1", "0.0.0.0", "::")  # noqa: S104 - addresses that `localhost` reaches from this machine


def serve(app: Flask, settings: Settings) -> None:
    """Serves `app` until SIGINT or SIGTERM; then it takes no new request, and running ones get seconds to end."""
    stopped = threading.Event()
    try:
        server = _listen(app, settings, stopped)
    except (OSError, ValueError) as error:  # ValueError: waitress cannot resolve the name
        reason = getattr(error, "strerror", None) or error
        sys.exit(f"Cannot listen on {settings.host}, port {settings.port}: {reason}")
    host, port = server.effective_listen[0]

    def stop(*_: object) -> None:
        # waitress ends its loop and its threads on this exception. Within a finalizer Python drops it: then the loop
        # raises it itself.
        stopped.set()
        raise SystemExit(0)

    sys.setswitchinterval(_SWITCH_INTERVAL)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    url = f"http://{'localhost' if host in _LOCAL else f'[{host}]' if ':' in host else host}:{port}"
    greeting = f"\nLocal LLM is at {url}  (the API, to read and try: {url}/docs)\n\nTry:\n\n{_example(url)}\n"
    with suppress(OSError):  # the reader may have ended, as with `| head`
        print(greeting, flush=True)  # noqa: T201
    server.run()


def _listen(app: Flask, settings: Settings, stopped: threading.Event) -> Any:
    limits = Limits(
        connections=_connections(settings.connection_limit),
        receive=settings.receive_timeout,
        rate=settings.receive_rate,
        send=settings.send_timeout,
        idle=settings.idle_timeout,
        body=settings.max_body_bytes,
    )
    return listen(
        app,
        limits,
        app.extensions[GUARD],
        app.extensions[BODIES],
        stopped,
        Dispatcher(PROBES),
        host=settings.host,
        port=settings.port,
        threads=settings.threads,
        channel_request_lookahead=1,  # lets a route ask whether its client is still connected
        recv_bytes=65536,
        max_request_header_size=65536,
        ident="local-llm",
        clear_untrusted_proxy_headers=True,
    )


def _connections(maximum: int) -> int:
    """Returns at most `maximum` connections; raises the limit of open files for them where the system allows it."""
    if importlib.util.find_spec("resource") is None:  # Windows has no such limit
        return maximum
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = maximum * _FILES_EACH + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return maximum
    possible = max(1, (soft - min(_OTHER_FILES, soft // 2)) // _FILES_EACH)
    logger.warning("The system allows %d open files, so at most %d connections are held at once", soft, possible)
    return possible


def _example(url: str) -> str:
    return (
        f"  curl -X POST {url}/api/huggingface/generate \\\n"
        '    -H "Content-Type: application/json" \\\n'
        '    -d \'{"model_id": "HuggingFaceTB/SmolLM2-135M-Instruct", "prompt": "Hello, how are you?"}\''
    )
