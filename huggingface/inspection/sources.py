"""Where a model's files are looked at: the models folder, the Hub's cache, or the Hub, by ranges of bytes.

Whatever the place, there is a folder with the small files (of a repository on the Hub a temporary one), the names of
all, and a way to read a piece of a large one; weights are never fetched. Every request has a share of one deadline.
Any thread may call this; imports neither torch nor transformers. Every failure is a `LoadError` that names the model,
says what to do, and holds no path of this machine.
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
from ..hub_errors import hub_errors, is_absent

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
# Asked for by name where the Hub does not list its files, to know whether they are there.
_PROBED = ("model.safetensors", "pytorch_model.bin", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

_MOST_SMALL = 4 << 20  # bytes of a small file
_MOST_INDEX = 32 << 20  # bytes of an index: some list a hundred thousand tensors
_AT_ONCE = 8  # requests


class Deadline:
    """Until when the Hub may be asked."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds.

        Raises:
            TimeoutError: there are none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the Hub did not answer in time")
        return left


@dataclass(frozen=True)
class Place:
    """Where a model's files are. `names` are those of its files with their bytes, as far as they are known.

    `counted` is how many values the weights have by the type that a safetensors file names, where the Hub says so.
    """

    model_id: str
    source: Literal["local", "cache", "hub"]
    folder: Path
    names: Mapping[str, int | None]
    commit: str | None = None
    counted: Mapping[str, int] | None = None
    listed: bool = True  # whether `names` are all
    _hub: _Hub | None = field(default=None, repr=False)

    def read(self, name: str, start: int, length: int) -> bytes:
        """The bytes of a file from `start` on; fewer only where it ends.

        Raises:
            OSError, and whatever tells why the Hub does not give it.
        """
        if self._hub is not None:
            return self._hub.read(name, start, length)
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def size(self, name: str) -> int | None:
        """The bytes of a file, if it is known."""
        return self._hub.sizes.get(name) if self._hub is not None else self.names.get(name)


def folder_place(model_id: str, folder: Path, source: Literal["local", "cache"] = "local") -> Place:
    """A folder of this machine.

    Raises:
        FilesMissing: it cannot be read.
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
    """What the Hub's cache has of the model, whole or not; None where it has not even its config."""
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
    """Why a model that is not here cannot be looked at."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return as_load_error(model_id, OfflineModeIsEnabled("offline"))


def as_load_error(model_id: str, error: BaseException) -> LoadError:
    """What an error in looking at a model means to the user."""
    try:
        with hub_errors(model_id):
            raise error
    except LoadError as known:
        return known


def check_gguf_name(model_id: str, name: str) -> str:
    """`name`, if it is that of a GGUF file within a folder.

    Raises:
        FilesMissing: it is not.
    """
    parts = PurePosixPath(name).parts
    inside = parts and not re.search(r"[\\:\0]", name) and "/" not in parts and ".." not in parts
    if not (inside and name.lower().endswith(".gguf")):
        raise FilesMissing(f"Model '{model_id}': '{public(ValueError(name))}' is no GGUF file of its repository")
    return name


@contextmanager
def hub_place(model_id: str, revision: str | None, seconds: float) -> Iterator[Place]:
    """A repository on the Hub; its small files are in a temporary folder until the block ends.

    Raises:
        LoadError: it cannot be looked at, or the small files cannot.
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
    """One repository at one commit, asked by the Hub's own client, so with its token and its endpoint."""

    def __init__(self, model_id: str, revision: str | None, deadline: Deadline) -> None:
        self.model_id = model_id
        self.commit: str | None = None
        self.listed = False
        self.sizes: dict[str, int] = {}
        self.counted: Mapping[str, int] | None = None
        self._revision = revision
        self._deadline = deadline
        self._addresses: dict[str, str] = {}  # where a file's bytes really lie, by its name

    def describe(self) -> Mapping[str, int | None]:
        """The names of the files, or those that may be there where the Hub does not list them."""
        from huggingface_hub import HfApi

        try:
            patience = min(self._deadline.left(), 5)
            info = HfApi().model_info(self.model_id, revision=self._revision, timeout=patience, files_metadata=True)
        except Exception as error:
            if not is_absent(error):  # a plain 404 is what small Hubs say, which serve files and nothing else
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
        """A small file, or None where there is none.

        Raises:
            LoadError: it is too long to be what it is called. Whatever tells why it cannot be had.
        """
        most = _MOST_INDEX if name.endswith(".index.json") else _MOST_SMALL
        try:
            content = self._get(name, None, most + 1)
        except Exception as error:
            if is_absent(error):
                return None
            raise
        if len(content) > most:
            raise LoadError(f"Model '{self.model_id}': {name} is too long to be looked at")
        return content

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        try:
            self._get(name, (0, 8), 8)
        except Exception as error:
            if is_absent(error):
                return False
            raise
        return True

    def read(self, name: str, start: int, length: int) -> bytes:
        """A piece of a file."""
        return self._get(name, (start, length), length)

    def _get(self, name: str, span: tuple[int, int] | None, most: int) -> bytes:
        """The file or a piece of it; the connection is closed after `most` bytes, whatever else would come."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.model_id, name, revision=self.commit or self._revision)
        headers = build_hf_headers()
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[0] + span[1] - 1}"
            if name in self._addresses:  # on another host: the token is not for it
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
            ends = announced.isdigit() and int(announced) <= most  # by itself, and the connection can be used again
            content = bytearray()
            for block in response.iter_bytes(1 << 16):
                content += block
                self._deadline.left()
                if len(content) >= most and not ends:
                    break
        return bytes(content[:most])
