"""Giving memory back: what caught errors still hold, and what glibc's allocator keeps after it was freed.

Standard library only; what concerns glibc does nothing under another C library. Any thread may call it.
"""

from __future__ import annotations

import ctypes
import sys
import traceback
from contextlib import suppress
from pathlib import Path

_M_ARENA_MAX = -8  # malloc.h


def keep_few_arenas() -> None:
    """Let all threads share two heaps instead of eight per core; call it before threads are started.

    With many request threads each load would fragment another heap, and resident memory would grow with every round.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)


def release_freed() -> None:
    """Return all free pages of the heaps to the system."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def forget_frames(error: BaseException | None) -> None:
    """Let go of the local variables that a caught error and its causes hold by their tracebacks.

    An error raised within a model holds its activations, and one raised within a load the model itself; kept for its
    reader, it would keep them too. The traceback stays fit for a log.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _glibc(name: str) -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)


def available_bytes() -> int | None:
    """Bytes that can be taken without swapping, a little left over for others; None where that cannot be told.

    The least of what Linux says of the machine (`MemAvailable`) and of this process's control group (version 2).
    """
    if sys.platform != "linux":
        return None
    found = []
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        found.append(sizes["MemAvailable"] - sizes["MemTotal"] // 50)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text("ascii"))
        found.append(limit - int((group / "memory.current").read_text("ascii")))
    return min(found, default=None)
