"""Copies of the tiny models that a test may change, and how they are loaded without the server around them.

Plain functions of a models folder; each test works on ids of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tiny_models

from huggingface.inspection import folder as files
from huggingface.loading import loader
from huggingface.registry.records import ModelRecord
from huggingface.types import GenerationRequest, LoadOptions


def copy(root: Path, name: str, model_id: str) -> Path:
    """A tiny model under another id, to be changed."""
    source = root / tiny_models.build(root, name)
    shutil.copytree(source, root / model_id, dirs_exist_ok=True)
    return root / model_id


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Change a JSON file of the folder; None removes a key."""
    path = folder / file
    content = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def load(root: Path, model_id: str, model_type: str, **options: Any) -> loader.LoadedModel:
    """Load a model without the server around it."""
    record = ModelRecord(model_id, model_id, model_type)
    folder = files.local_folder(root, model_id)
    assert folder is not None
    return loader.load(record, LoadOptions(root, device="cpu", **options), folder)


def text(model: loader.LoadedModel, prompt: str = "The little harbour") -> str:
    """What the model says, greedily; it is closed afterwards."""
    chunks = list(model.generate(GenerationRequest({"max_new_tokens": 6, "do_sample": False}, prompt=prompt)))
    model.close()
    return "".join(chunk.text for chunk in chunks)


def sharded(folder: Path) -> None:
    """Split the weights of a folder into two files and an index, as large models have them."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, parts = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {name: parts[rank % 2] for rank, name in enumerate(names)}
    for part in parts:
        save_file({name: tensors[name] for name in names if where[name] == part}, folder / part)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
