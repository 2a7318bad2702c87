"""The program of the processes that compile and follow forms, so that no form can end or block the server.

A form may make llguidance recurse until the stack is full, take gigabytes, or compute for minutes without releasing
Python's lock. The first process holds one model's tokens and forks a process for each form, with limits on memory and
on the time of each step; that process ends with its form. When a process is killed, the server gets the reason, and no
other form is affected.

Must import nothing of the package but this folder, so that it starts quickly and stays small.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llguidance import LLMatcher, LLTokenizer

from .notation import notation
from .unique import Tokens, Watched

# From the server: an operation, the index of a text of the form, and a token. Back: a kind, and a length in bytes.
OPERATION = struct.Struct("<BII")
TAKE, COPY = 0, 1
ANSWER = struct.Struct("<BI")
STATE, ERROR = 0, 1
ACCEPTING, STOPPED = 1, 2  # in the first byte of a state; the mask follows, one bit for each token
LENGTH = struct.Struct("<I")

NICE = 10  # other requests' steps need the same cores

_DEEP = 20_000  # Python's recursion limit; where the stack is too small for it, the process ends
_SHOWN = 1000  # characters of a reason

_LINE = re.compile(r"at \d+\(\d+\): ")  # the place of an error in a grammar

_DEPTH = "it is nested too deeply, or its rules follow each other in too long a chain"
_MEMORY = "it takes too much memory"
_REASONS: dict[int, str] = {
    signal.SIGPROF: "it takes too long to compute",
    signal.SIGSEGV: _DEPTH,
    signal.SIGBUS: _DEPTH,
    signal.SIGABRT: _MEMORY,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one form: bytes on top of its process's memory at the start, CPU seconds to compile it, and CPU
    seconds for each of its tokens."""

    memory: int = 1 << 30
    compiling: float = 5.0
    step: float = 2.0


def main() -> None:
    """Answers the server at the other end of standard input: a tokenizer first, then forms, each with a socket."""
    server = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the server, which ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICE)
    about = json.loads(receive(server, LENGTH.unpack(receive(server, LENGTH.size))[0]))
    try:
        tokens = LLTokenizer(about["tokenizer"], n_vocab=about["vocabulary"], eos_token=about["ends"])
    except ValueError as error:  # some kinds of pre-tokenizers
        server.sendall(_answer(ERROR, str(error).encode()))
        return
    server.sendall(_answer(STATE))
    _Forks(server, tokens, Limits(*about["limits"])).serve()


class _Forks:
    """The forms' processes: forks them, kills those that the server has closed, reports how the others ended."""

    def __init__(self, server: socket.socket, tokens: LLTokenizer, limits: Limits) -> None:
        self._server = server
        self._limits = limits
        self._tokens = tokens
        self._running: dict[int, socket.socket] = {}  # process id -> the process's end of its socket
        self._ids: dict[int, int] = {}  # that socket's file descriptor -> process id

    def serve(self) -> None:
        """Runs until the server closes its end."""
        poll = select.poll()
        poll.register(self._server, select.POLLIN)
        ended, wakes = os.pipe()
        os.set_blocking(ended, False)
        os.set_blocking(wakes, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes)
        poll.register(ended, select.POLLIN)
        while True:
            for number, _ in poll.poll():
                if number == self._server.fileno():
                    if (form := self._begin()) is None:
                        return
                    if form >= 0:
                        poll.register(form, 0)  # reports when the server closes its end
                elif number == ended:
                    with suppress(BlockingIOError):
                        os.read(ended, 4096)
                elif number in self._ids:
                    os.kill(self._ids[number], signal.SIGKILL)
                    poll.unregister(number)
            for form in self._reap():
                with suppress(KeyError):
                    poll.unregister(form)

    def _begin(self) -> int | None:
        """Forks a process for the next form; returns its socket's file descriptor, -1 on failure, None at the end."""
        message, numbers, _, _ = socket.recv_fds(self._server, 1, 1)
        if not message:
            return None
        form = socket.socket(fileno=numbers[0])
        try:
            process = os.fork()
        except OSError as error:
            with suppress(OSError), form:
                form.sendall(_answer(ERROR, f"no process could be started for it ({error.strerror})".encode()))
            return -1
        if not process:
            _follow(form, self._tokens, self._limits)
        self._running[process] = form
        self._ids[form.fileno()] = process
        return form.fileno()

    def _reap(self) -> list[int]:
        """Reports to the server how processes have ended; returns the file descriptors of their sockets."""
        gone = []
        while self._running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                break
            form = self._running.pop(process)
            del self._ids[form.fileno()]
            gone.append(form.fileno())
            reason = _REASONS.get(os.WTERMSIG(status), "its process was ended") if os.WIFSIGNALED(status) else ""
            with suppress(OSError), form:
                form.setblocking(False)
                if reason:
                    form.sendall(_answer(ERROR, reason.encode()))
        return gone


def _follow(form: socket.socket, tokens: LLTokenizer, limits: Limits) -> NoReturn:
    """Runs in the forked process: compiles the form that the server sends, and follows it token by token."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDWR), 2)  # libraries print as they abort
        os.dup2(2, 0)
        for name in [each.name for each in Path("/dev/fd").iterdir()]:
            if int(name) > 2 and int(name) != form.fileno():
                with suppress(OSError):
                    os.close(int(name))
        sys.setrecursionlimit(_DEEP)
        _limit_memory(limits.memory)
        wanted = json.loads(receive(form, LENGTH.unpack(receive(form, LENGTH.size))[0]))
        with _Limit(limits.compiling):
            texts = [_opened(tokens, *wanted)]
            answer = _state(texts[0])
        form.sendall(answer)
        while True:
            operation, index, token = OPERATION.unpack(receive(form, OPERATION.size))
            if operation == COPY:
                texts.append(texts[index].deep_copy())
                continue
            with _Limit(limits.step):
                texts[index].consume_token(token)
                answer = _state(texts[index])
            form.sendall(answer)
    except EOFError:
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - any error here belongs to the form
        with suppress(OSError):
            form.sendall(_answer(ERROR, _reason(error).encode()))
        os._exit(0)


def _opened(tokens: LLTokenizer, kind: str, value: Any) -> LLMatcher | Watched:
    """Compiles a form and returns a text at its beginning; if that fails, without the branches of unions that fail."""
    for pruned in (False, True):
        grammar, watch = notation(kind, value, pruned=pruned)
        matcher = LLMatcher(tokens, grammar, log_level=0)
        if not matcher.is_error():
            return matcher if watch is None else Watched(matcher, Tokens(tokens), watch)
    if kind != "json_schema" and isinstance(value, dict):  # the client has not written the lines around it
        raise ValueError(_LINE.sub("", _said(matcher.get_error()).partition("\n")[0]))
    return matcher


def _state(text: LLMatcher | Watched) -> bytes:
    """The message to the server with what may follow."""
    if not text.is_error() and not text.is_stopped():
        mask = text.compute_bitmask()
        if not text.is_error():
            stopped = STOPPED if text.is_stopped() else 0
            return _answer(STATE, bytes([stopped | (ACCEPTING if text.is_accepting() else 0)]), mask)
    if not text.is_error():
        return _answer(STATE, bytes([STOPPED | ACCEPTING]))
    return _answer(ERROR, _said(text.get_error()).encode())


def _said(error: str) -> str:
    """The reason in an error of llguidance, without the parser state at its end."""
    said = error.split("\n<state>")[0].strip()[:_SHOWN]
    if said.startswith("panic"):
        return "it is too large"
    return "nothing fits it" if said.startswith("NoExtension") else said


class _Limit:
    """Ends the process if a block takes more CPU seconds: signal handlers do not run within llguidance."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, self._seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory(more: int) -> None:
    """Limits the process to so many bytes on top of its present memory."""
    with suppress(OSError, ValueError):  # no such file, or a lower limit
        has = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + more, has + more))


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return _MEMORY
    return str(error)[:_SHOWN] or type(error).__name__


def _answer(kind: int, *parts: bytes) -> bytes:
    return b"".join((ANSWER.pack(kind, sum(map(len, parts))), *parts))


def receive(connection: socket.socket, size: int) -> bytes:
    """Receives exactly `size` bytes.

    Raises:
        EOFError: the other end was closed before that.
    """
    got = bytearray()
    while len(got) < size:
        part = connection.recv(size - len(got))
        if not part:
            raise EOFError
        got += part
    return bytes(got)
