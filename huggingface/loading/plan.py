"""What is known of a model before its weights are read: its config, its head, and what its settings mean here.

Imports torch and transformers, so it is itself imported late. No weight is read, and the network is not touched.
Must not know the registry, the manager or HTTP.
"""

from __future__ import annotations

import inspect
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from ..errors import FilesCorrupt, FilesRefused, InvalidRequest, LoadError, ModelUnsupported, NotServed, public
from ..inspection import folder as files
from ..inspection.headers import GGUFHeader
from ..inspection.heads import AUTO_CLASSES, Heads, Inputs
from ..modeling.rotary import context
from ..registry.records import LoadSettings, ModelRecord
from ..tasks import HEADS, MODEL_TYPES, Head
from ..types import EngineOptions, LoadOptions
from . import gguf as gguf_files
from .placement import Placement, place

logger = logging.getLogger(__name__)

# How transformers says that it lacks an optional package, where it does not raise an ImportError.
_INSTALL = re.compile(r"pip install|(need|must|requires?) .{0,40}install|is not installed", re.IGNORECASE)


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
    """Check a model's files and settings, and find out what it is to become. No weight is read."""
    model_id, trusted_ids = record.model_id, options.trust_remote_code
    trusted = model_id in trusted_ids
    placement = place(settings, options)
    # From here on everything is read from the folder, and the network is not touched.
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
    """The type of the weights in their files: what the config says, as transformers takes it."""
    text = plan.config.get_text_config()  # of a model that also sees, what is loaded may be its text half
    said = getattr(plan.config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    return getattr(torch, said) if isinstance(said, str) else said


def engine_options(plan: Plan, options: LoadOptions) -> EngineOptions:
    """How its engine is to run."""
    slots = plan.placement.slots
    return options.engine if slots is None else replace(options.engine, max_batch=slots)


def commit(folder: Path) -> str | None:
    """The commit of a model that came from the Hub."""
    return folder.name if folder.parent.name == "snapshots" else None


def effective(plan: Plan, model: Any, options: LoadOptions) -> dict[str, Any]:
    """The settings that are in effect."""
    placement = plan.placement
    mapping = None
    if placement.device_map is not None:  # transformers notes none where one device has all of it
        mapping = getattr(model, "hf_device_map", None) or {"": model.device}
    return {
        "device": placement.device if mapping is None else None,
        "device_map": None if mapping is None else {name: str(device) for name, device in mapping.items()},
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": placement.quantization,
        "attn_implementation": model.config.get_text_config()._attn_implementation,
        "compile": placement.compiles,
        "max_context": placement.max_context,
        "slots": engine_options(plan, options).max_batch,
    }


def file_bytes(plan: Plan, options: LoadOptions) -> int:
    """Bytes of the files that the weights are read from."""
    if plan.record.gguf_file is not None:
        return (plan.folder / plan.record.gguf_file).stat().st_size
    return files.weights_bytes(plan.record.model_id, plan.folder, allow_pickle=options.allow_pickle)


def file_marks(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """What tells a folder's files from any others: the name, size and time of change (ns) of each."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


def check_context(plan: Plan) -> None:
    """Refuse more tokens than the model reads."""
    asked, config = plan.placement.max_context, plan.config.get_text_config()
    own = getattr(config, "max_position_embeddings", None) or 0
    own = context(own, getattr(config, "rope_parameters", None)) if own > 0 else 0
    if asked is not None and asked > own > 0:
        raise InvalidRequest(
            f"Invalid value for field 'max_context': model '{plan.record.model_id}' reads {own} tokens at most",
            "max_context",
        )


def check_compile(plan: Plan) -> None:
    """Refuse to compile what gains nothing by it, and where there is nothing to compile with.

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
    files.read_config(model_id, folder)  # and see what it says, before anything is made of it
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:
        raise refusal(model_id, folder, error, "config.json") from error
    # transformers knows some models by this name, and it shall not matter to it where the files lie.
    config.name_or_path = model_id
    return config


def refusal(model_id: str, folder: Path, error: Exception, part: str) -> LoadError:
    """What an error of transformers in reading `part` of a model means to the user."""
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
    """The head that the weights have: the first of `wanted` where they have several, or do not say.

    Raises:
        NotServed: a model of its kind does none of this server's tasks, or cannot be run on a text alone.
        ModelUnsupported: it cannot be told.
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
    """What a class of transformers reads; None for one of the folder's own code."""
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
    """What loads the model: of T5 and its kin there are weights of the encoder alone, as in sentence-t5."""
    encoder = modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type, "")
    if head == "base" and encoder.endswith("EncoderModel") and encoder in (config.architectures or ()):
        return transformers.AutoModelForTextEncoding
    return getattr(transformers, AUTO_CLASSES[head])
