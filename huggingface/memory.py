"""Giving freed memory back to the system, which glibc's allocator does not do by itself.

Standard library only; does nothing where the C library is another one. Any thread may call it.
"""

from __future__ import annotations

import ctypes
import sys

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


def _glibc(name: str) -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)
