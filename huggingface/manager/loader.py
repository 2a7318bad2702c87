"""What loads models, imported late: what the manager asks of it, which mypy holds `loading.loader` to, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from ..errors import DependencyMissing
from ..host.imports import import_library
from ..progress import Progress
from ..registry.records import LoadSettings, ModelRecord
from ..types import Estimate, LoadOptions, Pending

if TYPE_CHECKING:
    from ..inspection.headers import Tensor
    from ..loading import loader
    from ..model import LoadedModel
    from ..model_memory import Memory


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
        make: Callable[[Pending, Progress], Path | None] | None = ...,
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
        backend: str,
        aside: bool = ...,
    ) -> Path | None:
        """Make what a backend lacks for a model; the folder of what cannot be kept beside it."""

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


class LateLoader:
    """The loader, imported when it is first needed, or in the background. Any thread may call it."""

    def __init__(self, imported: Callable[[], None]) -> None:
        """`imported` is called once, when all is there that the process then has for itself."""
        self._imported = imported
        self._timer: threading.Timer | None = None
        self._warm = False
        self._warming_up = threading.Lock()

    def get(self) -> Loader:
        """The loader, ready for work.

        Raises:
            DependencyMissing: torch or transformers cannot be imported.
        """
        loader = cast("Loader", import_library("huggingface.loading.loader"))
        with self._warming_up:
            if not self._warm:
                loader.warm_up()
                self._imported()
                self._warm = True
        return loader

    def begin(self, delay: float) -> None:
        """Import it in the background, `delay` seconds from now; where that fails, the first load says so."""
        self._timer = threading.Timer(delay, self._try)
        self._timer.name = "import-libraries"
        self._timer.start()

    def close(self) -> None:
        """Wait for an import under way: an interpreter that ends in the middle of one may crash."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    def _try(self) -> None:
        with suppress(DependencyMissing):
            self.get()
