"""From a Hub repository to a folder of its cache that holds all a model needs; the only code to use the network.

The Hub is `huggingface_hub`'s: its cache, token, offline switch and `HF_ENDPOINT`. Any thread may call this; it imports
neither torch nor transformers. A repository is taken at one commit; what an interrupted download left out is fetched
the next time, and while the Hub cannot be asked, what is complete in the cache is used.
Every failure is a `LoadError` that names the model, says what to do, and holds no path of this machine.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from . import files
from .errors import FilesMissing, HubUnreachable
from .hub_errors import damaged, hub_errors, is_absent, is_passing

logger = logging.getLogger(__name__)

_ATTEMPTS = 3  # of one file, where the Hub stumbles; seconds between them: 1, 2

# What describes a model and its tokenizer, beside the weights. Where the Hub tells which files there are, those that
# fit a pattern are fetched; where it does not, these names are tried: all that transformers' tokenizers read.
_PATTERNS = ("*.json", "*.txt", "*.model", "*.model.v*", "*.spm", "*.jinja", "*.tiktoken", "*.codes", "*.tokenizer")
_UNWANTED = ("*.index.json", "trainer_state.json", "all_results.json", "*_results.json", "README.txt", "LICENSE.txt")
_TEMPLATES = "additional_chat_templates/"
# What the modules of a sentence-transformers model lie in, beside its transformer: `1_Pooling/config.json`.
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


def fetch(model_id: str, *, allow_pickle: bool, trusted: frozenset[str] = frozenset()) -> Path:
    """Bring a repository's files into the Hub's cache, as far as they are not there; returns the cached folder.

    Weights come last: where they are complete, so is the rest. The Python files of the repository are brought only for
    an id among `trusted`.

    Raises:
        FilesMissing, FilesGated, HubUnreachable, FilesRefused, FilesCorrupt, LoadError: as their names say.
    """
    with hub_errors(model_id):
        for _ in range(2):  # once more if the repository changed in between
            repository = _Repository(model_id)
            repository.open()
            paths = [repository.get("config.json")]
            folder = paths[0].parent
            paths += [path for name in repository.small_files() if (path := repository.find(name))]
            if model_id in trusted:
                paths += _code(repository, folder, trusted)
            paths += _weights(repository, folder, allow_pickle)
            if all(path.is_relative_to(folder) for path in paths):
                repository.keep_commit(folder)
                return folder
    raise HubUnreachable(f"Model '{model_id}' changed on the Hub while it was downloaded; try again")


def _weights(repository: _Repository, folder: Path, allow_pickle: bool) -> list[Path]:
    model_id = repository.model_id
    names = files.weight_names(files.read_config(model_id, folder), model_id, allow_pickle=allow_pickle)
    first = next((path for name in names if (path := repository.find(name))), None)
    if first is None:
        if any(repository.find(name, ask_only=True) for name in files.PICKLES):
            raise files.only_pickles(model_id)
        if not repository.online:
            repository.fail()
        raise FilesMissing(
            f"Model '{model_id}': its repository on the Hub holds no weights of a kind known here (model.safetensors)"
        )
    paths = [first]
    if first.suffix == ".json":
        paths += [repository.get(name) for name in files.shards(model_id, folder, first.name)]
    for path in paths:
        if path.suffix == ".safetensors" and repository.online and not files.is_whole(path):
            repository.get(path.relative_to(folder).as_posix(), force=True)
    return paths


def _code(repository: _Repository, folder: Path, trusted: frozenset[str]) -> list[Path]:
    """Fetch the modules that the model's `auto_map` names and, one from another, those that they import."""
    paths = []
    for owner, names in files.code_modules(folder, repository.model_id).items():
        source = repository
        if owner != repository.model_id:
            if owner not in trusted:
                continue  # the load will refuse it
            source = _Repository(owner)
            source.open()
        pending, seen = list(names), set(names)
        while pending:
            path = source.get(f"{pending.pop()}.py")
            if owner == repository.model_id:
                paths.append(path)
            more = set(files.relative_imports(path.read_text(encoding="utf-8"))) - seen
            pending += more
            seen |= more
        if source is not repository:
            source.keep_commit(source.get("config.json").parent)
    return paths


class _Repository:
    """One repository, as the Hub shows it or as the cache has it."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.online = False
        self._revision: str | None = None  # a commit, or None for the default branch
        self._listing: frozenset[str] | None = None
        self._checksums: dict[str, str] = {}
        self._failure: Exception | None = None

    def open(self) -> None:
        """Find out whether the Hub can be asked, and for which commit."""
        from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url

        if constants.HF_HUB_OFFLINE:
            return
        patience = constants.HF_HUB_ETAG_TIMEOUT
        try:
            info = HfApi().model_info(self.model_id, timeout=patience, files_metadata=True)
        except Exception as error:  # noqa: BLE001 - as in transformers: many small Hubs serve files and nothing else
            logger.debug("the Hub does not describe %s: %s", self.model_id, error)
        else:
            self._take(info)
        if self._revision is None:
            try:
                get_hf_file_metadata(hf_hub_url(self.model_id, "config.json"), timeout=patience)
            except Exception as error:  # noqa: BLE001 - the cache may do; if not, `fail` raises it
                self._failure = error
                logger.info("the Hub does not give %s, so its cached files are used: %s", self.model_id, error)
                return
        self.online = True

    def _take(self, info: Any) -> None:
        """Learn from the Hub's description; any part of it may be absent."""
        siblings = info.siblings or []
        names = frozenset(sibling.rfilename for sibling in siblings)
        if info.sha is not None:
            self._revision = info.sha
        if "config.json" in names:
            self._listing = names
        self._checksums = {
            sibling.rfilename: sibling.lfs.sha256 for sibling in siblings if sibling.lfs and sibling.lfs.sha256
        }

    def small_files(self) -> Iterable[str]:
        """The names of the files beside config and weights that may matter; not all of them need to exist."""
        if self._listing is not None:
            listing = self._listing
        elif self.online:
            listing = self._list()
        else:
            return _NAMES
        if not listing:
            return _NAMES
        return sorted(
            name
            for name in listing
            if (name.startswith(_TEMPLATES) and name.endswith(".jinja"))
            or ("modules.json" in listing and _MODULE_FILE.fullmatch(name))
            or (
                "/" not in name
                and any(fnmatch.fnmatchcase(name, pattern) for pattern in _PATTERNS)
                and not any(fnmatch.fnmatchcase(name, pattern) for pattern in _UNWANTED)
            )
        )

    def _list(self) -> frozenset[str]:
        """The repository's files, from the route that lists them; nothing where the Hub has none."""
        from huggingface_hub import HfApi

        try:
            names = frozenset(HfApi().list_repo_files(self.model_id, revision=self._revision))
        except Exception:  # noqa: BLE001 - a small Hub
            return frozenset()
        return names if "config.json" in names else frozenset()

    def find(self, name: str, *, ask_only: bool = False) -> Path | None:
        """The file in the cache, fetched if it was not there, or None where the repository has no such file.

        With `ask_only` it is not fetched; the path then only tells that there is one.
        """
        if self._listing is not None and name not in self._listing:
            return None
        if not self.online:
            return self._cached(name)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return Path(name) if ask_only and self._exists(name) else self._download(name)
            except Exception as error:
                if is_absent(error):
                    return None
                if attempt == _ATTEMPTS or not is_passing(error):
                    raise
                logger.warning("%s of %s was not had, trying again: %s", name, self.model_id, error)
                time.sleep(attempt)
        raise AssertionError  # the loop returns or raises

    def get(self, name: str, *, force: bool = False) -> Path:
        """The file in the cache; with `force` fetched anew.

        Raises: whatever tells why it cannot be had.
        """
        if force:
            return self._download(name, force=True)
        path = self.find(name)
        if path is None:
            if not self.online:
                self.fail()
            raise FilesMissing(
                f"Model '{self.model_id}': its repository on the Hub lacks {name}, so it cannot be loaded here"
            )
        return path

    def fail(self) -> NoReturn:
        """Raise why the Hub cannot be asked."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        raise self._failure or OfflineModeIsEnabled("offline")

    def keep_commit(self, folder: Path) -> None:
        """Note in the cache that this commit is the repository's present one, now that all of it is there.

        So that the next load without a Hub finds it, and not one that was begun later and never completed.
        """
        if self._revision is None or not self.online:
            return
        reference = folder.parent.parent / "refs" / "main"
        try:
            if not reference.is_file() or reference.read_text(encoding="utf-8") != folder.name:
                reference.parent.mkdir(parents=True, exist_ok=True)
                beside = reference.with_name(f"main.{time.monotonic_ns()}")
                beside.write_text(folder.name, encoding="utf-8")
                beside.replace(reference)
        except OSError as error:  # a cache that others keep, and that is read only here
            logger.debug("the commit of %s could not be noted: %s", self.model_id, error)

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.model_id, name, revision=self._revision)
        return Path(path) if isinstance(path, str) else None

    def _exists(self, name: str) -> bool:
        """True; raises what `is_absent` knows where there is no such file.

        Asked before each download with a short patience: `hf_hub_download` itself would try for minutes.
        """
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.model_id, name, revision=self._revision)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return True

    def _download(self, name: str, *, force: bool = False) -> Path:
        from huggingface_hub import hf_hub_download

        cached = self._cached(name)
        if cached is not None and self._revision is not None and not force:
            return cached  # at a commit: it cannot have changed
        self._exists(name)
        path = Path(hf_hub_download(self.model_id, name, revision=self._revision, force_download=force))
        expected = self._checksums.get(name)
        if (cached is None or force) and expected is not None and _sha256(path) != expected:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise damaged(self.model_id, name)
        return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
