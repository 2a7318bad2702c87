"""The server's side of the processes that compile and follow forms: see `process`.

A `Compiler` belongs to one model's tokens; any thread may use it. An `Open` is one form in its process, used by one
thread at a time; only `state` and the methods that call it wait for the process.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from .process import ACCEPTING, ANSWER, COPY, ERROR, LENGTH, OPERATION, STOPPED, TAKE, Limits, receive

_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from forms.process import main; main()"
_ROOMS = Path(__file__).resolve().parent.parent  # the process imports this folder from here, and no other


class CannotConstrain(Exception):
    """llguidance does not support this kind of tokenizer; the message is llguidance's reason."""


class Refused(Exception):
    """The form cannot be compiled; the message is the reason."""


@dataclass(frozen=True, slots=True)
class State:
    """A text's state in its form: `accepting` if it may end here, `stopped` if nothing may follow, the `mask` of
    allowed tokens (one bit each), or the `error` after which it cannot go on."""

    accepting: bool = False
    stopped: bool = False
    mask: bytes = b""
    error: str = ""


_LOST = State(error="its process was ended")  # the forking process has ended too and gives no reason


class Compiler:
    """Opens forms for one model's tokens, each in a separate process. Any thread."""

    def __init__(self, tokenizer: str, vocabulary: int, ends: Collection[int], limits: Limits | None = None) -> None:
        """`tokenizer` is the text of a tokenizer.json, `vocabulary` its number of tokens, `ends` the ids of end tokens.

        Starts no process yet.
        """
        self._about = {
            "tokenizer": tokenizer,
            "vocabulary": vocabulary,
            "ends": list(ends),
            "limits": astuple(limits or Limits()),
        }
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(max(1, (os.cpu_count() or 1) // 2))  # other steps need cores too
        self._process: subprocess.Popen[bytes] | None = None
        self._server: socket.socket | None = None
        self._closed = False

    def open(self, kind: str, value: Any) -> Open:
        """Compiles a form; returns it at its beginning.

        Raises:
            Refused: the form cannot be compiled. CannotConstrain: this model's tokenizer is not supported.
        """
        wanted = json.dumps([kind, value]).encode()
        form = self._open(wanted)
        if form.told is _LOST:  # the processes ended before they received the form
            form.close()
            form = self._open(wanted)
        if form.state().error:
            form.close()
            raise Refused(form.state().error)
        return form

    def _open(self, wanted: bytes) -> Open:
        """Opens a form in a new process and waits for its state, which may be the reason of a failure."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._hand_over(theirs)
            with self._turns:
                with suppress(OSError):  # the state says why
                    ours.sendall(LENGTH.pack(len(wanted)) + wanted)
                form = Open(_Connection(ours))
                form.state()
        except BaseException:
            ours.close()
            raise
        return form

    def close(self) -> None:
        """Ends the processes. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._end()

    def _hand_over(self, form: socket.socket) -> None:
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                with suppress(OSError):
                    socket.send_fds(self._begun(), [b"f"], [form.fileno()])
                    return
            if self._closed:
                raise Refused("its model is being taken out of memory")
            self._end()
            self._begin()
            socket.send_fds(self._begun(), [b"f"], [form.fileno()])

    def _begun(self) -> socket.socket:
        assert self._server is not None  # noqa: S101 - set when the process starts
        return self._server

    def _begin(self) -> None:
        self._server, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, on this folder
                [sys.executable, "-P", "-c", _PROGRAM, str(_ROOMS)], stdin=theirs.fileno(), stdout=subprocess.DEVNULL
            )
        about = json.dumps(self._about).encode()
        try:
            self._server.sendall(LENGTH.pack(len(about)) + about)
            kind, length = ANSWER.unpack(receive(self._server, ANSWER.size))
            said = receive(self._server, length).decode()
        except (EOFError, OSError) as error:
            self._end()
            raise Refused("the process that compiles forms has ended") from error
        if kind == ERROR:
            self._end()
            raise CannotConstrain(said)

    def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._server = None


@dataclass(eq=False)
class _Connection:
    """One form's socket: answers come in the order of the questions."""

    socket: socket.socket
    count: int = 1
    expected: deque[Open] = field(default_factory=deque)
    got: bytearray = field(default_factory=bytearray)

    def __del__(self) -> None:
        self.socket.close()

    def ask(self, operation: int, index: int, token: int = 0) -> None:
        with suppress(OSError):  # the state says why
            self.socket.sendall(OPERATION.pack(operation, index, token))

    def read(self, *, wait: bool) -> bool:
        """Reads the answers that have arrived; whether another read may find more at once."""
        try:
            part = self.socket.recv(1 << 16, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            part = b""
        if not part:
            self.socket.close()
            while self.expected:
                self.expected.popleft().told = _LOST
            return False
        self.got += part
        while len(self.got) >= ANSWER.size:
            kind, length = ANSWER.unpack_from(self.got)
            end = ANSWER.size + length
            if len(self.got) < end:
                break
            said = bytes(self.got[ANSWER.size : end])
            del self.got[:end]
            self._tell(kind, said)
        return True

    def _tell(self, kind: int, said: bytes) -> None:
        if kind == ERROR:
            while self.expected:
                self.expected.popleft().told = State(error=said.decode("utf-8", "replace"))
        elif self.expected:
            flags = said[0]
            self.expected.popleft().told = State(bool(flags & ACCEPTING), bool(flags & STOPPED), said[1:])


class Open:
    """One text that follows a form. One thread at a time."""

    def __init__(self, connection: _Connection, index: int = 0, state: State | None = None) -> None:
        self._connection = connection
        self._index = index
        self.told = state
        if state is None:
            connection.expected.append(self)

    def copy(self) -> Open:
        """Copies the form at its present place, for another text."""
        state, connection = self.state(), self._connection
        connection.ask(COPY, self._index)
        index, connection.count = connection.count, connection.count + 1
        return Open(connection, index, state)

    def take(self, token: int) -> None:
        """Advances by an allowed token; the new state arrives later."""
        state = self.state()
        if not state.stopped and not state.error:
            self.told = None
            self._connection.expected.append(self)
            self._connection.ask(TAKE, self._index, token)

    @property
    def settled(self) -> bool:
        """Whether the state is known."""
        while self.told is None and self._connection.read(wait=False):
            pass
        return self.told is not None

    def state(self) -> State:
        """Waits until the state is known and returns it."""
        while self.told is None:
            self._connection.read(wait=True)
        return self.told

    def close(self) -> None:
        """Closes the socket, which ends the form's process whatever it does."""
        self._connection.socket.close()

    @property
    def number(self) -> int:
        """The socket's file descriptor, for `poll`."""
        return self._connection.socket.fileno()


def settle(forms: Iterable[Open], seconds: float) -> None:
    """Waits until the states of all forms are known, at most so many seconds."""
    until = time.monotonic() + seconds
    waiting = [form for form in forms if not form.settled]
    while waiting and (left := until - time.monotonic()) > 0:
        poll = select.poll()
        for form in waiting:
            poll.register(form.number, select.POLLIN)
        poll.poll(left * 1000)
        waiting = [form for form in waiting if not form.settled]
