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
