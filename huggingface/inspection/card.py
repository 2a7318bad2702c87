"""Reads a model's card from its small files on this machine: chat template, config, license.

Never asks the Hub and reads no weights. Any thread may call this; imports neither torch nor transformers. Must not know
the registry or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoadError
from ..registry.records import ModelRecord
from ..types import LoadOptions
from . import folder as files
from .contents import gguf_head, gguf_parts, template_files, tokenizer_config
from .rules import templates_of
from .sources import cached_place, folder_place

_MAX_LICENSE = 256 << 10  # bytes
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENSE-MODEL")


@dataclass(frozen=True, slots=True)
class Card:
    """A model's description of itself. `keys` are a GGUF file's, `config` is any other model's."""

    templates: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    license: str = ""


def read_card(record: ModelRecord, options: LoadOptions) -> Card:
    """Reads the card of a registered model; it is empty where the files are not on this machine or are damaged."""
    try:
        folder = files.local_folder(options.models_dir, record.model_id)
        place = (
            cached_place(record.model_id, record.revision) if folder is None else folder_place(record.model_id, folder)
        )
        if place is None:
            return Card()
        if record.gguf_file is not None:
            header = gguf_head(place, gguf_parts(place, record.gguf_file)[0])
            template = header.values.get("tokenizer.chat_template")
            texts = (template,) if isinstance(template, str) else ()
            return Card(texts, keys=header.values, license=_license(place.folder))
        config = files.read_config(record.model_id, place.folder)
        templates = templates_of(tokenizer_config(place), template_files(place))
        return Card(tuple(templates), config, license=_license(place.folder))
    except (LoadError, OSError):
        return Card()


def _license(folder: Path) -> str:
    """The text of the license in the folder; empty if there is none."""
    for name in _LICENSES:
        path = folder / name
        if path.is_file():
            return path.read_bytes()[:_MAX_LICENSE].decode("utf-8", "replace")
    return ""
