"""The backend seam: what a backend is to a load, and the one place that chooses which of them computes a model.

A backend is a file of its own, a name in `types.Backend`, and a line in `loader`. Must not know any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import InvalidRequest, LocalLLMError, ModelUnsupported
from ..model import Compute
from ..progress import Progress
from ..registry.records import LoadSettings
from ..types import Estimate, LoadOptions, Pending
from .plan import Plan

T = TypeVar("T")

# Has what a backend lacks for a model made, tells `Progress` how far that is, and waits: gives the folder of what could
# not be kept beside the model.
Make = Callable[[Pending, Progress], Path | None]


@dataclass(frozen=True, slots=True)
class Declined:
    """Why a backend does not compute a model, and what a load that asks for it by name raises; None where only `auto`
    finds that."""

    reason: str
    error: LocalLLMError | None = None
    pending: Pending | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What a backend opens a model with; the names are those of `loader.load`."""

    plan: Plan
    options: LoadOptions
    settings: LoadSettings
    adapters: Mapping[str, Path]
    tokenizer: Any
    progress: Progress
    make: Make | None
    spare: Path | None


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that a backend has opened.

    `folder` is the model's own and goes with it. A load waits for one that is `untried` until that has computed.
    """

    compute: Compute
    device: str
    folder: Path | None = None
    untried: bool = False


class Backend(Protocol):
    """What computes a model."""

    @property
    def name(self) -> str:
        """Its name in the settings."""

    def why_not(self, plan: Plan, options: LoadOptions, adapters: Mapping[str, Any]) -> Declined | None:
        """Why it cannot compute this model, as far as that is known before weights are read; None where it may."""

    def estimate(self, plan: Plan, options: LoadOptions, before: Declined | None) -> Estimate | Declined:
        """What the model would take, or why a load would go on to the next backend; `before` is why the one before it
        does not compute the model.

        Raises: as `loader.load`.
        """

    def open(self, load: Load) -> Opened | Declined:
        """The model, read, or why it cannot be computed so.

        Raises: as `loader.load`.
        """

    def convert(
        self, plan: Plan, options: LoadOptions, settings: LoadSettings, progress: Progress, *, aside: bool
    ) -> Path | None:
        """Make what it lacks for a model (`Declined.pending`), unless that is there; other work goes first where it is
        made `aside`. Returns the folder of what cannot be kept beside the model: it is the caller's.

        Raises:
            ConversionFailed: it cannot be made. Cancelled: `progress` was cancelled.
        """


def choose(
    backends: Sequence[Backend],
    plan: Plan,
    options: LoadOptions,
    adapters: Mapping[str, Any],
    use: Callable[[Backend, Declined | None], T | Declined],
) -> T:
    """What `use` makes of the backend that is asked for by name, or of the first that does not decline.

    Raises:
        InvalidRequest, ModelUnsupported: the one that is asked for declines. Besides, what `use` raises.
    """
    asked = plan.placement.backend
    declined: Declined | None = None
    for backend in backends:
        if asked not in ("auto", backend.name):
            declined = Declined(f"{asked} was asked for")
            continue
        answer = backend.why_not(plan, options, adapters) or use(backend, declined)
        if not isinstance(answer, Declined):
            return answer
        check_named(plan, answer)
        declined = answer
    raise ModelUnsupported(
        f"Model '{plan.record.model_id}' is computed by none of {', '.join(backend.name for backend in backends)}"
    )


def check_named(plan: Plan, declined: Declined) -> None:
    """Refuse a load that asks by name for a backend which declines.

    Raises:
        InvalidRequest, ModelUnsupported: it does.
    """
    if plan.placement.backend != "auto" and declined.error is not None:
        raise declined.error


def unsuited(name: str, reason: str) -> Declined:
    """The backend cannot compute what is asked for: a kind of model, or a setting."""
    message = f"Invalid value for field 'backend': {name} is not available here: {reason}"
    return Declined(reason, InvalidRequest(message, "backend"))


def unable(name: str, plan: Plan, reason: str) -> Declined:
    """The backend was tried with this very model, and cannot compute it."""
    message = f"Invalid value for field 'backend': {name} cannot compute model '{plan.record.model_id}': {reason}"
    return Declined(reason, InvalidRequest(message, "backend"))
