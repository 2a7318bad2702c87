"""Brings the files that a model needs from a Hub repository into a folder of the Hub's cache.

Uses `huggingface_hub`'s cache, token, offline switch and `HF_ENDPOINT`. Any thread may call it; it imports neither
torch nor transformers. This module decides which files a model or an adapter needs; `repository` knows which files
exist, and `transfer` downloads them. All files come from one commit. What an interrupted download left out, down to the
bytes of a file, is fetched the next time; while the Hub cannot be asked, complete files in the cache are used. Every
failure is a `LoadError` that names the model, says what to do, and contains no path of this machine.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from ..errors import FilesMissing, FilesRefused, HubUnreachable
from ..inspection import folder as files
from ..inspection.gguf_parts import SUFFIX, part_names
from ..inspection.headers import Tensor
from ..inspection.hub_errors import hub_errors
from ..progress import Progress
from . import cache
from .disk import DiskClaims
from .repository import Repository

# Files beside the weights that describe a model and its tokenizer. Where the Hub lists its files, those that match a
# pattern are fetched; where it does not, these names are tried: all that transformers' tokenizers read.
_PATTERNS = ("*.json", "*.txt", "*.model", "*.model.v*", "*.spm", "*.jinja", "*.tiktoken", "*.codes", "*.tokenizer")
_UNWANTED = ("*.index.json", "trainer_state.json", "all_results.json", "*_results.json", "README.txt", "LICENSE.txt")
_TEMPLATES = "additional_chat_templates/"
# Files of a sentence-transformers model's modules, beside its transformer: `1_Pooling/config.json`.
_MODULE_FILE = re.compile(r"[0-9]+_[A-Za-z0-9_]+/(config\.json|model\.safetensors)")

_NAMES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "byte_maps.json",
    "entity_vocab.json",
    "prophetnet.tokenizer",
    "word_shape.json",
    "word_pronunciation.json",
)


_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_ADAPTER_PICKLE = "adapter_model.bin"


def fetch(
    model_id: str,
    *,
    allow_pickle: bool,
    trusted: frozenset[str] = frozenset(),
    revision: str | None = None,
    gguf_file: str | None = None,
    progress: Progress | None = None,
    offline: bool = False,
    resolved: Callable[[str], None] = lambda _: None,
    claims: DiskClaims | None = None,
) -> Path:
    """Downloads the missing files of a repository into the Hub's cache; returns the folder there.

    The folder is named after the commit. Weights come last: if they are complete, so is the rest. What has arrived
    stays for the next time. Disk space is claimed among `claims`.

    Args:
        allow_pickle: weights may be pickles.
        trusted: ids of repositories whose Python files may be downloaded.
        revision: a branch, a tag or a commit.
        gguf_file: this file holds the weights, with the other parts of the file that it is a part of; other files, a
            config too, are fetched where they exist.
        progress: counts all bytes; its cancellation cancels the download.
        offline: sends no packet.
        resolved: is called with the commit when it is known.

    Raises:
        FilesMissing, FilesGated, HubUnreachable, FilesRefused, FilesCorrupt, DiskFull, LoadError: see `errors`.
        Cancelled: the download is cancelled.
    """

    def bring(repository: Repository) -> list[Path]:
        if gguf_file is not None:
            return _gguf(repository, gguf_file)
        return _model(repository, allow_pickle, trusted)

    key = gguf_file or "config.json"
    if not _is_inside(key) or (gguf_file is not None and not gguf_file.lower().endswith(SUFFIX)):
        raise FilesRefused(f"Model '{model_id}': {gguf_file!r} is not the name of a GGUF file of its repository")
    return _fetch(model_id, revision, key, bring, progress, offline, resolved, claims)


def fetch_config(
    model_id: str, *, trusted: frozenset[str] = frozenset(), revision: str | None = None, offline: bool = False
) -> Path:
    """Downloads a repository's `config.json`, and its code, into the Hub's cache; returns the folder.

    Raises: as `fetch`.
    """

    def bring(repository: Repository) -> list[Path]:
        config = repository.get("config.json")
        return [config, *(_code(repository, config.parent, trusted) if model_id in trusted else [])]

    return _fetch(model_id, revision, "config.json", bring, None, offline, lambda _: None, None, whole=False)


def fetch_adapter(
    adapter_id: str,
    *,
    progress: Progress | None = None,
    offline: bool = False,
    claims: DiskClaims | None = None,
) -> Path:
    """Downloads a LoRA adapter's config and weights into the Hub's cache; returns the folder.

    Raises: as `fetch`.
    """

    def bring(repository: Repository) -> list[Path]:
        config = repository.get(_ADAPTER[0])
        if not repository.has(_ADAPTER[1]) and repository.has(_ADAPTER_PICKLE):
            raise FilesRefused(
                f"Adapter '{adapter_id}' has no safetensors weights, only a pickle ({_ADAPTER_PICKLE}), which can run "
                "any code when it is loaded"
            )
        repository.expect(_ADAPTER)
        return [config, *_weights(repository, config.parent, [_ADAPTER[1]])]

    return _fetch(adapter_id, None, _ADAPTER[0], bring, progress, offline, lambda _: None, claims)


def adapter_head(adapter_id: str) -> dict[str, Tensor]:
    """Fetches the header of a LoRA adapter's weights: its tensors by name, without their values.

    Raises: as `fetch`.
    """
    from huggingface_hub import HfApi

    with hub_errors(adapter_id, None):
        told = HfApi().parse_safetensors_file_metadata(adapter_id, _ADAPTER[1])
        return {
            name: Tensor(each.dtype, tuple(each.shape), each.data_offsets[1] - each.data_offsets[0])
            for name, each in told.tensors.items()
        }


def claim_adapter(adapter_id: str, claims: DiskClaims) -> None:
    """Claims disk space for the missing files of a LoRA adapter, before its download begins.

    Raises:
        DiskFull: the disk lacks space. Otherwise as `fetch`.
    """
    with hub_errors(adapter_id, None):
        repository = Repository(adapter_id, claims=claims)
        repository.open(_ADAPTER[0])
        repository.claim(_ADAPTER)


def partial_bytes(model_id: str) -> int | None:
    """How many bytes of incomplete files are in the cache; None where there are no such files."""
    sizes = [path.stat().st_size for path in cache.partials(model_id) if path.exists()]
    return sum(sizes) if sizes else None


def _fetch(
    repository_id: str,
    revision: str | None,
    key: str,
    bring: Callable[[Repository], list[Path]],
    progress: Progress | None,
    offline: bool,
    resolved: Callable[[str], None],
    claims: DiskClaims | None,
    *,
    whole: bool = True,
) -> Path:
    """Calls `bring` to fetch files, the file `key` first, and checks that all of them are of one commit.

    `whole`: they are all that a load needs.
    """
    progress = progress or Progress()
    with hub_errors(repository_id, revision):
        for _ in range(2):  # once more if the repository changed meanwhile
            progress.check()
            progress.begin("download")
            repository = Repository(repository_id, revision, offline=offline, progress=progress, claims=claims)
            repository.open(key)
            if repository.commit is not None:
                resolved(repository.commit)
            paths = bring(repository)
            folder = paths[0].parents[len(PurePosixPath(key).parts) - 1]
            if all(path.is_relative_to(folder) for path in paths):
                resolved(folder.name)
                if whole:
                    repository.keep(folder)
                if whole and repository.online:
                    cache.sweep(repository_id)
                return folder
    raise HubUnreachable(f"Model '{repository_id}' changed on the Hub while it was downloaded; try again")


def _model(repository: Repository, allow_pickle: bool, trusted: frozenset[str]) -> list[Path]:
    """The paths of a model's files: its config, descriptions, tokenizer, code and weights."""
    config = repository.get("config.json")
    folder = config.parent
    weights = _weight_names(repository, folder, allow_pickle)
    small = _small_files(repository)
    repository.expect(["config.json", *small, *weights])
    paths = [config, *(path for name in small if (path := repository.find(name)))]
    if repository.model_id in trusted:
        paths += _code(repository, folder, trusted)
    return paths + _weights(repository, folder, weights)


def _gguf(repository: Repository, file: str) -> list[Path]:
    """The paths of the file that holds the weights, or of its parts, and of the files that describe the model."""
    parts = part_names(file)
    missing = next((name for name in parts if not repository.has(name)), None)
    if missing is not None:
        repository.lack(missing)
    small = list(dict.fromkeys(["config.json", *_small_files(repository)]))
    repository.expect([*small, *parts])
    paths = [path for name in small if (path := repository.find(name))]
    return [*(repository.get(name) for name in parts), *paths]


def _small_files(repository: Repository) -> list[str]:
    """The names of files beside config and weights that may matter; not all of them need to exist."""
    names = repository.names()
    if not names:
        return list(_NAMES)
    return sorted(
        name
        for name in names
        if (name.startswith(_TEMPLATES) and name.endswith(".jinja"))
        or ("modules.json" in names and _MODULE_FILE.fullmatch(name))
        or (
            "/" not in name
            and any(fnmatch.fnmatchcase(name, pattern) for pattern in _PATTERNS)
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in _UNWANTED)
        )
    )


def _weight_names(repository: Repository, folder: Path, allow_pickle: bool) -> list[str]:
    """The names of the weights' files, an index first where there is one."""
    model_id = repository.model_id
    names = files.weight_names(files.read_config(model_id, folder), model_id, allow_pickle=allow_pickle)
    first = next((name for name in names if repository.has(name)), None)
    if first is None:
        if any(repository.has(name) for name in files.PICKLES):
            raise files.only_pickles(model_id)
        if not repository.online:
            repository.fail()
        raise FilesMissing(
            f"Model '{model_id}': its repository on the Hub holds no weights of a supported kind (model.safetensors)"
        )
    if not first.endswith(".json"):
        return [first]
    repository.get(first)
    return [first, *files.shards(model_id, folder, first)]


def _weights(repository: Repository, folder: Path, names: Iterable[str]) -> list[Path]:
    """The paths of the weights, each file complete."""
    paths = [repository.get(name) for name in names]
    for path in paths:
        if path.suffix == ".safetensors" and repository.online and not files.is_whole(path):
            repository.get(path.relative_to(folder).as_posix(), force=True)
    return paths


def _code(repository: Repository, folder: Path, trusted: frozenset[str]) -> list[Path]:
    """Fetches the modules that the model's `auto_map` names, and the modules that they import."""
    paths = []
    for owner, names in files.code_modules(folder, repository.model_id).items():
        source = repository
        if owner != repository.model_id:
            if owner not in trusted:
                continue  # the load will refuse it
            source = Repository(owner)
            source.open("config.json")
        pending, seen = list(names), set(names)
        while pending:
            path = source.get(f"{pending.pop()}.py")
            if owner == repository.model_id:
                paths.append(path)
            more = set(files.relative_imports(path.read_text(encoding="utf-8"))) - seen
            pending += more
            seen |= more
        if source is not repository:
            source.keep(source.get("config.json").parent)
    return paths


def _is_inside(name: str) -> bool:
    """Whether a name stays within the repository."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "\\" not in name and "/" not in parts and ".." not in parts and name.isprintable()
