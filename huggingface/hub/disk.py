"""Room on disks, for all downloads of a server together: what those that run still need is nobody else's.

Standard library only; any thread may call it. Must not know what is downloaded. Other programs, and another server on
the same disk, are seen only by what is free.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path


class NoRoom(Exception):
    """There is no room for `missing` bytes: `free` ones are free on that disk, of which `promised` are for others."""

    def __init__(self, missing: int, free: int, promised: int) -> None:
        super().__init__(missing, free, promised)
        self.missing, self.free, self.promised = missing, free, promised


class Disk:
    """The disks of this machine, and what running downloads still need on each."""

    def __init__(self, free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free) -> None:
        """`free` tells how many bytes are free on the disk of a folder."""
        self._free = free
        self._lock = threading.Lock()
        self._claims: list[tuple[Claims, str, int, Callable[[], int]]] = []  # whose, of what, where, how much still

    def claims(self) -> Claims:
        """Those of one download, to be released when it is over."""
        return Claims(self)

    def claim(self, claims: Claims, what: str, place: Path, missing: Callable[[], int]) -> None:
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

    def release(self, claims: Claims) -> None:
        with self._lock:
            self._claims = [each for each in self._claims if each[0] is not claims]


class Claims:
    """What one download needs on disks, by what it brings there."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def claim(self, what: str, place: Path, missing: Callable[[], int]) -> None:
        """Have the room for `what` on the disk of `place`, which need not exist yet, in place of what was had for it.

        `missing` tells how many bytes have still to come there, at any time and from any thread.

        Raises:
            NoRoom: as its name says; nothing is changed.
        """
        self._disk.claim(self, what, place, missing)

    def release(self) -> None:
        """Give up all of it."""
        self._disk.release(self)
