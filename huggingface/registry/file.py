"""One file that several processes share and replace whole: its lock, versions, durable writes, and setting it aside.

This file owns the path and every system call on it, and does not know what the bytes mean. Any thread may call it, and
any number of processes may share the file. A version that was read or written is held open, so that the system cannot
give its inode number to another version while signatures are compared.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

from filelock import FileLock, Timeout

from ..cancellation import before_wait
from ..errors import RegistryBusy, RegistryError, StorageFull
from ..types import timestamp

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.005
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class Signature(NamedTuple):
    """Distinguishes versions of the file without reading them; `mtime` is in nanoseconds."""

    device: int
    inode: int
    mtime: int
    size: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        """The signature within the result of `stat` or `fstat`."""
        return cls(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


class Version:
    """One version of the file, held open as long as this object lives."""

    __slots__ = ("_descriptor", "signature")

    def __init__(self, descriptor: int) -> None:
        """Takes over the open `descriptor`, and closes it when this object is deleted."""
        self._descriptor = descriptor
        self.signature = Signature.of(os.fstat(descriptor))

    def __del__(self) -> None:
        os.close(self._descriptor)


class RegistryFile:
    """The file at `path`, or the file that a symbolic link there points to.

    Error messages carry the file's name only, since they may reach a client; the log has the whole path.
    """

    def __init__(self, path: Path, *, lock_timeout: float) -> None:
        """`lock_timeout`: seconds that `locked` waits for other threads and processes. Touches no file yet."""
        self.name = path.name
        self._path = Path(os.path.realpath(path))
        self._lock_timeout = lock_timeout
        self._mutex = threading.Lock()
        self._swept = False

    def after_fork(self) -> None:
        """Replaces the mutex in a forked child, where the thread that may have held it does not exist."""
        self._mutex = threading.Lock()

    def signature(self) -> Signature | None:
        """The signature of the present version, None where there is no file.

        Raises:
            RegistryError: its status cannot be read, or it is not a regular file.
        """
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure("read", error) from error
        if not stat.S_ISREG(status.st_mode):
            raise RegistryError(f"The registry file '{self.name}' cannot be read: it is not a regular file")
        return Signature.of(status)

    def read(self) -> tuple[Version, bytes] | None:
        """The present version and its bytes, None where there is no file.

        Raises:
            RegistryError: it cannot be read.
        """
        if self.signature() is None:
            return None
        try:
            version = Version(descriptor := os.open(self._path, os.O_RDONLY))
            with open(descriptor, "rb", closefd=False) as file:
                return version, file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure("read", error) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock that all writers of all processes share; not reentrant.

        Raises:
            RegistryBusy: other writers held the lock for all of `lock_timeout`.
            RegistryError: the lock file beside the registry cannot be made.
        """
        before_wait()
        deadline = time.monotonic() + self._lock_timeout
        if not self._mutex.acquire(timeout=self._lock_timeout):
            raise self._busy()
        try:
            # A lock object belongs to the process that made it, so each use makes a new one: that is cheap, and works
            # in a forked server.
            lock = FileLock(f"{self._path}.lock", poll_interval=_POLL_SECONDS, thread_local=False)
            try:
                self._make_folder()
                lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
            except Timeout:
                raise self._busy() from None
            except OSError as error:
                raise self._failure("locked", error) from error
            try:
                yield
            finally:
                lock.release()
        finally:
            self._mutex.release()

    @contextmanager
    def staged(self, data: bytes) -> Iterator[Callable[[], Version]]:
        """Writes `data` to the disk beside the file and yields a function that replaces the file with it.

        The caller holds the lock. The rename is on the disk when the context ends. If the function is not called, or
        fails, nothing has changed.

        Raises:
            StorageFull: no room on the disk. RegistryError: any other failure.
        """
        beside = self._path.with_name(f"{self._path.name}.{token_hex(4)}.tmp")
        published = False

        def publish() -> Version:
            nonlocal published
            version = Version(os.dup(descriptor))
            beside.replace(self._path)
            published = True
            return version

        try:
            self._sweep()
            old = self._replaced()
            # Private until it has the old file's owner and mode, so that it never shows more than the old file did.
            descriptor = os.open(beside, _CREATE, 0o666 if old is None else 0o600)
            try:
                if old is not None:
                    self._adopt(descriptor, old)
                remaining = memoryview(data)
                while remaining:
                    remaining = remaining[os.write(descriptor, remaining) :]
                os.fsync(descriptor)
                yield publish
            finally:
                os.close(descriptor)
            self._sync_folder(self._path.parent)
        except OSError as error:
            raise self._failure("written", error) from error
        finally:
            if not published:
                with suppress(OSError):
                    beside.unlink()

    def set_aside(self) -> str:
        """Renames the file, which the caller has locked, to an unused name; returns that name.

        Raises:
            RegistryError: the file cannot be renamed, and stays.
        """
        stem = f"{self._path.name}.corrupt-{timestamp().replace(':', '')}"
        aside, attempt = self._path.with_name(stem), 0
        while os.path.lexists(aside):
            attempt += 1
            aside = self._path.with_name(f"{stem}-{attempt}")
        try:
            self._path.rename(aside)
            self._sync_folder(self._path.parent)
        except OSError as error:
            raise self._failure("set aside", error) from error
        return aside.name

    def _replaced(self) -> os.stat_result | None:
        """The status of the file before it is replaced, None where there is no file."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        # A rename needs no permission on the file itself, but a read-only file must stay unchanged.
        if not os.access(self._path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return status

    @staticmethod
    def _adopt(descriptor: int, old: os.stat_result) -> None:
        """Gives the new file the old file's mode, and its owner where that is permitted."""
        new = os.fstat(descriptor)
        if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
            with suppress(PermissionError):
                os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))

    def _make_folder(self) -> None:
        """Makes the file's folder and its missing parents, and syncs each to the disk."""
        folder = self._path.parent
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for place in missing:
            self._sync_folder(place.parent)

    def _sweep(self) -> None:
        """Removes, once and under the lock, the temporary files that killed writers left beside the file."""
        if not self._swept:
            ours = re.compile(re.escape(self._path.name) + r"\.[0-9a-f]{8}\.tmp")
            for left in self._path.parent.iterdir():
                if ours.fullmatch(left.name):
                    left.unlink(missing_ok=True)
            self._swept = True

    @staticmethod
    def _sync_folder(folder: Path) -> None:
        """Syncs the folder's entries to the disk; some network file systems do not have this call or need it."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise
        finally:
            os.close(descriptor)

    def _busy(self) -> RegistryBusy:
        return RegistryBusy(f"The registry file '{self.name}' is locked by another writer; try again")

    def _failure(self, action: str, error: OSError) -> RegistryError:
        """The error for the user; the log gets the whole path."""
        _LOG.error("Registry file %s cannot be %s: %s", self._path, action, error)
        if error.errno in _FULL:
            return StorageFull(f"The registry file '{self.name}' cannot be {action}: no room on the disk")
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        return RegistryError(f"The registry file '{self.name}' cannot be {action}: {reason}")
