"""The registry: the registered models, in one JSON file that several processes may share.

A change is on the disk before its method returns; usage counters follow within `usage_delay`. Reads see the writes of
all processes. Any thread may call anything here. Must not know HTTP, models in memory or tasks. `file.py` locks and
replaces the file, `content.py` parses it.
"""

from __future__ import annotations

import builtins
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from ..errors import ModelDisabled, ModelExists, ModelNotFound, ProtectedField, RegistryError, UnknownField
from ..types import timestamp
from .content import FIELDS, Corrupt, RegistryContent, encode, parse, same_json, stored_value
from .file import RegistryFile, Signature, Version
from .records import ModelRecord, check_model_id

_LOG = logging.getLogger(__name__)

PROTECTED_FIELDS = ("model_id", "added_date", "usage_count", "details")
CHANGEABLE_FIELDS = tuple(name for name in FIELDS if name not in PROTECTED_FIELDS)

_SETTLE_SECONDS = 0.1  # wait for an editor that writes in place to finish, repeated after each of its writes
_SETTLE_TRIES = 20
_RETRY_AT_LEAST = 0.1  # seconds between attempts to write usage counters after a failure
_RETRY_AT_MOST = 30.0


class _Use(NamedTuple):
    """Uses of the model added at `added_date` that the file does not count yet."""

    added_date: str
    times: int
    last_used: str


def _used(record: ModelRecord, use: _Use | None) -> ModelRecord:
    """The record with the uses that the file does not count yet, if they belong to the same registration."""
    if use is None or use.added_date != record.added_date:
        return record
    return replace(
        record, usage_count=record.usage_count + use.times, last_used=max(record.last_used or "", use.last_used)
    )


def _with_uses(content: RegistryContent, uses: Mapping[str, _Use]) -> list[ModelRecord]:
    """The content's records, each with the uses that the file does not count yet."""
    if not uses:
        return list(content.records.values())
    return [_used(record, uses.get(record.model_id)) for record in content.records.values()]


class ModelRegistry:
    """The registered models, in the file at `path` (the document's `models_data`); a missing file is an empty registry.

    Every method that reads or writes raises RegistryError where the file cannot be read, RegistryBusy where another
    writer keeps it locked, StorageFull where a change has no room; then nothing has changed. A record with a wrong
    value stays in the file unchanged, is reported in `warnings` and the log, and counts as not registered until it is
    registered again, removed or corrected. A corrupt file is renamed and reported too, and the registry continues
    empty. Callers share records: they copy `parameters` before they change them.
    """

    def __init__(self, path: Path, *, lock_timeout: float = 10.0, usage_delay: float = 1.0) -> None:
        """Touches no file and starts no thread yet.

        Args:
            path: the JSON file; a symbolic link is followed. The first change makes its folder.
            lock_timeout: seconds that a change waits for other writers.
            usage_delay: seconds by which a usage counter on the disk may be late.
        """
        self._file = RegistryFile(path, lock_timeout=lock_timeout)
        self._usage_delay = usage_delay
        self._warnings: list[str] = []
        self._start_process()
        if hasattr(os, "register_at_fork"):
            method = weakref.WeakMethod(self._start_process)
            os.register_at_fork(after_in_child=lambda: (start := method()) and start())

    def _start_process(self) -> None:
        """Sets the state that a forked child must not inherit: the parent writes its own pending uses, its threads do
        not exist in the child, and its content may be copied in the middle of a change."""
        self._content: RegistryContent | None = None
        self._unreadable: list[str] = []  # a warning for each unreadable record of `_content`
        self._version: Version | None = None  # the file's version that `_content` was read from or written to
        self._file.after_fork()
        self._mutex = threading.Lock()  # guards every field; held for memory, a read or a rename only
        self._wake = threading.Condition(self._mutex)
        self._pending: dict[str, _Use] = {}
        self._writer: threading.Thread | None = None
        self._stopping = False

    # Reading ----------------------------------------------------------------------------------------------------------

    def list(self, model_type: str | None = None) -> builtins.list[ModelRecord]:
        """All records, or those of one type, in the order of their registration."""
        records = _with_uses(*self._snapshot())
        return records if model_type is None else [record for record in records if record.model_type == model_type]

    def get(self, model_id: str) -> ModelRecord:
        """The record of `model_id`. Raises ModelNotFound."""
        content, uses = self._snapshot()
        if model_id not in content.records:
            raise content.absent(model_id)
        return _used(content.records[model_id], uses.get(model_id))

    def usable(self, model_id: str) -> ModelRecord:
        """The record of a model that may be loaded.

        Raises:
            ModelNotFound, ModelDisabled: there is none, or it is disabled.
        """
        record = self.get(model_id)
        if record.status == "disabled":
            raise ModelDisabled(model_id)
        return record

    def check_present(self, model_id: str) -> None:
        """Raises ModelNotFound where the file has no record of `model_id`, not even an unreadable one."""
        content, _ = self._snapshot()
        if model_id not in content.records and not content.unreadable(model_id):
            raise ModelNotFound(model_id)

    def model_types(self) -> builtins.list[str]:
        """The distinct types of the registered models, sorted."""
        return sorted({record.model_type for record in self._snapshot()[0].records.values()})

    def statistics(self) -> dict[str, Any]:
        """Counts over all models, as the API shows them.

        `last_updated` is null until the first write, `most_used` until the first use. Of several models with the
        highest count, `most_used` is the most recently used, then the earliest registered.
        """
        content, uses = self._snapshot()
        records = _with_uses(content, uses)
        maximum = max(records, key=lambda record: (record.usage_count, record.last_used or ""), default=None)
        updated = [content.last_updated or "", *(use.last_used for use in uses.values())]
        return {
            "total_models": len(records),
            "total_usage": sum(record.usage_count for record in records),
            "model_types": dict(Counter(record.model_type for record in records)),
            "last_updated": max(updated) or None,
            "most_used": None
            if maximum is None or maximum.usage_count == 0
            else {"model_id": maximum.model_id, "name": maximum.name, "usage_count": maximum.usage_count},
        }

    @property
    def warnings(self) -> builtins.list[str]:
        """The file's problems for the user: unreadable records, and corrupt files that were set aside."""
        with suppress(RegistryError):  # callers that read records get this error themselves
            self._snapshot()
        with self._mutex:
            return [*self._warnings, *self._unreadable]

    # Changing ---------------------------------------------------------------------------------------------------------

    def add(self, record: ModelRecord) -> ModelRecord:
        """Registers a model; returns its record as stored.

        Raises:
            ModelExists: the id is registered already. InvalidModelId, InvalidRequest: a field has an invalid value.
        """
        check_model_id(record.model_id)
        added = ModelRecord(**{name: stored_value(name, getattr(record, name)) for name in FIELDS})

        def edit(records: dict[str, ModelRecord], _: RegistryContent) -> None:
            if added.model_id in records:
                raise ModelExists(added.model_id)
            records[added.model_id] = added

        self._change(edit, added.model_id)
        return added

    def update(self, model_id: str, changes: Mapping[str, Any]) -> ModelRecord:
        """Replaces whole fields of a record; returns the new record. Unchanged values are not written.

        Raises:
            ModelNotFound: the id is not registered. UnknownField, InvalidRequest: an invalid name or value.
            ProtectedField: a new value for a field that only the server sets.
        """
        for name in changes:
            if name not in FIELDS:
                raise UnknownField(name, CHANGEABLE_FIELDS)
        wanted = {name: stored_value(name, value) for name, value in changes.items() if name in CHANGEABLE_FIELDS}
        result: ModelRecord

        def edit(records: dict[str, ModelRecord], content: RegistryContent) -> None:
            nonlocal result
            if model_id not in records:
                raise content.absent(model_id)
            result = records[model_id]
            for name in PROTECTED_FIELDS:
                if name in changes and changes[name] != getattr(result, name):
                    raise ProtectedField(name)
            different = {name: value for name, value in wanted.items() if not same_json(value, getattr(result, name))}
            if different:
                result = records[model_id] = replace(result, **different)

        self._change(edit)
        return result

    def describe(self, record: ModelRecord, details: Mapping[str, Any]) -> ModelRecord:
        """Stores preflight's `details` in a record; returns the new record.

        Raises:
            ModelNotFound: this registration of the model has been removed.
        """
        wanted = stored_value("details", details)
        result: ModelRecord

        def edit(records: dict[str, ModelRecord], _: RegistryContent) -> None:
            nonlocal result
            present = records.get(record.model_id)
            if present is None or present.added_date != record.added_date:
                raise ModelNotFound(record.model_id)
            result = present
            if not same_json(wanted, present.details):
                result = records[record.model_id] = replace(present, details=wanted)

        self._change(edit)
        return result

    def remove(self, model_id: str) -> dict[str, Any]:
        """Removes a model; returns the new content as the document's `models_data`. Raises ModelNotFound."""

        def edit(records: dict[str, ModelRecord], content: RegistryContent) -> None:
            if records.pop(model_id, None) is None and not content.unreadable(model_id):
                raise ModelNotFound(model_id)

        content = self._change(edit, model_id)
        return {
            "models": [record.to_dict() for record in content.records.values()],
            "last_updated": content.last_updated,
            "count": len(content.records),
        }

    def record_use(self, model_id: str) -> None:
        """Counts one use: this process sees it at once, others when it is written. A removed model is ignored."""
        with suppress(RegistryError):  # an answer must not fail over its count: the last known records are used
            self._snapshot()
        with self._mutex:
            record = self._content.records.get(model_id) if self._content else None
            if record is None:
                return
            if not self._pending:
                self._wake.notify_all()
            pending = self._pending.get(model_id)
            times = pending.times if pending and pending.added_date == record.added_date else 0
            self._pending[model_id] = _Use(record.added_date, times + 1, timestamp())
            if self._writer is None or not self._writer.is_alive():
                self._writer = threading.Thread(target=self._write_behind, name="registry-usage", daemon=True)
                self._writer.start()

    def close(self) -> None:
        """Writes the pending counters, stops the thread and releases the file. The next call reopens it."""
        with self._mutex:
            self._stopping = True
            self._wake.notify_all()
            writer = self._writer
        if writer is not None:
            writer.join()
        with self._mutex:
            self._stopping, self._writer = False, None
        if not self._flush():
            _LOG.error("The registry is closed, and usage counters are lost if the process ends now")
        with self._mutex:
            self._content = self._version = None

    # Inside -----------------------------------------------------------------------------------------------------------

    def _snapshot(self) -> tuple[RegistryContent, dict[str, _Use]]:
        """The file's present content and the uses that it does not count yet, at the same moment."""
        try:
            return self._read()
        except Corrupt as reason:
            with ExitStack() as stack:
                try:
                    stack.enter_context(self._file.locked())
                except RegistryError as error:
                    raise self._stays_corrupt(reason, error) from error
                return self._read_or_set_aside()

    def _read(self) -> tuple[RegistryContent, dict[str, _Use]]:
        """As `_snapshot`; parses the file only if it has changed. Raises Corrupt."""
        with self._mutex:
            signature = self._file.signature()
            if self._content is None or signature != (self._version.signature if self._version else None):
                present = self._file.read()
                if present is None:
                    self._version, self._content = None, RegistryContent()
                else:
                    version, data = present
                    self._content = parse(data, version.signature.mtime)
                    self._version = version
                self._note_unreadable()
            return self._content, {**self._pending}

    def _read_or_set_aside(self) -> tuple[RegistryContent, dict[str, _Use]]:
        """As `_snapshot`, but renames a corrupt file; the caller holds the file's lock."""
        seen: Signature | None = None
        for _ in range(_SETTLE_TRIES):
            try:
                return self._read()
            except Corrupt as found:
                reason, corrupt = found, self._file.signature()
            if corrupt is not None and corrupt == seen:
                break
            seen = corrupt
            time.sleep(_SETTLE_SECONDS)
        try:
            aside = self._file.set_aside()
        except RegistryError as error:
            raise self._stays_corrupt(reason, error) from error
        warning = (
            f"The registry file '{self._file.name}' was corrupt ({reason}). It was set aside as '{aside}', "
            "and the registry goes on without the models in it."
        )
        _LOG.error("%s", warning)
        with self._mutex:
            self._warnings.append(warning)
        return self._read()

    def _note_unreadable(self) -> None:
        """Updates the warnings from the content and logs each once. The caller holds the mutex."""
        before = self._unreadable
        self._unreadable = [
            f"The registry file '{self._file.name}' holds a record that cannot be read, and keeps it: {problem}. "
            "Correct it there, register the model again, or delete it."
            for problem in (self._content.problems() if self._content else ())
        ]
        for warning in self._unreadable:
            if warning not in before:
                _LOG.error("%s", warning)

    def _stays_corrupt(self, reason: Corrupt, error: RegistryError) -> RegistryError:
        return type(error)(f"The registry file '{self._file.name}' is corrupt ({reason}), and it stays. {error}")

    def _change(
        self, edit: Callable[[dict[str, ModelRecord], RegistryContent], None], replaced: str | None = None
    ) -> RegistryContent:
        """Applies `edit` to the present records, and writes them with pending uses if anything has changed.

        Unreadable records with the id `replaced` are removed.
        """
        with self._file.locked():
            content, uses = self._read_or_set_aside()
            records = dict(content.records)
            for model_id, use in uses.items():
                if model_id in records:
                    records[model_id] = _used(records[model_id], use)
            edit(records, content)
            # Compared by identity: 1 equals True, but replacing one by the other is a change.
            same = len(records) == len(content.records) and all(
                records.get(model_id) is record for model_id, record in content.records.items()
            )
            if same and not (replaced is not None and content.unreadable(replaced)):
                with self._mutex:
                    self._settle(uses)  # the rest are uses of models that were removed
                return content
            changed = content.changed(records, timestamp(), replaced)
            try:
                data = encode(changed)
            except orjson.JSONEncodeError as error:
                raise RegistryError(f"The registry file '{self._file.name}' cannot be written: {error}") from error
            with self._file.staged(data) as publish, self._mutex:
                self._version = publish()
                self._content = changed
                self._note_unreadable()
                self._settle(uses)
            return changed

    def _settle(self, written: Mapping[str, _Use]) -> None:
        """Removes written or obsolete uses from the pending ones; the caller holds the mutex."""
        for model_id, use in written.items():
            pending = self._pending.get(model_id)
            if pending is None or pending.added_date != use.added_date:
                continue
            if pending.times == use.times:
                del self._pending[model_id]
            else:
                self._pending[model_id] = pending._replace(times=pending.times - use.times)

    def _flush(self) -> bool:
        """Writes the pending uses; on failure keeps them and returns False."""
        with self._mutex:
            if not self._pending:
                return True
        try:
            self._change(lambda _records, _content: None)
        except RegistryError as error:
            _LOG.warning("Usage counters could not be written yet, and are kept: %s", error)
            return False
        return True

    def _write_behind(self) -> None:
        """Runs on the usage thread until `close`: writes counted uses shortly before `usage_delay` has passed."""
        prompt = pause = self._usage_delay * 0.8
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._pending)
                if self._wake.wait_for(lambda: self._stopping, timeout=pause):
                    return
            pause = prompt if self._flush() else min(max(2 * pause, _RETRY_AT_LEAST), max(prompt, _RETRY_AT_MOST))
