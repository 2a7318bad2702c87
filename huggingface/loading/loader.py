"""Loads a record's model: returns a `LoadedModel`, or raises a `LoadError` that says why not.

Imports torch and transformers, so it is imported late. Any thread may call `load`. Must not know the registry, the
manager or HTTP.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, cast

import torch

from ..engine.torch.matmul import Products
from ..errors import LocalLLMError, OutOfMemory, no_panics
from ..host.memory import forget_frames
from ..inspection import folder as files
from ..inspection.headers import Tensor
from ..inspection.lora import factor_bytes
from ..model.loaded import LoadedModel
from ..model.memory import Memory, free
from ..model.parts import Setup
from ..progress import Progress
from ..registry.records import LoadSettings, ModelRecord
from ..tasks.reranking import note_cross_encoder
from ..types import BACKENDS as NAMES
from ..types import Backend as Name
from ..types import Estimate, LoadOptions
from .backend import Backend, Declined, Load, Make, Opened, choose
from .llama_cpp.load import LlamaCpp
from .openvino.load import OpenVINO
from .plan import check_compile, check_context, commit, effective, engine_options, look
from .pretrained import BUILDING, read_pooling, read_tokenizer
from .torch import Torch

# The backends, in the order in which `auto` tries them.
_BACKENDS: Mapping[Name, Backend] = {"llama.cpp": LlamaCpp(), "openvino": OpenVINO(), "torch": Torch()}
BACKENDS = tuple(_BACKENDS[name] for name in NAMES)

T = TypeVar("T")


def warm_up() -> None:
    """Makes torch set up its math libraries, which it does at the first larger product in each of them."""
    with torch.inference_mode():
        Products(torch.nn.Sequential(torch.nn.Linear(576, 1536)))


def load(
    record: ModelRecord,
    options: LoadOptions,
    folder: Path,
    *,
    settings: LoadSettings | None = None,
    adapters: Mapping[str, Path] = MappingProxyType({}),
    progress: Progress | None = None,
    memory: Memory | None = None,
    make: Make | None = None,
    spare: Path | None = None,
) -> LoadedModel:
    """Loads a registered model, whose files are in `folder`.

    Args:
        settings: the effective settings; None for the record's.
        adapters: the folders of its adapters, by name.
        progress: follows the load; its cancellation cancels the load.
        memory: the account where the model asks for memory later.
        make: makes the graph if its backend is asked for by name; otherwise another backend computes until there is one
            (`Setup.pending`).
        spare: the folder of a graph that could not be stored beside the model; it is deleted with the loaded one.

    Raises:
        LoadError: one of its kinds, with a message that names the model and says what to do.
        InvalidRequest: a setting cannot be honoured; the message names it.
        Cancelled: `progress` was cancelled.
    """
    wanted, told = settings or record.settings, progress or Progress()

    def work() -> LoadedModel:
        plan = look(record, options, folder, wanted)
        tokenizer = read_tokenizer(plan)
        check_context(plan)
        check_compile(plan)
        asked = Load(plan, options, wanted, adapters, tokenizer, told, make, spare)

        def open_with(backend: Backend, before: Declined | None) -> LoadedModel | Declined:
            opened = backend.open(asked)
            return opened if isinstance(opened, Declined) else _loaded(asked, opened, before, memory)

        return choose(BACKENDS, plan, options, adapters, open_with)

    return _on_a_thread(record.model_id, work)


def convert(
    record: ModelRecord,
    options: LoadOptions,
    folder: Path,
    settings: LoadSettings,
    progress: Progress,
    *,
    backend: str,
    aside: bool = False,
) -> Path | None:
    """Makes what `backend` lacks for a model, as `Backend.convert`.

    Raises:
        ConversionFailed: it cannot be made.
        Cancelled: `progress` was cancelled.
        Otherwise as `load`.
    """

    def work() -> Path | None:
        plan = look(record, options, folder, settings)
        return _BACKENDS[cast(Name, backend)].convert(plan, options, settings, progress, aside=aside)

    return _on_a_thread(record.model_id, work)


def estimate(
    record: ModelRecord,
    options: LoadOptions,
    folder: Path,
    settings: LoadSettings | None = None,
    *,
    described: bool = False,
    adapters: Iterable[Mapping[str, Tensor]] = (),
) -> Estimate:
    """What `load` would take, computed from the config and the files' headers.

    With `described`, the weights need not be there. `adapters` are the headers of its adapters' weights.

    Raises: as `load`.
    """

    def work() -> Estimate:
        plan = look(record, options, folder, settings or record.settings, described)
        own = record.adapters or {}
        return choose(BACKENDS, plan, options, own, lambda backend, before: backend.estimate(plan, options, before))

    told = _on_a_thread(record.model_id, work)
    factors = sum(map(factor_bytes, adapters))
    devices = {**told.devices, told.device: told.devices.get(told.device, 0) + factors}
    return replace(told, weights=told.weights + factors, devices=devices)


def check(record: ModelRecord, options: LoadOptions, folder: Path, settings: LoadSettings) -> None:
    """Refuses settings that a load would refuse, as far as that is known before weights are read.

    Raises: as `load`.
    """

    def work() -> None:
        plan = look(record, options, folder, settings)
        check_context(plan)
        check_compile(plan)
        choose(BACKENDS, plan, options, record.adapters or {}, lambda *_: None)

    _on_a_thread(record.model_id, work)


def rough_bytes(
    record: ModelRecord, options: LoadOptions, folder: Path, adapters: Iterable[Mapping[str, Tensor]] = ()
) -> int:
    """A quick upper bound of the bytes that a load takes, from the sizes of the files.

    Two and a half times the files: 16-bit weights become 32-bit ones, and a table of embeddings may be in memory twice.

    Raises: as `load`.
    """
    paths = files.weights_files(record.model_id, folder, allow_pickle=options.allow_pickle)
    size = sum(path.stat().st_size for path in paths)
    return size * 5 // 2 + options.engine.kv_cache_bytes // 4 + sum(map(factor_bytes, adapters))


def _loaded(load: Load, opened: Opened, before: Declined | None, memory: Memory | None) -> LoadedModel:
    """Puts an opened model in service; `before` says why the backend before does not compute it."""
    plan, options, compute = load.plan, load.options, opened.compute
    with ExitStack() as failed:
        if opened.folder is not None:
            failed.callback(shutil.rmtree, opened.folder, ignore_errors=True)
        with BUILDING:
            pooling = read_pooling(plan.folder, compute.model, plan.trusted)
        note_cross_encoder(compute.model.config, plan.folder)
        setup = Setup(
            record=plan.record,
            head=plan.head,
            device=opened.device,
            effective=effective(plan, compute.model, options),
            backend_reason=None if before is None else before.reason,
            pending=None if before is None else before.pending,
            max_context=plan.placement.max_context,
            commit=commit(plan.folder),
            folder=opened.folder,
        )
        model = LoadedModel(setup, compute, load.tokenizer, engine_options(plan, options), pooling, memory)
        failed.callback(model.close)
        if opened.untried:
            model.prepared(load.progress.cancellation)
        failed.pop_all()
    return model


def _on_a_thread(model_id: str, work: Callable[[], T]) -> T:
    """Runs `work` on a thread that ends afterwards.

    OpenMP keeps a team of threads for every thread that has computed, and if there are more of them than cores, none
    waits actively, which slows each small product by half.
    """
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="load") as thread, no_panics():
            return thread.submit(work).result()
    except LocalLLMError as error:
        forget_frames(error)  # the frames hold all that was read so far
        free()
        raise
    except MemoryError as error:
        forget_frames(error)
        free()
        raise OutOfMemory(f"Not enough memory to load model '{model_id}'") from error
