"""From a model's id to a folder with its files: the models folder first, then the Hub and its cache.

The Hub is `huggingface_hub`'s: its cache, token, offline switch and `HF_ENDPOINT`. Any thread may call this; nothing
here imports torch or reads weights beyond their headers. Every failure is a `LoadError` that names the model, says what
to do, and holds no path of this machine.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import (
    FilesCorrupt,
    FilesGated,
    FilesMissing,
    FilesRefused,
    HubUnreachable,
    LoadError,
)

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ABSOLUTE_PATH = re.compile(r"(?<![\w:/.])(?:[A-Za-z]:)?[/\\](?:[^\s'\"/\\]+[/\\])+")


def local_folder(models_dir: Path, model_id: str) -> Path | None:
    """The model's folder in the models folder, or None where there is none and the Hub is to be asked.

    `model_id` has been checked as a Hub id. A folder without any file (`org` for the id `org`) is not a model's.
    """
    folder = models_dir / model_id
    if folder.is_dir() and any(entry.is_file() for entry in folder.iterdir()):
        return folder
    return None


def fetch(model_id: str, *, allow_pickle: bool) -> Path:
    """Bring config and weights from the Hub into its cache, as far as they are not there; returns the cached folder.

    Raises:
        FilesMissing, FilesGated, HubUnreachable, FilesRefused, LoadError: as their names say.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    absent: list[EntryNotFoundError] = []

    def find(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(model_id, name))
        except EntryNotFoundError as error:
            absent.append(error)
            return None

    with hub_errors(model_id):
        for _ in range(2):  # once more if the repository changed in between
            folder = Path(hf_hub_download(model_id, "config.json")).parent
            find("generation_config.json")
            absent.clear()
            weights = next((path for name in _SAFETENSORS if (path := find(name))), None)
            if weights is None and allow_pickle:
                weights = next((path for name in _PICKLES if (path := find(name))), None)
            if weights is None:
                unknown = [error for error in absent if isinstance(error, LocalEntryNotFoundError)]
                if unknown:  # not in the cache, and nobody to ask
                    raise unknown[0]
                raise _no_weights(model_id)
            names = _shards(model_id, weights) if weights.suffix == ".json" else []
            parts = [Path(hf_hub_download(model_id, name)) for name in names]
            if all(path.parent == folder for path in [weights, *parts]):
                return folder
    raise HubUnreachable(f"Model '{model_id}' changed on the Hub while it was downloaded; try again")


def check(model_id: str, folder: Path, *, allow_pickle: bool) -> None:
    """See that `folder` holds a config and whole weights, reading no more than headers.

    Raises:
        FilesMissing: no config, or no weights.
        FilesRefused: the only weights are pickles, and `allow_pickle` is off.
        FilesCorrupt: a part is missing, damaged or cut short.
    """
    if not (folder / "config.json").is_file():
        raise FilesMissing(f"Model '{model_id}': its folder holds no config.json; copy the complete model there")
    weights = next((path for name in _SAFETENSORS if (path := folder / name).is_file()), None)
    if weights is None:
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        if not pickles:
            raise FilesMissing(f"Model '{model_id}': its folder holds no weights (model.safetensors)")
        if not allow_pickle:
            raise _no_weights(model_id)
        return
    names = _shards(model_id, weights) if weights.suffix == ".json" else [weights.name]
    for name in names:
        _check_safetensors(model_id, folder / name)


def _check_safetensors(model_id: str, path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FilesCorrupt(f"Model '{model_id}': the part {path.name} of its weights is missing; download it again")
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise FilesCorrupt(
            f"Model '{model_id}': {path.name} is damaged or incomplete (or only a Git LFS pointer); download it again"
        ) from error


def _shards(model_id: str, index: Path) -> list[str]:
    """The file names that an index of weights lists, each once."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FilesCorrupt(f"Model '{model_id}': {index.name} is damaged; download it again") from error
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) for name in names):
        raise FilesCorrupt(f"Model '{model_id}': {index.name} names files outside the model's folder")
    return names


def _no_weights(model_id: str) -> FilesRefused:
    return FilesRefused(
        f"Model '{model_id}' has no safetensors weights. Pickle weights (pytorch_model.bin) can run any code when they "
        "are loaded; if it has them and you trust them, set LOCAL_LLM_ALLOW_PICKLE=true"
    )


@contextmanager
def hub_errors(model_id: str) -> Iterator[None]:
    """Turn whatever a call to the Hub raises within the block into a `LoadError` for the user."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        raise _hub_error(model_id, error) from error


def _hub_error(model_id: str, error: BaseException) -> LoadError:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    causes = list(_chain(error))

    def caused_by(*kinds: type[BaseException]) -> BaseException | None:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if caused_by(GatedRepoError):
        return FilesGated(
            f"Model '{model_id}' is gated on the Hub: accept its terms on its page there, then set HF_TOKEN to a token "
            "of that account"
        )
    if caused_by(RepositoryNotFoundError):
        return FilesMissing(
            f"Model '{model_id}' has no folder in the models folder and no repository on the Hub that this server may "
            "read. Check the id; if the repository is private, set HF_TOKEN"
        )
    if missing := caused_by(RemoteEntryNotFoundError):
        name = getattr(getattr(missing, "response", None), "url", None)
        wanted = str(name).rsplit("/", 1)[-1] if name else "a needed file"
        return FilesMissing(
            f"Model '{model_id}': its repository on the Hub lacks {wanted}, so it cannot be loaded here"
        )
    full = next((cause for cause in causes if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)), None)
    if full is not None:
        return LoadError(f"Model '{model_id}' could not be downloaded: the disk is full")
    if constants.HF_HUB_OFFLINE or caused_by(OfflineModeIsEnabled):
        return HubUnreachable(
            f"Model '{model_id}' is not (completely) on this machine, and the Hub is switched off (HF_HUB_OFFLINE). "
            "Put its files into the models folder, or allow the download"
        )
    response = getattr(caused_by(HfHubHTTPError), "response", None)
    if response is not None and response.status_code in (401, 403):
        return FilesGated(f"Model '{model_id}': the Hub refuses access ({response.status_code}); set HF_TOKEN")
    if response is not None:
        return HubUnreachable(
            f"Model '{model_id}' could not be downloaded: the Hub answered {response.status_code}; try again later"
        )
    if caused_by(LocalEntryNotFoundError, ConnectionError, TimeoutError) or any(
        type(cause).__module__.startswith(("httpx", "httpcore")) for cause in causes
    ):
        return HubUnreachable(
            f"Model '{model_id}' is not (completely) on this machine, and the Hub cannot be reached. "
            "Check the connection, or put its files into the models folder"
        )
    return LoadError(f"Model '{model_id}' could not be downloaded: {public(error)}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def public(error: BaseException) -> str:
    """An error's first line, fit for a client: file names keep their last part only."""
    lines = str(error).strip().splitlines()
    return _ABSOLUTE_PATH.sub("", lines[0])[:300] if lines else type(error).__name__
