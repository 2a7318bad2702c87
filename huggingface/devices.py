"""Which device models run on, told without importing torch, so that a cold server can say it at once.

Standard library only. The loader asks torch itself; both follow the same rule, which is written here.
"""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata

from .memory import available_bytes, resident_bytes


def resolve_device(setting: str) -> str:
    """The device that `setting` means here: `auto` is `cuda` where torch would find a CUDA device, else `cpu`."""
    if setting != "auto":
        return setting
    return "cuda" if cuda_available() else "cpu"


def free_bytes(device: str) -> int | None:
    """Bytes that could be taken on a device without harm to others; None where that cannot be told."""
    if device == "cpu":
        return available_bytes()
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, int(free + kept - total // 50))


def used_bytes(device: str) -> int | None:
    """Bytes that this process (on a CPU), or all processes (elsewhere), have on a device; None where unknown."""
    if device == "cpu":
        return resident_bytes()
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def cuda_available() -> bool:
    """Whether torch would find a CUDA device: asked of torch if it is imported, else of its build and the driver."""
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
