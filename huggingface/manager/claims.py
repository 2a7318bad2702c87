"""Loads that wait for memory, oldest first, and the models that admit no new users for them.

A waiting load has a claim. The claim outlives a refusal for some seconds: a client that retries after `Retry-After` is
still first, and the models that should make room for it do not fill again meanwhile. Otherwise overlapping requests
could keep a model out for ever. Not thread-safe: `ModelTable` guards it with its lock.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from ..errors import MemoryHeld

_KEPT = 1.5 * MemoryHeld.retry_after  # seconds that a claim outlives its refusal


@dataclass(slots=True)
class Claim:
    """One model's turn for memory; `victims` are the models in use that should make room for it."""

    model_id: str
    victims: frozenset[str] = field(default_factory=frozenset)
    until: float | None = None  # a reading of `time.monotonic`; None while its load waits


class Claims:
    """All claims, oldest first."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}

    def enter(self, model_id: str) -> Claim:
        """The model's claim: a new one at the end, or the one that a refusal left."""
        self._forget_old()
        claim = self._claims.setdefault(model_id, Claim(model_id))
        claim.until = None
        return claim

    def leave(self, claim: Claim, *, refused: bool) -> None:
        """Ends a claim at once, or some seconds after a refusal."""
        if refused:
            claim.until = time.monotonic() + _KEPT
        else:
            self._claims.pop(claim.model_id, None)

    def first(self, claim: Claim) -> bool:
        """Whether a claim is the oldest."""
        self._forget_old()
        return next(iter(self._claims.values()), None) is claim

    def drains(self, model_id: str) -> bool:
        """Whether a model admits no new users, so that its users end."""
        self._forget_old()
        return any(model_id in claim.victims for claim in self._claims.values())

    def drain(self, claim: Claim, model_ids: Collection[str]) -> None:
        """Stops these models from admitting users for a claim; the claim's earlier victims admit users again."""
        claim.victims = frozenset(model_ids)

    def _forget_old(self) -> None:
        if self._claims:
            now = time.monotonic()
            self._claims = {
                name: claim for name, claim in self._claims.items() if claim.until is None or claim.until > now
            }
