"""What a load would take, told before a weight is read: from the model that its config describes, built of nothing.

The modules are built on torch's meta device, which holds shapes and no numbers, so that ties, heads that are left out
and buffers count as they will. Imports torch, so it is imported with the loader. Must not know files or the manager.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..engine.slots import first_bank
from ..engine.torch.cache import layer_shapes
from ..engine.torch.matmul import copies
from ..tasks import Head
from ..types import EngineOptions, Estimate
from .placement import Placement
from .quantization import predicted_bytes

logger = logging.getLogger(__name__)

_MOST_PARAMETERS = 100_000  # tensors of one model: the largest there are have some ten thousand
_GROUP = 64  # numbers of an output that share a scale in OpenVINO's 4 bits


def estimate(
    build: Callable[[], Any],
    head: Head,
    placement: Placement,
    own_dtype: torch.dtype,
    options: EngineOptions,
    runner: Literal["torch", "openvino"] = "torch",
) -> tuple[Estimate, int]:
    """What the model that `build` makes would take, and of how many numbers its parameters are.

    `own_dtype` is that of the weights in their files, `runner` what computes it.
    """
    with torch.device("meta"), torch.no_grad(), _bounded():
        model = build()
    dtype = placement.dtype or own_dtype
    tensors = _tensors(model, dtype)
    weights = sum(tensors.values())
    devices = _by_device(model, tensors, placement)
    copied = 0
    if runner == "openvino":
        weights, copied = _graph_bytes(model, placement.quantization)
        devices = {placement.device: weights}
    elif placement.quantization is not None:
        weights = predicted_bytes(model, placement.quantization, placement.device)
        devices = {placement.device: weights}
    elif head == "causal-lm" and placement.device == "cpu" and dtype is torch.float32 and placement.device_map is None:
        copied = copies(model, options.findings)
    token_bytes = _token_bytes(model, dtype) if head == "causal-lm" else 0
    kv_cache = first_bank(options.kv_cache_bytes // token_bytes) * token_bytes if token_bytes else 0
    devices[placement.device] = devices.get(placement.device, 0) + copied + kv_cache
    told = Estimate(
        weights=weights,
        copies=copied,
        kv_cache=kv_cache,
        token_bytes=token_bytes,
        device=placement.device,
        dtype=str(dtype).removeprefix("torch."),
        quantization=placement.quantization,
        devices=devices,
        engine=runner,
    )
    return told, sum(tensor.numel() for tensor in model.parameters())


@contextmanager
def _bounded() -> Iterator[None]:
    """Give up a model, in the making on this thread, that has more parameters than any: it would go on for hours.

    Raises:
        ValueError: it has.
    """
    thread, count = threading.get_ident(), 0

    def note(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > _MOST_PARAMETERS:
            raise ValueError(f"a model of more than {_MOST_PARAMETERS} tensors")

    hook = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        hook.remove()


def _graph_bytes(model: Any, quantization: str | None) -> tuple[int, int]:
    """Bytes of the constants of OpenVINO's graph of a model, and of the table that is multiplied too.

    A compressed matrix has a number of 16 bits to scale each of its outputs by, and one of 8 to begin at; in 4 bits, a
    number of 16 for each 64 of an output. The first and the last matrix stay in 8 bits, as in `nncf.compress_weights`.
    """
    table = model.get_input_embeddings().weight
    outputs = model.get_output_embeddings()
    last = None if outputs is None else outputs.weight

    def size(tensor: torch.Tensor) -> int:
        if quantization is None or tensor.dim() < 2:
            return tensor.numel() * 4
        eight = tensor.numel() + 3 * tensor.shape[0]
        wide = tensor is table or tensor is last
        return eight if quantization == "int8" or wide else tensor.numel() // 2 + 2 * (tensor.numel() // _GROUP)

    return sum(map(size, model.parameters())), size(table) if last is not None and last is table else 0


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


def _token_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, where the model keeps nothing else."""
    try:
        with torch.inference_mode():
            inputs = torch.zeros((1, 1), dtype=torch.long, device="meta")
            cache = model(input_ids=inputs, use_cache=True, return_dict=True).past_key_values
        shapes = layer_shapes(cache)
    except Exception as error:  # noqa: BLE001 - it is not served in a batch then, or it is one that cannot be run without numbers
        logger.debug("the cache of %s cannot be told: %s", type(model).__name__, error)
        return _configured_bytes(model.config.get_text_config(), dtype)
    floats = sum(shape.token_bytes // shape.dtype.itemsize for shape in shapes if shape is not None)
    return int(floats * dtype.itemsize)


def _configured_bytes(config: Any, dtype: torch.dtype) -> int:
    """The same of what its config says; of each layer, where they differ."""
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
