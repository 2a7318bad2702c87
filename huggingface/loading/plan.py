"""What is known of a model before its weights are read: its config, its head, and its settings on this machine.

Imports torch and transformers, so it is imported late. Reads no weights and uses no network. Must not know the
registry, the manager or HTTP.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from transformers.models.auto import modeling_auto

from ..errors import (
    FilesCorrupt,
    FilesMissing,
    FilesRefused,
    InvalidRequest,
    LoadError,
    ModelUnsupported,
    NotServed,
    public,
)
from ..inspection import folder as files
from ..inspection.headers import SAFETENSORS_TYPES, GGUFHeader, safetensors_header
from ..inspection.heads import AUTO_CLASSES, Heads, Inputs
from ..modeling.rotary import context
from ..registry.records import LoadSettings, ModelRecord
from ..tasks import HEADS, MODEL_TYPES, Head
from ..types import EngineOptions, LoadOptions
from . import gguf as gguf_files
from .placement import Placement, place

logger = logging.getLogger(__name__)

# How transformers reports a missing optional package without an ImportError.
_INSTALL = re.compile(r"pip install|(need|must|requires?) .{0,40}install|is not installed", re.IGNORECASE)


_NEARLY = 0.95

FileMarks = tuple[tuple[str, int, int], ...]

_HEADS = Heads(vars(modeling_auto))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of a model before its weights are read."""

    record: ModelRecord
    folder: Path
    config: Any
    head: Head
    placement: Placement
    trusted: bool
    gguf: GGUFHeader | None = None


def look(
    record: ModelRecord, options: LoadOptions, folder: Path, settings: LoadSettings, described: bool = False
) -> Plan:
    """Checks a model's files and settings, and picks its head. Reads no weights."""
    model_id, trusted_ids = record.model_id, options.trust_remote_code
    trusted = model_id in trusted_ids
    placement = place(settings, options)
    # From here on everything is read from the folder, and the network is not used.
    header = None
    if record.gguf_file is not None:
        header = gguf_files.check(model_id, folder, record.gguf_file)
        config = gguf_files.read_config(model_id, folder, record.gguf_file, header)
    else:
        if not described:
            files.check(model_id, folder, allow_pickle=options.allow_pickle, trusted=trusted_ids)
        config = _read_config(model_id, folder, trusted)
    wanted = MODEL_TYPES[record.model_type].heads if record.model_type in MODEL_TYPES else HEADS
    head = _head(model_id, config, wanted)
    return Plan(record, folder, config, head, placement, trusted, header)


def own_dtype(plan: Plan) -> torch.dtype:
    """The dtype of the weights in their files, as transformers takes it from the config."""
    text = plan.config.get_text_config()  # of a model that also sees, only the text part may be loaded
    said = getattr(plan.config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    return getattr(torch, said) if isinstance(said, str) else said


def engine_options(plan: Plan, options: LoadOptions) -> EngineOptions:
    """The options of the model's engine."""
    slots = plan.placement.slots
    return options.engine if slots is None else replace(options.engine, max_batch=slots)


def commit(folder: Path) -> str | None:
    """The commit of a model that came from the Hub."""
    return folder.name if folder.parent.name == "snapshots" else None


def effective(plan: Plan, model: Any, options: LoadOptions) -> dict[str, Any]:
    """The effective settings."""
    placement = plan.placement
    mapping = None
    if placement.device_map is not None:  # transformers records none if one device has the whole model
        mapping = getattr(model, "hf_device_map", None) or {"": model.device}
    return {
        "device": placement.device if mapping is None else None,
        "device_map": None if mapping is None else {name: str(device) for name, device in mapping.items()},
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_dtype": str(own_dtype(plan)).removeprefix("torch.") if placement.stored else None,
        "quantization": placement.quantization,
        "attn_implementation": model.config.get_text_config()._attn_implementation,
        "compile": placement.compiles,
        "kv_cache_dtype": str(placement.kv_dtype or model.dtype).removeprefix("torch."),
        "max_context": placement.max_context,
        "slots": engine_options(plan, options).max_batch,
    }


def file_bytes(plan: Plan, options: LoadOptions) -> int:
    """Bytes of the files that hold the weights."""
    return sum(path.stat().st_size for path in gguf_paths(plan) or weights_files(plan, options))


def has_16_bits(plan: Plan, options: LoadOptions) -> bool:
    """Whether nearly all of the model's weights have 16 bits in their files; before these are here, by the config."""
    sizes: Counter[int] = Counter()
    try:
        paths = weights_files(plan, options)
    except FilesMissing:
        return own_dtype(plan).itemsize == 2
    for path in paths:
        if path.suffix != ".safetensors":
            return False
        with path.open("rb") as file:

            def read(start: int, length: int, file: BinaryIO = file) -> bytes:
                file.seek(start)
                return file.read(length)

            for tensor in (safetensors_header(read) or {}).values():
                sizes[SAFETENSORS_TYPES[tensor.type][1]] += tensor.bytes or 0
    return sizes[16] >= _NEARLY * sizes.total()


def weights_files(plan: Plan, options: LoadOptions) -> list[Path]:
    """The files that hold the weights, if they are not in a GGUF file."""
    return files.weights_files(plan.record.model_id, plan.folder, allow_pickle=options.allow_pickle)


def gguf_paths(plan: Plan) -> list[Path]:
    """The GGUF file that holds the weights, or all of its parts, in order; none where other files do."""
    gguf_file = plan.record.gguf_file
    return [] if gguf_file is None else gguf_files.locate(plan.record.model_id, plan.folder, gguf_file)


def model_marks(plan: Plan) -> FileMarks:
    """What identifies a model's files; its GGUF file may lie in a folder below its own."""
    return tuple(sorted({*file_marks(plan.folder), *marks_of(plan.folder, gguf_paths(plan))}))


def file_marks(folder: Path) -> FileMarks:
    """What identifies a folder's files."""
    return marks_of(folder, sorted(path for path in folder.iterdir() if path.is_file()))


def marks_of(folder: Path, paths: Iterable[Path]) -> FileMarks:
    """What identifies files in a folder: the name, size and modification time (ns) of each."""
    found = ((path.relative_to(folder).as_posix(), path.stat()) for path in paths)
    return tuple((name, about.st_size, about.st_mtime_ns) for name, about in found)


def check_context(plan: Plan) -> None:
    """Refuses a context longer than the model's."""
    asked, config = plan.placement.max_context, plan.config.get_text_config()
    own = getattr(config, "max_position_embeddings", None) or 0
    own = context(own, getattr(config, "rope_parameters", None)) if own > 0 else 0
    if asked is not None and asked > own > 0:
        raise InvalidRequest(
            f"Invalid value for field 'max_context': model '{plan.record.model_id}' reads {own} tokens at most",
            "max_context",
        )


def check_compile(plan: Plan) -> None:
    """Refuses `compile` for models that gain nothing by it, and where there is no compiler.

    A batch has another shape at every step: compiled, a model of two layers took minutes and was slower afterwards.
    """
    if not plan.placement.compiles:
        return
    if plan.head in ("causal-lm", "seq2seq-lm"):
        raise InvalidRequest(
            f"Invalid value for field 'compile': model '{plan.record.model_id}' generates text, and its shapes change "
            "at every token; it is for models that classify, fill or embed",
            "compile",
        )
    try:
        torch.compile(lambda values: values * 2 + 1)(torch.ones(3, device=plan.placement.device))
    except Exception as error:
        raise ModelUnsupported(
            f"Model '{plan.record.model_id}' cannot be compiled here: torch.compile found no working compiler "
            f"({type(error).__name__}); on a CPU it needs g++ or clang"
        ) from error


def _read_config(model_id: str, folder: Path, trusted: bool) -> Any:
    files.read_config(model_id, folder)  # and check it before it is used
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:
        raise refusal(model_id, folder, error, "config.json") from error
    # transformers knows some models by this name, so it must not depend on the folder.
    config.name_or_path = model_id
    return config


def refusal(model_id: str, folder: Path, error: Exception, part: str) -> LoadError:
    """The error for the user from transformers' error while reading `part` of a model."""
    message = str(error)
    if "trust_remote_code" in message:
        return FilesRefused(
            f"Model '{model_id}' needs Python code of its own repository. If you have read that code and trust it, set "
            f"LOCAL_LLM_TRUST_REMOTE_CODE={model_id}"
        )
    if part == "config.json" and ("model_type" in message or "does not recognize" in message):
        return ModelUnsupported(
            f"Model '{model_id}': transformers {transformers.__version__} does not know this kind of model (model_type "
            "in config.json)"
        )
    if isinstance(error, ImportError) or _INSTALL.search(message):
        return ModelUnsupported(
            f"Model '{model_id}': {part} needs a package that is not installed: {public(error, folder)}"
        )
    logger.info("%s of %s cannot be used", part, model_id, exc_info=error)
    return FilesCorrupt(
        f"Model '{model_id}': {part} is damaged or incomplete; download it again ({public(error, folder)})"
    )


def _head(model_id: str, config: Any, wanted: tuple[Head, ...]) -> Head:
    """The head of the weights: the first of `wanted` where they have several, or name none.

    Raises:
        NotServed: models of its kind do none of this server's tasks, or cannot run on a text alone.
        ModelUnsupported: the head is unknown.
    """
    kind, architectures = config.model_type, config.architectures or ()
    remote = getattr(config, "auto_map", None) or {}
    head = _HEADS.pick(kind, architectures, wanted, remote=remote, encoder_decoder=config.is_encoder_decoder)
    if head is None:
        if not architectures and not remote:
            raise ModelUnsupported(
                f"Model '{model_id}': its config.json does not name the architecture of the weights ('architectures'), "
                f"and a {kind} has none that fits the model's type"
            )
        raise NotServed(
            f"Model '{model_id}' is a {', '.join((architectures or [kind])[:3])}, "
            "which does none of this server's text tasks"
        )
    if no_text := _HEADS.no_text(head, kind, architectures, _inputs):
        raise NotServed(f"Model '{model_id}' is a {no_text}; it does none of this server's text tasks")
    return head


def _inputs(name: str) -> Inputs | None:
    """The inputs of a class of transformers; None for one in the folder's own code."""
    model_class = getattr(transformers, name, None)
    if model_class is None:
        return None
    arguments = {
        each.name: each.default is each.empty
        for each in inspect.signature(model_class.forward).parameters.values()
        if each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "self"
    }
    return getattr(model_class, "input_modalities", "text"), arguments


def auto_class(config: Any, head: Head) -> Any:
    """The class that loads the model; T5 and its kin have weights of the encoder alone, as in sentence-t5."""
    encoder = modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type, "")
    if head == "base" and encoder.endswith("EncoderModel") and encoder in (config.architectures or ()):
        return transformers.AutoModelForTextEncoding
    return getattr(transformers, AUTO_CLASSES[head])
