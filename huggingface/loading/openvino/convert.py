"""The process that makes a model's OpenVINO graph: `python -m huggingface.loading.openvino.convert`.

Reads a pickled `Wanted` from standard input, reports progress on standard output, one JSON object per line, and ends
when the other end of its input is closed. See `subprocess`.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import Cancelled, ConversionFailed
from ...progress import Progress
from .subprocess import Wanted

logger = logging.getLogger(__name__)


class _Told(Progress):
    """Progress that is reported to the parent process."""

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
    """Makes the graph that standard input describes."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to standard error
    logging.basicConfig(level=logging.WARNING)

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=told, flush=True)

    wanted = pickle.load(sys.stdin.buffer)  # noqa: S301 - the parent process wrote it
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
    os._exit(0)  # all is done, and interpreters with threads of libraries end slowly


def _step_back(wanted: Wanted) -> None:
    """Gives other work priority, if `wanted.nice` says so; makes Linux end this process first when memory runs out."""
    if wanted.nice and hasattr(os, "nice"):
        os.nice(wanted.nice)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "ascii")


def _end_with_the_other() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
