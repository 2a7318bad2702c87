"""Measures memory, returns freed memory to the system, and recognizes errors that mean out of memory.

Caught errors hold objects through their tracebacks, and glibc's allocator keeps freed pages: both are released here.
Standard library only; the glibc functions do nothing under another C library. Any thread may call it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ..errors import OutOfMemory

T = TypeVar("T")

_M_ARENA_MAX = -8  # malloc.h
_MADV_DONTNEED = 4  # sys/mman.h
# Texts of torch's CPU allocator, of CUDA, and of its libraries; the last is cuBLAS without room for its workspace.
_NO_MEMORY = ("allocate memory", "out of memory", "STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
_DROP_EVERY = 0.01  # seconds between two drops of a file's pages while the file is copied


def keep_few_arenas() -> None:
    """Makes all threads share two heaps instead of eight per core; call it before threads start.

    With many request threads each load would fragment another heap, and resident memory would grow with each load.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)


def release_freed() -> None:
    """Returns all free pages of the heaps to the system."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def mapped_files() -> list[tuple[int, int]]:
    """The address ranges (start, end) at which files are mapped into this process; empty where unknown."""
    found = []
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
            addresses, _, _, _, inode, *_ = line.split(None, 5)
            if inode != "0":
                start, _, end = addresses.partition("-")
                found.append((int(start, 16), int(end, 16)))
    return found


def drop_pages(address: int, size: int) -> None:
    """Drops a mapped file's pages from memory, once the file has been copied.

    A later read there loads them from the file again. The pages must not have been written to.
    """
    madvise = _glibc("madvise")
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if madvise is not None and length > 0:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED)


@contextmanager
def few_file_pages(*paths: Path) -> Iterator[None]:
    """Keeps few pages of mapped files in memory while the block copies them, and none afterwards.

    The system would drop them where memory is short, but counts them as this process's until then.
    """
    done = threading.Event()

    def drop() -> None:
        while not done.wait(_DROP_EVERY):
            drop_file_pages(*paths)

    thread = threading.Thread(target=drop, name="few-file-pages")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        drop_file_pages(*paths)


def drop_file_pages(*paths: Path) -> None:
    """Drops from memory all pages of files that are mapped read-only; a later read loads them again."""
    wanted = {str(path.resolve()) for path in paths}
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
            addresses, *rest = line.split(None, 5)
            if len(rest) == 5 and rest[4] in wanted and "w" not in rest[0]:
                start, _, end = addresses.partition("-")
                drop_pages(int(start, 16), int(end, 16) - int(start, 16))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch, CUDA or CUDA's libraries means that a device has no memory left."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def forget_frames(error: BaseException | None) -> None:
    """Clears the local variables that a caught error and its causes hold through their tracebacks.

    An error raised in a model holds the model's activations, an error raised in a load holds the model. Where the error
    is kept for a reader, they would stay in memory too. The traceback can still be logged.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def retried(work: Callable[[], T], relieve: Callable[[], bool]) -> T:
    """Runs `work`; if memory runs out and `relieve` frees some, runs it once more.

    Raises: as `work`.
    """
    try:
        return work()
    except OutOfMemory as error:
        if not relieve():
            raise
        forget_frames(error)
    return work()


def _glibc(name: str) -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)


def available_bytes() -> int | None:
    """Bytes that can be allocated without swapping, less 2% of the machine for others; None where unknown.

    The smaller of the machine's `MemAvailable` and the room in this process's control group (version 2 or 1).
    """
    if sys.platform != "linux":
        return None
    found = []
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        found.append(sizes["MemAvailable"] - sizes["MemTotal"] // 50)
    group = Path("/sys/fs/cgroup")
    for limit, current, statistics, name in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):
            room = int((group / limit).read_text("ascii")) - int((group / current).read_text("ascii"))
            # Inactive file pages count as the group's, but the system drops them when it needs room.
            lines = (group / statistics).read_text("ascii").splitlines()
            found.append(room + next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0))
    return max(0, min(found)) if found else None


def resident_bytes() -> int | None:
    """Resident bytes of this process; None where unknown."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return None


def readable(size: float) -> str:
    """Formats a size in bytes for people: `1.25 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
