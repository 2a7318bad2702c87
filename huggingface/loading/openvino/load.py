"""OpenVINO as a backend: whether it may compute a model, the model's graph, and the model without its weights.

The loader calls it, on its thread; `convert` also runs in a process of its own. Must not know the registry or the
manager.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from ...cancellation import Cancellation
from ...engine.layers import NotBatchable
from ...engine.openvino import library
from ...engine.openvino.blanks import Blanks, NotBlank
from ...engine.openvino.constants import GROUP
from ...engine.openvino.lazy_weights import Reserve
from ...engine.torch.lora import Adapters
from ...errors import ConversionFailed, FilesMissing, ModelUnsupported, public
from ...host.memory import available_bytes, forget_frames
from ...model.memory import ModelMemory
from ...model.parts import Serving
from ...progress import Progress
from ...registry.records import LoadSettings, ModelRecord
from ...tasks import Head
from ...types import EngineOptions, Estimate, LoadOptions, Pending
from ..backend import Declined, Load, Opened, check_named, unable, unsuited
from ..estimate import Weights, estimate
from ..lora import AttachedAdapters
from ..plan import Plan, auto_class, file_bytes, look, model_marks, own_dtype, weights_files
from ..pretrained import BUILDING, read_blank, read_model, read_tokenizer, watched
from ..shell import Shell, open_shell
from ..torch import TorchCompute
from . import decoder, encoder, subprocess
from .decoder import Graph
from .encoder import EncoderGraph
from .graph_store import GraphPlace
from .subprocess import Wanted

logger = logging.getLogger(__name__)

# Bytes of files up to which this process converts a model that a load waits for: another process takes longer to import
# torch.
CONVERTED_HERE = 32 * 2**20

# The same for a conversion `aside`: in this process it would delay the requests that are answered meanwhile.
CONVERTED_HERE_ASIDE = 0

# The nice value of a conversion `aside`: it gets a tenth of a core that is always busy. With 19 it would take hours
# there.
_NICE = 10

# Bytes that the converting process takes besides weights: torch, transformers, openvino, and a part of one weight.
_CONVERTING = 430 * 10**6


class OpenVINO:
    """OpenVINO as a `Backend`."""

    name = "openvino"

    def offers(self, plan: Plan) -> bool:  # noqa: ARG002 - the protocol's
        """True: `why_not` says what `auto` keeps from OpenVINO."""
        return True

    def why_not(self, plan: Plan, options: LoadOptions, adapters: Mapping[str, Any]) -> Declined | None:
        """A kind of model, a setting, a missing package, or a record that the model has no graph."""
        if (reason := _rule_against(plan, adapters)) is not None:
            return unsuited(self.name, reason)
        if not library.installed():
            message = "cannot be computed by OpenVINO, which is not installed: pip install openvino"
            return Declined("not installed: openvino", ModelUnsupported(f"Model '{plan.record.model_id}' {message}"))
        reason = _place(plan, options).refused
        return None if reason is None else unable(self.name, plan, reason)

    def estimate(self, plan: Plan, options: LoadOptions, before: Declined | None) -> Estimate | Declined:  # noqa: ARG002 - the protocol's
        """What the model's graph takes; under `auto`, only if there is one."""
        unmade = None if _place(plan, options).present else _unmade(plan, options)
        if unmade is not None and plan.placement.backend == "auto":
            return unmade
        return estimate(plan, options, self.name, partial(_weigh, plan), unmade)

    def convert(
        self, plan: Plan, options: LoadOptions, settings: LoadSettings, progress: Progress, *, aside: bool
    ) -> Path | None:
        """Makes the graph: here, or in a process of its own; with `aside` always in a process of its own."""
        place = _place(plan, options)
        bare = ModelRecord(
            plan.record.model_id, plan.record.name, plan.record.model_type, gguf_file=plan.record.gguf_file
        )
        with place.locked(progress.check), ExitStack() as undo:
            if (reason := place.refused) is not None:
                raise ConversionFailed(reason)
            if place.present:  # another server was faster
                return None
            spare = Path(tempfile.mkdtemp(prefix="local-llm-"))
            undo.callback(shutil.rmtree, spare, ignore_errors=True)
            wanted = Wanted(
                bare, replace(options, engine=EngineOptions()), plan.folder, settings, spare, _NICE if aside else 0
            )
            try:
                if file_bytes(plan, options) > (CONVERTED_HERE_ASIDE if aside else CONVERTED_HERE):
                    subprocess.convert(wanted, progress)
                else:
                    with BUILDING:
                        convert(wanted, progress)
            except ConversionFailed as error:
                if error.final:
                    place.refuse(str(error))
                raise
            if not (spare / "about.json").exists():
                return None
            undo.pop_all()
            return spare

    def open(self, load: Load) -> Opened | Declined:
        """Reads the graph, and the model without its weights.

        If there is no graph, `load.make` makes it if OpenVINO is asked for by name; without `load.make`, it is made
        here.
        """
        plan, options, spare = load.plan, load.options, load.spare
        placement = plan.placement
        with ExitStack() as undo:
            place = _place(plan, options)
            find = encoder.find if plan.head in encoder.HEADS else decoder.find
            try:
                graph = find(place, spare)
                missing = graph is None
                if missing and placement.backend == "auto":
                    return _unmade(plan, options)
                shell = open_shell(plan, options)  # refuses faulty files
                if missing:
                    if file_bytes(plan, options) > CONVERTED_HERE:
                        numbers = sum(tensor.numel() for tensor in shell.model.parameters())
                        _check_conversion(_converting_bytes(plan, options, numbers))
                    if load.make is None:
                        spare = self.convert(plan, options, load.settings, load.progress, aside=False)
                    else:
                        spare = load.make(_pending(plan, options), load.progress)
                    if spare is not None:
                        undo.callback(shutil.rmtree, spare, ignore_errors=True)
                    graph = find(place, spare)
                if graph is None:
                    raise NotBatchable("its graph could not be kept anywhere")
            except (NotBatchable, ConversionFailed) as error:
                return unable(self.name, plan, str(error))
            if graph.folder is not None:
                undo.pop_all()  # the folder is deleted with the model

        def refuse(reason: str) -> None:
            place.refuse(reason)
            check_named(plan, unable(self.name, plan, reason))

        compute = GraphCompute(plan.head, graph, shell, options.engine.kv_cache_bytes, refuse)
        return Opened(compute, "cpu", graph.folder, untried=missing)


class GraphCompute:
    """A model that OpenVINO computes by its graph, as a `Compute`."""

    backend = OpenVINO.name

    def __init__(
        self, head: Head, graph: Graph | EncoderGraph, shell: Shell, kv_cache_bytes: int, refuse: Callable[[str], None]
    ) -> None:
        """If the graph gives other numbers on this machine, `refuse` is called with the reason, so that it is not tried
        again; then torch computes, unless `refuse` raises."""
        self.model = shell.model
        self.adapters: Adapters = AttachedAdapters("", shell.model, {})
        self._head = head
        self._graph = graph
        self._shell = shell
        self._kv_cache_bytes = kv_cache_bytes
        self._refuse = refuse

    @property
    def weights(self) -> Mapping[str, int]:
        """Bytes of the graph's weights."""
        return {"cpu": self._graph.weight_bytes}

    def serve(self, memory: ModelMemory, cancellation: Cancellation) -> Serving:
        """Serves by the graph, in a batch or behind the model's own forward pass."""
        graph = self._graph
        reserve = Reserve(self.model, self._shell.read, memory.take_own, self._shell.weights)
        try:
            if isinstance(graph, EncoderGraph):
                encoder = graph.encoder(self.model, reserve, cancellation)
                memory.set_weights({"cpu": encoder.weight_bytes})
                return Serving(self.backend, reason="it does not generate text", encoder=encoder)
            runner = graph.runner(self._kv_cache_bytes // graph.token_bytes, reserve, cancellation)
        except NotBatchable as error:
            logger.warning("a %s is not computed by OpenVINO: %s", type(self.model).__name__, error)
            self._refuse(str(error))
            forget_frames(error)  # the frames hold what was compiled
            declined = str(error)
        else:
            memory.set_weights({"cpu": runner.weight_bytes})
            cache, copied = runner.cache, runner.copied_bytes  # a table is read in place, from its file
            return Serving(self.backend, runner, unwritten=lambda: cache.unwritten_bytes + copied)
        memory.set_weights({})
        reserve.fetch()
        reserve.stay()
        compute = TorchCompute(self._head, self.model)
        memory.set_weights(compute.weights)
        return replace(compute.serve(memory, cancellation), declined=declined)


def _rule_against(plan: Plan, adapters: Mapping[str, Any]) -> str | None:
    """The rule that keeps OpenVINO from computing such a model with these settings; None if none does."""
    placement = plan.placement
    if plan.head == "seq2seq-lm" or (plan.config.is_encoder_decoder and _whole(plan)):
        return "it is an encoder-decoder"
    rules = (
        (plan.head not in ("causal-lm", *encoder.HEADS), "it reads tables"),
        (placement.device != "cpu" or placement.device_map is not None, "it is not on the CPU alone"),
        (
            (placement.dtype or own_dtype(plan)) is not torch.float32,
            "OpenVINO computes in float32 here, and dtype says otherwise",
        ),
        (
            placement.kv_dtype not in (None, torch.float32),
            "its keys and values are float32",
        ),
        (placement.stored, "OpenVINO widens weights of 16 bits"),
        (bool(adapters), "it has adapters"),
        (placement.attention is not None, "attn_implementation is for torch"),
        (placement.compiles, "compile is for torch"),
    )
    return next((reason for applies, reason in rules if applies), None)


def _unmade(plan: Plan, options: LoadOptions) -> Declined:
    """There is no graph yet, and OpenVINO was not asked for by name."""
    return Declined("its graph is being made", pending=_pending(plan, options))


def _pending(plan: Plan, options: LoadOptions) -> Pending:
    return Pending(OpenVINO.name, _place(plan, options).key, partial(_conversion_bytes, plan, options))


def _conversion_bytes(plan: Plan, options: LoadOptions, numbers: int) -> int:
    """Bytes that another process takes to make the graph of a model with `numbers` parameters.

    0 for a model that a load waits for and that is so small that no other process makes its graph.
    """
    try:
        size = file_bytes(plan, options)
    except FilesMissing:  # they are not downloaded yet
        size = numbers * own_dtype(plan).itemsize
    small = plan.placement.backend == "openvino" and size <= CONVERTED_HERE
    return 0 if small else _converting_bytes(plan, options, numbers)


def _weigh(plan: Plan, model: Any) -> Weights:
    total, table = _graph_bytes(model, plan.placement.quantization)
    return Weights(total, {plan.placement.device: total}, table)


def _graph_bytes(model: Any, quantization: str | None) -> tuple[int, int]:
    """Bytes of the constants of a model's OpenVINO graph, and of the table that is also multiplied.

    A compressed matrix has a 16-bit scale and an 8-bit zero point per output; in 4 bits, a 16-bit scale and a 4-bit
    zero point per 32 numbers. The first and the last matrix, and those of an attention's values, stay in 8 bits, as
    `constants` rounds them.
    """
    table = model.get_input_embeddings().weight
    outputs = model.get_output_embeddings()
    last = None if outputs is None else outputs.weight
    values = _value_weights(model) if quantization == "int4" else set()

    def size(tensor: torch.Tensor) -> int:
        if quantization is None or tensor.dim() < 2:
            return tensor.numel() * 4
        eight = tensor.numel() + 3 * tensor.shape[0]
        wide = tensor is table or tensor is last or id(tensor) in values
        wide = wide or tensor.shape[-1] % GROUP != 0
        return eight if quantization == "int8" or wide else tensor.numel() // 2 + 5 * (tensor.numel() // GROUP) // 2

    return sum(map(size, model.parameters())), size(table) if last is not None and last is table else 0


def _value_weights(model: Any) -> set[int]:
    """The `id` of one weight a layer that has the shape of an attention's weights for values.

    Those for keys have it too: where only one weight a layer has it, values are computed together with other numbers.
    """
    config = model.config.get_text_config()
    layers = config.per_layer_config if config.is_heterogeneous else [config] * getattr(config, "num_hidden_layers", 0)
    values: set[int] = set()
    for shape, count in Counter(map(_value_shape, layers)).items():
        alike = [tensor for tensor in model.parameters() if tuple(tensor.shape) == shape]
        values |= {id(tensor) for tensor in alike[:count]} if len(alike) >= 2 * count else set()
    return values


def _value_shape(layer: Any) -> tuple[int, int]:
    """The shape of a layer's weights for the values of its attention, by its config."""

    def number(name: str, otherwise: int = 0) -> int:
        value = getattr(layer, name, None)
        return value if isinstance(value, int) else otherwise

    heads, width = number("num_attention_heads"), number("hidden_size")
    return number("num_key_value_heads", heads) * number("head_dim", width // heads if heads else 0), width


def _converting_bytes(plan: Plan, options: LoadOptions, numbers: int) -> int:
    """Bytes that the process takes that makes the graph of a model with `numbers` parameters."""
    quantization = plan.placement.quantization
    whole = plan.gguf is not None
    with suppress(FilesMissing):  # they are not downloaded yet
        whole = whole or any(path.suffix != ".safetensors" for path in weights_files(plan, options))
    tried = plan.head in encoder.HEADS or (quantization is not None and numbers <= decoder.TRIED)
    return 4 * numbers * (whole + tried) + _CONVERTING


def _check_conversion(need: int) -> None:
    """Checks that there is memory to make a graph, which takes `need` bytes.

    Raises:
        ConversionFailed: there is not.
    """
    free = available_bytes()
    if free is not None and free < need:
        raise ConversionFailed(f"its conversion takes about {need} bytes of memory, and {free} are free")


def _whole(plan: Plan) -> bool:
    """Whether the model is more than an encoder."""
    return auto_class(plan.config, plan.head) is not transformers.AutoModelForTextEncoding


def _place(plan: Plan, options: LoadOptions) -> GraphPlace:
    """The place of the model's graph."""
    wanted = [plan.head, plan.record.gguf_file, plan.trusted, options.allow_pickle]
    form = "encoder" if plan.head in encoder.HEADS else ""
    return GraphPlace(plan.folder, [model_marks(plan), wanted], plan.placement.quantization, form)


def convert(wanted: Wanted, progress: Progress) -> None:
    """Makes a model's graph and stores it; except for small models in a process of its own, see `subprocess`.

    Raises:
        ConversionFailed: OpenVINO cannot compute the model, or the disk lacks space for its graph. Otherwise as `open`.
    """
    options, folder, spare = wanted.options, wanted.folder, wanted.spare
    plan = look(wanted.record, options, folder, wanted.settings)
    exact = replace(plan, placement=replace(plan.placement, quantization=None))
    progress.begin("read", file_bytes(plan, options))
    blanks = Blanks()
    with watched(progress):
        model = read_blank(exact, options, blanks)
    try:
        if model is not None:
            with suppress(NotBlank):
                return _make(plan, options, spare, model, blanks, progress)
        del model, blanks
        if plan.gguf is None:
            _check_conversion(4 * file_bytes(plan, options) // own_dtype(plan).itemsize)
        with watched(progress):
            model = read_model(exact, options, None)
        _make(plan, options, spare, model, Blanks(), progress)
    except (NotBatchable, library.OpenVINOMissing) as error:
        raise ConversionFailed(str(error)) from error
    except OSError as error:
        raise ConversionFailed(f"its graph cannot be written: {public(error, folder)}") from error


def _make(plan: Plan, options: LoadOptions, spare: Path, model: Any, blanks: Blanks, progress: Progress) -> None:
    progress.begin("convert", 4 * sum(tensor.numel() for tensor in model.parameters()))
    place, quantization = _place(plan, options), plan.placement.quantization
    rest = (place, quantization, spare, progress.cancellation, blanks, lambda numbers: progress.advance(4 * numbers))
    if plan.head in encoder.HEADS:
        encoder.make(model, read_tokenizer(plan), *rest)
    else:
        decoder.make(model, *rest)
