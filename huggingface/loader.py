"""The only `from_pretrained`: a record becomes a `LoadedModel`, or a `LoadError` that says why not.

Imports torch and transformers, so it is itself imported late. `load` may be called from any thread. It must not know
the registry, the manager or HTTP.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

from . import files, hub
from .devices import resolve_device
from .engine.products import Products
from .errors import (
    DeviceMissing,
    FilesCorrupt,
    FilesMissing,
    FilesRefused,
    InvalidRequest,
    LoadError,
    LocalLLMError,
    ModelUnsupported,
    OutOfMemory,
)
from .loaded import LoadedModel, free
from .memory import forget_frames
from .records import LoadOptions, ModelRecord
from .tasks import HEADS, MODEL_TYPES, Head
from .tasks.embedding import Pooling, find_pooling
from .tasks.reranking import note_cross_encoder

logger = logging.getLogger(__name__)

# How transformers says that it lacks an optional package, where it does not raise an ImportError.
_INSTALL = re.compile(r"pip install|(need|must|requires?) .{0,40}install|is not installed", re.IGNORECASE)

# transformers builds a model under process-wide switches (default dtype, skipped initialization), so two must not be
# built at once. Files are fetched outside of it: a slow download holds nobody up.
_BUILDING = threading.Lock()


@dataclass(frozen=True, slots=True)
class _HeadClass:
    """How a head is loaded, and which architectures (class names in `config.json`) have it."""

    auto_class: Any
    names: Mapping[str, str | tuple[str, ...]]


_HEADS: Mapping[Head, _HeadClass] = {
    "causal-lm": _HeadClass(transformers.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq-lm": _HeadClass(transformers.AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "masked-lm": _HeadClass(transformers.AutoModelForMaskedLM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "sequence-classification": _HeadClass(
        transformers.AutoModelForSequenceClassification, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ),
    "token-classification": _HeadClass(
        transformers.AutoModelForTokenClassification, auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    ),
    "question-answering": _HeadClass(
        transformers.AutoModelForQuestionAnswering, auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES
    ),
    "table-question-answering": _HeadClass(
        transformers.AutoModelForTableQuestionAnswering, auto.MODEL_FOR_TABLE_QUESTION_ANSWERING_MAPPING_NAMES
    ),
    "base": _HeadClass(transformers.AutoModel, auto.MODEL_MAPPING_NAMES),
}


def warm_up() -> None:
    """Have torch set up its math libraries, which it does at the first product of some size in each of them."""
    with torch.inference_mode():
        Products(torch.nn.Sequential(torch.nn.Linear(576, 1536)))


def load(record: ModelRecord, options: LoadOptions) -> LoadedModel:
    """Bring a registered model into memory: from the models folder, else from the Hub.

    float32 on a CPU, the weights' own dtype elsewhere.

    Raises:
        LoadError: one of its kinds, with a message that names the model and says what to do.
    """
    try:
        # On a thread of its own, that ends: OpenMP keeps a team of threads for every thread that ever computed, and
        # where there are more of them than cores, none waits actively, which makes each small product slower by half.
        with ThreadPoolExecutor(1, thread_name_prefix="load") as thread:
            return thread.submit(_load, record, options).result()
    except LoadError as error:
        forget_frames(error)  # they hold whatever was read so far
        free()
        raise


def _load(record: ModelRecord, options: LoadOptions) -> LoadedModel:
    model_id = record.model_id
    allow_pickle, trusted_ids = options.allow_pickle, options.trust_remote_code
    trusted = model_id in trusted_ids
    device = resolve_device(options.device)
    _check_device(device)
    folder = files.local_folder(options.models_dir, model_id)
    if folder is None:
        folder = hub.fetch(model_id, allow_pickle=allow_pickle, trusted=trusted_ids)
    # From here on everything is read from the folder, and the network is not touched.
    files.check(model_id, folder, allow_pickle=allow_pickle, trusted=trusted_ids)
    config = _read_config(model_id, folder, trusted)
    tokenizer = _read_tokenizer(model_id, folder, config, trusted)
    wanted = MODEL_TYPES[record.model_type].heads if record.model_type in MODEL_TYPES else HEADS
    head = _head(model_id, config, wanted)
    with _BUILDING:
        model = _read_model(model_id, folder, config, head, device, options, trusted)
        pooling = _pooling(folder, model, trusted)
    note_cross_encoder(model.config, folder)
    return LoadedModel(record, model, tokenizer, head, device, options.engine, pooling)


def _pooling(folder: Path, model: Any, trusted: bool) -> Pooling | LocalLLMError | None:
    """What a sentence-transformers folder says of making vectors; what is wrong there is told to who asks for one."""
    try:
        return find_pooling(folder, model, trusted=trusted)
    except InvalidRequest as error:
        return error
    except Exception as error:
        logger.info("the modules of a sentence-transformers model cannot be used", exc_info=error)
        return InvalidRequest(f"This model's modules.json cannot be used: {files.public(error, folder)}")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceMissing(
            f"The device '{device}' is not to be had here; choose another one in the server's setting LOCAL_LLM_DEVICE"
        ) from error


def _read_config(model_id: str, folder: Path, trusted: bool) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:
        raise _refusal(model_id, folder, error, "config.json") from error
    # transformers knows some models by this name, and it shall not matter to it where the files lie.
    config.name_or_path = model_id
    return config


def _read_tokenizer(model_id: str, folder: Path, config: Any, trusted: bool) -> Any:
    if not files.has_tokenizer(folder):
        raise FilesMissing(
            f"Model '{model_id}': its folder holds no tokenizer (tokenizer.json); put the complete model there"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=trusted, local_files_only=True
        )
    except Exception as error:
        raise _refusal(model_id, folder, error, "its tokenizer") from error
    # Where there is no vocabulary, transformers makes a tokenizer that knows no word.
    if lacking := files.lacking_vocabulary(folder, getattr(tokenizer, "vocab_files_names", {})):
        raise FilesMissing(f"Model '{model_id}': its tokenizer lacks {lacking}; put the complete model there")
    return tokenizer


def _refusal(model_id: str, folder: Path, error: Exception, part: str) -> LoadError:
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
            f"Model '{model_id}': {part} needs a package that is not installed: {files.public(error, folder)}"
        )
    logger.info("%s of %s cannot be used", part, model_id, exc_info=error)
    return FilesCorrupt(
        f"Model '{model_id}': {part} is damaged or incomplete; download it again ({files.public(error, folder)})"
    )


def _head(model_id: str, config: Any, wanted: tuple[Head, ...]) -> Head:
    """The head that the weights have: the first of `wanted` where they have several, or do not say."""

    def classes(head: Head) -> tuple[str, ...]:
        names = _HEADS[head].names.get(config.model_type, ())
        return (names,) if isinstance(names, str) else names

    order = [*wanted, *(head for head in HEADS if head not in wanted)]
    if wanted == ("base",) and classes("base"):  # hidden states: as AutoModel reads any checkpoint, without its head
        return "base"
    remote = getattr(config, "auto_map", None) or {}
    for architecture in config.architectures or ():
        # BART is one class for filling masks and for generating; the latter's tasks include the former.
        if "masked-lm" in wanted and architecture in classes("seq2seq-lm"):
            return "seq2seq-lm"
        for head in order:
            if architecture in classes(head):
                return head
        for head in order:
            if _HEADS[head].auto_class.__name__ in remote:
                return head
        # Older names: a pretraining or language-model head has the weights of the plain one.
        if architecture.endswith(("ForPreTraining", "LMHeadModel")):
            for head in order:
                if head in ("masked-lm", "causal-lm", "seq2seq-lm") and classes(head):
                    return head
    if not config.architectures:
        generates: tuple[Head, ...] = ("seq2seq-lm",) if config.is_encoder_decoder else ()
        for head in [*wanted, *generates]:
            if classes(head):
                return head
        if not remote:
            raise ModelUnsupported(
                f"Model '{model_id}': its config.json does not name the architecture of the weights ('architectures'), "
                f"and a {config.model_type} has none that fits the model's type"
            )
    raise ModelUnsupported(
        f"Model '{model_id}' is a {', '.join(config.architectures or [config.model_type])}, "
        "which does none of this server's text tasks"
    )


def _read_model(
    model_id: str, folder: Path, config: Any, head: Head, device: str, options: LoadOptions, trusted: bool
) -> Any:
    try:
        model, info = _auto_class(config, head).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32 if device == "cpu" else "auto",
            use_safetensors=None if options.allow_pickle else True,
            trust_remote_code=trusted,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported in the info, and refused below in words of our own
            output_loading_info=True,
        )
        _check_weights(model_id, head, info)
        return model.to(device)
    except LoadError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(f"Not enough memory on {device} to load model '{model_id}'") from error
    except Exception as error:
        if "allocate memory" in str(error):  # what torch's CPU allocator says
            raise OutOfMemory(f"Not enough memory on {device} to load model '{model_id}'") from error
        raise _refusal(model_id, folder, error, "its weights or its config.json") from error


def _auto_class(config: Any, head: Head) -> Any:
    """What loads the model: of T5 and its kin there are weights of the encoder alone, as in sentence-t5."""
    encoder = auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type, "")
    if head == "base" and encoder.endswith("EncoderModel") and encoder in (config.architectures or ()):
        return transformers.AutoModelForTextEncoding
    return _HEADS[head].auto_class


def _check_weights(model_id: str, head: Head, info: Mapping[str, Iterable[Any]]) -> None:
    """Refuse weights that do not fill the model: transformers would fill the rest with random numbers.

    A base model's pooler may be missing: no task here reads it, and some checkpoints come without.
    """
    missing = sorted(str(key) for key in info["missing_keys"])
    if head == "base":
        missing = [key for key in missing if not key.startswith("pooler.")]
    # Of a tensor that does not fit: its name, its shape in the file, and the shape that the model needs.
    mismatched = sorted(str(key[0]) for key in info["mismatched_keys"])
    if missing or mismatched:
        names = ", ".join([*missing, *mismatched][:3])
        raise FilesCorrupt(
            f"Model '{model_id}': its weights do not fill the model ({len(missing)} tensors missing, {len(mismatched)} "
            f"of another shape, such as {names}); they are incomplete, or belong to another model than its config.json"
        )
