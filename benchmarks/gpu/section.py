"""One section in a process of its own: `python -m benchmarks.gpu.section NAME DEVICE MODELS TOLD`."""

from __future__ import annotations

import platform
import signal
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from . import exact, memory, models, robust, speed
from .scale import Scale, scale_of
from .tell import Tell

_PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "sentence-transformers", "numpy"),
    *("huggingface_hub", "flask", "waitress", "pydantic", "llguidance", "triton", "bitsandbytes"),
)


def make_models(root: Path, scale: Scale, tell: Tell) -> None:
    """What the machine is, and the models of the other sections."""
    tell.figure("versions", python=platform.python_version(), **_versions())
    tell.figure("card", **_card(scale.device))
    for name in models.FAMILIES:
        models.family(root, name)
    models.adapters(root, f"{models.ORG}/opt")
    models.tasks(root)
    models.large(root, "large", scale.large, scale.half, scale.device)


def _larger(root: Path, scale: Scale, tell: Tell) -> None:
    if scale.larger is not None:
        speed.larger(root, scale, tell)


SECTIONS: Mapping[str, Callable[[Path, Scale, Tell], None]] = {
    "models": make_models,
    "exact": exact.texts,
    "tasks": exact.tasks,
    "memory": memory.run,
    "robust": robust.run,
    "profile": speed.profile,
    "speed": speed.callers,
    "larger": _larger,
}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _card(device: str) -> dict[str, Any]:
    import torch

    if device == "cpu":
        return {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    card = torch.cuda.get_device_properties(0)
    return {
        "name": card.name,
        "memory_bytes": card.total_memory,
        "multiprocessors": card.multi_processor_count,
        "capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "devices": torch.cuda.device_count(),
    }


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # noqa: BLE001 - it is told where it can be
        return None


def main(arguments: list[str]) -> None:
    """Run the section."""
    name, device, root, told = arguments
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its server is stopped
    Path(root).mkdir(exist_ok=True)
    SECTIONS[name](Path(root), scale_of(device), Tell(Path(told)))


if __name__ == "__main__":
    main(sys.argv[1:])
