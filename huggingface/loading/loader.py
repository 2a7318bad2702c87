"""A record becomes a `LoadedModel`, or a `LoadError` that says why not.

Imports torch and transformers, so it is itself imported late. `load` may be called from any thread. It must not know
the registry, the manager or HTTP.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch

from ..engine.torch.matmul import Products
from ..errors import LocalLLMError, OutOfMemory, no_panics
from ..host.memory import forget_frames
from ..inspection import folder as files
from ..inspection.headers import Tensor
from ..inspection.lora import factor_bytes
from ..progress import Progress
from ..registry.records import LoadSettings, ModelRecord
from ..tasks.reranking import note_cross_encoder
from ..types import Estimate, LoadOptions
from . import estimate as estimating
from .lora import attach
from .model import LoadedModel, Memory, Setup, free
from .openvino import load as by_openvino
from .plan import (
    Plan,
    auto_class,
    check_compile,
    check_context,
    commit,
    effective,
    engine_options,
    file_bytes,
    look,
    own_dtype,
    refusal,
)
from .pretrained import BUILDING, read_model, read_pooling, read_tokenizer, watched

T = TypeVar("T")


def warm_up() -> None:
    """Have torch set up its math libraries, which it does at the first product of some size in each of them."""
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
    make: by_openvino.Make | None = None,
    spare: Path | None = None,
) -> LoadedModel:
    """Bring a registered model, whose files are in `folder`, into memory.

    `settings` are those in effect; without them the record's. `adapters` are the folders of its adapters by their
    names. `memory` is where it asks for memory later on. `make` has OpenVINO's graph made where that is asked for by
    name; where it is not, torch computes as long as there is none (`Setup.converts`). `spare` is the folder of a graph
    that could not be kept beside the model, and goes with the loaded one.

    Raises:
        LoadError: one of its kinds, with a message that names the model and says what to do.
        InvalidRequest: a setting that cannot be honoured, by its name.
        Cancelled: `progress` was cancelled.
    """
    settings, progress = settings or record.settings, progress or Progress()
    work = partial(_load, record, options, folder, settings, adapters, progress, memory, make, spare)
    return _on_a_thread(record.model_id, work)


def convert(
    record: ModelRecord,
    options: LoadOptions,
    folder: Path,
    settings: LoadSettings,
    progress: Progress,
    *,
    aside: bool = False,
) -> Path | None:
    """Make OpenVINO's graph of a model, unless it is there; other work goes first where it is made `aside`. Returns the
    folder of one that cannot be kept beside the model: it is the caller's.

    Raises:
        ConversionFailed: it cannot be made. Cancelled: `progress` was cancelled. As `load`, besides.
    """

    def work() -> Path | None:
        plan = look(record, options, folder, settings)
        return by_openvino.make_graph(plan, options, settings, progress, aside=aside)

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
    """What `load` would take, from the config and the files' headers alone; where the model is only `described`, its
    weights need not be there. `adapters` are the heads of its adapters' weights.

    Raises: as `load`.
    """
    settings = settings or record.settings
    told = _on_a_thread(record.model_id, lambda: _estimate(look(record, options, folder, settings, described), options))
    factors = sum(map(factor_bytes, adapters))
    devices = {**told.devices, told.device: told.devices.get(told.device, 0) + factors}
    return replace(told, weights=told.weights + factors, devices=devices)


def check(record: ModelRecord, options: LoadOptions, folder: Path, settings: LoadSettings) -> None:
    """Refuse settings that a load would refuse, as far as that is known before weights are read.

    Raises: as `load`.
    """

    def work() -> None:
        plan = look(record, options, folder, settings)
        check_context(plan)
        check_compile(plan)
        by_openvino.reason_against(plan, options, record.adapters or {})

    _on_a_thread(record.model_id, work)


def rough_bytes(
    record: ModelRecord, options: LoadOptions, folder: Path, adapters: Iterable[Mapping[str, Tensor]] = ()
) -> int:
    """About as many bytes as a load takes at most, told by the size of the files alone, in no time.

    Twice and a half the files: weights of 16 bits become ones of 32, and a table of embeddings may lie there twice.

    Raises: as `load`.
    """
    size = files.weights_bytes(record.model_id, folder, allow_pickle=options.allow_pickle)
    return size * 5 // 2 + options.engine.kv_cache_bytes // 4 + sum(map(factor_bytes, adapters))


def _on_a_thread(model_id: str, work: Callable[[], T]) -> T:
    """Have work done on a thread of its own, that ends: OpenMP keeps a team of threads for every thread that ever
    computed, and where there are more of them than cores, none waits actively, which makes each small product slower
    by half."""
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="load") as thread, no_panics():
            return thread.submit(work).result()
    except LocalLLMError as error:
        forget_frames(error)  # they hold whatever was read so far
        free()
        raise
    except MemoryError as error:
        forget_frames(error)
        free()
        raise OutOfMemory(f"Not enough memory to load model '{model_id}'") from error


def _estimate(plan: Plan, options: LoadOptions) -> Estimate:
    built, config = auto_class(plan.config, plan.head), copy.deepcopy(plan.config)
    config.name_or_path = str(plan.folder)  # where code of its own is looked for

    def build() -> Any:
        return built.from_config(config, trust_remote_code=plan.trusted)

    reason = by_openvino.reason_against(plan, options, plan.record.adapters or {})
    wanted = plan.placement.engine == "openvino"
    runner: Literal["torch", "openvino"] = "torch"
    if reason is None and (wanted or by_openvino.has_graph(plan, options)):
        runner = "openvino"
    own, engine = own_dtype(plan), engine_options(plan, options)
    try:
        with BUILDING:
            told, numbers = estimating.estimate(build, plan.head, plan.placement, own, engine, runner)
    except LocalLLMError:
        raise
    except Exception as error:
        raise refusal(plan.record.model_id, plan.folder, error, "its config.json") from error
    conversion = 0 if reason is not None else by_openvino.conversion_bytes(plan, options, numbers)
    return replace(told, conversion=conversion)


def _load(
    record: ModelRecord,
    options: LoadOptions,
    folder: Path,
    settings: LoadSettings,
    adapters: Mapping[str, Path],
    progress: Progress,
    memory: Memory | None,
    make: by_openvino.Make | None,
    spare: Path | None,
) -> LoadedModel:
    plan = look(record, options, folder, settings)
    model_id, placement = record.model_id, plan.placement
    tokenizer = read_tokenizer(plan)
    check_context(plan)
    check_compile(plan)
    reason = by_openvino.reason_against(plan, options, adapters)
    key = None
    if reason is None:
        made = by_openvino.load(plan, options, settings, tokenizer, progress, memory, make, spare)
        if isinstance(made, LoadedModel):
            return made
        reason = made
        if made is None:
            key, reason = by_openvino.graph_key(plan, options), "its graph is being made"
    own = Path(tempfile.mkdtemp(prefix="local-llm-")) if placement.device_map is not None else None
    try:
        with BUILDING:
            progress.begin("read", file_bytes(plan, options))
            with watched(progress):
                model = read_model(plan, options, own)
            attached = attach(model_id, model, adapters, tokenizer)
            if placement.compiles:
                model.compile(dynamic=True)  # at its first use, which takes a while
            pooling = read_pooling(folder, model, plan.trusted)
        note_cross_encoder(model.config, folder)
        setup = Setup(
            record=record,
            head=plan.head,
            device=str(model.device) if placement.device_map is not None else placement.device,
            effective=effective(plan, model, options),
            key=_key(plan, options, adapters),
            engine_reason=reason,
            converts=key,
            max_context=placement.max_context,
            commit=commit(folder),
            folder=own,
        )
        return LoadedModel(setup, model, tokenizer, engine_options(plan, options), pooling, memory, attached)
    except BaseException:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
        raise


def _key(plan: Plan, options: LoadOptions, adapters: Mapping[str, Path]) -> tuple[Any, ...]:
    """What tells these weights, as they are loaded, from any others."""
    folders = (plan.folder, *adapters.values())
    paths = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
    marks = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    wanted = (plan.head, str(plan.placement), plan.record.gguf_file, tuple(adapters))
    return (marks, *wanted, options.engine.kv_cache_bytes)
