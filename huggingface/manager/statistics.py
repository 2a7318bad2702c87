"""Statistics of each model: latencies, speeds, loads, cache hits and failures, stored in a file beside the registry.

Counters are kept in memory and written later, added to those that other processes wrote meanwhile; a damaged file is
set aside as the registry's is. Any thread may call anything here, and nothing here makes a request fail. Must not know
HTTP or models, only their names.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from ..errors import RegistryError
from ..registry.file import RegistryFile, Version

logger = logging.getLogger(__name__)

# Latencies are counted in classes whose bounds grow by this factor: a quantile is exact to half of it, and the counts
# of several processes can be added. Source: Masson, Rim, Lee: "DDSketch", PVLDB 12(12), 2019.
_GROWTH = 1.05
_DELAY = 5.0  # the most seconds until counts are written to the file
_QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


@dataclass(slots=True)
class _Counts:
    """The counts of one model; seconds and tokens are sums."""

    sums: Counter[str] = field(default_factory=Counter)  # requests, tokens, cache_hits, seconds of loads, …
    latencies: Counter[int] = field(default_factory=Counter)  # requests by class of latency
    errors: Counter[str] = field(default_factory=Counter)  # by kind
    last_load: float | None = None

    def add(self, other: _Counts) -> None:
        """Adds the counts of `other`."""
        self.sums.update(other.sums)
        self.latencies.update(other.latencies)
        self.errors.update(other.errors)
        self.last_load = self.last_load if other.last_load is None else other.last_load

    def to_json(self) -> dict[str, Any]:
        return {
            "sums": dict(self.sums),
            "latencies": {str(key): count for key, count in sorted(self.latencies.items())},
            "errors": dict(self.errors),
            "last_load": self.last_load,
        }

    @classmethod
    def from_json(cls, value: Any) -> _Counts:
        """Raises: ValueError, TypeError, KeyError, AttributeError if `to_json` did not write the value."""
        sums = Counter({str(name): _number(number) for name, number in value["sums"].items()})
        latencies = Counter({int(key): int(count) for key, count in value["latencies"].items()})
        errors = Counter({str(kind): int(count) for kind, count in value["errors"].items()})
        last = value["last_load"]
        return cls(sums, latencies, errors, None if last is None else _number(last))

    def shown(self) -> dict[str, Any]:
        """Returns the fields that the API shows: seconds, tokens per second, counts."""
        requests, loads, busy = self.sums["requests"], self.sums["loads"], self.sums["generation_seconds"]
        return {
            "requests": requests,
            "latency_seconds": {name: self._quantile(part) for name, part in _QUANTILES.items()},
            "tokens": self.sums["tokens"],
            "tokens_per_second": round(self.sums["tokens"] / busy, 3) if busy else None,
            "loads": loads,
            "load_seconds": {
                "mean": round(self.sums["load_seconds"] / loads, 3) if loads else None,
                "last": None if self.last_load is None else round(self.last_load, 3),
            },
            "cache_hits": self.sums["cache_hits"],
            "cache_misses": self.sums["cache_misses"],
            "evictions": self.sums["evictions"],
            "errors": dict(sorted(self.errors.items())),
        }

    def _quantile(self, part: float) -> float | None:
        wanted, seen = part * sum(self.latencies.values()), 0
        for key, count in sorted(self.latencies.items()):
            seen += count
            if seen >= wanted:
                return round(float(_GROWTH ** (key - 0.5)), 6)
        return None


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("not a number")
    return value


class Statistics:
    """The counters, and the file at `path` that keeps them; without a path they last as long as the process."""

    def __init__(self, path: Path | None = None) -> None:
        self._file = None if path is None else RegistryFile(path, lock_timeout=5.0)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._pending: dict[str, _Counts] = {}
        self._kept: dict[str, _Counts] = {}  # the file's counts when it was last read
        self._removed: set[str] = set()  # models whose counts are deleted from the file
        self._version: Version | None = None
        self._writer: threading.Thread | None = None
        self._closing = False

    # Events -----------------------------------------------------------------------------------------------------------

    def served(self, model_id: str, seconds: float, tokens: int) -> None:
        """Counts an answered request: `seconds` from its arrival to its answer, and the generated `tokens`."""
        sums = {"requests": 1, "tokens": tokens, "generation_seconds": seconds if tokens else 0.0}
        key = math.ceil(math.log(max(seconds, 1e-6), _GROWTH))
        self._note(model_id, _Counts(Counter(sums), Counter({key: 1})))

    def failed(self, model_id: str, kind: str) -> None:
        """Counts a request or a load that ended with an error of this kind."""
        self._note(model_id, _Counts(errors=Counter({kind: 1})))

    def found(self, model_id: str) -> None:
        """Counts a request that found its model in memory."""
        self._note(model_id, _Counts(Counter(cache_hits=1)))

    def missed(self, model_id: str) -> None:
        """Counts a request that did not find its model in memory."""
        self._note(model_id, _Counts(Counter(cache_misses=1)))

    def loaded(self, model_id: str, seconds: float) -> None:
        """Counts a load."""
        self._note(model_id, _Counts(Counter({"loads": 1, "load_seconds": seconds}), last_load=seconds))

    def evicted(self, model_id: str) -> None:
        """Counts an eviction."""
        self._note(model_id, _Counts(Counter(evictions=1)))

    def removed(self, model_id: str) -> None:
        """Deletes the counts of a model that is no longer registered; later counts belong to another model."""
        with self._lock:
            self._pending.pop(model_id, None)
            self._removed.add(model_id)
            self._write_later()

    # Looking ---------------------------------------------------------------------------------------------------------

    def shown(self) -> dict[str, dict[str, Any]]:
        """The counts so far, by model."""
        with self._lock:
            self._read()
            both: dict[str, _Counts] = {}
            for counts in (self._remaining(self._removed), self._pending):
                for model_id, each in counts.items():
                    both.setdefault(model_id, _Counts()).add(each)
        return {model_id: counts.shown() for model_id, counts in sorted(both.items())}

    def close(self) -> None:
        """Writes pending counts and ends the thread."""
        with self._lock:
            self._closing = True
            writer = self._writer
        self._wake.set()
        if writer is not None:
            writer.join()
        self._flush()
        with self._lock:
            self._closing, self._writer, self._version = False, None, None

    # Inside ----------------------------------------------------------------------------------------------------------

    def _note(self, model_id: str, counts: _Counts) -> None:
        with self._lock:
            self._pending.setdefault(model_id, _Counts()).add(counts)
            self._write_later()

    def _write_later(self) -> None:
        """Starts the thread that writes pending counts; with the lock held."""
        if self._file is not None and not self._closing and (self._writer is None or not self._writer.is_alive()):
            self._wake.clear()
            self._writer = threading.Thread(target=self._write_behind, name="statistics", daemon=True)
            self._writer.start()

    def _remaining(self, removed: Set[str]) -> dict[str, _Counts]:
        """The file's counts of models that are still registered."""
        return {model_id: counts for model_id, counts in self._kept.items() if model_id not in removed}

    def _write_behind(self) -> None:
        """Writes once, some seconds after the first new count; later counts start another thread."""
        self._wake.wait(_DELAY)
        with self._lock:
            if self._closing:
                return  # `close` writes
            self._writer = None
        self._flush()

    def _flush(self) -> None:
        """Adds pending counts to the file."""
        if self._file is None or not (self._pending or self._removed):
            return
        try:
            with self._file.locked():
                with self._lock:
                    self._read(locked=True)
                    pending, self._pending = self._pending, {}
                    removed, self._removed = self._removed, set()
                    before = self._remaining(removed)
                    kept = {model_id: _Counts() for model_id in (*before, *pending)}
                    for counts in (before, pending):
                        for model_id, each in counts.items():
                            kept[model_id].add(each)
                document = {"models": {model_id: counts.to_json() for model_id, counts in kept.items()}}
                try:
                    data = orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
                    with self._file.staged(data) as publish, self._lock:
                        self._version, self._kept = publish(), kept
                except RegistryError:
                    with self._lock:
                        for model_id, each in self._pending.items():
                            pending.setdefault(model_id, _Counts()).add(each)
                        self._pending = pending
                        self._removed |= removed
                    raise
        except RegistryError as error:  # the counts stay pending, and the next count tries again
            logger.warning("statistics could not be written, the next count tries again: %s", error)

    def _read(self, *, locked: bool = False) -> None:
        """Reads the file, if it has changed; with the file's lock held, sets a damaged one aside."""
        if self._file is None:
            return
        with suppress(RegistryError):
            signature = self._file.signature()
            if signature is None:
                self._version, self._kept = None, {}
            elif self._version is None or signature != self._version.signature:
                present = self._file.read()
                if present is None:
                    return
                try:
                    models = orjson.loads(present[1])["models"]
                    kept = {model_id: _Counts.from_json(value) for model_id, value in models.items()}
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    if locked:
                        aside = self._file.set_aside()
                        logger.error("%s was damaged (%s) and is set aside as %s", self._file.name, error, aside)
                        self._version, self._kept = None, {}
                    return
                self._version, self._kept = present[0], kept


def beside(registry: Path) -> Path:
    """The path of the statistics of a registry's models."""
    return registry.with_name(f"{registry.stem}.statistics.json")
