"""The only `from_pretrained` of models and tokenizers: turns a plan into transformers' own objects, or a `LoadError`.

Imports torch and transformers, so it is imported late. Must not know the registry, the manager or HTTP.
"""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import modeling_gguf_pytorch_utils
from transformers.pytorch_utils import Conv1D

from .. import rendering
from ..engine.openvino.blanks import Blanks
from ..engine.openvino.lazy_weights import make_shell
from ..errors import (
    DeviceFailed,
    FilesCorrupt,
    FilesMissing,
    InvalidRequest,
    LocalLLMError,
    OutOfMemory,
    explained,
    public,
)
from ..host.memory import ran_out_of_memory
from ..inspection import folder as files
from ..progress import Progress
from ..tasks import Head
from ..tasks.embedding import Pooling, find_pooling
from ..types import LoadOptions
from . import default_dtype
from . import gguf as gguf_files
from .plan import Plan, auto_class, refusal, weights_files
from .quantization import quantize, store_narrow

logger = logging.getLogger(__name__)

# transformers' names for its progress bars: for weights that are read, and GGUF tensors that are unpacked.
_BARS = ("Loading weights", "Converting and de-quantizing GGUF tensors...")

# Where transformers looks for an adapter to attach by itself: only the record's adapters are wanted.
_NOWHERE = "no-adapter-of-its-own"

_GENERATION = "generation_config.json"

# Modules whose weights may be kept, or rounded, as they are stored.
_STORED = (nn.Linear, nn.Embedding, Conv1D)

# transformers builds a model under process-wide switches (skipped initialization), so only one may be built at a time.
# Files are fetched outside the lock: a slow download delays no other load.
BUILDING = threading.Lock()

# The default dtype is no such switch here: other models compute while one is built.
default_dtype.install()

# A chat template is a program of the model's author, without limits of its own.
rendering.install()

# A progress bar writes to the standard error under a lock of the process: if the reader is gone, the write fails, the
# lock stays locked, and every later load waits for it. Loads report their progress themselves.
transformers.utils.logging.disable_progress_bar()


def read_tokenizer(plan: Plan) -> Any:
    """The model's tokenizer: from its folder, or from its GGUF file if the folder has none.

    Raises: as `loader.load`.
    """
    tokenizer = _read_tokenizer(plan)
    templates = getattr(tokenizer, "chat_template", None)
    files.check_templates(plan.record.model_id, templates.values() if isinstance(templates, dict) else [templates])
    return tokenizer


def _read_tokenizer(plan: Plan) -> Any:
    model_id, folder, gguf_file = plan.record.model_id, plan.folder, plan.record.gguf_file
    if plan.gguf is not None and gguf_file is not None and not files.has_tokenizer(folder):
        return gguf_files.read_tokenizer(model_id, folder, gguf_file, plan.gguf)
    if not files.has_tokenizer(folder):
        raise FilesMissing(
            f"Model '{model_id}': its folder holds no tokenizer (tokenizer.json); put the complete model there"
        )
    with explained(lambda error: refusal(model_id, folder, error, "its tokenizer")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, config=plan.config, trust_remote_code=plan.trusted, local_files_only=True
        )
    # Without a vocabulary, transformers creates a tokenizer that knows no word.
    if lacking := files.lacking_vocabulary(folder, getattr(tokenizer, "vocab_files_names", {})):
        raise FilesMissing(f"Model '{model_id}': its tokenizer lacks {lacking}; put the complete model there")
    return tokenizer


def read_model(plan: Plan, options: LoadOptions, offload: Path | None, *, hollow: bool = False) -> Any:
    """Reads the model as planned; a `hollow` one has shapes without numbers. `offload` is the folder for offloaded
    parts."""
    model_id, placement = plan.record.model_id, plan.placement
    spread: dict[str, Any] = {}
    if placement.device_map is not None:
        spread = {"device_map": placement.device_map, "offload_folder": offload}
    elif hollow:
        spread = {"device_map": {"": "meta"}}
    if placement.attention is not None:
        spread["attn_implementation"] = placement.attention
    reader, gguf_file = auto_class(plan.config, plan.head), plan.record.gguf_file
    # Memory never holds all of a model in float32 that is rounded layer by layer.
    rounds = placement.quantization is not None and placement.dtype is torch.float32 and plan.gguf is None
    stored = (rounds or placement.stored) and not hollow
    dtype = placement.dtype or "auto"
    with explained(partial(_failure, plan)):
        if plan.gguf is not None and gguf_file is not None:
            model, info = gguf_files.read_model(
                model_id, plan.folder, gguf_file, plan.gguf, reader, plan.config, dtype=dtype, **spread
            )
        else:
            with _as_stored() if stored else nullcontext():
                model, info = reader.from_pretrained(
                    plan.folder,
                    config=plan.config,
                    dtype=dtype,
                    use_safetensors=None if options.allow_pickle else True,
                    trust_remote_code=plan.trusted,
                    local_files_only=True,
                    ignore_mismatched_sizes=True,  # reported in the info, and refused below in the server's own words
                    output_loading_info=True,
                    adapter_kwargs={"subfolder": _NOWHERE},
                    **spread,
                )
        _check_weights(model_id, plan.head, info)
        if hollow:
            return model
        _check_map(placement.device_map, model)
        if model.device.type == "meta":
            raise InvalidRequest(
                "Invalid value for field 'device_map': what reads the tokens (the embeddings) cannot be on the disk",
                "device_map",
            )
        if placement.quantization is not None:
            quantize(model, placement.quantization, placement.device, torch.float32 if stored else None)
        elif placement.stored:
            store_narrow(model)
        if stored:
            _widen(model)
        return model if placement.device_map is not None else model.to(placement.device)


def _failure(plan: Plan, error: Exception) -> LocalLLMError:
    model_id, placement = plan.record.model_id, plan.placement
    if ran_out_of_memory(error):
        return OutOfMemory(f"Not enough memory on {placement.device} to load model '{model_id}'")
    if isinstance(error, torch.AcceleratorError):
        return DeviceFailed(placement.device, str(error))
    if placement.attention is not None and re.search("attention|attn|flash|flex", str(error), re.IGNORECASE):
        return InvalidRequest(
            f"Invalid value for field 'attn_implementation': model '{model_id}' cannot be loaded with it here: "
            f"{public(error, plan.folder)}",
            "attn_implementation",
        )
    if placement.device_map is not None and isinstance(error, ValueError) and "device_map" in str(error):
        return InvalidRequest(f"Invalid value for field 'device_map': {public(error, plan.folder)}", "device_map")
    return refusal(model_id, plan.folder, error, "its weights or its config.json")


def read_blank(plan: Plan, options: LoadOptions, blanks: Blanks) -> Any:
    """Reads the float32 model with blanks in place of its matrices, which stay in their files; None if it cannot be.

    What the model computes itself is computed in float32, as in `read_model`; vectors are read.

    Raises: as `loader.load`.
    """
    if plan.gguf is not None:
        return None
    paths = weights_files(plan, options)
    if any(path.suffix != ".safetensors" for path in paths):
        return None
    from safetensors import safe_open

    hollow = read_model(plan, options, None, hollow=True)
    shapes = {tuple(tensor.shape) for tensor in hollow.state_dict().values()}
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not all(tensor.itemsize > 1 and tuple(tensor.shape) in shapes for tensor in floating.values()):
        return None  # they are packed, or made into others, which would take the memory of numbers
    try:
        for name, tensor in floating.items():
            if tensor.dim() > 1 and tensor.numel():
                tensors[name] = torch.from_numpy(blanks.add([tensor], mapped=True))
        model, info = type(hollow).from_pretrained(
            None,
            config=copy.deepcopy(plan.config),
            dtype=torch.float32,
            state_dict=tensors,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise refusal(plan.record.model_id, plan.folder, error, "its weights or its config.json") from error
    _check_weights(plan.record.model_id, plan.head, info)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if (parts := blanks.of(buffer)) is not None:
                module.register_buffer(name, parts[0].float())
    return model


@contextmanager
def _as_stored() -> Iterator[None]:
    """Has the weights of products and tables read in the types of their files, whatever the dtype of the model.

    All else has that dtype from the start: what a model computes itself loses no digits. It applies to the whole
    process: use it with the lock of building held.
    """
    models: Any = transformers.PreTrainedModel
    own: Callable[[Any, torch.dtype], dict[str, torch.dtype | None]] = models._get_dtype_plan

    def as_stored(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype | None]:
        kept = (f"^{re.escape(name)}[.]weight$" for name, module in model.named_modules() if type(module) in _STORED)
        return own(model, dtype) | dict.fromkeys(kept)

    models._get_dtype_plan = as_stored
    try:
        yield
    finally:
        models._get_dtype_plan = own


def _widen(model: Any) -> None:
    """Makes parameters float32 that are left as they were stored."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype is not torch.float32:
            parameter.data = parameter.data.float()


def read_shell(plan: Plan, options: LoadOptions) -> Any:
    """Reads the model without its weights, from its folder: parameters have shapes only."""
    if plan.gguf is not None:
        config = copy.deepcopy(plan.config)
        with torch.device("meta"), torch.no_grad():
            model = auto_class(config, plan.head).from_config(config, dtype=torch.float32).eval()
        if model.can_generate() and (plan.folder / _GENERATION).is_file():
            with explained(partial(_failure, plan)):
                own = transformers.GenerationConfig.from_pretrained(plan.folder, _GENERATION, local_files_only=True)
            model.generation_config = own
        return make_shell(model)
    return make_shell(read_model(plan, options, None, hollow=True))


@contextmanager
def watched(progress: Progress) -> Iterator[None]:
    """Reports to `progress` how many of the weights are read, from transformers' own progress bar.

    Its hook applies to the whole process, as do the switches that it builds models under: use it with their lock held.
    """
    total = progress.now().total or 0

    def watch(factory: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if named.get("desc") not in _BARS or not arguments:
            return factory(*arguments, **named)
        items = list(arguments[0])

        def each() -> Iterator[Any]:
            told = 0
            for index, item in enumerate(items, 1):
                yield item
                progress.advance(total * index // len(items) - told)
                told = total * index // len(items)

        return factory(each(), **{**named, "total": len(items)})

    before, unpacking = transformers.utils.logging.set_tqdm_hook(watch), modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = lambda *arguments, **named: watch(
        unpacking, arguments, {**named, "disable": True}
    )
    try:
        yield
    finally:
        transformers.utils.logging.set_tqdm_hook(before)
        modeling_gguf_pytorch_utils.tqdm = unpacking


def read_pooling(folder: Path, model: Any, trusted: bool) -> Pooling | LocalLLMError | None:
    """The pooling of a sentence-transformers folder; an error is returned, for requests that need it."""
    try:
        return find_pooling(folder, model, trusted=trusted)
    except InvalidRequest as error:
        return error
    except Exception as error:
        logger.info("the modules of a sentence-transformers model cannot be used", exc_info=error)
        return InvalidRequest(f"This model's modules.json cannot be used: {public(error, folder)}")


def _check_map(device_map: Any, model: Any) -> None:
    """Refuses a map that names unknown modules or leaves modules out: transformers ignores both.

    Raises:
        InvalidRequest: the message names the module.
    """
    if not isinstance(device_map, Mapping):
        return
    modules = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    field = "Invalid value for field 'device_map': "
    for name in device_map:
        if name not in modules:
            raise InvalidRequest(f"{field}the model has no module '{name}'", "device_map")
    for name, _ in model.named_parameters():
        if not any(not module or name == module or name.startswith(f"{module}.") for module in device_map):
            raise InvalidRequest(f"{field}it does not say where '{name}' goes", "device_map")


def _check_weights(model_id: str, head: Head, info: Mapping[str, Iterable[Any]]) -> None:
    """Refuses weights that do not fill the model: transformers would fill the rest with random numbers.

    A base model's pooler may be missing: no task here reads it, and some checkpoints come without.
    """
    missing = sorted(str(key) for key in info["missing_keys"])
    if head == "base":
        missing = [key for key in missing if not key.startswith("pooler.")]
    # Of a mismatched tensor: its name, its shape in the file, and the shape that the model needs.
    mismatched = sorted(str(key[0]) for key in info["mismatched_keys"])
    if missing or mismatched:
        names = ", ".join([*missing, *mismatched][:3])
        raise FilesCorrupt(
            f"Model '{model_id}': its weights do not fill the model ({len(missing)} tensors missing, {len(mismatched)} "
            f"of another shape, such as {names}); they are incomplete, or belong to another model than its config.json"
        )
