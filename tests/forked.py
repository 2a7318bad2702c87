"""Servers forked from a process that has imported what they import: importing takes longer than most tests.

`Forked` has what tests use of the `subprocess.Popen` of `python app.py`. This file is also the program of the process
that forks: it computes nothing, so that a child begins as a server does that has just imported the libraries. A child
cannot show everything: imports, variables that a library reads as it is imported, and the memory that the system counts
need a real `python app.py`. `conftest.Server` decides.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent

_NUMBER = struct.Struct("<i")
_lock = threading.Lock()
_template: tuple[subprocess.Popen[bytes], socket.socket] | None = None


class Forked:
    """A server's process."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        """Raises: EOFError: the process that forks has ended."""
        reads, writes = os.pipe()
        self.stdout: IO[str] = os.fdopen(reads, encoding="utf-8")
        self._ends, theirs = socket.socketpair()
        self.returncode: int | None = None
        wish = json.dumps({"environment": environment, "folder": str(folder)}).encode()
        with theirs, _lock:
            template = _running()
            # Where it writes, and where its end is told.
            socket.send_fds(template, [_NUMBER.pack(len(wish))], [writes, theirs.fileno()])
            template.sendall(wish)
            os.close(writes)
        self.pid = _NUMBER.unpack(_receive(self._ends, _NUMBER.size))[0]

    def poll(self) -> int | None:
        """Its exit status, if it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended; the negative of a signal that ended it.

        Raises: subprocess.TimeoutExpired: it takes longer than so many seconds.
        """
        if self.returncode is None:
            self._ends.settimeout(timeout)
            try:
                self.returncode = _NUMBER.unpack(_receive(self._ends, _NUMBER.size))[0]
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("app.py", timeout or 0) from None
            self._ends.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def _running() -> socket.socket:
    """The socket of this process's template, which lives as long as this process."""
    global _template
    if _template is None or _template[0].poll() is not None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        _template = process, ours
    return _template[1]


def _receive(connection: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        if not (part := connection.recv(size - len(got))):
            raise EOFError
        got += part
    return got


def main(connection: socket.socket) -> None:
    """Forks a server for each request; returns in the server. Reports how each ends. When the other side has gone, ends
    the remaining servers and this process."""
    running: dict[int, socket.socket] = {}
    wakes, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken)
    while True:
        ready, _, _ = select.select([connection.fileno(), wakes], [], [])
        if wakes in ready:
            os.read(wakes, 4096)
            while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with running.pop(ended[0]) as ends, contextlib.suppress(OSError):
                    ends.sendall(_NUMBER.pack(os.waitstatus_to_exitcode(ended[1])))
        if connection.fileno() not in ready:
            continue
        head, numbers, _, _ = socket.recv_fds(connection, _NUMBER.size, 2)
        if not head:
            break
        wish = json.loads(_receive(connection, _NUMBER.unpack(head)[0]))
        writes, ends = numbers[0], socket.socket(fileno=numbers[1])
        if not (pid := os.fork()):
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(writes, 1)
            os.dup2(writes, 2)
            for number in (writes, wakes, woken):
                os.close(number)
            for each in (connection, ends, *running.values()):
                each.close()
            os.environ.clear()
            os.environ.update(wish["environment"])
            os.chdir(wish["folder"])
            return
        os.close(writes)
        running[pid] = ends
        ends.sendall(_NUMBER.pack(pid))
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    sys.exit()


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # app.py sets it before the import, too
    import app  # noqa: F401
    from huggingface.loading import loader  # noqa: F401

    gc.collect()
    gc.freeze()  # the collector of a child would touch, and so copy, all of it
    main(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = [str(ROOT / "app.py")]
    status: object = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        status = error.code
    # What the interpreter does at its end, but for taking the libraries apart, which would copy all of them.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    os._exit(status if isinstance(status, int) else int(status is not None))
