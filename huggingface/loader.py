"""The only `from_pretrained`: a record becomes a `LoadedModel`, or a `LoadError` that says why not.

Imports torch and transformers, so it is itself imported late. `load` may be called from any thread. It must not know
the registry, the manager or HTTP.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

from . import files
from .devices import resolve_device
from .engine.engine import Engine
from .engine.runner import TransformersRunner
from .engine.ticket import Ticket
from .errors import FilesCorrupt, FilesMissing, FilesRefused, LoadError, ModelUnsupported, OutOfMemory, UnsupportedTask
from .records import GenerationRequest, LoadOptions, ModelRecord, timestamp
from .tasks import HEADS, MODEL_TYPES, Head, supported_tasks
from .tasks.runner import TaskRunner

logger = logging.getLogger(__name__)

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


class LoadedModel:
    """A model in memory: one set of weights that serves every generation and every task of its head.

    Any thread may call it; the work runs on the model's own thread, one piece after another.
    """

    def __init__(self, record: ModelRecord, model: Any, tokenizer: Any, head: Head) -> None:
        model_id = record.model_id
        self.model_id = model_id
        self.model_type = record.model_type
        self.head = head
        self.device = str(model.device)
        self.loaded_at = timestamp()
        self._tasks = TaskRunner(model_id, model, tokenizer, head)
        self._engine = Engine(model_id, TransformersRunner(model_id, model, tokenizer))

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """The tasks that `run` takes, by the names a caller may use."""
        return supported_tasks(self.head)

    @property
    def opened_tasks(self) -> tuple[str, ...]:
        """The tasks that were run since the load, whose pipelines are kept."""
        return self._tasks.opened

    def generate(self, request: GenerationRequest) -> Ticket:
        """Queue a generation; its ticket gives the text, and the errors of `TransformersRunner.generate`.

        Raises:
            UnsupportedTask: the model has no head that generates text.
        """
        if self.head not in ("causal-lm", "seq2seq-lm"):
            raise UnsupportedTask(self.model_id, "generate", self.supported_tasks)
        return self._engine.submit(request)

    def run(
        self, task: str, inputs: Any, parameters: Mapping[str, Any], cancelled: Callable[[], bool] = lambda: False
    ) -> Any:
        """Run a task and return its result as JSON values; waits for its turn and until it is done.

        Raises:
            UnsupportedTask: the model cannot do it. InvalidRequest: inputs or parameters that it cannot honour.
            Cancelled: `cancelled()` turned true, or the model is being unloaded.
        """
        tasks = self._tasks
        return self._engine.call(lambda gone: tasks.run(task, inputs, parameters, gone), cancelled)

    def close(self) -> None:
        """Cancel what runs, and give the memory back to the system. The model cannot be used afterwards."""
        self._engine.close()
        del self._engine, self._tasks
        gc.collect()  # pipelines, models and their modules refer to each other in circles
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        if sys.platform == "linux":
            # glibc keeps freed memory for itself until it is told otherwise.
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)


def load(record: ModelRecord, options: LoadOptions) -> LoadedModel:
    """Bring a registered model into memory: from the models folder, else from the Hub.

    float32 on a CPU, the weights' own dtype elsewhere.

    Raises:
        LoadError: one of its kinds, with a message that names the model and says what to do.
    """
    model_id = record.model_id
    trusted = model_id in options.trust_remote_code
    device = resolve_device(options.device)
    folder = files.local_folder(options.models_dir, model_id)
    if folder is None:
        folder = files.fetch(model_id, allow_pickle=options.allow_pickle)
        with files.hub_errors(model_id):  # transformers knows which files a tokenizer needs; they join the others
            transformers.AutoTokenizer.from_pretrained(model_id, trust_remote_code=trusted)
    files.check(model_id, folder, allow_pickle=options.allow_pickle)
    config = _read_config(model_id, folder, trusted)
    tokenizer = _read_tokenizer(model_id, folder, trusted)
    wanted = MODEL_TYPES[record.model_type].heads if record.model_type in MODEL_TYPES else HEADS
    head = _head(model_id, config, wanted)
    with _BUILDING:
        model = _read_model(model_id, folder, config, head, device, options, trusted)
    return LoadedModel(record, model, tokenizer, head)


def _read_config(model_id: str, folder: Path, trusted: bool) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:
        raise _config_error(model_id, error) from error


def _config_error(model_id: str, error: Exception) -> LoadError:
    message = str(error)
    if "trust_remote_code" in message:
        return FilesRefused(
            f"Model '{model_id}' needs Python code of its own repository. If you have read that code and trust it, set "
            f"LOCAL_LLM_TRUST_REMOTE_CODE={model_id}"
        )
    if "not a valid JSON" in message or isinstance(error, UnicodeDecodeError):
        return FilesCorrupt(f"Model '{model_id}': config.json is damaged; download it again")
    if isinstance(error, ImportError):
        return ModelUnsupported(f"Model '{model_id}' needs a package that is not installed: {files.public(error)}")
    if "model_type" in message or "architecture" in message or isinstance(error, KeyError):
        return ModelUnsupported(
            f"Model '{model_id}': transformers {transformers.__version__} does not know this kind of model"
        )
    return FilesCorrupt(f"Model '{model_id}': config.json cannot be used: {files.public(error)}")


def _read_tokenizer(model_id: str, folder: Path, trusted: bool) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except ImportError as error:
        raise ModelUnsupported(
            f"Model '{model_id}': its tokenizer needs a package that is not installed: {files.public(error)}"
        ) from error
    except Exception as error:
        if any(folder.glob("*token*")) or any(folder.glob("*vocab*")) or any(folder.glob("*.model")):
            raise FilesCorrupt(
                f"Model '{model_id}': its tokenizer files are damaged or incomplete; download them again"
            ) from error
        raise FilesMissing(f"Model '{model_id}': its folder holds no tokenizer (tokenizer.json)") from error


def _head(model_id: str, config: Any, wanted: tuple[Head, ...]) -> Head:
    """The head that the weights have: the first of `wanted` where they have several, or do not say."""

    def known_to(head: Head) -> bool:
        return config.model_type in _HEADS[head].names

    def carries(head: Head, architecture: str) -> bool:
        names = _HEADS[head].names.get(config.model_type, ())
        return architecture in ((names,) if isinstance(names, str) else names)

    order = [*wanted, *(head for head in HEADS if head not in wanted)]
    if wanted == ("base",) and known_to("base"):  # hidden states: as AutoModel reads any checkpoint, without its head
        return "base"
    for architecture in config.architectures or ():
        for head in order:
            if carries(head, architecture):
                return head
        remote = getattr(config, "auto_map", None) or {}
        for head in order:
            if _HEADS[head].auto_class.__name__ in remote:
                return head
        # Older names: a pretraining or language-model head has the weights of the plain one.
        if architecture.endswith(("ForPreTraining", "LMHeadModel")):
            for head in order:
                if head in ("masked-lm", "causal-lm", "seq2seq-lm") and known_to(head):
                    return head
    if not config.architectures:
        for head in wanted:
            if known_to(head):
                return head
    raise ModelUnsupported(
        f"Model '{model_id}' is a {', '.join(config.architectures or [config.model_type])}, "
        "which does none of this server's text tasks"
    )


def _read_model(
    model_id: str, folder: Path, config: Any, head: Head, device: str, options: LoadOptions, trusted: bool
) -> Any:
    try:
        model, info = _HEADS[head].auto_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32 if device == "cpu" else "auto",
            use_safetensors=None if options.allow_pickle else True,
            trust_remote_code=trusted,
            local_files_only=True,
            output_loading_info=True,
        )
        _check_weights(model_id, head, info)
        return model.to(device)
    except LoadError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(f"Not enough memory on {device} to load model '{model_id}'") from error
    except ImportError as error:
        raise ModelUnsupported(
            f"Model '{model_id}' needs a package that is not installed: {files.public(error)}"
        ) from error
    except Exception as error:
        if "allocate memory" in str(error):  # what torch's CPU allocator says
            raise OutOfMemory(f"Not enough memory on {device} to load model '{model_id}'") from error
        raise FilesCorrupt(f"Model '{model_id}' could not be read: {files.public(error)}") from error


def _check_weights(model_id: str, head: Head, info: Mapping[str, Iterable[Any]]) -> None:
    """Refuse weights that do not fill the model: transformers would fill the rest with random numbers.

    A base model's pooler may be missing: no task here reads it, and some checkpoints come without.
    """
    missing = sorted(str(key) for key in info["missing_keys"])
    if head == "base":
        missing = [key for key in missing if not key.startswith("pooler.")]
    mismatched = [str(key) for key in info["mismatched_keys"]]
    if missing or mismatched:
        names = ", ".join([*missing, *mismatched][:3])
        raise FilesCorrupt(
            f"Model '{model_id}': its weights do not fill the model ({len(missing) + len(mismatched)} tensors missing "
            f"or of another shape, such as {names}); they are incomplete or belong to another model"
        )
