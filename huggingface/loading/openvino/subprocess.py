"""Making OpenVINO's graph of a model in a process of its own: `python -m huggingface.loading.openvino.subprocess`.

Tracing a model and converting it takes all of Python's attention for many seconds, leaves memory behind in torch's
registries, and runs compiled code on whatever a model's author wrote. None of that is for the process that serves. This
one is given a pickled `Wanted` on its standard input, tells how it goes on its standard output, a JSON object a line,
and ends when the other end of its input is closed.
"""

from __future__ import annotations

import json
import logging
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

from ...errors import Cancelled, ConversionFailed
from ...progress import Progress
from ...records import LoadOptions, LoadSettings, ModelRecord

logger = logging.getLogger(__name__)

_END = 5.0  # seconds that a process which is ending may take for it
_LOOK_AGAIN = 0.1  # seconds between two looks at whether anybody still waits
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
    command = [sys.executable, "-m", "huggingface.loading.openvino.subprocess"]
    process = subprocess.Popen(  # noqa: S603 - this very interpreter, on this very module
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
                line = lines.get(timeout=_LOOK_AGAIN)
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


class _Told(Progress):
    """Progress that is told to the other process."""

    def __init__(self, tell: Callable[..., None]) -> None:
        super().__init__()
        self._tell = tell

    def begin(self, phase: Any, total: int | None = None, done: int = 0) -> None:
        super().begin(phase, total, done)
        self._tell(phase=phase, total=total)

    def advance(self, count: int) -> None:
        super().advance(count)
        self._tell(advance=count)


def main() -> None:
    """Make the graph that is asked for on standard input."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is for people
    logging.basicConfig(level=logging.WARNING)

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=told, flush=True)

    wanted = pickle.load(sys.stdin.buffer)  # noqa: S301 - what started this process wrote it
    threading.Thread(target=_end_with_the_other, daemon=True).start()
    _step_back(wanted)
    from . import load as loading

    try:
        loading.convert(wanted, _Told(tell))
    except (ConversionFailed, Cancelled) as error:
        tell(refused=str(error), final=getattr(error, "final", False))
    except MemoryError:
        tell(refused="there is not enough memory to convert it", final=False)
    except Exception as error:
        logger.exception("the conversion failed")
        tell(refused=f"its conversion failed ({type(error).__name__})", final=False)
    else:
        tell(made=True)
    told.flush()
    os._exit(0)  # nothing is left to be done, and interpreters with threads of libraries end slowly


def _step_back(wanted: Wanted) -> None:
    """Have other work go first, where that is wanted; and have Linux end this process, not the one that serves, where
    memory runs out."""
    if wanted.nice and hasattr(os, "nice"):
        os.nice(wanted.nice)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "ascii")


def _end_with_the_other() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
