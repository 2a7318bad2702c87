"""Renders chat templates in separate processes, under limits of time and memory.

`install` makes transformers render every chat this way; the text is the same as from transformers itself. Any thread
may render. One template renders one chat at a time, so that an endless template delays only its own chats. Must not
know models, requests or HTTP.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from ..cancellation import before_wait
from .process import LENGTH, read

_PATIENCE = 10.0  # seconds that a chat waits for earlier chats of the same template
_SILENCE = 60.0  # seconds without an answer after which a process is killed, however little it has computed
_SCRIPT = Path(__file__).with_name("process.py")
_ERRORS = {kind.__name__: kind for kind in (TypeError, ValueError, RecursionError)}


class TemplateLimit(TemplateError):
    """A template exceeds the limits of time or memory."""


class Renderer:
    """Renders in processes: one for each template that is rendered at the same time, reused later."""

    def __init__(self, seconds: int = 5) -> None:
        """Starts no process yet. `seconds` is the CPU time that a template has for one chat."""
        self._seconds = seconds
        self._mutex = threading.Lock()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._turns: dict[str, list[Any]] = {}  # for each template in use: a lock, and how many hold or wait for it
        self._owner = os.getpid()
        atexit.register(self.close)

    def render(self, template: str, values: dict[str, Any]) -> str:
        """Renders the template with `values`.

        Raises:
            TemplateLimit: it takes too long, or too much memory. TemplateError: the template refuses the chat.
            TypeError, ValueError, RecursionError: the template fails on the chat.
        """
        question = pickle.dumps((template, values, self._seconds))
        before_wait()
        with self._turn(template):
            answer = self._ask(question)
        if "text" in answer:
            return answer["text"]
        if answer["error"] == "TooLarge":
            raise TemplateLimit(answer["message"])
        raise _ERRORS.get(answer["error"], TemplateError)(answer["message"])

    @contextmanager
    def _turn(self, template: str) -> Iterator[None]:
        with self._mutex:
            turn = self._turns.setdefault(template, [threading.Lock(), 0])
            turn[1] += 1
        try:
            if not turn[0].acquire(timeout=_PATIENCE):
                raise TemplateLimit("it is still busy with the chats before this one")
            try:
                yield
            finally:
                turn[0].release()
        finally:
            with self._mutex:
                turn[1] -= 1
                if not turn[1]:
                    del self._turns[template]

    def _ask(self, question: bytes) -> dict[str, str]:
        """Asks a process; one that ends without an answer is not reused."""
        process = self._take() or _started()
        answer = _exchange(process, LENGTH.pack(len(question)) + question)
        if answer is None:
            late = process.returncode in (-getattr(signal, "SIGPROF", 0), -getattr(signal, "SIGKILL", 0))
            raise TemplateLimit(
                f"it does not end within {self._seconds} seconds"
                if late
                else "it takes too much memory, or nests too deeply"
            )
        with self._mutex:
            self._idle.append(process)
        return answer

    def _take(self) -> subprocess.Popen[bytes] | None:
        with self._mutex:
            if self._owner != os.getpid():  # forked: the processes are the parent's
                self._idle, self._owner = [], os.getpid()
            while self._idle:
                process = self._idle.pop()
                if process.poll() is None:
                    return process
        return None

    def close(self) -> None:
        """Ends the idle processes."""
        with self._mutex:
            idle, self._idle = self._idle, []
        if self._owner == os.getpid():
            for process in idle:
                _end(process)


def _started() -> subprocess.Popen[bytes]:
    """Starts a process and waits until it is ready. Raises TemplateLimit where that fails."""
    try:
        process = subprocess.Popen(  # noqa: S603 - this very interpreter, on a file of this package
            [sys.executable, str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
    except OSError as error:
        raise TemplateLimit(f"no process can be started for it ({error.strerror})") from error
    if _exchange(process, b"") is None:
        raise TemplateLimit("its process does not start")
    return process


def _exchange(process: subprocess.Popen[bytes], message: bytes) -> dict[str, str] | None:
    """Sends a message and reads the answer; None where the process ends, or is killed after a silence."""
    assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - both are pipes
    timer = threading.Timer(_SILENCE, process.kill)
    timer.daemon = True
    timer.start()
    answer = None
    try:
        process.stdin.write(message)
        process.stdin.flush()
        answer = read(process.stdout)
    except OSError:  # the process has ended in the middle of the message
        answer = None
    finally:
        timer.cancel()
        if answer is None:
            _end(process)
    return None if answer is None else json.loads(answer)


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - both are pipes
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdout.close()
    with suppress(OSError):  # part of a message may be unread
        process.stdin.close()


class _Template:
    """Stands in for a compiled template in transformers."""

    def __init__(self, renderer: Renderer, template: str) -> None:
        self._renderer, self._template = renderer, template

    def render(self, **values: Any) -> str:
        """Renders the template as jinja's own method does."""
        return self._renderer.render(self._template, values)


def install() -> None:
    """Makes transformers render chats with one `Renderer` in this process from now on."""
    from transformers.utils import chat_template_utils

    if not isinstance(getattr(chat_template_utils._compile_jinja_template, "renderer", None), Renderer):
        renderer = Renderer()

        def compiled(template: str) -> _Template:
            return _Template(renderer, template)

        compiled.renderer = renderer  # type: ignore[attr-defined]
        chat_template_utils._compile_jinja_template = compiled
