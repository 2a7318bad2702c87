"""Gives access to a model's files where they are: in the models folder, the Hub's cache, or on the Hub.

Each place has a folder with the small files (temporary for a repository on the Hub), the names of all files, and a
function that reads a range of a large file; weights are never downloaded. All requests share one deadline. Any thread
may call this; imports neither torch nor transformers. Every failure is a `LoadError` that names the model, says what to
do, and holds no path of this machine.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ..errors import FilesMissing, HubUnreachable, LoadError, public
from .gguf_parts import SUFFIX
from .hub_errors import hub_errors, is_absent

logger = logging.getLogger(__name__)

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "model_index.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
# Files that are asked for by name where the Hub does not list a repository's files.
_PROBED = ("model.safetensors", "pytorch_model.bin", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

_MAX_SMALL = 4 << 20  # bytes of a small file
_MAX_INDEX = 32 << 20  # bytes of an index: some list a hundred thousand tensors
_AT_ONCE = 8  # requests


class Deadline:
    """The time limit for all requests to the Hub together."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """The seconds that are left.

        Raises:
            TimeoutError: no time is left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the Hub did not answer in time")
        return left


@dataclass(frozen=True)
class Place:
    """The place of a model's files. `names` maps each file's name to its size in bytes, None where unknown.

    `counted` is the Hub's number of weights by their type in safetensors files, where the Hub tells it.
    """

    model_id: str
    source: Literal["local", "cache", "hub"]
    folder: Path
    names: Mapping[str, int | None]
    commit: str | None = None
    counted: Mapping[str, int] | None = None
    listed: bool = True  # whether `names` holds all files
    _hub: _Hub | None = field(default=None, repr=False)

    def read(self, name: str, start: int, length: int) -> bytes:
        """Reads `length` bytes of a file from `start`; fewer only at the file's end.

        Raises:
            OSError: the file cannot be read. The Hub client's errors pass through.
        """
        if self._hub is not None:
            return self._hub.read(name, start, length)
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def size(self, name: str) -> int | None:
        """The size of a file in bytes, None where unknown."""
        return self._hub.sizes.get(name) if self._hub is not None else self.names.get(name)


def folder_place(model_id: str, folder: Path, source: Literal["local", "cache"] = "local") -> Place:
    """The place of a model in a folder of this machine.

    Raises:
        FilesMissing: the folder cannot be read.
    """
    try:
        paths = [
            *folder.iterdir(),
            *folder.glob("additional_chat_templates/*.jinja"),
            *folder.glob("*/*.[gG][gG][uU][fF]"),
        ]
        names = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(paths)
            if not path.name.startswith(".") and path.is_file()
        }
    except OSError as error:
        raise FilesMissing(f"Model '{model_id}': its folder cannot be read ({error.strerror})") from error
    return Place(model_id, source, folder, names, folder.name if source == "cache" else None)


def cached_place(model_id: str, revision: str | None) -> Place | None:
    """The model's place in the Hub's cache, complete or not; None where not even its config is there."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "adapter_config.json"):
        path = try_to_load_from_cache(model_id, name, revision=revision)
        if isinstance(path, str):
            return folder_place(model_id, Path(path).parent, "cache")
    return None


def is_offline() -> bool:
    """Whether the Hub is switched off for the whole process."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def offline_error(model_id: str) -> LoadError:
    """The error for a model that is not on this machine, while the Hub is switched off."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return as_load_error(model_id, OfflineModeIsEnabled("offline"))


def as_load_error(model_id: str, error: BaseException) -> LoadError:
    """Translates an error of an inspection into one for the user."""
    try:
        with hub_errors(model_id):
            raise error
    except LoadError as known:
        return known


def check_gguf_name(model_id: str, name: str) -> str:
    """Returns `name` if it can be a GGUF file within a folder.

    Raises:
        FilesMissing: it cannot.
    """
    parts = PurePosixPath(name).parts
    inside = parts and not re.search(r"[\\:\0]", name) and "/" not in parts and ".." not in parts
    if not (inside and name.lower().endswith(SUFFIX)):
        raise FilesMissing(f"Model '{model_id}': '{public(ValueError(name))}' is no GGUF file of its repository")
    return name


@contextmanager
def hub_place(model_id: str, revision: str | None, seconds: float) -> Iterator[Place]:
    """The place of a repository on the Hub; its small files are in a temporary folder until the block ends.

    Raises:
        LoadError: the repository or its small files cannot be read.
    """
    with hub_errors(model_id, revision), tempfile.TemporaryDirectory(prefix="preflight-") as scratch:
        hub = _Hub(model_id, revision, Deadline(seconds))
        names = hub.describe()
        folder = Path(scratch)
        wanted = [name for name in names if name in SMALL_FILES or _TEMPLATE.fullmatch(name)]
        if "model.safetensors" in names and hub.listed:
            wanted = [name for name in wanted if not name.endswith(".index.json")]
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="preflight") as pool:
            contents = dict(zip(wanted, pool.map(hub.content, wanted), strict=True))
            probed = () if hub.listed else tuple(zip(_PROBED, pool.map(hub.exists, _PROBED), strict=True))
        for name, content in contents.items():
            if content is not None:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
        if not hub.listed:
            names = {name: None for name, content in contents.items() if content is not None}
            names |= {name: hub.sizes.get(name) for name, there in probed if there}
        yield Place(model_id, "hub", folder, names, hub.commit, hub.counted, hub.listed, hub)


class _Hub:
    """One repository at one commit, read with the Hub's own client, its token and its endpoint."""

    def __init__(self, model_id: str, revision: str | None, deadline: Deadline) -> None:
        self.model_id = model_id
        self.commit: str | None = None
        self.listed = False
        self.sizes: dict[str, int] = {}
        self.counted: Mapping[str, int] | None = None
        self._revision = revision
        self._deadline = deadline
        self._addresses: dict[str, str] = {}  # the URL to which the Hub redirects each file

    def describe(self) -> Mapping[str, int | None]:
        """The names of the files with their sizes; where the Hub does not list them, the names that may exist."""
        from huggingface_hub import HfApi

        try:
            patience = min(self._deadline.left(), 5)
            info = HfApi().model_info(self.model_id, revision=self._revision, timeout=patience, files_metadata=True)
        except Exception as error:
            if not is_absent(error):  # a plain 404 comes from small Hubs, which serve only files
                raise
        else:
            self.commit = info.sha
            siblings = info.siblings or []
            self.sizes = {each.rfilename: each.size for each in siblings if each.size is not None}
            self.listed = bool(siblings)
            summary = getattr(info, "safetensors", None)
            self.counted = dict(summary.parameters) if summary is not None and summary.parameters else None
            if self.listed:
                return {each.rfilename: each.size for each in siblings}
        return dict.fromkeys(SMALL_FILES)

    def content(self, name: str) -> bytes | None:
        """Reads a small file; None where it does not exist.

        Raises:
            LoadError: the file is too long for its name. The Hub client's errors pass through.
        """
        maximum = _MAX_INDEX if name.endswith(".index.json") else _MAX_SMALL
        try:
            content = self._get(name, None, maximum + 1)
        except Exception as error:
            if is_absent(error):
                return None
            raise
        if len(content) > maximum:
            raise LoadError(f"Model '{self.model_id}': {name} is longer than {maximum >> 20} MiB")
        return content

    def exists(self, name: str) -> bool:
        """Whether the file exists."""
        try:
            self._get(name, (0, 8), 8)
        except Exception as error:
            if is_absent(error):
                return False
            raise
        return True

    def read(self, name: str, start: int, length: int) -> bytes:
        """Reads a range of a file.

        Raises:
            FilesMissing: there is no such file. The Hub client's errors pass through.
        """
        try:
            return self._get(name, (start, length), length)
        except Exception as error:
            if not is_absent(error):
                raise
            raise FilesMissing(f"Model '{self.model_id}': there is no {name} among its files") from error

    def _get(self, name: str, span: tuple[int, int] | None, maximum: int) -> bytes:
        """Reads a file or a range of it; closes the connection after `maximum` bytes, even if more would follow."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.model_id, name, revision=self.commit or self._revision)
        headers = build_hf_headers()
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[0] + span[1] - 1}"
            if name in self._addresses:  # on another host, which must not get the token
                url, headers = self._addresses[name], {"Range": headers["Range"]}
        headers["Accept-Encoding"] = "identity"
        with get_session().stream("GET", url, headers=headers, timeout=min(self._deadline.left(), 5)) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            if span is not None:
                if response.status_code != 206 and span[0]:
                    raise HubUnreachable(f"Model '{self.model_id}': the Hub does not send pieces of {name}")
                total = response.headers.get("Content-Range", "").rpartition("/")[2]
                if total.isdigit():
                    self.sizes[name] = int(total)
                if response.history and response.url.host != response.history[0].url.host:
                    self._addresses[name] = str(response.url)
            if self.commit is None:
                seen: Any = [each.headers.get("X-Repo-Commit") for each in (*response.history, response)]
                self.commit = next((each for each in seen if each), None)
            announced = response.headers.get("Content-Length", "")
            ends = announced.isdigit() and int(announced) <= maximum  # then the connection can be used again
            content = bytearray()
            for block in response.iter_bytes(1 << 16):
                content += block
                self._deadline.left()
                if len(content) >= maximum and not ends:
                    break
        return bytes(content[:maximum])
