"""The graph of a model that reads texts, to embed, classify or fill them: made once, stored, and read at later loads.

The loader calls it, on its thread or in the process that converts. Must not know records or the registry.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...cancellation import NEVER, Cancellation
from ...engine.layers import NotBatchable
from ...engine.openvino import encoder as encoders
from ...engine.openvino.blanks import Blanks
from ...engine.openvino.constants import settle
from ...engine.openvino.encoder import Encoder, EncoderForm, Padding, Sample
from ...engine.openvino.failures import computed
from ...engine.openvino.lazy_weights import Reserve
from ...engine.openvino.runner import read_graph
from ...host.memory import few_file_pages, release_freed
from ...tasks import Head
from ...tasks.positions import max_positions
from .graph_store import EXPECTED, GraphPlace

# The tasks of models with these heads need only their forward pass, for rows of tokens.
HEADS: frozenset[Head] = frozenset(
    {"base", "masked-lm", "question-answering", "sequence-classification", "token-classification"}
)


@dataclass(frozen=True, slots=True)
class EncoderGraph:
    """A model's graph on the disk, and what is stored with it; `expected` are torch's results.

    `folder`, of a graph that could not be stored beside the model, is deleted with the model.
    """

    path: Path
    weight_bytes: int
    quantization: str | None
    form: EncoderForm
    expected: tuple[Sample, ...]
    folder: Path | None = None

    def encoder(self, shell: Any, reserve: Reserve, cancellation: Cancellation = NEVER) -> Encoder:
        """Creates a tested encoder of the graph, and puts it behind `shell`, a model without weights.

        Raises:
            NotBatchable: the graph does not give torch's results here.
            Cancelled: by `cancellation`.
        """
        weights = self.path.with_suffix(".bin")  # products keep them packed in memory of their own
        with computed("compute"), few_file_pages(weights):
            graph = read_graph(self.path)
            cancellation.check()
            encoder = Encoder(graph, self.form)
            del graph
            cancellation.check()
            encoders.check(encoder, self.expected, self.quantization)
        release_freed()
        encoder.serve(shell, reserve)
        return encoder


def find(place: GraphPlace, spare: Path | None = None) -> EncoderGraph | None:
    """The graph of a model that reads; see `Place.find`."""
    return place.find(_read, spare)


def make(
    model: Any,
    tokenizer: Any,
    place: GraphPlace,
    quantization: str | None,
    spare: Path,
    cancellation: Cancellation = NEVER,
    blanks: Blanks | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> None:
    """Makes a graph of a float32 model, compares it with torch, and stores it.

    The model's weights may be `blanks`. A graph whose weights are rounded is compared before they are. `done` is called
    with how many numbers of the graph's weights are written.

    Raises:
        NotBatchable: OpenVINO cannot serve the model; that is recorded.
        NotBlank: the graph cannot be made of blanks.
        Cancelled: by `cancellation`.
        OSError: the disk lacks space.
    """
    blanks = Blanks() if blanks is None else blanks
    padding = Padding(tokenizer.pad_token_id, tokenizer.padding_side == "left")
    try:
        with blanks.filled(), computed("convert"):
            form = encoders.find_form(model, tokenizer.model_input_names)
        with computed("convert"):
            graph = encoders.convert(model, form)
        with place.numbers_file(sum(tensor.numel() for tensor in model.parameters()), spare) as file:
            exact = graph if quantization is None else graph.clone()
            settle(exact, blanks, None, file, done)
            some = partial(
                encoders.samples, model, form, padding, maximum=max_positions(model), cancellation=cancellation
            )
            with computed("compute"), blanks.filled():
                expected = tuple(some(kept=True))
                trial = Encoder(exact, form)
                encoders.check(trial, expected)
                for sample in some(kept=False):
                    encoders.check(trial, [sample])
            del trial, exact
            release_freed()
            if quantization is not None:
                settle(graph, blanks, quantization, file)
                cancellation.check()
            place.keep(graph, _about(form), _tensors(expected), spare)
    except NotBatchable as error:
        place.refuse(str(error))
        raise
    finally:
        gc.collect()


def _about(form: EncoderForm) -> dict[str, Any]:
    return {
        "inputs": list(form.inputs),
        "optional": list(form.optional),
        "outputs": list(form.outputs),
        "kind": list(form.kind),
    }


def _tensors(expected: tuple[Sample, ...]) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{name}": tensor.contiguous()
        for number, sample in enumerate(expected)
        for name, tensor in (*sample.inputs.items(), *sample.outputs.items())
    }


def _read(path: Path, about: Mapping[str, Any], own: Path | None) -> EncoderGraph:
    from safetensors.torch import load_file

    module, name = about["kind"]
    form = EncoderForm(tuple(about["inputs"]), tuple(about["optional"]), tuple(about["outputs"]), (module, name))
    tensors = load_file(path / EXPECTED)
    expected = tuple(
        Sample(
            {name: tensors[f"{number}.{name}"].clone() for name in form.inputs},
            {name: tensors[f"{number}.{name}"].clone() for name in form.outputs},
        )
        for number in range(len(tensors) // len(form.inputs + form.outputs))
    )
    return EncoderGraph(path / "graph.xml", about["bytes"], about["quantization"], form, expected, own)
