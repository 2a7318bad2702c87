"""Finds a model's folder in the models folder, and checks that its files can be loaded safely.

Reads configs, indexes and headers, never the weights themselves; imports neither torch nor transformers, and never uses
the network. Any thread may call this. Must not know the Hub: a folder of its cache is like any other folder. Every
failure is a `LoadError` that names the model, says what to do, and holds no path of this machine.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import (
    FilesCorrupt,
    FilesMissing,
    FilesRefused,
    LibraryPanic,
    LoadError,
    ModelUnsupported,
    NotServed,
    no_panics,
)
from .gguf_parts import first_names

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# JSON files whose damage transformers ignores, or reports with a message that does not help.
_JSON_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = (".json", ".txt", ".model", ".spm", ".tiktoken", ".codes")
# Files that hold a whole vocabulary, for any tokenizer class.
_WORDS = ("tokenizer.json", "tokenizer.*.json", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "tekken.json")
# Entries of a config for the number of a model's modules and for their sizes, and limits above any model's.
_NUMBER = re.compile(r"n(um)?_")
_LAYERS = re.compile(r"((^|_)(layers|blocks|stages|depths)|^n(um)?_(layer|block))$")
_PARTS = re.compile(r"((^|_)(experts|heads)|^n(um)?_(head|expert))$")
_LABELS = re.compile(r"(^|_)num_labels$")
_WIDTH = re.compile(
    r"^(?!.*(data|train|cache|memory|batch|queue|max_|context|ctx|seq|window)).*"
    r"(^|_)(size|dims?|width|rank|channels|embd|inner|model|ff|kv|buckets)$"
)
_MAX_LAYERS, _MAX_PARTS, _MAX_LABELS, _MAX_WIDTH = 1 << 12, 1 << 15, 1 << 20, 1 << 24
_MAX_JSON = 64 << 20  # bytes of a JSON file that is not a vocabulary
_MAX_TEMPLATE = 1 << 20  # characters: 30 times the longest known template
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_SIZE = 1024  # bytes; pointers of Git LFS are smaller
_IMPORT = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import\b|import\s+\.(\w+)\s*$)", re.MULTILINE)


def local_folder(models_dir: Path, model_id: str) -> Path | None:
    """The model's folder in the models folder, or None where there is none.

    `model_id` has been checked as a Hub id. For an id without an organization, a folder that holds only folders belongs
    to an organization of this name, not to a model.

    Raises:
        FilesMissing: the folder is a broken link, or cannot be read.
    """
    folder = models_dir / model_id
    try:
        if not folder.is_dir():
            if folder.is_symlink():
                raise FilesMissing(f"Model '{model_id}': its folder in the models folder is a link that leads nowhere")
            return None
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise FilesMissing(f"Model '{model_id}': its folder cannot be read ({error.strerror})") from error
    if "/" not in model_id and not any(entry.is_file() for entry in entries):
        return None
    return folder


def read_config(model_id: str, folder: Path) -> dict[str, Any]:
    """Reads `config.json`.

    Raises:
        FilesMissing: there is none. FilesCorrupt: it is damaged. NotServed: the folder holds a pipeline of diffusers.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise FilesMissing(
                f"Model '{model_id}' is an adapter (LoRA) without its base model; merge the two and save them as one"
            )
        if (folder / "model_index.json").is_file():
            raise diffusion(model_id)
        if ggufs := first_names(path.name for path in folder.iterdir()):
            raise FilesMissing(
                f"Model '{model_id}' has its weights as GGUF only; name one in gguf_file: {', '.join(ggufs[:10])}"
            )
        raise FilesMissing(f"Model '{model_id}': its folder holds no config.json; put the complete model there")
    config = _read_object(model_id, folder / "config.json")
    _check_config(model_id, config)
    return config


def _check_config(model_id: str, config: Mapping[str, Any]) -> None:
    """Refuses entries that no model has, and numbers with which building the model would never end or fill all memory.

    Raises:
        FilesCorrupt: names the entry.
    """
    said = config.get("architectures")
    if said is not None and not (isinstance(said, list) and all(isinstance(name, str) for name in said)):
        raise FilesCorrupt(f"Model '{model_id}': config.json is damaged ('architectures' is no list of names)")
    inner: list[tuple[str, Any]] = [("", config)]
    while inner:
        name, value = inner.pop()
        if isinstance(value, dict):
            inner.extend((str(key), each) for key, each in value.items())
        elif isinstance(value, list):
            inner.extend((name, each) for each in value)
        elif isinstance(value, int | float) and not _may_be(name, value):
            raise FilesCorrupt(
                f"Model '{model_id}': config.json is damaged ('{name}' is {str(value)[:40]}, which no model has)"
            )


def _may_be(name: str, value: float) -> bool:
    """Whether a config may have this number in the entry `name`."""
    if isinstance(value, bool):
        return not _NUMBER.match(name)
    if _LAYERS.search(name):
        return 0 <= value <= _MAX_LAYERS
    if _PARTS.search(name):
        return 0 <= value <= _MAX_PARTS
    if _LABELS.search(name):
        return 0 <= value <= _MAX_LABELS
    return not _WIDTH.search(name) or -1 <= value <= _MAX_WIDTH  # -1 stands for "none"


def check(model_id: str, folder: Path, *, allow_pickle: bool, trusted: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Checks that `folder` holds a config and complete weights, and nothing that would run code against the settings.

    Returns the content of `config.json`; reads only the headers of the weights.

    Raises:
        FilesMissing: no config, or no weights.
        FilesRefused: the only weights are pickles and `allow_pickle` is off, or the model is `trusted` but uses code of
            a repository that is not.
        FilesCorrupt: a part is missing, damaged or cut short.
    """
    config = read_config(model_id, folder)
    _check_tokenizer_files(model_id, folder)
    for name in _JSON_FILES:
        if (folder / name).is_file():
            _read_object(model_id, folder / name)
    if model_id in trusted:
        for owner in code_modules(folder, model_id):
            if owner not in trusted:
                raise FilesRefused(
                    f"Model '{model_id}' needs Python code of the repository '{owner}'. If you have read that code and "
                    f"trust it, add {owner} to LOCAL_LLM_TRUST_REMOTE_CODE"
                )
    names = weight_names(config, model_id, allow_pickle=allow_pickle)
    first = next((name for name in names if (folder / name).is_file()), None)
    if first is None:
        if any((folder / name).is_file() for name in PICKLES):
            raise only_pickles(model_id)
        raise FilesMissing(
            f"Model '{model_id}': its folder holds no weights ({SAFETENSORS[0]}); put the complete model there"
        )
    for name in shards(model_id, folder, first) if first.endswith(".json") else [first]:
        if not (folder / name).is_file():
            raise FilesCorrupt(f"Model '{model_id}': the part {name} of its weights is missing; download it again")
        if _is_pointer(folder / name):
            raise _pointer(model_id, name)
        if name.endswith(".safetensors") and not is_whole(folder / name):
            raise FilesCorrupt(f"Model '{model_id}': {name} is damaged or incomplete; download it again")
    return config


def weights_files(model_id: str, folder: Path, *, allow_pickle: bool) -> list[Path]:
    """The weights' files that exist in a folder.

    Raises: as `check`, where the names of the files cannot be found.
    """
    names = weight_names(read_config(model_id, folder), model_id, allow_pickle=allow_pickle)
    first = next((name for name in names if (folder / name).is_file()), None)
    if first is None:
        return []
    parts = shards(model_id, folder, first) if first.endswith(".json") else [first]
    return [folder / name for name in parts if (folder / name).is_file()]


def _check_tokenizer_files(model_id: str, folder: Path) -> None:
    """Refuses Git LFS pointers, which some tokenizers would read as a vocabulary, unless tokenizer.json is complete."""
    if (folder / "tokenizer.json").is_file() and not _is_pointer(folder / "tokenizer.json"):
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in _VOCABULARIES and path.is_file() and _is_pointer(path):
            raise _pointer(model_id, path.name)


def weight_names(config: dict[str, Any], model_id: str, *, allow_pickle: bool) -> tuple[str, ...]:
    """The files that may hold or list the weights, in transformers' order of preference.

    Raises:
        FilesRefused: the config names a file that is not a safetensors file in the model's folder.
    """
    own = config.get("transformers_weights")
    if own is not None:
        kinds = (".safetensors", ".safetensors.index.json")
        if not (isinstance(own, str) and _is_inside(own) and own.endswith(kinds)):
            raise FilesRefused(
                f"Model '{model_id}': its config names weights that are not a safetensors file in its folder"
            )
        return (own,)
    return (*SAFETENSORS, *PICKLES) if allow_pickle else SAFETENSORS


def shards(model_id: str, folder: Path, index: str) -> list[str]:
    """The distinct file names that an index of weights lists.

    Raises:
        FilesCorrupt: the index is damaged, or lists a file of another kind or outside the folder.
    """
    try:
        names = sorted(set(json.loads((folder / index).read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FilesCorrupt(f"Model '{model_id}': {index} is damaged; download it again") from error
    # transformers reads every file without the name of a safetensors file as a pickle, whatever the index's kind.
    kind = ".safetensors" if ".safetensors." in index else ".bin"
    if not names or not all(isinstance(name, str) and _is_inside(name) for name in names):
        raise FilesCorrupt(f"Model '{model_id}': {index} lists files outside the model's folder, or none at all")
    if not all(name.endswith(kind) for name in names):
        raise FilesCorrupt(f"Model '{model_id}': {index} lists files of another kind than {kind}")
    return names


def is_whole(path: Path) -> bool:
    """Whether a safetensors file has a valid header, and the length that the header gives."""
    from safetensors import SafetensorError, safe_open

    try:
        with no_panics(), safe_open(path, framework="np"):
            return True
    except (SafetensorError, OSError, ValueError, LibraryPanic):
        return False


def diffusion(model_id: str) -> NotServed:
    """The error for a folder that holds a pipeline of diffusers."""
    return NotServed(
        f"Model '{model_id}' is a diffusion pipeline (model_index.json), which does none of this server's text tasks"
    )


def only_pickles(model_id: str) -> FilesRefused:
    """The error for a model whose weights are all pickles."""
    return FilesRefused(
        f"Model '{model_id}' has no safetensors weights, only pickles (pytorch_model.bin), which can run any code when "
        "they are loaded. If you trust them, set LOCAL_LLM_ALLOW_PICKLE=true"
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether any file belongs to a tokenizer; tokenizers that read bytes have only a config."""
    patterns = ("tokenizer*", "vocab*", *_WORDS)
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def lacking_vocabulary(folder: Path, names: Mapping[str, str]) -> str | None:
    """The name of the vocabulary file that a tokenizer lacks, or None where it has one or needs none.

    `names` are its class's `vocab_files_names`; it is empty for tokenizers that read bytes.
    """
    present = {path.name for path in folder.iterdir() if path.is_file()}
    if not names or present & set(names.values()):
        return None
    if any(fnmatch.fnmatchcase(name, word) for name in present for word in _WORDS):
        return None
    return names.get("tokenizer_file") or min(names.values())


def check_templates(model_id: str, templates: Iterable[Any]) -> None:
    """Refuses chat templates that are too long to be searched at every request.

    Raises:
        ModelUnsupported: a template is too long.
    """
    if any(isinstance(template, str) and len(template) > _MAX_TEMPLATE for template in templates):
        raise ModelUnsupported(f"Model '{model_id}': its chat template is longer than {_MAX_TEMPLATE} characters")


def code_modules(folder: Path, model_id: str) -> dict[str, list[str]]:
    """The Python modules (without `.py`) that the folder's `auto_map`s name, by their repository.

    The repository is `model_id`, unless an entry names another (`owner/name--module.Class`).
    """
    modules: dict[str, list[str]] = {}
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        mapping = _read_object(model_id, folder / name).get("auto_map") or {}
        for reference in _strings(mapping):
            owner, _, target = reference.rpartition("--")
            module = target.rpartition(".")[0]
            known = modules.setdefault(owner or model_id, [])
            if re.fullmatch(r"\w+", module) and module not in known:
                known.append(module)
    return modules


def relative_imports(source: str) -> list[str]:
    """The sibling modules that Python `source` imports, as transformers finds them."""
    return [first or second for first, second in _IMPORT.findall(source)]


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _read_object(model_id: str, path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise FilesCorrupt(f"Model '{model_id}': {path.name} is longer than {_MAX_JSON >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if _is_pointer(path):
            raise _pointer(model_id, path.name) from error
        raise FilesCorrupt(f"Model '{model_id}': {path.name} is damaged (not JSON); download it again") from error
    except OSError as error:
        raise LoadError(f"Model '{model_id}': {path.name} cannot be read ({error.strerror})") from error
    if not isinstance(value, dict):
        raise FilesCorrupt(f"Model '{model_id}': {path.name} is damaged (not a JSON object); download it again")
    return value


def _pointer(model_id: str, name: str) -> FilesCorrupt:
    return FilesCorrupt(
        f"Model '{model_id}': {name} is only a Git LFS pointer, not the file itself; fetch it (git lfs pull)"
    )


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size > _POINTER_SIZE:
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _is_inside(name: str) -> bool:
    """Whether a file name stays within its folder, on any system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not re.search(r"[\\:\0]", name) and "/" not in parts and ".." not in parts
