"""What the files at a place hold: tokenizer, chat templates, and the heads of the weights.

Nothing is kept; any thread may call this. Must not know how the files are reached, nor what a model is made of them.
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

_MOST_HEADER = 16 << 20  # bytes of one header that comes from the Hub
MOST_LOCAL_HEADER = 256 << 20
_AT_ONCE = 8

_TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "tekken.json")


def json_object(place: Place, name: str) -> dict[str, Any]:
    """A JSON object among the small files; an empty one where there is no such file.

    Raises:
        FilesCorrupt: it is damaged.
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
    """The tokenizer's config, and the special tokens that older ones keep beside it."""
    config = json_object(place, "tokenizer_config.json")
    try:
        special = json_object(place, "special_tokens_map.json")
    except FilesCorrupt:
        special = {}
    return {**{name: value for name, value in special.items() if name == "mask_token"}, **config}


def template_files(place: Place) -> list[str]:
    """The chat templates that are files of their own."""
    found = []
    for path in (place.folder / "chat_template.jinja", *place.folder.glob("additional_chat_templates/*.jinja")):
        if path.is_file():
            found.append(path.read_text(encoding="utf-8", errors="replace"))
    inner = json_object(place, "chat_template.json").get("chat_template")
    return [*found, inner] if isinstance(inner, str) else found


def has_tokenizer(place: Place) -> bool:
    """Whether any of the files is a tokenizer's, by its name."""
    names = [name for name in place.names if "/" not in name]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in _TOKENIZER)


def gguf_names(place: Place) -> list[str]:
    """The names of the GGUF files, sorted."""
    return sorted(name for name in place.names if name.lower().endswith(".gguf"))


def gguf_head(place: Place, name: str) -> GGUFHeader:
    """What a GGUF file tells of itself.

    Raises:
        HeaderDamaged: it is no GGUF file, or cut short. OSError, and whatever tells why the Hub does not give it.
    """
    return gguf_header(partial(place.read, name), most=_most(place))


def _most(place: Place) -> int:
    return MOST_LOCAL_HEADER if place.source != "hub" else _MOST_HEADER


def weight_files(place: Place, config: dict[str, Any]) -> list[str]:
    """The files of the weights: the one, or those that its index lists. Pickles too, to be named and not to be read."""
    known = files.weight_names(config, place.model_id, allow_pickle=True)
    first = next((name for name in known if name in place.names), None)
    if first is None or not first.endswith(".json"):
        return [] if first is None else [first]
    try:
        return files.shards(place.model_id, place.folder, first)
    except OSError:
        return []


def tensors(place: Place, names: list[str]) -> dict[str, Tensor]:
    """What all the heads list together; nothing where one cannot be had."""

    def head(name: str) -> dict[str, Tensor] | None:
        return safetensors_header(partial(place.read, name), most=_most(place))

    if not names or not all(name.endswith(".safetensors") for name in names):
        return {}
    try:
        if place.source == "hub":
            with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="preflight") as pool:
                heads = list(pool.map(head, names))
        else:
            heads = [head(name) for name in names]
    except Exception as error:  # noqa: BLE001 - what the config tells stands without them
        logger.info("the heads of the weights of %s cannot be read: %s", place.model_id, error)
        return {}
    if any(found is None for found in heads):
        return {}
    return {name: tensor for found in heads if found is not None for name, tensor in found.items()}
