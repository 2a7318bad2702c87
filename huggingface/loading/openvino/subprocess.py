"""Makes a model's OpenVINO graph in a process of its own, which runs `convert`.

Tracing and converting a model keeps Python busy for many seconds, leaves memory behind in torch's registries, and runs
compiled code on whatever a model's author wrote; the serving process must not do that. The process reads a pickled
`Wanted` from standard input, reports progress on standard output, one JSON object per line, and ends when the other end
of its input is closed.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from ...cancellation import LOOK_AGAIN
from ...errors import ConversionFailed
from ...progress import Progress
from ...registry.records import LoadSettings, ModelRecord
from ...types import LoadOptions

_END = 5.0  # seconds that an ending process may take
_ROOT = Path(__file__).resolve().parents[3]

# The signals that end a process after a fault that would happen again.
_CRASHES = frozenset({-4, -6, -7, -8, -11})


@dataclass(frozen=True, slots=True)
class Wanted:
    """The model whose graph is made.

    The graph goes into `spare` if it cannot be stored beside the model; `nice` is the process's nice value, 0 to 19.
    """

    record: ModelRecord
    options: LoadOptions
    folder: Path
    settings: LoadSettings
    spare: Path
    nice: int = 0


def convert(wanted: Wanted, progress: Progress) -> None:
    """Makes the graph, and waits for it.

    Raises:
        ConversionFailed: there is no graph.
        Cancelled: `progress` was cancelled.
    """
    command = [sys.executable, "-m", "huggingface.loading.openvino.convert"]
    process = subprocess.Popen(  # noqa: S603 - this interpreter, on this package
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=_ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        creationflags=getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0) if wanted.nice else 0,  # of Windows
    )
    lines: Queue[bytes | None] = Queue()
    assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - both are pipes
    reader = threading.Thread(target=_read, args=(process.stdout, lines.put), name="convert")
    reader.start()
    outcome: dict[str, Any] = {}
    try:
        pickle.dump(wanted, process.stdin)
        process.stdin.flush()
        while True:
            progress.check()
            try:
                line = lines.get(timeout=LOOK_AGAIN)
            except Empty:
                continue
            if line is None:
                break
            told = json.loads(line)
            if "phase" in told:
                progress.begin(told["phase"], told["total"])
            elif "advance" in told:
                progress.advance(told["advance"])
            else:
                outcome = told
    except BrokenPipeError:  # the process ended before it had read its input: its exit code says how
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END)
    finally:
        process.kill()  # harmless if it has ended
        process.wait()
        reader.join()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
    if not outcome:
        ended = process.returncode
        raise ConversionFailed(f"its conversion ended with {ended}", final=ended in _CRASHES)
    if "refused" in outcome:
        raise ConversionFailed(outcome["refused"], final=outcome["final"])


def _read(pipe: Any, put: Callable[[bytes | None], None]) -> None:
    for line in pipe:
        put(line)
    put(None)
