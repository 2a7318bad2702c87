"""Lists the models in the models folder: folders that hold a complete model, by the id under which it is loaded.

Reads names and the headers of weights files. Pure functions; any thread may call them. Must not know the registry.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from ..errors import InvalidModelId, LoadError
from ..registry.records import check_model_id
from . import folder as files
from .contents import MAX_LOCAL_HEADER
from .gguf_parts import first_names, part_names
from .headers import HeaderDamaged, gguf_header

logger = logging.getLogger(__name__)


def model_folders(models_dir: Path) -> Iterator[tuple[str, Path]]:
    """The folders that hold a complete model, each with its id: `<name>`, or `<organization>/<name>`."""
    for outer in _folders(models_dir):
        if _holds_model(outer.name, outer):
            yield outer.name, outer
            continue
        for inner in _folders(outer):
            model_id = f"{outer.name}/{inner.name}"
            if _holds_model(model_id, inner):
                yield model_id, inner


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden; none where it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError as error:
        logger.info("%s cannot be read: %s", folder, error)
        return []


def _holds_model(model_id: str, folder: Path) -> bool:
    """Whether a folder holds complete weights and a config; a download that was broken off does not."""
    try:
        check_model_id(model_id)
        names = {path.name for path in folder.iterdir() if path.is_file()}
        if {"config.json", "adapter_config.json"} & names and _has_weights(model_id, folder, names):
            return True
        return any(
            all(part in names and _is_whole_gguf(folder / part) for part in part_names(name))
            for name in first_names(names)
        )
    except (InvalidModelId, OSError):
        return False


def _has_weights(model_id: str, folder: Path, names: set[str]) -> bool:
    known = (*files.SAFETENSORS, *files.PICKLES, "adapter_model.safetensors", "adapter_model.bin")
    first = next((name for name in known if name in names), None)
    if first is None:
        first = next(
            (name for name in sorted(names) if name.endswith((".safetensors", ".safetensors.index.json"))), None
        )
    if first is None:
        return False
    try:
        parts = files.shards(model_id, folder, first) if first.endswith(".json") else [first]
    except LoadError:
        return False
    return all(
        (folder / part).is_file() and (not part.endswith(".safetensors") or files.is_whole(folder / part))
        for part in parts
    )


def _is_whole_gguf(path: Path) -> bool:
    def read(start: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    try:
        end = gguf_header(read, maximum=MAX_LOCAL_HEADER).end
    except HeaderDamaged:
        return False
    return end is None or path.stat().st_size >= end
