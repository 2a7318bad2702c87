"""torch as a backend: transformers' own model, with its weights, adapters and placement. It computes any model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..engine.torch.matmul import copies
from ..tasks.reranking import note_cross_encoder
from ..types import Estimate, LoadOptions
from .backend import Declined, Load
from .estimate import Weights, estimate
from .lora import attach
from .model import LoadedModel, Setup
from .placement import Placement
from .plan import Plan, commit, effective, engine_options, file_bytes, file_marks, own_dtype
from .pretrained import BUILDING, read_model, read_pooling, watched
from .quantization import predicted_bytes


class Torch:
    """torch as a `Backend`."""

    name = "torch"

    def why_not(self, plan: Plan, options: LoadOptions, adapters: Mapping[str, Any]) -> Declined | None:  # noqa: ARG002 - the protocol's
        """Nothing: it computes any model."""
        return None

    def estimate(self, plan: Plan, options: LoadOptions, before: Declined | None) -> Estimate:
        """What the weights take on each device, and the copies of some that make products faster."""
        return estimate(plan, options, self.name, partial(_weigh, plan, options), before)

    def open(self, load: Load, before: Declined | None) -> LoadedModel:
        """Reads the weights, and puts the adapters on them."""
        plan, options, placement = load.plan, load.options, load.plan.placement
        own = Path(tempfile.mkdtemp(prefix="local-llm-")) if placement.device_map is not None else None
        try:
            with BUILDING:
                load.progress.begin("read", file_bytes(plan, options))
                with watched(load.progress):
                    model = read_model(plan, options, own)
                attached = attach(plan.record.model_id, model, load.adapters, load.tokenizer)
                if placement.compiles:
                    model.compile(dynamic=True)  # at its first use, which takes a while
                pooling = read_pooling(plan.folder, model, plan.trusted)
            note_cross_encoder(model.config, plan.folder)
            setup = Setup(
                record=plan.record,
                head=plan.head,
                device=str(model.device) if placement.device_map is not None else placement.device,
                effective=effective(plan, model, options),
                key=_key(plan, options, load.adapters),
                engine_reason=None if before is None else before.reason,
                converts=None if before is None or before.pending is None else before.pending.key,
                max_context=placement.max_context,
                commit=commit(plan.folder),
                folder=own,
            )
            options_here = engine_options(plan, options)
            return LoadedModel(setup, model, load.tokenizer, options_here, pooling, load.memory, attached)
        except BaseException:
            if own is not None:
                shutil.rmtree(own, ignore_errors=True)
            raise


def _key(plan: Plan, options: LoadOptions, adapters: Mapping[str, Path]) -> tuple[Any, ...]:
    """What tells these weights, as they are loaded, from any others."""
    marks = tuple((str(folder), file_marks(folder)) for folder in (plan.folder, *adapters.values()))
    wanted = (plan.head, str(plan.placement), plan.record.gguf_file, tuple(adapters))
    return (marks, *wanted, options.engine.kv_cache_bytes)


def _weigh(plan: Plan, options: LoadOptions, model: Any) -> Weights:
    placement = plan.placement
    if placement.quantization is not None:
        weights = predicted_bytes(model, placement.quantization, placement.device)
        return Weights(weights, {placement.device: weights})
    dtype = placement.dtype or own_dtype(plan)
    tensors = _tensors(model, dtype)
    laid_out = plan.head == "causal-lm" and placement.device == "cpu" and placement.device_map is None
    copied = copies(model, options.engine.findings) if laid_out and dtype is torch.float32 else 0
    return Weights(sum(tensors.values()), _by_device(model, tensors, placement), copied)


def _tensors(model: Any, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each parameter and buffer, ties once; some models keep some modules in float32, as transformers does."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype.itemsize < 4 else set()
    if dtype is torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    sizes = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        width = tensor.itemsize
        if tensor.is_floating_point():
            width = 4 if kept & set(name.split(".")) else dtype.itemsize
        sizes[name] = tensor.numel() * width
    return sizes


def _by_device(model: Any, tensors: Mapping[str, int], placement: Placement) -> dict[str, int]:
    """Bytes of the weights on each device; what is offloaded to the disk takes no memory."""
    mapping = placement.device_map
    if mapping is None:
        return {placement.device: sum(tensors.values())}
    if isinstance(mapping, str):
        from accelerate import infer_auto_device_map  # type: ignore[import-untyped]

        mapping = infer_auto_device_map(model, no_split_module_classes=getattr(model, "_no_split_modules", None))
    sizes: dict[str, int] = {}
    for name, size in tensors.items():
        owners = [module for module in mapping if not module or name == module or name.startswith(f"{module}.")]
        device = str(torch.device(mapping[max(owners, key=len)])) if owners and mapping[owners[0]] != "disk" else "disk"
        if device != "disk":
            sizes[device] = sizes.get(device, 0) + size
    return sizes
