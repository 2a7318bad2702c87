"""The only `from_pretrained`: a record becomes a `LoadedModel`, or a `LoadError` that says why not.

Imports torch and transformers, so it is itself imported late. `load` may be called from any thread. It must not know
the registry, the manager or HTTP.
"""

from __future__ import annotations

import gc
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

from . import files, hub
from .devices import resolve_device
from .engine.batch import TransformersBatch, sequence_of
from .engine.constraints import Constraints
from .engine.engine import Engine
from .engine.parity import batch_runner
from .engine.prepare import Preparer
from .engine.products import Products
from .engine.prompts import run_in_batch
from .engine.runner import BatchRunner, NotBatchable
from .engine.solo import Solo
from .engine.ticket import Ticket
from .engine.tokens import TokenTexts
from .errors import (
    Cancelled,
    DeviceMissing,
    FilesCorrupt,
    FilesMissing,
    FilesRefused,
    InvalidRequest,
    LoadError,
    LocalLLMError,
    ModelUnsupported,
    OutOfMemory,
    UnsupportedTask,
)
from .memory import forget_frames, release_freed
from .records import ChatTraits, EngineOptions, EngineStatus, GenerationRequest, LoadOptions, ModelRecord, timestamp
from .tasks import HEADS, MODEL_TYPES, Head
from .tasks.embedding import Pooling, find_pooling
from .tasks.generation import generation_arguments
from .tasks.positions import max_positions
from .tasks.reranking import note_cross_encoder
from .tasks.runner import TaskRunner
from .tasks.text_generation import TextGenerations

logger = logging.getLogger(__name__)

# How transformers says that it lacks an optional package, where it does not raise an ImportError.
_INSTALL = re.compile(r"pip install|(need|must|requires?) .{0,40}install|is not installed", re.IGNORECASE)

_GENERATION = "text-generation"  # the one task whose work the batch does

# Of a generation config: what an answer's caller may set too.
_DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "top_h")

_LOOK_AGAIN = 0.1  # seconds between two looks at whether the one who waits is still there

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


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a model in memory is made of; let go of as a whole."""

    engine: Engine
    tasks: TaskRunner
    preparer: Preparer
    solo: Solo
    tokenizer: Any
    batched: bool
    generations: TextGenerations


class LoadedModel:
    """A model in memory: one set of weights that serves every generation and every task of its head.

    Any thread may call it; the work runs on the model's own thread, many generations in one batch.
    """

    def __init__(
        self,
        record: ModelRecord,
        model: Any,
        tokenizer: Any,
        head: Head,
        device: str,
        options: EngineOptions,
        pooling: Pooling | LocalLLMError | None = None,
    ) -> None:
        """`pooling` is what makes one vector of a text's, or why that cannot be had."""
        model_id = record.model_id
        self.model_id = model_id
        self.model_type = record.model_type
        self.head = head
        self.device = device
        self.loaded_at = timestamp()
        runner, reason = _batch_runner(model, head)
        constraints = _constraints(model, tokenizer)
        texts = TokenTexts(tokenizer, lambda: constraints.tokens)
        batch = None if runner is None else TransformersBatch(model_id, runner, texts, options)
        self.pools = pooling is not None

        def find() -> Pooling | None:
            if isinstance(pooling, LocalLLMError):
                raise pooling
            return pooling

        tasks = TaskRunner(model_id, model, tokenizer, head, find)
        engine = Engine(model_id, batch, tasks, options, reason)
        preparer = Preparer(
            model_id,
            model,
            tokenizer,
            contexts=_contexts(model),
            room=None if batch is None else batch.slots.longest,
            constraints=constraints,
            arguments=lambda given: generation_arguments(given, model),
        )
        solo = Solo(model_id, model, tokenizer, texts)
        generations = TextGenerations(model, tokenizer, lambda given, error: tasks.failure(_GENERATION, given, error))
        self._parts: _Parts | None = _Parts(engine, tasks, preparer, solo, tokenizer, batch is not None, generations)
        # Of one call, so that whoever comes meanwhile finds a place.
        self._most_prompts = max(1, options.max_batch // 2)
        self._context = _contexts(model)[0]

    @property
    def opened_tasks(self) -> tuple[str, ...]:
        """The tasks that were run since the load, whose pipelines are kept."""
        parts = self._parts
        return () if parts is None else parts.tasks.opened

    @property
    def status(self) -> EngineStatus | None:
        """What its engine is doing; None where it has been taken out of memory."""
        parts = self._parts
        return None if parts is None else parts.engine.status()

    @property
    def own_parameters(self) -> Mapping[str, Any]:
        """What its generation config says of drawing tokens; lengths and ends apply anyhow."""
        config = self._open().solo.model.generation_config
        return {name: value for name in _DRAWING if (value := getattr(config, name, None)) is not None}

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self._open().tokenizer.decode(list(tokens), skip_special_tokens=False))

    def count_tokens(self, text: str) -> int:
        """How many tokens its tokenizer makes of a text, without special ones."""
        return len(self._open().tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with the special ones that the model's tokenizer adds."""
        return list(self._open().tokenizer(text, return_attention_mask=False)["input_ids"])

    @property
    def chat(self) -> ChatTraits:
        """How it lays chats out."""
        tokenizer = self._open().tokenizer
        added = tokenizer.added_tokens_decoder
        special = frozenset(token.content for token in added.values() if token.special)
        return ChatTraits(tokenizer.chat_template, {token.content: id_ for id_, token in added.items()}, special)

    @property
    def failed(self) -> bool:
        """Whether its engine is broken, so that it is to be loaded anew."""
        parts = self._parts
        return parts is not None and parts.engine.failed

    def generate(self, request: GenerationRequest, gone: Callable[[], bool] = lambda: False) -> Ticket:
        """Queue a generation; its ticket gives the text, and the errors of what computes it.

        It is given up when `gone()`, which is asked at every step, or when the ticket is cancelled.

        Raises:
            UnsupportedTask: the model has no head that generates text.
            InvalidRequest: the prompt or a parameter is one that this model cannot honour.
            QueueFull, OutOfMemory, EngineFailed, Cancelled: it was not taken into the queue.
        """
        parts = self._open()
        if self.head not in ("causal-lm", "seq2seq-lm"):
            raise UnsupportedTask(self.model_id, "generate", parts.engine.call(lambda: parts.tasks.supported))
        submitted = time.monotonic()
        prepared = parts.preparer.prepare(request)
        ticket = Ticket(prepared.prompt_tokens, parts.engine.wake, prepared.end)
        if parts.batched and prepared.settled is not None:
            parts.engine.submit(sequence_of(prepared, prepared.settled, parts.tokenizer, ticket, gone, request.streams))
        else:
            parts.engine.submit_job(
                ticket,
                lambda given_up: parts.solo.generate(prepared, request.streams, submitted, ticket.put, given_up),
                gone,
            )
        return ticket

    def run(
        self, task: str, inputs: Any, parameters: Mapping[str, Any], gone: Callable[[], bool] = lambda: False
    ) -> Any:
        """Run a task and return its result as JSON values; it is batched with whoever else asks at the time.

        Prompts of `text-generation` run as generations do, unless they ask for what only the model itself can: beams.

        Raises:
            UnsupportedTask: the model cannot do it. InvalidRequest: inputs or parameters that it cannot honour.
            QueueFull: as many calls wait as may.
            Cancelled: `gone()` turned true, or the model is being unloaded.
        """
        parts = self._open()
        if task == _GENERATION and parts.batched:
            generation = parts.generations.begin(inputs, parameters)
            if run_in_batch(generation, parts.engine, most=self._most_prompts, context=self._context, gone=gone):
                parts.tasks.note(task)
                return generation.result()
        parts.engine.check_queue_for_task()
        call = parts.tasks.submit(task, inputs, parameters, gone)
        parts.engine.wake()
        while True:
            try:
                return call.result(_LOOK_AGAIN)
            except TimeoutError:
                if gone():
                    call.cancel()
                    raise Cancelled from None

    def _open(self) -> _Parts:
        parts = self._parts
        if parts is None:
            raise Cancelled(f"Model '{self.model_id}' has been taken out of memory")
        return parts

    def close(self) -> None:
        """Cancel what runs, and give the memory back to the system. The model cannot be used afterwards."""
        parts, self._parts = self._parts, None
        if parts is None:
            return
        parts.engine.close()
        del parts
        _free()


def _batch_runner(model: Any, head: Head) -> tuple[BatchRunner | None, str | None]:
    """What serves the model in a batch, or why it is served one request at a time."""
    if head == "seq2seq-lm":
        return None, "it is an encoder-decoder"
    if head != "causal-lm":
        return None, "it does not generate text"
    try:
        return batch_runner(model), None
    except NotBatchable as error:
        logger.info("%s is served one request at a time: %s", model.config.name_or_path, error)
        return None, str(error)


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
        _free()
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


def _free() -> None:
    """Give back what was let go of: models and pipelines refer to each other in circles, and allocators keep memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    release_freed()


def _constraints(model: Any, tokenizer: Any) -> Constraints:
    """What constrains the model's texts; llguidance looks at the tokenizer when it is first asked."""
    own = model.generation_config.eos_token_id if model.can_generate() else None
    ends = own if isinstance(own, list) else [] if own is None else [own]
    return Constraints(tokenizer, model.config.get_text_config().vocab_size, ends)


def _contexts(model: Any) -> tuple[int | None, int | None]:
    """How many tokens the model can read, and how many it can have in what it writes: its weights or its config say."""
    reads = max_positions(model)
    if reads is None:
        said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        reads = said if said and said > 0 else None  # XLNet says -1: no limit
    if not model.config.is_encoder_decoder:
        return reads, reads
    return reads, max_positions(model.get_decoder())


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
