"""Reads the files at a place: tokenizer, chat templates, and the headers of the weights.

Nothing is kept; any thread may call this. Must not know how the files are reached, or how a model is made of them.
"""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from ..errors import FilesCorrupt, FilesMissing
from . import folder as files
from .gguf_parts import first_names, part_names
from .headers import GGUFHeader, HeaderDamaged, Tensor, gguf_header, safetensors_header
from .sources import Place

logger = logging.getLogger(__name__)

T = TypeVar("T")

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
    """The names of the GGUF files, sorted; of one in several parts the first."""
    return first_names(place.names)


def gguf_parts(place: Place, name: str) -> list[str]:
    """The names of all parts of the GGUF file that `name` is a part of, in order.

    Raises:
        FilesMissing: one is not among the files; the message names it.
    """
    parts = part_names(name)
    missing = next((part for part in parts if part not in place.names), None) if place.listed else None
    if missing is not None:
        raise FilesMissing(f"Model '{place.model_id}': there is no {missing} among its files")
    return parts


def gguf_head(place: Place, name: str) -> GGUFHeader:
    """Reads the header of a GGUF file.

    Raises:
        FilesCorrupt: it is not a GGUF file, or is cut short. OSError, and the Hub client's errors.
    """
    try:
        return gguf_header(partial(place.read, name), maximum=_maximum(place))
    except HeaderDamaged as error:
        raise gguf_damaged(place, name) from error


def gguf_heads(place: Place, names: list[str]) -> dict[str, GGUFHeader]:
    """Reads the headers of GGUF files.

    Raises: as `gguf_head`.
    """
    return dict(zip(names, _each(place, partial(gguf_head, place), names), strict=True))


def gguf_damaged(place: Place, name: str) -> FilesCorrupt:
    """The error for a GGUF file that is damaged or incomplete."""
    return FilesCorrupt(f"Model '{place.model_id}': {name} is damaged or incomplete; download it again")


def _each(place: Place, read: Callable[[str], T], names: list[str]) -> list[T]:
    """What `read` finds in each file; on the Hub it reads several at once."""
    if place.source != "hub":
        return [read(name) for name in names]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="preflight") as pool:
        return list(pool.map(read, names))


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


def bytes_of(place: Place, names: list[str]) -> int | None:
    """The size of these files together; None where there are none, or one's size is unknown."""
    sizes = [size for name in names if (size := place.size(name)) is not None]
    return sum(sizes) if names and len(sizes) == len(names) else None


def tensors(place: Place, names: list[str]) -> dict[str, Tensor]:
    """The tensors of all headers together; empty where one header cannot be read."""

    def head(name: str) -> dict[str, Tensor] | None:
        return safetensors_header(partial(place.read, name), maximum=_maximum(place))

    if not names or not all(name.endswith(".safetensors") for name in names):
        return {}
    try:
        heads = _each(place, head, names)
    except Exception as error:  # noqa: BLE001 - the config's details stand without them
        logger.info("the headers of the weights of %s cannot be read: %s", place.model_id, error)
        return {}
    if any(found is None for found in heads):
        return {}
    return {name: tensor for found in heads if found is not None for name, tensor in found.items()}
