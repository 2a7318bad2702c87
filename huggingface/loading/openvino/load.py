"""Loading a model that OpenVINO computes: whether it may be, its graph, and the model without its weights.

Called by the loader, on its thread; `convert` in a process of its own too. Must not know the registry or the manager.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from ...engine.layers import NotBatchable
from ...engine.openvino import library
from ...errors import ConversionFailed, FilesMissing, InvalidRequest, ModelUnsupported, public
from ...host.memory import available_bytes
from ...progress import Progress
from ...registry.records import LoadSettings, ModelRecord
from ...tasks.reranking import note_cross_encoder
from ...types import EngineOptions, LoadOptions
from ..model import Conversion, LoadedModel, Memory, Setup, detach
from ..plan import Plan, auto_class, commit, effective, engine_options, file_bytes, look, own_dtype
from ..pretrained import BUILDING, read_model, read_pooling, read_shell, read_tokenizer, watched
from ..quantization import predicted_bytes
from . import decoder, encoder, subprocess
from .graph_store import Place
from .subprocess import Wanted

# Has a model's graph made, tells `Progress` how far that is, and waits: gives the folder of one that could not be kept
# beside the model. It is told what tells this graph from any other.
Make = Callable[[str, Progress], Path | None]

# Bytes of files up to which a model that somebody waits for is converted in this process: that is over before another
# one has imported torch.
CONVERTED_HERE = 32 * 2**20

# The same of one that is made aside: what runs here would hold up those that are answered meanwhile.
CONVERTED_HERE_ASIDE = 0

# How far other work goes before a graph that is made aside: that gets a tenth of a core that is always busy. With 19 it
# would take hours there.
_NICE = 10

# Bytes that the process which converts takes besides the weights: torch, transformers and openvino.
_CONVERTING = 600 * 10**6


def reason_against(plan: Plan, options: LoadOptions, adapters: Mapping[str, Any]) -> str | None:
    """Why torch is to compute this model, as far as that is known before a graph is made; None where OpenVINO may.

    Raises:
        InvalidRequest: OpenVINO is asked for by name, and cannot be had for this model or with the rest of what is
            asked for.
        ModelUnsupported: it is asked for, and not installed.
    """
    placement = plan.placement
    if placement.engine == "torch":
        return "torch was asked for"
    reason = None
    if plan.head == "seq2seq-lm" or (plan.config.is_encoder_decoder and _whole(plan)):
        reason = "it is an encoder-decoder"
    elif plan.head not in ("causal-lm", *encoder.HEADS):
        reason = "it reads tables"
    elif placement.device != "cpu" or placement.device_map is not None:
        reason = "it is not on the CPU alone"
    elif (placement.dtype or own_dtype(plan)) is not torch.float32:
        reason = "OpenVINO computes in float32 here, and dtype says otherwise"
    elif adapters:
        reason = "it has adapters"
    elif placement.attention is not None:
        reason = "attn_implementation is for torch"
    elif placement.compiles:
        reason = "compile is for torch"
    elif placement.quantization == "int4" and placement.engine == "auto":
        reason = "in 4 bits torch loses less"
    if reason is not None:
        if placement.engine == "openvino":
            raise InvalidRequest(f"Invalid value for field 'engine': openvino cannot be had here: {reason}", "engine")
        return reason
    packages = ("openvino", "nncf") if placement.quantization is not None else ("openvino",)
    lacking = [name for name in packages if not library.installed(name)]
    if lacking and placement.engine == "openvino":
        raise ModelUnsupported(
            f"Model '{plan.record.model_id}' was to be computed by OpenVINO, which is not installed: pip install "
            + " ".join(lacking)
        )
    if lacking:
        return f"not installed: {' '.join(lacking)}"
    reason = _place(plan, options).refused
    if reason is not None and placement.engine == "openvino":
        raise _refusal(plan, reason)
    return reason


def _refusal(plan: Plan, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid value for field 'engine': openvino cannot compute model '{plan.record.model_id}': {reason}", "engine"
    )


def load(
    plan: Plan,
    options: LoadOptions,
    settings: LoadSettings,
    tokenizer: Any,
    progress: Progress,
    memory: Memory | None,
    make: Make | None,
    spare: Path | None,
) -> LoadedModel | str | None:
    """The model with OpenVINO to compute it, why that cannot be, or None where its graph is still to be made and
    OpenVINO was not asked for by name. `make` makes the graph where it was; without it, that is done here and now.

    Raises:
        InvalidRequest: it cannot be, and was asked for by name.
    """
    placement = plan.placement
    with ExitStack() as undo:
        place = _place(plan, options)
        find = encoder.find if plan.head in encoder.HEADS else decoder.find
        try:
            graph = find(place, spare)
            anew = graph is None
            if anew and placement.engine == "auto":
                return None
            with BUILDING:
                model = read_shell(plan, options)  # refuses what is wrong with the files
                pooling = read_pooling(plan.folder, model, plan.trusted)
            if anew:
                if file_bytes(plan, options) > CONVERTED_HERE:
                    _check_conversion(sum(tensor.numel() for tensor in model.parameters()), placement.quantization)
                make = make or (lambda _, told: make_graph(plan, options, settings, told))
                spare = make(place.key, progress)
                if spare is not None:
                    undo.callback(shutil.rmtree, spare, ignore_errors=True)
                graph = find(place, spare)
            if graph is None:
                raise NotBatchable("its graph could not be kept anywhere")
        except (NotBatchable, ConversionFailed) as error:
            if placement.engine == "openvino":
                raise _refusal(plan, str(error)) from error
            return str(error)
        note_cross_encoder(model.config, plan.folder)
        setup = Setup(
            record=plan.record,
            head=plan.head,
            device="cpu",
            effective=effective(plan, model, options),
            max_context=placement.max_context,
            commit=commit(plan.folder),
            folder=graph.folder,
        )
        conversion = Conversion(
            graph, lambda: _read_whole(plan, options), _own_bytes(plan, model), place.refuse, placement.engine != "auto"
        )
        loaded = LoadedModel(
            setup, model, tokenizer, engine_options(plan, options), pooling, memory, conversion=conversion
        )
        with ExitStack() as failed:
            failed.callback(loaded.close)
            if anew:  # whether it can be computed so is not known yet
                loaded.prepared(lambda: progress.cancelled)
            failed.pop_all()
        if graph.folder is not None:
            undo.pop_all()  # it goes with the model
        return loaded


def graph_key(plan: Plan, options: LoadOptions) -> str:
    """What tells the graph of a model from any other."""
    return _place(plan, options).key


def make_graph(
    plan: Plan, options: LoadOptions, settings: LoadSettings, progress: Progress, *, aside: bool = False
) -> Path | None:
    """Make a model's graph, unless it is there: here, or in a process of its own, which every model gets where it is
    made `aside`. Returns the folder of one that cannot be kept beside the model: it is the caller's.

    Raises:
        ConversionFailed: it cannot be made. Cancelled: `progress` was cancelled.
    """
    place = _place(plan, options)
    bare = ModelRecord(plan.record.model_id, plan.record.name, plan.record.model_type, gguf_file=plan.record.gguf_file)
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


def _read_whole(plan: Plan, options: LoadOptions) -> Any:
    """The model itself, in memory of its own."""
    with BUILDING:
        whole = read_model(plan, options, None)
    detach(whole)
    return whole


def _own_bytes(plan: Plan, model: Any) -> int:
    """Bytes of the weights that `_read_whole` reads of a model, whose shell this is."""
    if plan.placement.quantization is not None:
        return predicted_bytes(model, plan.placement.quantization, "cpu")
    return sum(tensor.numel() * tensor.itemsize for tensor in {*model.parameters(), *model.buffers()})


def conversion_bytes(plan: Plan, options: LoadOptions, numbers: int) -> int:
    """Bytes that another process takes for a while to make the graph of a model of so many numbers; 0 where a graph is
    kept, and where the model is waited for and so small that no other process makes it."""
    if has_graph(plan, options):
        return 0
    try:
        size = file_bytes(plan, options)
    except FilesMissing:  # they are still to be downloaded
        size = numbers * own_dtype(plan).itemsize
    small = plan.placement.engine == "openvino" and size <= CONVERTED_HERE
    return 0 if small else _converting_bytes(numbers, plan.placement.quantization)


def has_graph(plan: Plan, options: LoadOptions) -> bool:
    """Whether a model's graph is kept, so that a load has OpenVINO compute it."""
    return _place(plan, options).present


def _converting_bytes(numbers: int, quantization: str | None) -> int:
    # Two thirds of the weights are merged into larger ones. What is to be rounded is tried before, its weights packed.
    return int(numbers * 4 * (1.7 if quantization is None else 2.4)) + _CONVERTING


def _check_conversion(numbers: int, quantization: str | None) -> None:
    """See that there is memory for another process that makes the graph of a model of so many numbers.

    Raises:
        ConversionFailed: there is not.
    """
    need, free = _converting_bytes(numbers, quantization), available_bytes()
    if free is not None and free < need:
        raise ConversionFailed(f"its conversion takes about {need} bytes of memory, and {free} are free")


def _whole(plan: Plan) -> bool:
    """Whether a model is more than the encoder of one."""
    return auto_class(plan.config, plan.head) is not transformers.AutoModelForTextEncoding


def _place(plan: Plan, options: LoadOptions) -> Place:
    """Where the model's graph is kept."""
    paths = sorted(path for path in plan.folder.iterdir() if path.is_file())
    marks = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    wanted = [plan.head, plan.record.gguf_file, plan.trusted, options.allow_pickle]
    form = "encoder" if plan.head in encoder.HEADS else ""
    return Place(plan.folder, [marks, wanted], plan.placement.quantization, form)


def convert(wanted: Wanted, progress: Progress) -> None:
    """Make a model's graph and keep it; for any but a small model in a process of its own, see `subprocess`.

    Raises:
        ConversionFailed: OpenVINO cannot compute it, or there is no room for its graph. As `load`, besides.
    """
    options, folder, spare = wanted.options, wanted.folder, wanted.spare
    plan = look(wanted.record, options, folder, wanted.settings)
    exact = replace(plan, placement=replace(plan.placement, quantization=None))
    progress.begin("read", file_bytes(plan, options))
    with watched(progress):
        model = read_model(exact, options, None)
    progress.begin("convert")
    try:
        place, quantization = _place(plan, options), plan.placement.quantization
        if plan.head in encoder.HEADS:
            tokenizer = read_tokenizer(plan)
            encoder.make(model, tokenizer, place, quantization, spare, lambda: progress.cancelled)
        else:
            decoder.make(model, place, quantization, spare, lambda: progress.cancelled)
    except (NotBatchable, library.OpenVINOMissing) as error:
        raise ConversionFailed(str(error)) from error
    except OSError as error:
        raise ConversionFailed(f"its graph cannot be written: {public(error, folder)}") from error
