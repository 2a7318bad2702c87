"""Downloads one file from the Hub into a blob of its cache, continuing where an earlier attempt stopped.

The partial file lies beside the blob under a name of its own, which no reader of the cache takes for a model's file. It
survives a cancelled download, a lost connection and a killed process, and becomes the blob when it is complete and has
the checksum that the Hub announces. Any thread and process may call this: the cache's own lock admits one writer at a
time. Must not know models or revisions, or what is tried again.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..inspection.hub_errors import Damaged, Stalled
from ..progress import Progress

if TYPE_CHECKING:
    from httpx2 import Response

PARTIAL = ".local-llm.part"

_STRIDE = 1024**2  # bytes between two checks while a file is read, and at most between two reports of progress
_TELL = 0.1  # seconds, at most, between two reports of progress
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Source:
    """Where to download a file, with which headers, and its size and checksum as far as the Hub announces them."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    size: int | None
    sha256: str | None


class Count:
    """Counts the bytes of one file that have arrived, and reports them to the progress of all files."""

    def __init__(self, progress: Progress, there: int = 0) -> None:
        """`there` are bytes that the progress counts already."""
        self.progress = progress
        self.there = there

    def set(self, there: int) -> None:
        """Sets how many bytes have arrived.

        Raises:
            Cancelled: the download is cancelled.
        """
        more, self.there = there - self.there, there
        if more:
            self.progress.advance(more)
        else:
            self.progress.check()


def transfer(source: Source, blob: Path, lock: Path, count: Count, *, force: bool = False) -> None:
    """Downloads the file to `blob`, if it is missing; with `force` from the first byte, replacing an existing file.

    Raises:
        Cancelled: the download is cancelled.
        Damaged, Stalled: see `hub_errors`.
        OSError and the errors of `huggingface_hub` and its HTTP library: the transfer broke off; the partial file
            stays.
    """
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _held(lock, blob, count):
        if blob.exists() and not force:
            count.set(blob.stat().st_size)
            return
        with _Partial(blob, count.progress) as partial:
            if force or (source.size is not None and partial.size > source.size):
                partial.restart()
            resumed = partial.size > 0
            count.set(partial.size)
            if source.size is None or partial.size < source.size:
                _pour(source, partial, count)
            if source.sha256 is not None and partial.sha256 != source.sha256:
                partial.discard()
                raise Damaged("its checksum differs from the Hub's", resumed=resumed)
            partial.become(blob)


def partial_of(blob: Path) -> Path:
    """The path of a blob's first bytes until it is complete."""
    return blob.with_name(f"{blob.name}{PARTIAL}")


def bar(count: Count) -> type:
    """A class that `hf_xet` uses in place of tqdm's bar; it adds the bytes to `count`."""

    class Bar:
        total: int | None = None

        def __init__(self, *_: object, **__: object) -> None:
            self.n = 0

        def update(self, more: int) -> None:
            count.set(count.there + more)

        def update_transfer(self, more: int) -> None:
            """Does nothing: received bytes count once they are written to the file."""

        def set_postfix_str(self, *_: object, **__: object) -> None:
            """Draws nothing."""

        set_transfer_postfix_str = refresh = close = set_postfix_str

    return Bar


def _pour(source: Source, partial: _Partial, count: Count) -> None:
    """Requests the missing bytes, and writes them as they arrive."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    # A compressed file would differ from the announced size, and could not be resumed at a byte.
    headers = {**source.headers, "Accept-Encoding": "identity"}
    if partial.size:
        headers["Range"] = f"bytes={partial.size}-"
    patience = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        with get_session().stream("GET", source.url, headers=headers, timeout=patience) as response:
            if response.status_code == 416 and partial.size:
                partial.restart()
                raise ConnectionError("the Hub's file is shorter than the partial file here")
            hf_raise_for_status(response)
            _align(response, source, partial)
            count.set(partial.size)
            told = time.monotonic()
            for chunk in response.iter_bytes():
                partial.write(chunk)
                now = time.monotonic()
                if partial.size - count.there >= _STRIDE or now - told >= _TELL:
                    count.set(partial.size)
                    told = now
                else:
                    count.progress.check()
    except httpx2.TimeoutException as error:
        raise Stalled(f"no bytes came for {patience} s") from error
    finally:
        _settle(count, partial.size)
    if source.size is not None and partial.size != source.size:
        if partial.size < source.size:
            raise ConnectionError("the file ended early")
        partial.discard()
        raise Damaged(f"it has more than the {source.size} bytes that the Hub announces", resumed=False)


def _settle(count: Count, there: int) -> None:
    """Reports the last bytes, whatever ended the transfer, and raises nothing that would hide its error."""
    more, count.there = there - count.there, there
    if more and not count.progress.cancellation.cancelled:
        count.progress.advance(more)


def _align(response: Response, source: Source, partial: _Partial) -> None:
    """Checks that the response is the announced file, from the partial one's end; else restarts or refuses it."""
    resumed = partial.size > 0
    span = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code != 206:
        if resumed:  # the server ignored the range
            partial.restart()
    elif span is None or int(span[1]) != partial.size:
        partial.restart()
        raise ConnectionError("the Hub sent another part of the file than was requested")
    announced = None
    if response.headers.get("Content-Encoding", "identity").lower() == "identity":
        announced = (None if span[2] == "*" else span[2]) if span else response.headers.get("Content-Length")
    if announced is not None and source.size is not None and int(announced) != source.size:
        partial.discard()
        raise Damaged(f"it has {announced} bytes, but the Hub announces {source.size}", resumed=False)


class _Partial:
    """The first bytes of a blob, on disk and in the checksum. One thread uses it at a time, under the lock."""

    def __init__(self, blob: Path, progress: Progress) -> None:
        self.path = partial_of(blob)
        self._progress = progress
        self._file: IO[bytes] = self.path.open("ab+", buffering=0)
        self._digest = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> _Partial:
        try:
            self._file.seek(0)
            while chunk := self._file.read(_STRIDE):
                self._progress.check()
                self._digest.update(chunk)
                self.size += len(chunk)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def become(self, blob: Path) -> None:
        """Becomes the blob, which is complete."""
        self._file.close()
        self.path.replace(blob)

    @property
    def sha256(self) -> str:
        """The checksum of the bytes that are here."""
        return self._digest.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Appends a chunk."""
        rest = memoryview(chunk)
        while rest:  # an unbuffered file may write only a part
            written = self._file.write(rest)
            self._digest.update(rest[:written])
            self.size += written
            rest = rest[written:]

    def restart(self) -> None:
        """Drops the bytes that are here."""
        self._file.truncate(0)
        self._digest = hashlib.sha256()
        self.size = 0

    def discard(self) -> None:
        """Deletes the partial file."""
        self.restart()
        self._file.close()
        self.path.unlink(missing_ok=True)


@contextmanager
def _held(lock: Path, blob: Path, count: Count) -> Iterator[None]:
    """Takes the blob's lock, which `huggingface_hub` takes too; while another holder downloads, its progress is
    reported."""
    from filelock import FileLock, Timeout

    holder = FileLock(lock, mode=0o664)  # as huggingface_hub does: a group may share a cache
    while True:
        try:
            holder.acquire(timeout=0.2)
            break
        except Timeout:
            partial = partial_of(blob)
            count.set(partial.stat().st_size if partial.exists() else 0)
    try:
        yield
    finally:
        holder.release()
