"""Stores a model's graph in `.local-llm/` in its folder, complete or not at all.

A graph's name identifies the weights, the settings and the versions that it was made of. Must not know what a graph
computes, or records.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from ...cancellation import LOOK_AGAIN
from ...engine.layers import NotBatchable
from ...engine.openvino.constants import NumbersFile
from ...engine.openvino.graph import constant_bytes
from ...engine.openvino.library import openvino, versions
from ...host.memory import few_file_pages
from ..kept import KeptFolder, write_json

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Creates the graph's object from its folder, its stored description, and the folder to delete with the model, if any.
Read = Callable[[Path, Mapping[str, Any], Path | None], T]

EXPECTED = "expected.safetensors"  # torch's results, beside the graph

# Increase this whenever graphs of earlier versions of this project must not be used any more.
_FORMAT = 4

# Bytes on the disk for each number of a graph that is made: in the graph, and in the file that it is written from.
_MAKING = {None: 8, "int8": 2, "int4": 1.5}

_ROOM = 1.1  # times a graph's size that must be free on the disk before it is written


class GraphPlace(KeptFolder):
    """The place of one model's graph of one kind."""

    def __init__(self, folder: Path, marks: Any, quantization: str | None, form: str = "") -> None:
        """`folder` is the model's, `marks` identify its weights; `form` is the graph's kind where it is not that of a
        model that generates."""
        kind = f"{form}-{quantization or 'float32'}".removeprefix("-")
        super().__init__(folder, f"openvino-{kind}", [_FORMAT, versions(), quantization, marks])
        self._quantization = quantization

    def find(self, read: Read[T], spare: Path | None = None) -> T | None:
        """The stored graph, if it is complete; otherwise the one in `spare`, which is deleted with the model.

        Raises:
            NotBatchable: it is recorded that the model cannot be served so; the message says why.
        """
        path = self.path
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
            _check_sizes(path, about)
            return read(path, about, None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("the graph in %s cannot be used, it will be made again: %s", self._name, error)
            shutil.rmtree(path, ignore_errors=True)
            return None

    @property
    def present(self) -> bool:
        """Whether a complete graph is stored, or a record that there can be none."""
        path = self.path
        try:
            about = json.loads((path / "about.json").read_text("utf-8"))
            if about.get("refused") is None:
                _check_sizes(path, about)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        return True

    @contextmanager
    def locked(self, check: Callable[[], None]) -> Iterator[None]:
        """Lets one thread of one process at a time make a graph of this model, and deletes leftovers of a killed one.

        A folder that is read-only has no lock: each process makes its own graph.

        Raises:
            Any error of `check`, which is called while another thread or process has the lock.
        """
        lock = None
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            lock = FileLock(self._folder / ".lock", thread_local=False)
        while lock is not None and not lock.is_locked:
            try:
                lock.acquire(timeout=LOOK_AGAIN)
            except Timeout:
                check()
            except (OSError, NotImplementedError):
                lock = None
        try:
            if lock is not None:
                for path in self._folder.glob(f".{self._name}.*.tmp"):
                    shutil.rmtree(path, ignore_errors=True)
            yield
        finally:
            if lock is not None:
                lock.release()

    @contextmanager
    def numbers_file(self, numbers: int, spare: Path) -> Iterator[NumbersFile]:
        """A file for the numbers of a graph of so many that is being made; in `spare` if the model's folder has no room
        for it and for the graph."""
        folder = spare / "numbers"
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            _check_room(self._folder, int(numbers * _MAKING[self._quantization]))
            unfinished = self._folder / f".{self._name}.numbers.tmp"
            unfinished.mkdir()
            folder = unfinished
        folder.mkdir(exist_ok=True)
        try:
            path = folder / "numbers.bin"
            with few_file_pages(path):
                yield NumbersFile(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, graph: Any, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], spare: Path) -> None:
        """Writes a graph, its description, and torch's results; into `spare` if they cannot be stored beside the model.

        Raises:
            OSError: there is no space there either.
        """
        size, _ = constant_bytes(graph)
        about = {**about, "quantization": self._quantization, "bytes": size}
        try:
            _check_room(self._folder.parent, size)
            self.write(lambda folder: _save(graph, folder, about, tensors))
        except OSError as error:
            logger.warning("the graph of %s cannot be stored beside it: %s", self._folder.parent.name, error)
            _check_room(spare, size)
            _save(graph, spare, about, tensors)


def _save(graph: Any, folder: Path, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    openvino().save_model(graph, os.fspath(folder / "graph.xml"), compress_to_fp16=False)
    save_file(dict(tensors), folder / EXPECTED)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    write_json(folder / "about.json", {**about, "sizes": sizes, "versions": versions()})


def _check_sizes(path: Path, about: Mapping[str, Any]) -> None:
    """Raises: ValueError, OSError, KeyError where a graph is incomplete."""
    for name, size in about["sizes"].items():
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} has another size than when it was written")


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size * _ROOM:
        raise OSError(f"its graph takes {size} bytes, and {free} are free on the disk")
