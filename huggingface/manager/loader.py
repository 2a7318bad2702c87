"""The loader, imported late, and the functions that the manager calls: mypy checks `loading.loader` against them."""

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
    from ..model.loaded import LoadedModel
    from ..model.memory import Memory


# For each adapter, the tensors of its weights by name.
Heads = Iterable["Mapping[str, Tensor]"]


class Loader(Protocol):
    """See `loading.loader` for what each function does and raises."""

    def warm_up(self) -> None:
        """Sets up what the first load would wait for."""

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
        """Loads a model, whose files are in `folder`."""

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
        """Makes what a backend lacks for a model; returns the folder of a result that cannot be stored beside the
        model."""

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
        """Computes what a load would take."""

    def check(self, record: ModelRecord, options: LoadOptions, folder: Path, settings: LoadSettings) -> None:
        """Refuses settings that a load would refuse."""

    def rough_bytes(
        self,
        record: ModelRecord,
        options: LoadOptions,
        folder: Path,
        adapters: Heads = ...,
    ) -> int:
        """A quick upper bound of the bytes that a load takes."""


if TYPE_CHECKING:
    _LOADER: Loader = loader


class LateLoader:
    """The loader, imported on its first use, or in the background. Any thread may call it."""

    def __init__(self, imported: Callable[[], None]) -> None:
        """`imported` is called once, when the process has all the memory that it needs without a model."""
        self._imported = imported
        self._timer: threading.Timer | None = None
        self._warm = False
        self._warming_up = threading.Lock()

    def get(self) -> Loader:
        """The loader, ready to load.

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
        """Imports the loader in the background, `delay` seconds from now; if that fails, the first load reports it."""
        self._timer = threading.Timer(delay, self._try)
        self._timer.name = "import-libraries"
        self._timer.start()

    def close(self) -> None:
        """Waits for a running import: an interpreter that ends during an import may crash."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    def _try(self) -> None:
        with suppress(DependencyMissing):
            self.get()
