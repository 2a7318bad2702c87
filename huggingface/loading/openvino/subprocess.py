"""Making OpenVINO's graph of a model in a process of its own, which runs `convert`.

Tracing a model and converting it takes all of Python's attention for many seconds, leaves memory behind in torch's
registries, and runs compiled code on whatever a model's author wrote. None of that is for the process that serves. This
one is given a pickled `Wanted` on its standard input, tells how it goes on its standard output, a JSON object a line,
and ends when the other end of its input is closed.
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

_END = 5.0  # seconds that a process which is ending may take for it
_ROOT = Path(__file__).resolve().parents[3]

# The signals by which a process ends that did something wrong, and will again.
_CRASHES = frozenset({-4, -6, -7, -8, -11})


@dataclass(frozen=True, slots=True)
class Wanted:
    """Of which model a graph is to be made. It goes into `spare` where it cannot be kept beside the model; `nice` is
    how far other work goes first, 0 to 19 as Unix has it.
    """

    record: ModelRecord
    options: LoadOptions
    folder: Path
    settings: LoadSettings
    spare: Path
    nice: int = 0


def convert(wanted: Wanted, progress: Progress) -> None:
    """Have the graph made, and wait for it.

    Raises:
        ConversionFailed: there is none. Cancelled: `progress` was cancelled.
    """
    command = [sys.executable, "-m", "huggingface.loading.openvino.convert"]
    process = subprocess.Popen(  # noqa: S603 - this very interpreter, on this very package
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
    except BrokenPipeError:  # it ended before it had read what is wanted: its end says how
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END)
    finally:
        process.kill()  # no harm where it has ended
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
