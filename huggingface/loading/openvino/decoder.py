"""The graph of a model that generates: made once, stored, and read at later loads.

The loader calls it, on its thread or in the process that converts. Must not know records or the registry.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...cancellation import NEVER, Cancellation
from ...engine.layers import NotBatchable, probe
from ...engine.openvino import agreement
from ...engine.openvino import graph as graphs
from ...engine.openvino.blanks import Blanks
from ...engine.openvino.constants import settle
from ...engine.openvino.failures import computed
from ...engine.openvino.lazy_weights import Reserve
from ...engine.openvino.runner import OpenVINORunner, read_graph
from ...engine.torch.cache import LayerShape
from ...engine.torch.parity import Expected, as_tensors, from_tensors, room_for
from ...host.memory import few_file_pages, release_freed
from .graph_store import EXPECTED, GraphPlace

# The largest difference of compressed weights' logits from float32's, as a share of their spread: a larger one is a
# fault.
_CLOSE = {None: agreement.CLOSE, "int8": 0.15, "int4": 0.6}

TRIED = 4 * 10**8  # numbers up to which a graph is tried itself, in float32, before its weights are rounded


@dataclass(frozen=True, slots=True)
class Graph:
    """A model's graph on the disk, and what is stored with it.

    `shapes` are what each layer keeps of a token, `windows` how far back some layers see, `expected` torch's logits.
    `folder`, of a graph that could not be stored beside the model, is deleted with the model.
    """

    path: Path
    weight_bytes: int
    quantization: str | None
    shapes: tuple[LayerShape, ...]
    windows: Mapping[int, int]
    expected: tuple[Expected, ...]
    folder: Path | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of the KV cache of one token."""
        return sum(shape.token_bytes for shape in self.shapes)

    def runner(self, tokens: int, reserve: Reserve, cancellation: Cancellation = NEVER) -> OpenVINORunner:
        """Creates a tested runner of the graph; its KV cache has room for `tokens`.

        Raises:
            NotBatchable: the graph does not give torch's results here.
            Cancelled: by `cancellation`.
        """
        weights = self.path.with_suffix(".bin")  # products keep them packed in memory of their own
        with computed("compute"), few_file_pages(weights):
            graph = read_graph(self.path)
            cancellation.check()
            runner = OpenVINORunner(graph, self.windows, self.shapes, max(tokens, room_for(self.expected)), reserve)
            del graph
            cancellation.check()
            agreement.check(runner, self.expected, _CLOSE[self.quantization])
        release_freed()
        return runner


def find(place: GraphPlace, spare: Path | None = None) -> Graph | None:
    """The graph of a model that generates; see `Place.find`."""
    return place.find(_read, spare)


def make(
    model: Any,
    place: GraphPlace,
    quantization: str | None,
    spare: Path,
    cancellation: Cancellation = NEVER,
    blanks: Blanks | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> None:
    """Makes a graph of a float32 model, which it consumes, compares it with torch, and stores it.

    The model's weights may be `blanks`. A graph whose weights are rounded is compared before they are: itself where
    that takes little memory, otherwise a small model of the same code. `done` is called with how many numbers of the
    graph's weights are written.

    Raises:
        NotBatchable: OpenVINO cannot serve the model; that is recorded.
        NotBlank: the graph cannot be made of blanks.
        Cancelled: by `cancellation`.
        OSError: the disk lacks space.
    """
    blanks = Blanks() if blanks is None else blanks
    numbers = sum(tensor.numel() for tensor in model.parameters())
    try:
        graphs.check_kinds(model)
        agreement.check_far(model, cancellation)
        shapes = tuple(shape for shape in probe(model) if shape is not None)
        with blanks.filled():
            expected = tuple(agreement.torch_expects(model, cancellation))
        with computed("convert"):
            graph = graphs.convert(model, blanks, quantization)
        cancellation.check()
        windows = graphs.windows(model)
        itself = quantization is not None and not (numbers > TRIED and agreement.check_small(model, cancellation))
        _unload(model)
        with place.numbers_file(numbers, spare) as file:
            if itself:
                trial = graph.clone()
                settle(trial, blanks, None, file)
                runner = OpenVINORunner(trial, windows, shapes, room_for(expected))
                agreement.check(runner, expected)
                runner.close()
                del trial, runner
                release_freed()
            settle(graph, blanks, quantization, file, done)
            cancellation.check()
            about = {
                "windows": {str(layer): width for layer, width in windows.items()},
                "layers": [[*shape.keys, *shape.values] for shape in shapes],
            }
            place.keep(graph, about, as_tensors(expected), spare)
    except NotBatchable as error:
        place.refuse(str(error))
        raise
    finally:
        gc.collect()


def _unload(model: Any) -> None:
    """Frees the weights that the graph does not use: it has copies of those that it merged."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)
    gc.collect()
    release_freed()


def _read(path: Path, about: Mapping[str, Any], own: Path | None) -> Graph:
    from safetensors.torch import load_file

    expected = from_tensors(load_file(path / EXPECTED))
    device = torch.device("cpu")
    shapes = tuple(LayerShape((a, b), (c, d), torch.float32, device) for a, b, c, d in about["layers"])
    windows = {int(layer): int(width) for layer, width in about["windows"].items()}
    return Graph(path / "graph.xml", about["bytes"], about["quantization"], shapes, windows, expected, own)
