"""The models' entries in memory: which model is there, how many requests use it, and who waits for exclusive access.

One lock guards all of it; it is never held while a model is loaded, waited for or unloaded. The manager decides what
happens to the models. Any thread may call it. Must not know the registry, torch or HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from ..cancellation import LOOK_AGAIN, Cancellation, before_wait
from ..errors import Cancelled, MemoryHeld, ModelBusy
from ..progress import Progress
from ..registry.records import LoadSettings
from .budget import Account
from .claims import Claim, Claims

if TYPE_CHECKING:
    from ..model.loaded import LoadedModel


class Loading:
    """A load that runs: all requests for the model wait for it, and fail if it fails.

    After it has succeeded, each of these requests counts as a user of the model, so the model is not evicted before
    they get it.
    """

    def __init__(self, *, forced: bool = False) -> None:
        """A `forced` load goes on even if no request waits for it."""
        self.progress = Progress()
        self.done: Future[None] = Future()
        self.forced = forced
        self.waiting = 0
        self.model: LoadedModel | None = None  # set on success: the requests that waited count as its users


@dataclass(slots=True)
class ModelEntry:
    """One model's entry in memory. Times are readings of `time.monotonic`."""

    model: LoadedModel | None = None
    account: Account | None = None  # the model's account in the budget
    users: int = 0
    replaced: dict[LoadedModel, int] = field(default_factory=dict)  # users of models that were replaced by a takeover
    loading: Loading | None = None
    reserved: bool = False  # exclusive access is granted or waited for: no new users
    overrides: LoadSettings = field(default_factory=LoadSettings)  # the settings of the last load, over the record's
    used: float = 0.0
    expires: float | None = None
    load_seconds: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether there is a model that no request uses or is about to use."""
        return self.model is not None and not self.users and not self.reserved and self.loading is None

    def replace(self, model: LoadedModel, account: Account) -> LoadedModel | None:
        """Lets new users have another model; returns the previous model if it has no users."""
        before, users = self.model, self.users - sum(self.replaced.values())
        self.model, self.account = model, account
        if before is None or not users:
            return before
        self.replaced[before] = users
        return None

    def left(self, model: LoadedModel) -> bool:
        """Counts one user less of a model; returns whether that was the last user of a replaced model."""
        self.users -= 1
        if model not in self.replaced:
            return False
        self.replaced[model] -= 1
        if self.replaced[model]:
            return False
        del self.replaced[model]
        return True


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in memory at one moment; `expires_at` is ISO 8601 in UTC, None for never or while in use."""

    model: LoadedModel
    users: int
    expires_at: str | None
    pinned: bool
    load_seconds: float


class ModelTable:
    """All entries, and the lock that guards them; the condition `changed` is notified of every change that a thread
    awaits."""

    def __init__(self, busy_timeout: float = 30.0) -> None:
        """`busy_timeout` is the seconds that exclusive access waits for the requests of a model."""
        self._busy_timeout = busy_timeout
        self.changed = threading.Condition()
        self.closed = False
        # It never shrinks: a thread may wait for an entry, and an empty one is tiny.
        self._entries: dict[str, ModelEntry] = {}
        self._claims = Claims()

    # With the lock held -----------------------------------------------------------------------------------------------

    def of(self, model_id: str) -> ModelEntry:
        """The model's entry, created if it is missing."""
        return self._entries.setdefault(model_id, ModelEntry())

    def all(self) -> list[tuple[str, ModelEntry]]:
        """Every entry, by id."""
        return list(self._entries.items())

    def drains(self, model_id: str) -> bool:
        """Whether a model admits no new users, because a load waits for its memory."""
        return self._claims.drains(model_id)

    # With or without the lock -----------------------------------------------------------------------------------------

    @property
    def busy_deadline(self) -> float:
        """The reading of `time.monotonic` at which a wait for exclusive access that begins now ends."""
        return time.monotonic() + self._busy_timeout

    @contextmanager
    def exclusive(self, model_id: str, deadline: float | None = None) -> Iterator[ModelEntry]:
        """Exclusive access to the model's entry: waits for active leases to end, and blocks new ones meanwhile.

        Raises:
            ModelBusy: they did not end before the deadline; without one, before `busy_deadline`.
        """
        deadline = self.busy_deadline if deadline is None else deadline
        before_wait()
        with self.changed:
            entry = self.of(model_id)
            if not self.changed.wait_for(lambda: not entry.reserved, deadline - time.monotonic()):
                raise ModelBusy(f"Model '{model_id}' is being loaded or unloaded; try again later")
            entry.reserved = True
            if not self.changed.wait_for(
                lambda: entry.users == 0 and entry.loading is None, deadline - time.monotonic()
            ):
                entry.reserved = False
                self.changed.notify_all()
                raise ModelBusy(f"Model '{model_id}' is in use; try again when its requests have ended")
        try:
            yield entry
        finally:
            self.free(entry)

    def free(self, entry: ModelEntry) -> None:
        """Ends the exclusive access to an entry."""
        with self.changed:
            entry.reserved = False
            self.changed.notify_all()

    @contextmanager
    def claim(self, model_id: str) -> Iterator[Claim]:
        """The model's turn for memory, after older claims; a refusal keeps it for some seconds."""
        with self.changed:
            claim = self._claims.enter(model_id)
        refused = False
        try:
            yield claim
        except MemoryHeld:
            refused = True
            raise
        finally:
            with self.changed:
                self._claims.leave(claim, refused=refused)
                self.changed.notify_all()

    def is_first(self, claim: Claim) -> bool:
        """Whether a claim is the oldest."""
        with self.changed:
            return self._claims.first(claim)

    def drain(self, claim: Claim, victims: Collection[str]) -> None:
        """Stops these models from admitting users until the claim ends; earlier victims of the claim admit again."""
        with self.changed:
            self._claims.drain(claim, victims)
            self.changed.notify_all()

    def wait_for_turn(self, claim: Claim, deadline: float, cancellation: Cancellation) -> None:
        """Waits until no request uses the claim's victims; for a moment if it has none.

        Raises:
            Cancelled: by `cancellation`, or the server is shutting down.
        """
        before_wait()
        with self.changed:
            entries = [self.of(model_id) for model_id in claim.victims]
            while (left := deadline - time.monotonic()) > 0:
                if self.closed or cancellation.cancelled:
                    raise Cancelled
                if entries and not any(entry.users for entry in entries):
                    return
                self.changed.wait(min(left, LOOK_AGAIN))
                if not entries:  # another load runs, or is first: its end changes what fits
                    return

    # Snapshots --------------------------------------------------------------------------------------------------------

    def loaded(self) -> dict[str, LoadedModel]:
        """The models in memory, by id."""
        with self.changed:
            return {model_id: entry.model for model_id, entry in self.all() if entry.model is not None}

    def loading(self) -> dict[str, Progress]:
        """The loads that run, by id."""
        with self.changed:
            return {model_id: entry.loading.progress for model_id, entry in self.all() if entry.loading is not None}

    def residents(self, pinned: Collection[str]) -> dict[str, Resident]:
        """The models in memory and how many requests use each, by id."""
        with self.changed:
            now, clock = time.monotonic(), datetime.now(UTC).replace(tzinfo=None)
            found = {}
            for model_id, entry in self.all():
                if entry.model is not None:
                    expires = None
                    if entry.expires is not None and not entry.users:
                        expires = (clock + timedelta(seconds=entry.expires - now)).isoformat(timespec="microseconds")
                    found[model_id] = Resident(
                        entry.model, entry.users, expires, model_id in pinned, entry.load_seconds
                    )
            return found

    def last_used(self, *, busy: bool = False) -> dict[str, float]:
        """When idle models were last used, by id; with `busy` those in use too."""
        with self.changed:
            return {
                model_id: entry.used
                for model_id, entry in self.all()
                if entry.idle or (busy and entry.model is not None and not entry.reserved)
            }

    def goes(self, model_id: str) -> bool:
        """Whether a model is about to be unloaded."""
        with self.changed:
            entry = self._entries.get(model_id)
            return entry is None or entry.reserved or self.closed

    def others_come(self, model_id: str) -> bool:
        """Whether another model is being loaded."""
        with self.changed:
            return any(entry.loading is not None for name, entry in self.all() if name != model_id)
