"""The backend seam: the interface of a backend, and the one place that chooses a model's backend.

A backend is a file of its own, a name in `types.Backend`, and a line in `loader`. Must not know any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import InvalidRequest, LocalLLMError, ModelUnsupported
from ..model.parts import Compute
from ..progress import Progress
from ..registry.records import LoadSettings
from ..types import Estimate, LoadOptions, Pending
from .plan import Plan

T = TypeVar("T")

# Makes what a backend lacks for a model, reports to `Progress`, and waits; returns the folder of a result that cannot
# be stored beside the model.
Make = Callable[[Pending, Progress], Path | None]


@dataclass(frozen=True, slots=True)
class Declined:
    """Why a backend does not compute a model.

    `error` is raised by a load that asks for the backend by name; None where only `auto` declines.
    """

    reason: str
    error: LocalLLMError | None = None
    pending: Pending | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What a backend opens a model with; see `loader.load` for the names."""

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

    `folder` is deleted with the model. A load of an `untried` model waits until the model has computed.
    """

    compute: Compute
    device: str
    folder: Path | None = None
    untried: bool = False


class Backend(Protocol):
    """Computes models."""

    @property
    def name(self) -> str:
        """The backend's name in the settings."""

    def offers(self, plan: Plan) -> bool:
        """Whether `auto` asks this backend for such a model, so that another one that computes it has a reason.

        A backend that is asked for by name is always asked.
        """

    def why_not(self, plan: Plan, options: LoadOptions, adapters: Mapping[str, Any]) -> Declined | None:
        """Why the backend cannot compute this model, as far as is known before weights are read; None if it may."""

    def estimate(self, plan: Plan, options: LoadOptions, before: Declined | None) -> Estimate | Declined:
        """What the model would take, or why a load would try the next backend.

        `before` says why the backend before this one does not compute the model.

        Raises: as `loader.load`.
        """

    def open(self, load: Load) -> Opened | Declined:
        """Reads the model; or returns why the backend does not compute it.

        Raises: as `loader.load`.
        """

    def convert(
        self, plan: Plan, options: LoadOptions, settings: LoadSettings, progress: Progress, *, aside: bool
    ) -> Path | None:
        """Makes what the backend lacks for a model (`Declined.pending`), if it is missing.

        With `aside`, other work goes first. Returns the folder of a result that cannot be stored beside the model; the
        caller owns it.

        Raises:
            ConversionFailed: it cannot be made.
            Cancelled: `progress` was cancelled.
        """


def choose(
    backends: Sequence[Backend],
    plan: Plan,
    options: LoadOptions,
    adapters: Mapping[str, Any],
    use: Callable[[Backend, Declined | None], T | Declined],
) -> T:
    """Calls `use` with the backend asked for by name, or with each until one does not decline; returns its result.

    Raises:
        InvalidRequest, ModelUnsupported: the backend that is asked for declines. Also the errors of `use`.
    """
    asked = plan.placement.backend
    declined: Declined | None = None
    for backend in backends:
        if asked != backend.name and not backend.offers(plan):
            continue
        if asked not in ("auto", backend.name):
            declined = Declined(f"{asked} was asked for")
            continue
        answer = backend.why_not(plan, options, adapters) or use(backend, declined)
        if not isinstance(answer, Declined):
            return answer
        check_named(plan, answer)
        declined = answer
    if declined is not None and declined.error is not None:
        raise declined.error
    raise ModelUnsupported(
        f"Model '{plan.record.model_id}' cannot be computed by any of {', '.join(backend.name for backend in backends)}"
    )


def check_named(plan: Plan, declined: Declined) -> None:
    """Refuses a load that asks by name for a backend which declines.

    Raises:
        InvalidRequest, ModelUnsupported: it declines.
    """
    if plan.placement.backend != "auto" and declined.error is not None:
        raise declined.error


def unsuited(name: str, reason: str) -> Declined:
    """The backend does not support the request: a kind of model, or a setting."""
    message = f"Invalid value for field 'backend': {name} is not available here: {reason}"
    return Declined(reason, InvalidRequest(message, "backend"))


def unable(name: str, plan: Plan, reason: str) -> Declined:
    """The backend was tried with this model and cannot compute it."""
    message = f"Invalid value for field 'backend': {name} cannot compute model '{plan.record.model_id}': {reason}"
    return Declined(reason, InvalidRequest(message, "backend"))
