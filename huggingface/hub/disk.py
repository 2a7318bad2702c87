"""Disk space for all downloads of a server: each download claims the bytes that it still needs.

Standard library only; any thread may call it. Must not know what is downloaded. Other programs, and other servers on
the same disk, show only in the free bytes.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path


class NoRoom(Exception):
    """The disk lacks space for `missing` bytes: it has `free` ones, of which `promised` are claimed by others."""

    def __init__(self, missing: int, free: int, promised: int) -> None:
        super().__init__(missing, free, promised)
        self.missing, self.free, self.promised = missing, free, promised


class Disk:
    """The disks of this machine, and the bytes that running downloads still need on each."""

    def __init__(self, free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free) -> None:
        """`free` returns how many bytes are free on a folder's disk."""
        self._free = free
        self._lock = threading.Lock()
        self._claims: list[tuple[DiskClaims, str, int, Callable[[], int]]] = []  # whose, what, device, missing bytes

    def claims(self) -> DiskClaims:
        """The claims of one download; release them when it ends."""
        return DiskClaims(self)

    def claim(self, claims: DiskClaims, what: str, place: Path, missing: Callable[[], int]) -> None:
        while not place.exists():
            place = place.parent
        disk = place.stat().st_dev
        with self._lock:
            others = [each for each in self._claims if each[:2] != (claims, what)]
            promised = sum(max(0, still()) for _, _, on, still in others if on == disk)
            free, need = self._free(place), missing()
            if need > 0 and need > free - promised:
                raise NoRoom(need, free, promised)
            self._claims = [*others, (claims, what, disk, missing)]

    def release(self, claims: DiskClaims) -> None:
        with self._lock:
            self._claims = [each for each in self._claims if each[0] is not claims]


class DiskClaims:
    """The disk space that one download claims, by what it downloads."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def claim(self, what: str, place: Path, missing: Callable[[], int]) -> None:
        """Claims space for `what` on the disk of `place`, which need not exist yet; replaces an earlier claim for it.

        `missing` returns how many bytes must still arrive there; any thread may call it at any time.

        Raises:
            NoRoom: the disk lacks space; nothing changes.
        """
        self._disk.claim(self, what, place, missing)

    def release(self) -> None:
        """Releases all of these claims."""
        self._disk.release(self)
