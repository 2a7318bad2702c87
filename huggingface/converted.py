"""A model as OpenVINO's graph: made of the transformers model once, kept beside its files, read again at the next load.

A graph lies in `.local-llm/` in the model's folder, under a name that tells the weights, the settings and the versions
it was made of; it is written under another name and renamed when it is complete. What cannot be served so is noted
there too, so that it is not tried again. Called by the loader, on its thread. Must not know records or the registry.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from .engine.cache import LayerShape
from .engine.layers import NotBatchable, probe
from .engine.openvino import agreement
from .engine.openvino import graph as graphs
from .engine.openvino.library import versions
from .engine.openvino.reserve import Reserve
from .engine.openvino.runner import OpenVINORunner, read_graph
from .engine.parity import Expected, room_for
from .errors import Cancelled
from .memory import drop_file_pages, release_freed

T = TypeVar("T")

logger = logging.getLogger(__name__)

# What makes of a folder, of what is told about its graph, and of whether it goes with the loaded model, a graph as the
# rest of the program knows it.
Read = Callable[[Path, Mapping[str, Any], Path | None], T]

FOLDER = ".local-llm"
EXPECTED = "expected.safetensors"  # what torch gives, beside the graph

# To be raised whenever a graph made by an earlier version of this project is not to be used any more.
_FORMAT = 2

_ROOM = 1.1  # times a graph's size that must be free on the disk before it is written
_ABANDONED = 24 * 3600  # seconds after which an incomplete graph is nobody's any more

# How far the logits of compressed weights may lie from float32's, as a share of their spread: what is worse is a fault.
_CLOSE = {None: agreement.CLOSE, "int8": 0.15, "int4": 0.6}


@dataclass(frozen=True, slots=True)
class Graph:
    """A model's graph on the disk, and what is known of it.

    `shapes` are what each layer keeps of a token, `windows` how far back some of them see, `expected` the logits that
    torch gave. `folder` is to be removed with the model where the graph could not be kept.
    """

    path: Path
    quantization: str | None
    shapes: tuple[LayerShape, ...]
    windows: Mapping[int, int]
    expected: tuple[Expected, ...]
    folder: Path | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of the KV cache of one token."""
        return sum(shape.token_bytes for shape in self.shapes)

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights."""
        return self.path.with_suffix(".bin").stat().st_size

    def runner(self, tokens: int, reserve: Reserve, given_up: Callable[[], bool] = lambda: False) -> OpenVINORunner:
        """What computes with it, tried; its KV cache has room for `tokens`.

        Raises:
            NotBatchable: it does not give here what torch gave. Cancelled: `given_up()` turned true.
        """
        try:
            graph = read_graph(self.path)
            if given_up():
                raise Cancelled
            runner = OpenVINORunner(graph, self.windows, self.shapes, max(tokens, room_for(self.expected)), reserve)
            del graph
            if given_up():
                raise Cancelled
            agreement.check(runner, self.expected, _CLOSE[self.quantization])
        except (NotBatchable, Cancelled, MemoryError):
            raise
        except Exception as error:
            logger.info("OpenVINO cannot compute %s", self.path, exc_info=error)
            raise NotBatchable(f"OpenVINO cannot compute it ({last_line(error)})") from error
        drop_file_pages(self.path.with_suffix(".bin"))  # products have their weights packed, elsewhere
        release_freed()
        return runner


class Place:
    """Where one model's graph of one kind is kept."""

    def __init__(self, folder: Path, marks: Any, quantization: str | None, form: str = "") -> None:
        """`folder` is the model's, `marks` are what tells its weights from any others; `form` is what the graph is
        where it is another than that of a model that generates."""
        self._folder = folder / FOLDER
        self._quantization = quantization
        of_all = json.dumps([_FORMAT, versions(), quantization, marks], sort_keys=True, default=str)
        kind = f"{form}-{quantization or 'float32'}".removeprefix("-")
        self._name = f"openvino-{kind}-{hashlib.sha256(of_all.encode()).hexdigest()[:16]}"
        self._prefix = f"openvino-{kind}-"

    def find(self, read: Read[T], spare: Path | None = None) -> T | None:
        """The graph that is kept, if there is one and it is whole; or else the one in `spare`, which is to be removed
        with the model.

        Raises:
            NotBatchable: it is noted that the model cannot be served so, and why.
        """
        path = self._folder / self._name
        try:
            told = (path / "about.json").read_text("utf-8")
        except OSError:
            if spare is None or not (spare / "about.json").exists():
                return None
            return read(spare, json.loads((spare / "about.json").read_text("utf-8")), spare)
        try:
            about = json.loads(told)
            if (reason := about.get("refused")) is not None:
                raise NotBatchable(str(reason))
            for name, size in about["sizes"].items():
                if (path / name).stat().st_size != size:
                    raise ValueError(f"{name} is not as long as it was")
            return read(path, about, None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("the graph in %s cannot be used, and is made anew: %s", self._name, error)
            shutil.rmtree(path, ignore_errors=True)
            return None

    @property
    def refused(self) -> bool:
        """Whether it is noted that the model cannot be served so."""
        try:
            return "refused" in json.loads((self._folder / self._name / "about.json").read_text("utf-8"))
        except (OSError, ValueError):
            return False

    def refuse(self, reason: str) -> None:
        """Note that the model cannot be served so."""
        with suppress(OSError):
            self._write(lambda folder: _write_json(folder / "about.json", {"refused": reason}))

    def keep(self, graph: Any, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], spare: Path) -> None:
        """Write a graph, what is told about it, and what torch gives; where it cannot be kept beside the model, into
        the folder `spare`.

        Raises:
            OSError: there is no room for it there either.
        """
        size, _ = graphs.constant_bytes(graph)
        about = {**about, "quantization": self._quantization}
        try:
            _check_room(self._folder.parent, size)
            self._write(lambda folder: _save(graph, folder, about, tensors))
        except OSError as error:
            logger.warning("the graph of %s cannot be kept beside it: %s", self._folder.parent.name, error)
            _check_room(spare, size)
            _save(graph, spare, about, tensors)

    def _write(self, write: Callable[[Path], None]) -> Path:
        """Have a folder written, and give it its name when all of it is on the disk."""
        self._folder.mkdir(exist_ok=True)
        target = self._folder / self._name
        unfinished = self._folder / f".{self._name}.{uuid.uuid4().hex[:8]}.tmp"
        unfinished.mkdir()
        try:
            write(unfinished)
            for path in unfinished.iterdir():
                _sync(path)
            _sync(unfinished)
            self._clean()
            try:
                unfinished.rename(target)
            except OSError:
                if not (target / "about.json").exists():  # else another process was as fast
                    raise
            _sync(self._folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return target

    def _clean(self) -> None:
        """Remove graphs of the same kind that were made of something else, and those that nobody will complete."""
        for path in self._folder.iterdir():
            old = path.name.startswith(self._prefix) and path.name != self._name
            with suppress(OSError):
                if old or (path.name.endswith(".tmp") and time.time() - path.stat().st_mtime > _ABANDONED):
                    shutil.rmtree(path, ignore_errors=True)


def find(place: Place, spare: Path | None = None) -> Graph | None:
    """The graph of a model that generates; see `Place.find`."""
    return place.find(_read, spare)


def make(
    model: Any,
    place: Place,
    quantization: str | None,
    spare: Path,
    given_up: Callable[[], bool] = lambda: False,
) -> None:
    """Make a graph of a float32 model, see that it gives what torch gives, and keep it.

    A compressed one is made of one that was tried before its weights were rounded.

    Raises:
        NotBatchable: the model cannot be served so; that is noted.
        Cancelled: `given_up()` turned true. OSError: there is no room on the disk.
        OpenVINOMissing: nncf is not installed.
    """
    try:
        graphs.check_kinds(model)
        shapes = tuple(shape for shape in probe(model) if shape is not None)
        expected = tuple(agreement.torch_expects(model, given_up))
        graph = traced(model, graphs.convert)
        if given_up():
            raise Cancelled
        windows = graphs.windows(model)
        if quantization is not None:
            trial = OpenVINORunner(graph.clone(), windows, shapes, room_for(expected))
            agreement.check(trial, expected)
            trial.close()
            del trial
            release_freed()
            graph = graphs.compress(graph, quantization)
            if given_up():
                raise Cancelled
        about = {
            "windows": {str(layer): width for layer, width in windows.items()},
            "layers": [[*shape.keys, *shape.values] for shape in shapes],
        }
        place.keep(graph, about, _tensors(expected), spare)
    except NotBatchable as error:
        place.refuse(str(error))
        raise
    finally:
        gc.collect()


def traced(model: Any, convert: Callable[[Any], Any]) -> Any:
    """A model's graph, as `convert` makes it.

    Raises:
        NotBatchable: it cannot be made. MemoryError: for lack of that.
    """
    try:
        return convert(model)
    except (NotBatchable, MemoryError):
        raise
    except Exception as error:
        logger.info("OpenVINO cannot convert a %s", type(model).__name__, exc_info=error)
        raise NotBatchable(f"OpenVINO cannot convert it ({last_line(error)})") from error


def last_line(error: Exception) -> str:
    """What an error of OpenVINO's says in a few words."""
    lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
    found = next((line for line in lines if line.startswith("No conversion rule")), None)
    return (found or type(error).__name__)[:200]


def _tensors(expected: tuple[Expected, ...]) -> dict[str, torch.Tensor]:
    tensors = {}
    for number, row in enumerate(expected):
        tensors[f"{number}.prompt"] = torch.tensor(row.prompt)
        tensors[f"{number}.tokens"] = torch.tensor(row.tokens)
        tensors[f"{number}.logits"] = row.logits.contiguous()
    return tensors


def _save(graph: Any, folder: Path, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    import openvino
    from safetensors.torch import save_file

    openvino.save_model(graph, os.fspath(folder / "graph.xml"), compress_to_fp16=False)
    save_file(dict(tensors), folder / EXPECTED)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    _write_json(folder / "about.json", {**about, "sizes": sizes, "versions": versions()})


def _read(path: Path, about: Mapping[str, Any], own: Path | None) -> Graph:
    from safetensors.torch import load_file

    tensors = load_file(path / EXPECTED)
    expected = tuple(
        Expected(
            tensors[f"{number}.prompt"].tolist(),
            None,
            tensors[f"{number}.tokens"].tolist(),
            tensors[f"{number}.logits"].clone(),
        )
        for number in range(len(tensors) // 3)
    )
    device = torch.device("cpu")
    shapes = tuple(LayerShape((a, b), (c, d), torch.float32, device) for a, b, c, d in about["layers"])
    windows = {int(layer): int(width) for layer, width in about["windows"].items()}
    return Graph(path / "graph.xml", about["quantization"], shapes, windows, expected, own)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), "utf-8")


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size * _ROOM:
        raise OSError(f"its graph takes {size} bytes, and {free} are free on the disk")


def _sync(path: Path) -> None:
    """Have a file or a folder on the disk, and not only on its way there."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
