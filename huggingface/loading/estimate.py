"""Estimates a load before weights are read: builds the config's model without numbers.

The modules are built on torch's meta device, which holds only shapes, so ties, missing heads and buffers count as in a
load. The backend computes the size of its weights. Imports torch, so it is imported with the loader. Must not know the
manager.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..engine.slots import first_bank
from ..engine.torch.cache import layer_shapes
from ..errors import explained
from ..types import Estimate, LoadOptions
from .backend import Declined
from .plan import Plan, auto_class, engine_options, model_marks, own_dtype, refusal
from .pretrained import BUILDING

logger = logging.getLogger(__name__)

_MAX_PARAMETERS = 100_000  # tensors of one model: the largest models have some ten thousand


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a model's weights, in all and by device, and of copies of some of them."""

    total: int
    devices: Mapping[str, int]
    copies: int = 0


def estimate(
    plan: Plan, options: LoadOptions, backend: str, weigh: Callable[[Any], Weights], before: Declined | None
) -> Estimate:
    """Estimates a model that `backend` computes; `weigh` computes its weights' bytes from the model without numbers.

    If `before` has a pending conversion, the estimate includes the memory that it takes.

    Raises: as `loader.load`.
    """
    dtype, placement = plan.placement.dtype or own_dtype(plan), plan.placement
    weights, token_bytes, numbers = _known_shape(plan, options, backend, weigh, placement.kv_dtype or dtype)
    kv_bytes = engine_options(plan, options).kv_cache_bytes
    kv_cache = first_bank(kv_bytes // token_bytes) * token_bytes if token_bytes else 0
    here = weights.devices.get(placement.device, 0) + weights.copies + kv_cache
    pending = None if before is None else before.pending
    return Estimate(
        weights=weights.total,
        copies=weights.copies,
        kv_cache=kv_cache,
        token_bytes=token_bytes,
        device=placement.device,
        dtype=str(dtype).removeprefix("torch."),
        quantization=placement.quantization,
        devices={**weights.devices, placement.device: here},
        backend=backend,
        conversion=0 if pending is None else pending.size(numbers),
        own_dtype=str(own_dtype(plan)).removeprefix("torch."),
        is_stored=placement.stored,
    )


def _known_shape(
    plan: Plan, options: LoadOptions, backend: str, weigh: Callable[[Any], Weights], kv_dtype: torch.dtype
) -> tuple[Weights, int, int]:
    """`_shape`, computed once for the same files and settings.

    Building the model and a pass of it keep the interpreter busy for a quarter of a second.
    """
    if plan.placement.device_map is not None:  # accelerate places the layers by the memory that is free now
        with BUILDING:
            return _shape(plan, weigh, kv_dtype)
    findings, key = options.engine.findings, ("shape", backend, plan.folder)
    made_of = (model_marks(plan), plan.head, plan.record.gguf_file, plan.trusted, str(plan.placement))
    known = findings.get(key)
    if known is None or known[0] != made_of:
        with BUILDING:  # of concurrent calls, one builds
            known = findings.get(key)
            if known is None or known[0] != made_of:
                known = findings[key] = (made_of, _shape(plan, weigh, kv_dtype))
    shape: tuple[Weights, int, int] = known[1]
    return shape


def _shape(plan: Plan, weigh: Callable[[Any], Weights], kv_dtype: torch.dtype) -> tuple[Weights, int, int]:
    """The bytes of the model's weights and of one token's keys and values, and the number of parameters.

    They come from a model on torch's meta device. One thread at a time (`BUILDING`).
    """
    built, config = auto_class(plan.config, plan.head), copy.deepcopy(plan.config)
    config.name_or_path = str(plan.folder)  # where its own code is looked up
    with explained(lambda error: refusal(plan.record.model_id, plan.folder, error, "its config.json")):
        with torch.device("meta"), torch.no_grad(), _bounded():
            model = built.from_config(config, trust_remote_code=plan.trusted)
        token_bytes = _token_bytes(model, kv_dtype) if plan.head == "causal-lm" else 0
        return weigh(model), token_bytes, sum(tensor.numel() for tensor in model.parameters())


@contextmanager
def _bounded() -> Iterator[None]:
    """Stops building a model, on this thread, with more parameters than any real one: it would take hours.

    Raises:
        ValueError: the model has too many.
    """
    thread, count = threading.get_ident(), 0

    def note(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > _MAX_PARAMETERS:
            raise ValueError(f"a model of more than {_MAX_PARAMETERS} tensors")

    hook = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        hook.remove()


def _token_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, if the model keeps nothing else."""
    try:
        with torch.inference_mode():
            inputs = torch.zeros((1, 1), dtype=torch.long, device="meta")
            cache = model(input_ids=inputs, use_cache=True, return_dict=True).past_key_values
        shapes = layer_shapes(cache)
    except Exception as error:  # noqa: BLE001 - such a model is not served in a batch, or cannot run without numbers
        logger.debug("the cache of %s is unknown: %s", type(model).__name__, error)
        return _configured_bytes(model.config.get_text_config(), dtype)
    floats = sum(shape.token_bytes // shape.dtype.itemsize for shape in shapes if shape is not None)
    return int(floats * dtype.itemsize)


def _configured_bytes(config: Any, dtype: torch.dtype) -> int:
    """The same, computed from the config; per layer, where layers differ."""
    if getattr(config, "state_size", None):
        return 0
    layers = config.per_layer_config if config.is_heterogeneous else [config] * getattr(config, "num_hidden_layers", 0)
    values = 0
    for layer in layers:
        heads = getattr(layer, "num_attention_heads", 0)
        if not heads:
            return 0
        width = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        values += 2 * (getattr(layer, "num_key_value_heads", None) or heads) * width
    return int(values * dtype.itemsize)
