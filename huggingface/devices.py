"""Which device models run on, told without importing torch, so that a cold server can say it at once.

Standard library only. The loader asks torch itself; both follow the same rule, which is written here.
"""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata


def resolve_device(setting: str) -> str:
    """The device that `setting` means here: `auto` is `cuda` where torch would find a CUDA device, else `cpu`."""
    if setting != "auto":
        return setting
    return "cuda" if cuda_available() else "cpu"


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
