"""What the manager asks of what loads models, which is imported late: the module `loading.loader`, as mypy sees to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..progress import Progress
from ..registry.records import LoadSettings, ModelRecord
from ..types import Estimate, LoadOptions

if TYPE_CHECKING:
    from ..inspection.headers import Tensor
    from ..loading import loader
    from ..loading.model import LoadedModel, Memory


# Of the weights of adapters: their tensors by name.
Heads = Iterable["Mapping[str, Tensor]"]


class Loader(Protocol):
    """See `loading.loader` for what each function does, and raises."""

    def warm_up(self) -> None:
        """Set up what the first load would wait for."""

    def load(
        self,
        record: ModelRecord,
        options: LoadOptions,
        folder: Path,
        *,
        settings: LoadSettings | None = ...,
        adapters: Mapping[str, Path] = ...,
        progress: Progress | None = ...,
        memory: Memory | None = ...,
        make: Callable[[str, Progress], Path | None] | None = ...,
        spare: Path | None = ...,
    ) -> LoadedModel:
        """Bring a model, whose files are in `folder`, into memory."""

    def convert(
        self,
        record: ModelRecord,
        options: LoadOptions,
        folder: Path,
        settings: LoadSettings,
        progress: Progress,
        *,
        aside: bool = ...,
    ) -> Path | None:
        """Make OpenVINO's graph of a model; the folder of one that cannot be kept beside it."""

    def estimate(
        self,
        record: ModelRecord,
        options: LoadOptions,
        folder: Path,
        settings: LoadSettings | None = ...,
        *,
        described: bool = ...,
        adapters: Heads = ...,
    ) -> Estimate:
        """What a load would take."""

    def check(self, record: ModelRecord, options: LoadOptions, folder: Path, settings: LoadSettings) -> None:
        """Refuse settings that a load would refuse."""

    def rough_bytes(
        self,
        record: ModelRecord,
        options: LoadOptions,
        folder: Path,
        adapters: Heads = ...,
    ) -> int:
        """About as many bytes as a load takes at most, told at once."""


if TYPE_CHECKING:
    _LOADER: Loader = loader
