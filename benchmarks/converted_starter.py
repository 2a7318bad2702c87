"""The starter model in transformers' own form, which benchmarks and tests compare with: float32 safetensors.

It is made once, from the starter's GGUF file as transformers unpacks it, in a folder that git ignores; there both forms
lie side by side. Any number of processes may ask for it at once.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from filelock import FileLock

from starter import GGUF_FILE, MODEL_ID, bring_starter

MODELS_DIR = Path(__file__).resolve().parent.parent / ".cache" / "models"
FOLDER = MODELS_DIR / MODEL_ID

_FILES = ("config.json", "generation_config.json", "model.safetensors")  # in this order: the last makes it complete


def bring_converted() -> Path:
    """Makes the model if it is not there, which takes some seconds and 640 MB of disk; returns its models folder.

    Raises:
        StarterError: the starter model cannot be installed.
    """
    bring_starter(MODELS_DIR)
    with FileLock(MODELS_DIR / ".lock"):
        if not all((FOLDER / name).is_file() for name in _FILES):
            _convert()
    return MODELS_DIR


def _convert() -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        FOLDER, gguf_file=GGUF_FILE, quantization_config=unpacked, dtype=torch.float32
    )
    with tempfile.TemporaryDirectory(dir=MODELS_DIR) as made:
        model.save_pretrained(made)
        for name in _FILES:
            (Path(made) / name).rename(FOLDER / name)
