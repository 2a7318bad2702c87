"""Reads the files at a place: tokenizer, chat templates, and the headers of the weights.

Nothing is kept; any thread may call this. Must not know how the files are reached, or how a model is made of them.
"""

from __future__ import annotations

import fnmatch
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ..errors import FilesCorrupt
from . import folder as files
from .headers import GGUFHeader, Tensor, gguf_header, safetensors_header
from .sources import Place

logger = logging.getLogger(__name__)

_MAX_HEADER = 16 << 20  # bytes of one header read from the Hub
MAX_LOCAL_HEADER = 256 << 20
_AT_ONCE = 8

_TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "tekken.json")


def json_object(place: Place, name: str) -> dict[str, Any]:
    """Reads a JSON object from a small file; returns an empty one where there is no such file.

    Raises:
        FilesCorrupt: the file is damaged.
    """
    path = place.folder / name
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise FilesCorrupt(f"Model '{place.model_id}': {name} is damaged (not JSON); download it again") from error
    if not isinstance(value, dict):
        raise FilesCorrupt(f"Model '{place.model_id}': {name} is damaged (not a JSON object); download it again")
    return value


def tokenizer_config(place: Place) -> dict[str, Any]:
    """The tokenizer's config, with the mask token that older tokenizers keep in a file of its own."""
    config = json_object(place, "tokenizer_config.json")
    try:
        special = json_object(place, "special_tokens_map.json")
    except FilesCorrupt:
        special = {}
    return {**{name: value for name, value in special.items() if name == "mask_token"}, **config}


def template_files(place: Place) -> list[str]:
    """The chat templates in separate files."""
    found = []
    for path in (place.folder / "chat_template.jinja", *place.folder.glob("additional_chat_templates/*.jinja")):
        if path.is_file():
            found.append(path.read_text(encoding="utf-8", errors="replace"))
    inner = json_object(place, "chat_template.json").get("chat_template")
    return [*found, inner] if isinstance(inner, str) else found


def has_tokenizer(place: Place) -> bool:
    """Whether the name of any file is that of a tokenizer's file."""
    names = [name for name in place.names if "/" not in name]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in _TOKENIZER)


def gguf_names(place: Place) -> list[str]:
    """The names of the GGUF files, sorted."""
    return sorted(name for name in place.names if name.lower().endswith(".gguf"))


def gguf_head(place: Place, name: str) -> GGUFHeader:
    """Reads the header of a GGUF file.

    Raises:
        HeaderDamaged: it is not a GGUF file, or is cut short. OSError, and the Hub client's errors.
    """
    return gguf_header(partial(place.read, name), maximum=_maximum(place))


def _maximum(place: Place) -> int:
    return MAX_LOCAL_HEADER if place.source != "hub" else _MAX_HEADER


def weight_files(place: Place, config: dict[str, Any]) -> list[str]:
    """The files of the weights: one, or those that an index lists. Includes pickles, which are listed but not read."""
    known = files.weight_names(config, place.model_id, allow_pickle=True)
    first = next((name for name in known if name in place.names), None)
    if first is None or not first.endswith(".json"):
        return [] if first is None else [first]
    try:
        return files.shards(place.model_id, place.folder, first)
    except OSError:
        return []


def tensors(place: Place, names: list[str]) -> dict[str, Tensor]:
    """The tensors of all headers together; empty where one header cannot be read."""

    def head(name: str) -> dict[str, Tensor] | None:
        return safetensors_header(partial(place.read, name), maximum=_maximum(place))

    if not names or not all(name.endswith(".safetensors") for name in names):
        return {}
    try:
        if place.source == "hub":
            with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="preflight") as pool:
                heads = list(pool.map(head, names))
        else:
            heads = [head(name) for name in names]
    except Exception as error:  # noqa: BLE001 - the config's details stand without them
        logger.info("the headers of the weights of %s cannot be read: %s", place.model_id, error)
        return {}
    if any(found is None for found in heads):
        return {}
    return {name: tensor for found in heads if found is not None for name, tensor in found.items()}
