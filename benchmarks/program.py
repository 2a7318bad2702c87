"""A program that is being measured: started, paused while others are, looked at from outside, and stopped.

The memory and the processor time are those of its whole tree of processes. Whatever ends the benchmark but SIGKILL
stops what was started here.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
from pathlib import Path
from time import perf_counter

import psutil

_SAMPLE_EVERY = 0.1  # seconds


class Program:
    """One process and its children; its output goes to a temporary file."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path, *, pipes: bool = False) -> None:
        """Start it in `folder`. With `pipes`, its standard input and output are kept for the caller."""
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed in stop()
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else self._log,
            stderr=self._log,
        )
        self.stdin, self.stdout = self._process.stdin, self._process.stdout
        self._watched = psutil.Process(self._process.pid)

    def output(self) -> str:
        """What it wrote so far."""
        # The program writes at the same position of the file as is read at here: it must not be moved.
        length = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), length, 0).decode(errors="replace")

    def ended(self) -> bool:
        """Whether it is over."""
        return self._process.poll() is not None

    def pause(self) -> None:
        """Take the processor away from it."""
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                process.suspend()

    def resume(self) -> None:
        """Let it go on."""
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                process.resume()

    def ask_to_end(self, limit: float) -> int | None:
        """Ask it to end (SIGTERM), and wait so many seconds at most; its exit status, or None if it goes on."""
        self._process.terminate()
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End it: asked first, killed after ten seconds."""
        tree = self._tree()
        self.resume()
        self._process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        for pipe in (self.stdin, self.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def memory(self) -> int:
        """Bytes of resident memory now."""
        total = 0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def processor_time(self) -> float:
        """Seconds of processor time so far."""
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._watched, *self._watched.children(recursive=True)]
        except psutil.Error:
            return []


class Watch:
    """Around a measurement: the program's peak memory, and how much of the machine went to anybody else.

    `with Watch(program) as watch: …`, then `watch.peak` in bytes and `watch.elsewhere`, a share of all cores: 0 to 1.
    """

    def __init__(self, program: Program) -> None:
        self.peak = 0
        self.elsewhere = 0.0
        self._program = program
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._began = perf_counter()
        self._before = self._others()
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        wall = perf_counter() - self._began
        self.elsewhere = max(0.0, self._others() - self._before) / wall / (psutil.cpu_count() or 1)
        self._over.set()
        self._sampler.join()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, self._program.memory())
            if self._over.wait(_SAMPLE_EVERY):
                return

    def _others(self) -> float:
        """Seconds that all cores were busy, for others than the program and this process."""
        machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        # Guests are counted in `user` already.
        busy = sum(machine) - idle - getattr(machine, "guest", 0.0) - getattr(machine, "guest_nice", 0.0)
        return float(busy - own.user - own.system - self._program.processor_time())
