"""Finds the device that models run on without importing torch, so that a cold server answers at once.

Standard library only. The loader asks torch itself; both follow the rule in this file.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata

from .memory import available_bytes, resident_bytes


def resolve_device(setting: str) -> str:
    """Returns the device that `setting` means: `auto` is `cuda` where torch would find a CUDA device, else `cpu`."""
    if setting != "auto":
        return setting
    return "cuda" if cuda_available() else "cpu"


def indexed(device: str) -> str:
    """The device's name with its index: torch places a tensor for `cuda` on `cuda:0`, and reports that name."""
    return "cuda:0" if device == "cuda" else device


def by_index(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sums bytes by device, with each device named by its index."""
    summed: dict[str, int] = {}
    for device, size in sizes.items():
        summed[indexed(device)] = summed.get(indexed(device), 0) + size
    return summed


def free_bytes(device: str) -> int | None:
    """Bytes that can be allocated on a device without harm to other processes; None where unknown."""
    if device == "cpu":
        return available_bytes()
    memory = _cuda_memory(device)
    if memory is None:
        return None
    free, total, cached = memory
    return max(0, free + cached - total // 50)


def used_bytes(device: str) -> int | None:
    """Bytes in use on a device: by this process on the CPU, by all processes elsewhere; None where unknown."""
    if device == "cpu":
        return resident_bytes()
    memory = _cuda_memory(device)
    return None if memory is None else memory[1] - memory[0]


def _cuda_memory(device: str) -> tuple[int, int, int] | None:
    """Free bytes of a CUDA device, its total, and the bytes cached by torch's allocator; None where CUDA fails.

    After a failed assertion in a kernel, CUDA refuses every call of the process, this one too.
    """
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    with suppress(RuntimeError):
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total), int(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return None


def cuda_available() -> bool:
    """Whether torch would find a CUDA device: asks torch if it is imported, else torch's build and the driver."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda"):
        return bool(torch.cuda.is_available())
    try:
        if metadata.version("torch").endswith("+cpu"):
            return False
    except metadata.PackageNotFoundError:
        return False
    count = ctypes.c_int(0)
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False
