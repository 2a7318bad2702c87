"""How long a model stays in memory after its last use, and the thread that then unloads it.

Must not know the loader or HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..cancellation import LOOK_AGAIN
from ..registry.records import ModelRecord
from .table import ModelEntry, ModelTable


class KeepAlive:
    """Unloads models whose keep-alive is over."""

    def __init__(self, table: ModelTable, seconds: float, evict: Callable[[str], bool]) -> None:
        """`seconds` is how long a model stays where neither its record nor a request says; -1: for ever. `evict`
        unloads a model if its time is still over."""
        self._table = table
        self._seconds = seconds
        self._evict = evict
        self._reaper: threading.Thread | None = None

    def begin(self, entry: ModelEntry, record: ModelRecord, keep_alive: float | None) -> None:
        """Starts the keep-alive time of a model that no request uses any more; with the lock held."""
        if keep_alive is None:
            keep_alive = record.keep_alive if record.keep_alive is not None else self._seconds
        self.expire(entry, None if keep_alive < 0 else entry.used + keep_alive)

    def expire(self, entry: ModelEntry, when: float | None) -> None:
        """Unloads the model at `when` (`time.monotonic`) unless it is in use; None: never. With the lock held."""
        entry.expires = when
        if entry.expires is not None and self._reaper is None and not self._table.closed:
            self._reaper = threading.Thread(target=self._reap, name="keep-alive")
            self._reaper.start()

    def _reap(self) -> None:
        """Unloads expired models until none will expire."""
        while True:
            with self._table.changed:
                waiting = {name: entry.expires for name, entry in self._table.all() if entry.expires is not None}
                if not waiting or self._table.closed:
                    self._reaper = None
                    return
                now = time.monotonic()
                due = [name for name, expires in waiting.items() if expires <= now and self._table.of(name).idle]
                if not due:
                    soonest = min(waiting.values())
                    self._table.changed.wait(min(soonest - now, 60.0) if soonest > now else LOOK_AGAIN)
                    continue
            for model_id in due:
                self._evict(model_id)

    def close(self) -> None:
        """Waits for the thread, after the table is closed."""
        with self._table.changed:
            reaper = self._reaper
        if reaper is not None:
            reaper.join()
