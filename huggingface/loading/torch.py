"""torch as a backend: transformers' own model, with its weights, adapters and placement. It computes any model."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Hashable, Mapping, MutableMapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..cancellation import Cancellation
from ..engine.layers import NotBatchable
from ..engine.torch.lora import Adapters
from ..engine.torch.matmul import copies
from ..engine.torch.parity import batch_runner
from ..errors import InvalidRequest
from ..model.memory import ModelMemory
from ..model.parts import Serving
from ..registry.records import STORED
from ..tasks import Head
from ..types import Estimate, LoadOptions
from .backend import Declined, Load, Opened
from .estimate import Weights, estimate
from .lora import AttachedAdapters, attach
from .narrow import NarrowLinear
from .placement import Placement
from .plan import Plan, file_bytes, file_marks, has_16_bits, model_marks, own_dtype
from .pretrained import BUILDING, read_model, watched
from .quantization import predicted_bytes, stored_bytes
from .quantization import tensor_bytes as quantized_bytes

logger = logging.getLogger(__name__)


def check_cache(plan: Plan) -> None:
    """Refuses keys and values of another type than the model's.

    Raises:
        InvalidRequest: the settings ask for such.
    """
    dtype = plan.placement.dtype or own_dtype(plan)
    if plan.placement.kv_dtype not in (None, dtype):
        own = str(dtype).removeprefix("torch.")
        raise InvalidRequest(
            f"Invalid value for field 'kv_cache_dtype': torch computes model '{plan.record.model_id}', with keys and "
            f"values in {own} like the rest",
            "kv_cache_dtype",
        )


class Torch:
    """torch as a `Backend`."""

    name = "torch"

    def offers(self, plan: Plan) -> bool:  # noqa: ARG002 - the protocol's
        """True: torch computes any model."""
        return True

    def why_not(self, plan: Plan, options: LoadOptions, adapters: Mapping[str, Any]) -> Declined | None:  # noqa: ARG002 - the protocol's
        """Keys and values of another type than the model's; otherwise torch computes any model."""
        try:
            check_cache(plan)
        except InvalidRequest as error:
            return Declined(str(error), error)
        return None

    def estimate(self, plan: Plan, options: LoadOptions, before: Declined | None) -> Estimate:
        """The weights' bytes on each device, and the copies of some weights that make products faster."""
        return estimate(plan, options, self.name, partial(_weigh, plan, options), before)

    def convert(self, *_: object, aside: bool) -> None:
        """Nothing to make: torch reads the weights as they are."""

    def open(self, load: Load) -> Opened:
        """Reads the weights, and attaches the adapters."""
        plan, options, placement = load.plan, load.options, load.plan.placement
        with ExitStack() as failed:
            folder = None
            if placement.device_map is not None:
                folder = Path(tempfile.mkdtemp(prefix="local-llm-"))
                failed.callback(shutil.rmtree, folder, ignore_errors=True)
            with BUILDING:
                load.progress.begin("read", file_bytes(plan, options))
                with watched(load.progress):
                    model = read_model(plan, options, folder)
                adapters = attach(plan.record.model_id, model, load.adapters, load.tokenizer)
                if placement.compiles:
                    model.compile(dynamic=True)  # at its first use, which takes a while
            failed.pop_all()
        device = placement.device if folder is None else str(model.device)
        findings, key = options.engine.findings, _key(plan, options, load.adapters)
        return Opened(TorchCompute(plan.head, model, adapters, findings, key), device, folder)


class TorchCompute:
    """A model that torch computes, as a `Compute`."""

    backend = Torch.name

    def __init__(
        self,
        head: Head,
        model: Any,
        adapters: Adapters | None = None,
        findings: MutableMapping[Hashable, Any] | None = None,
        key: Hashable = None,
    ) -> None:
        """`findings` keep measurements of the model under `key`, which identifies its weights and settings."""
        self.model = model
        self.adapters: Adapters = adapters or AttachedAdapters("", model, {})
        self._head = head
        self._findings = findings
        self._key = key

    @property
    def weights(self) -> Mapping[str, int]:
        """Bytes of the model's tensors by device, each storage once."""
        return tensor_bytes(self.model)

    def serve(self, memory: ModelMemory, cancellation: Cancellation) -> Serving:  # noqa: ARG002 - the protocol's
        """Serves in a batch, if that gives the model's own results; only decoders that generate text are tried."""
        if self._head == "seq2seq-lm":
            return Serving(self.backend, reason="it is an encoder-decoder")
        if self._head != "causal-lm":
            return Serving(self.backend, reason="it does not generate text")
        try:
            runner = batch_runner(self.model, self._findings, self._key, cancellation, self.adapters)
        except NotBatchable as error:
            logger.info("a %s is served one request at a time: %s", type(self.model).__name__, error)
            return Serving(self.backend, reason=str(error))
        return Serving(self.backend, runner)


def tensor_bytes(model: Any) -> dict[str, int]:
    """Bytes of a model's tensors by device, each storage once."""
    if any(isinstance(module, NarrowLinear) for module in model.modules()):
        return {str(model.device): quantized_bytes(model)}
    seen: set[tuple[str, int]] = set()
    sizes: dict[str, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        device = str(tensor.device)
        key = (device, tensor.data_ptr())
        if tensor.device.type != "meta" and key not in seen:
            seen.add(key)
            sizes[device] = sizes.get(device, 0) + tensor.numel() * tensor.itemsize
    return sizes


def _key(plan: Plan, options: LoadOptions, adapters: Mapping[str, Path]) -> tuple[Any, ...]:
    """Identifies these weights as they are loaded."""
    folders = {plan.folder: model_marks(plan)} | {folder: file_marks(folder) for folder in adapters.values()}
    marks = tuple((str(folder), marks) for folder, marks in folders.items())
    wanted = (plan.head, str(plan.placement), plan.record.gguf_file, tuple(adapters))
    return (marks, *wanted, options.engine.kv_cache_bytes)


def _weigh(plan: Plan, options: LoadOptions, model: Any) -> Weights:
    placement = plan.placement
    dtype = placement.dtype or own_dtype(plan)
    if placement.stored or placement.quantization is not None:
        model = model.to(dtype)  # from the config's, without numbers
        if placement.stored:
            if not has_16_bits(plan, options):
                raise InvalidRequest(f"dtype '{STORED}' is for weights of 16 bits", "dtype")
            weights = stored_bytes(model)
        else:
            weights = predicted_bytes(model, placement.quantization, placement.device)
        return Weights(weights, {placement.device: weights})
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
    """Bytes of the weights on each device; parts offloaded to the disk take no memory."""
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
