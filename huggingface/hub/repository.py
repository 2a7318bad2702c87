"""One repository, as the Hub shows it at one commit or as the Hub's cache has it: its files by name, and their sizes.

`transfer` downloads a file, and `huggingface_hub` then puts it in its place in its `cache`. One thread uses a
`Repository`. Must not know what a model consists of. Errors are the library's, except `Cancelled` and those that `get`
and `expect` list.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from ..errors import DiskFull, FilesMissing, LoadError, public
from ..inspection.hub_errors import Damaged, damaged, is_absent, is_passing, pause_after, unknown_revision
from ..progress import Progress
from . import cache
from .disk import Disk, DiskClaims, NoRoom
from .transfer import Count, Source, bar, transfer

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

logger = logging.getLogger(__name__)

_ATTEMPTS = 3  # attempts to fetch a file when the Hub fails temporarily; seconds between them: 1, 2
_HEADWAY = 1024**2  # bytes of a file since the last failure that reset the count of attempts
_FRESH = 60.0  # seconds for which the address of a file is reused, because it is signed for a limited time

_SHA256 = re.compile(r"[0-9a-f]{64}")
# What git allows in the name of a branch or tag, and does not lead out of the cache's folder of references.
_REVISION = re.compile(
    r"(?!.*(\.\.|//|/\.|@\{|\.lock(/|\Z)))[^\s./~^:?*\[\\\x00-\x1f\x7f][^\s~^:?*\[\\\x00-\x1f\x7f]{0,254}"
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file in the Hub's description of a repository; `etag` is its blob's name in the cache."""

    size: int | None
    etag: str | None
    sha256: str | None


class Repository:
    """One repository at one revision: a branch, a tag, a commit, or None for the default branch."""

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        *,
        offline: bool = False,
        progress: Progress | None = None,
        claims: DiskClaims | None = None,
    ) -> None:
        """`offline` sends no packet; `progress` counts every byte; disk space is claimed among `claims`.

        Raises:
            FilesMissing: no repository can have such a revision.
        """
        if revision is not None and (not _REVISION.fullmatch(revision) or revision.endswith("/")):
            raise unknown_revision(model_id, revision)
        self.model_id = model_id
        self.online = False
        self.commit: str | None = None  # if the Hub names it
        self._revision = revision
        self._offline = offline
        self._progress = progress or Progress()
        self._claims = claims or Disk().claims()
        self._key = ""
        self._listing: dict[str, _Entry] | None = None
        self._asked: dict[str, tuple[float, HfFileMetadata]] = {}  # with the time of each answer
        self._absent: set[str] = set()
        self._counts: dict[str, Count] = {}
        self._total: int | None = None
        self._failure: Exception | None = None

    def open(self, key: str) -> None:
        """Finds out whether the Hub can be asked, and for which commit. `key` is a file that must exist."""
        from huggingface_hub import HfApi, constants, get_hf_file_metadata

        self._key = key
        if self._offline or constants.HF_HUB_OFFLINE:
            return
        patience = constants.HF_HUB_ETAG_TIMEOUT
        try:
            info = HfApi().model_info(self.model_id, revision=self._revision, timeout=patience, files_metadata=True)
        except Exception as error:  # noqa: BLE001 - as in transformers: many small Hubs serve only files
            logger.debug("the Hub does not describe %s: %s", self.model_id, error)
        else:
            self._take(info)
        if self.commit is None:
            try:
                get_hf_file_metadata(self._url(key), timeout=patience)
            except Exception as error:  # noqa: BLE001 - the cache may suffice; if not, `fail` raises it
                self._failure = error
                logger.info("the Hub does not serve %s, so its cached files are used: %s", self.model_id, error)
                return
        self.online = True

    def _take(self, info: Any) -> None:
        """Reads the Hub's description; any part of it may be absent."""
        listing = {}
        for sibling in info.siblings or ():
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            size = sibling.lfs.size if sibling.lfs else sibling.size
            listing[sibling.rfilename] = _Entry(size, sha256 or sibling.blob_id, sha256)
        if info.sha is not None:
            self.commit = info.sha
        if self._key in listing:
            self._listing = listing

    def names(self) -> Iterable[str]:
        """The names of the repository's files, as far as the Hub lists them; otherwise empty."""
        if self._listing is not None:
            return self._listing
        return self._list() if self.online else ()

    def _list(self) -> Iterable[str]:
        """The repository's files, from the route that lists them; none where the Hub has no such route."""
        from huggingface_hub import HfApi

        try:
            names = frozenset(HfApi().list_repo_files(self.model_id, revision=self._at))
        except Exception:  # noqa: BLE001 - a small Hub
            return ()
        return names if self._key in names else ()

    def has(self, name: str) -> bool:
        """Whether the repository has the file, or the cache where the Hub cannot be asked."""
        if self._listing is not None:
            return name in self._listing
        return self._cached(name) is not None if not self.online else self._ask(name) is not None

    def expect(self, names: Iterable[str]) -> None:
        """Announces the files that will be fetched, as far as they exist, and their size to the progress.

        Raises:
            DiskFull: the disk lacks space for the missing bytes.
        """
        extents = self._extents(names)
        for name, (_, present) in extents.items():
            self._counts[name] = Count(self._progress, present)
        total, there = (sum(each) for each in zip(*extents.values(), strict=True)) if extents else (0, 0)
        self._total = total
        counts = [self._counts[name] for name in extents]
        self._claim(lambda: total - sum(count.there for count in counts))
        self._progress.expect(total, there)

    def claim(self, names: Iterable[str]) -> None:
        """Claims disk space for these files, as far as they exist, before they are announced by `expect`.

        Raises:
            DiskFull: the disk lacks space.
        """
        missing = sum(size - present for size, present in self._extents(names).values())
        self._claim(lambda: missing)

    def _extents(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        extents = {}
        for name in dict.fromkeys(names):
            size, present = self._extent(name)
            if size is not None:
                extents[name] = size, present
        return extents

    def _extent(self, name: str) -> tuple[int | None, int]:
        """A file's size, None where it does not exist or is unknown; and how many of its bytes are here."""
        entry = self._listing.get(name) if self._listing is not None else None
        cached = self._cached(name) if self.commit is not None or not self.online else None
        if not self.online:
            size = cached.stat().st_size if cached else None
            return size, size or 0
        size, etag = (entry.size, entry.etag) if entry else (None, None)
        if size is None and (self._listing is None or entry):
            metadata = self._ask(name)
            size, etag = (metadata.size, metadata.etag) if metadata else (None, None)
        if size is None:
            return None, 0
        if cached and cached.stat().st_size == size:
            return size, size
        return size, cache.present(self.model_id, etag, size)

    def _claim(self, missing: Callable[[], int]) -> None:
        try:
            self._claims.claim(self.model_id, cache.storage(self.model_id), missing)
        except NoRoom as error:
            others = f", {_text(error.promised)} of them for other downloads" if error.promised else ""
            raise DiskFull(
                f"Model '{self.model_id}': {_text(error.missing)} are still to be downloaded, and the disk of the "
                f"Hub's cache has {_text(error.free)} free{others}; make room there, or set HF_HOME to a place on "
                "another disk"
            ) from error

    def find(self, name: str) -> Path | None:
        """The file's path in the cache, fetched if it is missing; None where the repository has no such file."""
        if name in self._absent or (self._listing is not None and name not in self._listing):
            return None
        if not self.online:
            return self._cached(name)
        try:
            return self._fetch(name)
        except Exception as error:
            if is_absent(error):
                self._absent.add(name)
                return None
            raise

    def get(self, name: str, *, force: bool = False) -> Path:
        """The file's path in the cache; with `force` the file is downloaded again.

        Raises:
            FilesMissing: the repository has no such file.
            Otherwise the error that ended the download.
        """
        path = self._fetch(name, force=True) if force else self.find(name)
        if path is None:
            self.lack(name)
        return path

    def lack(self, name: str) -> NoReturn:
        """Raises the error for a file that the repository lacks, or that the cache lacks while the Hub is not asked."""
        if not self.online:
            self.fail()
        raise FilesMissing(
            f"Model '{self.model_id}': its repository on the Hub lacks {name}, so it cannot be loaded here"
        )

    def fail(self) -> NoReturn:
        """Raises the reason why the Hub cannot be asked."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        raise self._failure or OfflineModeIsEnabled("offline")

    def keep(self, folder: Path) -> None:
        """Records in the cache that the revision stands for the commit in `folder`, once all of it is there."""
        revision = self._revision or "main"
        if self.commit is not None and self.online and revision != self.commit:
            cache.keep_commit(self.model_id, revision, folder.name)

    # One file --------------------------------------------------------------------------------------------------------

    def _fetch(self, name: str, *, force: bool = False) -> Path:
        """Brings the file into the cache; tries again after temporary failures.

        Raises: an error for which `is_absent` is true, if the repository has no such file.
        """
        cached = self._cached(name)
        entry = self._listing.get(name) if self._listing is not None else None
        if cached is not None and self.commit is not None and not force:
            if entry is None or entry.sha256 is None or cached.stat().st_size == entry.size:
                return cached  # a commit's files never change
            force = True  # the file was cut short
        self._progress.at(name)
        try:
            return self._patiently(name, lambda: self._download(name, force=force))
        except Damaged as error:
            raise damaged(self.model_id, name, str(error)) from error

    def _download(self, name: str, *, force: bool) -> Path:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.utils import is_package_available

        metadata = self._metadata(name)
        self._asked.pop(name, None)  # if the download fails, the address may be the reason
        count, path = self._count(name, metadata.size), self._cached(name)
        blob = cache.blob(self.model_id, metadata.etag)
        if metadata.xet_file_data is not None and (metadata.size or 0) > constants.MAX_HTTP_DOWNLOAD_SIZE:
            # The Hub serves such large files only in parts, which `hf_xet` joins; such a download cannot be resumed.
            if constants.HF_HUB_DISABLE_XET or not is_package_available("hf_xet"):
                raise LoadError(
                    f"Model '{self.model_id}': {name} is so large that the Hub serves it only to the package hf_xet; "
                    "install it (pip install hf_xet)"
                )
            hub_bar: Any = bar(count)
            path = Path(
                hf_hub_download(self.model_id, name, revision=self._at, force_download=force, tqdm_class=hub_bar)
            )
        else:
            if blob is not None and metadata.commit_hash is not None:
                transfer(self._source(name, metadata), blob, cache.lock(blob), count, force=force)
                if force and path is not None:
                    path.unlink(missing_ok=True)  # without symbolic links, this is the damaged file itself
            path = Path(hf_hub_download(self.model_id, name, revision=self._at))
        count.set(path.stat().st_size)
        return path

    def _source(self, name: str, metadata: HfFileMetadata) -> Source:
        """The file's address and headers; the token goes only to the Hub, as in `huggingface_hub`'s own downloads."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers

        url, headers = self._url(name), build_hf_headers()
        if metadata.xet_file_data is None and metadata.location != url:
            hubs = {urlsplit(each)[:2] for each in (url, constants.HUGGINGFACE_CO_URL_HOME)}
            if urlsplit(metadata.location)[:2] not in hubs:
                headers.pop("authorization", None)
            url = metadata.location
        entry = self._listing.get(name) if self._listing is not None else None
        sha256 = entry.sha256 if entry else None
        if sha256 is None and metadata.etag is not None and _SHA256.fullmatch(metadata.etag):
            sha256 = metadata.etag
        return Source(url, headers, metadata.size, sha256)

    def _ask(self, name: str) -> HfFileMetadata | None:
        """The Hub's metadata of the file; None where there is no such file."""
        if name in self._absent:
            return None
        try:
            return self._patiently(name, lambda: self._metadata(name))
        except Exception as error:
            if is_absent(error):
                self._absent.add(name)
                return None
            raise

    def _metadata(self, name: str) -> HfFileMetadata:
        """The Hub's metadata of the file, with a short timeout: `hf_hub_download` itself would try for minutes."""
        from huggingface_hub import constants, get_hf_file_metadata

        asked, metadata = self._asked.get(name, (0.0, None))
        if metadata is None or time.monotonic() - asked > _FRESH:
            metadata = get_hf_file_metadata(self._url(name), timeout=constants.HF_HUB_ETAG_TIMEOUT)
            self._asked[name] = time.monotonic(), metadata
        return metadata

    def _patiently(self, name: str, work: Callable[[], T]) -> T:
        """Does `work` on a file; repeats it after temporary failures while that makes progress.

        Raises:
            Cancelled: the download is cancelled.
            Otherwise the last attempt's error.
        """
        attempt, reached = 0, 0
        while True:
            self._progress.check()
            try:
                return work()
            except Exception as error:
                there = self._counts[name].there if name in self._counts else 0
                attempt = 1 if there >= reached + _HEADWAY else attempt + 1
                reached = there
                if attempt >= _ATTEMPTS or not is_passing(error):
                    raise
                logger.warning("%s of %s could not be fetched, trying again: %s", name, self.model_id, public(error))
                self._progress.cancellation.wait(pause_after(error, attempt))

    def _count(self, name: str, size: int | None) -> Count:
        """The count of the file's bytes; the size of a file that was not announced is added to the total."""
        if name not in self._counts:
            self._counts[name] = Count(self._progress)
            if self._total is not None and size is not None:
                self._total += size
                self._progress.expect(self._total, sum(count.there for count in self._counts.values()))
        return self._counts[name]

    @property
    def _at(self) -> str | None:
        """The revision to request: the commit, once it is known."""
        return self.commit or self._revision

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.model_id, name, revision=self._at)

    def _cached(self, name: str) -> Path | None:
        return cache.find(self.model_id, name, self._at)


def _text(size: int) -> str:
    """Formats a number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
