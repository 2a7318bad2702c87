"""The only `from_pretrained`: a record becomes a `LoadedModel`, or a `LoadError` that says why not.

Imports torch and transformers, so it is itself imported late. `load` may be called from any thread. It must not know
the registry, the manager or HTTP.
"""

from __future__ import annotations

import copy
import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import transformers
from transformers import modeling_gguf_pytorch_utils
from transformers.models.auto import modeling_auto as auto

from . import converted, converted_encoder, converting, estimating, files, gguf_files
from .adapter_files import factor_bytes
from .adapters import attach
from .converting import ConversionFailed, Wanted
from .engine.layers import NotBatchable
from .engine.openvino import library
from .engine.openvino.reserve import make_shell
from .engine.products import Products
from .errors import (
    FilesCorrupt,
    FilesMissing,
    FilesRefused,
    InvalidRequest,
    LoadError,
    LocalLLMError,
    ModelUnsupported,
    OutOfMemory,
)
from .headers import GGUFHeader, Tensor
from .loaded import Conversion, LoadedModel, Memory, Setup, detach, free
from .memory import available_bytes, forget_frames
from .placement import Placement, place
from .progress import Progress
from .quantization import predicted_bytes, quantize
from .records import EngineOptions, Estimate, LoadOptions, LoadSettings, ModelRecord
from .tasks import HEADS, MODEL_TYPES, Head
from .tasks.embedding import Pooling, find_pooling
from .tasks.reranking import note_cross_encoder

T = TypeVar("T")

logger = logging.getLogger(__name__)

# How transformers says that it lacks an optional package, where it does not raise an ImportError.
_INSTALL = re.compile(r"pip install|(need|must|requires?) .{0,40}install|is not installed", re.IGNORECASE)

# What transformers calls its progress bars: of weights that are read, and of GGUF's that are unpacked.
_BARS = ("Loading weights", "Converting and de-quantizing GGUF tensors...")

# Bytes of files up to which a model is converted in this process: that is over before another one has imported torch.
_CONVERTED_HERE = 32 * 2**20

# Bytes that the process which converts takes besides the weights: torch, transformers and openvino.
_CONVERTING = 600 * 10**6

# Where transformers looks for an adapter to put on the model by itself: only those that the record names are wanted.
_NOWHERE = "no-adapter-of-its-own"

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


def load(
    record: ModelRecord,
    options: LoadOptions,
    folder: Path,
    *,
    settings: LoadSettings | None = None,
    adapters: Mapping[str, Path] = MappingProxyType({}),
    progress: Progress | None = None,
    memory: Memory | None = None,
) -> LoadedModel:
    """Bring a registered model, whose files are in `folder`, into memory.

    `settings` are those in effect; without them the record's. `adapters` are the folders of its adapters by their
    names. `memory` is where it asks for memory later on.

    Raises:
        LoadError: one of its kinds, with a message that names the model and says what to do.
        InvalidRequest: a setting that cannot be honoured, by its name.
        Cancelled: `progress` was cancelled.
    """
    settings, progress = settings or record.settings, progress or Progress()
    work = partial(_load, record, options, folder, settings, adapters, progress, memory)
    return _on_a_thread(record.model_id, work)


def estimate(
    record: ModelRecord,
    options: LoadOptions,
    folder: Path,
    settings: LoadSettings | None = None,
    *,
    described: bool = False,
    adapters: Iterable[Mapping[str, Tensor]] = (),
) -> Estimate:
    """What `load` would take, from the config and the files' headers alone; where the model is only `described`, its
    weights need not be there. `adapters` are the heads of its adapters' weights.

    Raises: as `load`.
    """
    settings = settings or record.settings
    told = _on_a_thread(
        record.model_id, lambda: _estimate(_look(record, options, folder, settings, described), options)
    )
    factors = sum(map(factor_bytes, adapters))
    devices = {**told.devices, told.device: told.devices.get(told.device, 0) + factors}
    return replace(told, weights=told.weights + factors, devices=devices)


def check(record: ModelRecord, options: LoadOptions, folder: Path, settings: LoadSettings) -> None:
    """Refuse settings that a load would refuse, as far as that is known before weights are read.

    Raises: as `load`.
    """

    def look() -> None:
        plan = _look(record, options, folder, settings)
        _check_context(plan)
        _check_compile(plan)

    _on_a_thread(record.model_id, look)


def rough_bytes(
    record: ModelRecord, options: LoadOptions, folder: Path, adapters: Iterable[Mapping[str, Tensor]] = ()
) -> int:
    """About as many bytes as a load takes at most, told by the size of the files alone, in no time.

    Twice and a half the files: weights of 16 bits become ones of 32, and a table of embeddings may lie there twice.

    Raises: as `load`.
    """
    size = files.weights_bytes(record.model_id, folder, allow_pickle=options.allow_pickle)
    return size * 5 // 2 + options.engine.kv_cache_bytes // 4 + sum(map(factor_bytes, adapters))


def _on_a_thread(model_id: str, work: Callable[[], T]) -> T:
    """Have work done on a thread of its own, that ends: OpenMP keeps a team of threads for every thread that ever
    computed, and where there are more of them than cores, none waits actively, which makes each small product slower
    by half."""
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="load") as thread:
            return thread.submit(work).result()
    except LocalLLMError as error:
        forget_frames(error)  # they hold whatever was read so far
        free()
        raise
    except MemoryError as error:
        forget_frames(error)
        free()
        raise OutOfMemory(f"Not enough memory to load model '{model_id}'") from error


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is known of a model before its weights are read."""

    record: ModelRecord
    folder: Path
    config: Any
    head: Head
    placement: Placement
    trusted: bool
    gguf: GGUFHeader | None = None


def _look(
    record: ModelRecord, options: LoadOptions, folder: Path, settings: LoadSettings, described: bool = False
) -> _Plan:
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
    return _Plan(record, folder, config, head, placement, trusted, header)


def _estimate(plan: _Plan, options: LoadOptions) -> Estimate:
    auto_class, config = _auto_class(plan.config, plan.head), copy.deepcopy(plan.config)
    config.name_or_path = str(plan.folder)  # where code of its own is looked for

    def build() -> Any:
        return auto_class.from_config(config, trust_remote_code=plan.trusted)

    own = _own_dtype(plan)
    engine = _engine_options(plan, options)
    converts = _not_for_openvino(plan, plan.record.adapters or {}) is None and not _place(plan, options).refused
    try:
        with _BUILDING:
            runner: Any = "openvino" if converts else "torch"
            return estimating.estimate(build, plan.head, plan.placement, own, engine, runner)
    except LocalLLMError:
        raise
    except Exception as error:
        raise _refusal(plan.record.model_id, plan.folder, error, "its config.json") from error


def _own_dtype(plan: _Plan) -> torch.dtype:
    """The type of the weights in their files: what the config says, as transformers takes it."""
    said = getattr(plan.config, "dtype", None) or torch.float32
    return getattr(torch, said) if isinstance(said, str) else said


def _engine_options(plan: _Plan, options: LoadOptions) -> EngineOptions:
    slots = plan.placement.slots
    return options.engine if slots is None else replace(options.engine, max_batch=slots)


def _load(
    record: ModelRecord,
    options: LoadOptions,
    folder: Path,
    settings: LoadSettings,
    adapters: Mapping[str, Path],
    progress: Progress,
    memory: Memory | None,
) -> LoadedModel:
    plan = _look(record, options, folder, settings)
    model_id, placement = record.model_id, plan.placement
    if plan.gguf is not None and record.gguf_file is not None and not files.has_tokenizer(folder):
        tokenizer = gguf_files.read_tokenizer(model_id, folder, record.gguf_file, plan.gguf)
    else:
        tokenizer = _read_tokenizer(model_id, folder, plan.config, plan.trusted)
    _check_context(plan)
    _check_compile(plan)
    reason = _not_for_openvino(plan, adapters)
    if reason is None:
        made = _load_converted(plan, options, settings, tokenizer, progress, memory)
        if isinstance(made, LoadedModel):
            return made
        reason = made
    own = Path(tempfile.mkdtemp(prefix="local-llm-")) if placement.device_map is not None else None
    try:
        with _BUILDING:
            progress.begin("read", _file_bytes(plan, options))
            with _watched(progress):
                model = _read_model(plan, options, own)
            attached = attach(model_id, model, adapters, tokenizer)
            if placement.compiles:
                model.compile(dynamic=True)  # at its first use, which takes a while
            pooling = _pooling(folder, model, plan.trusted)
        note_cross_encoder(model.config, folder)
        setup = Setup(
            record=record,
            head=plan.head,
            device=str(model.device) if placement.device_map is not None else placement.device,
            effective=_effective(plan, model, options),
            key=_key(plan, options, adapters),
            engine_reason=reason,
            max_context=placement.max_context,
            commit=_commit(folder),
            folder=own,
        )
        return LoadedModel(setup, model, tokenizer, _engine_options(plan, options), pooling, memory, attached)
    except BaseException:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
        raise


def _commit(folder: Path) -> str | None:
    """The commit of a model that came from the Hub."""
    return folder.name if folder.parent.name == "snapshots" else None


# By OpenVINO ----------------------------------------------------------------------------------------------------------


def _not_for_openvino(plan: _Plan, adapters: Mapping[str, Any]) -> str | None:
    """Why torch is to compute this model; None where OpenVINO may.

    Raises:
        InvalidRequest: OpenVINO is asked for by name, and cannot be had with the rest of what is asked for.
        ModelUnsupported: it is asked for, and not installed.
    """
    placement = plan.placement
    if placement.engine == "torch":
        return "torch was asked for"
    reason = None
    if plan.head == "seq2seq-lm" or (plan.config.is_encoder_decoder and _whole(plan)):
        reason = "it is an encoder-decoder"
    elif plan.head not in ("causal-lm", *converted_encoder.HEADS):
        reason = "it reads tables"
    elif placement.device != "cpu" or placement.device_map is not None:
        reason = "it is not on the CPU alone"
    elif (placement.dtype or _own_dtype(plan)) is not torch.float32:
        reason = "OpenVINO computes in float32 here, and dtype says otherwise"
    elif adapters:
        reason = "it has adapters"
    elif placement.attention is not None:
        reason = "attn_implementation is for torch"
    elif placement.compiles:
        reason = "compile is for torch"
    elif placement.quantization == "int4" and placement.engine == "auto":
        reason = "in 4 bits torch loses less"
    if reason is not None:
        if placement.engine == "openvino":
            raise InvalidRequest(f"Invalid value for field 'engine': openvino cannot be had here: {reason}", "engine")
        return reason
    packages = ("openvino", "nncf") if placement.quantization is not None else ("openvino",)
    lacking = [name for name in packages if not library.installed(name)]
    if lacking and placement.engine == "openvino":
        raise ModelUnsupported(
            f"Model '{plan.record.model_id}' was to be computed by OpenVINO, which is not installed: pip install "
            + " ".join(lacking)
        )
    return f"not installed: {' '.join(lacking)}" if lacking else None


def _load_converted(
    plan: _Plan,
    options: LoadOptions,
    settings: LoadSettings,
    tokenizer: Any,
    progress: Progress,
    memory: Memory | None,
) -> LoadedModel | str:
    """The model with OpenVINO to compute it, or why that cannot be.

    Raises:
        InvalidRequest: it cannot be, and was asked for by name.
    """
    placement, record, folder = plan.placement, plan.record, plan.folder
    place, spare = _place(plan, options), Path(tempfile.mkdtemp(prefix="local-llm-"))
    try:
        find = converted_encoder.find if plan.head in converted_encoder.HEADS else converted.find
        graph = find(place)
        anew = graph is None
        with _BUILDING:
            model = _read_shell(plan, options)  # refuses what is wrong with the files
            pooling = _pooling(folder, model, plan.trusted)
        if anew:
            bare = replace(options, engine=EngineOptions())
            wanted = Wanted(_bare(record), bare, folder, settings, spare)
            if _file_bytes(plan, options) > _CONVERTED_HERE:
                _check_conversion(model, placement.quantization)
                converting.convert(wanted, progress)
            else:
                with _BUILDING:
                    convert(wanted, progress)
            graph = find(place, spare)
        if graph is None:
            raise NotBatchable("its graph could not be kept anywhere")
    except (NotBatchable, ConversionFailed) as error:
        shutil.rmtree(spare, ignore_errors=True)
        if isinstance(error, ConversionFailed) and error.final:
            place.refuse(str(error))
        if placement.engine == "openvino":
            raise InvalidRequest(
                f"Invalid value for field 'engine': openvino cannot compute model '{record.model_id}': {error}",
                "engine",
            ) from error
        return str(error)
    except BaseException:
        shutil.rmtree(spare, ignore_errors=True)
        raise
    if graph.folder is None:
        shutil.rmtree(spare, ignore_errors=True)
    try:
        note_cross_encoder(model.config, folder)
        weights = sum(tensor.numel() * tensor.itemsize for tensor in {*model.parameters(), *model.buffers()})
        if placement.quantization is not None:
            weights = predicted_bytes(model, placement.quantization, "cpu")
        setup = Setup(
            record=record,
            head=plan.head,
            device="cpu",
            effective=_effective(plan, model, options),
            max_context=placement.max_context,
            commit=_commit(folder),
            folder=graph.folder,
        )

        def read() -> Any:
            with _BUILDING:
                whole = _read_model(plan, options, None)
            detach(whole)
            return whole

        conversion = Conversion(graph, read, weights, place.refuse, placement.engine == "openvino")
        loaded = LoadedModel(
            setup, model, tokenizer, _engine_options(plan, options), pooling, memory, conversion=conversion
        )
        if anew:  # whether it can be computed so is not known yet
            try:
                loaded.prepared(lambda: progress.cancelled)
            except BaseException:
                loaded.close()
                raise
        return loaded
    except BaseException:
        if graph.folder is not None:
            shutil.rmtree(graph.folder, ignore_errors=True)
        raise


def _check_conversion(model: Any, quantization: str | None) -> None:
    """See that there is memory for another process that makes the graph of a model, whose shell this is.

    Raises:
        ConversionFailed: there is not.
    """
    weights = sum(tensor.numel() * 4 for tensor in model.parameters())
    # What is to be rounded is tried before, with its weights packed.
    need = weights * (1 if quantization is None else 2) + _CONVERTING
    free = available_bytes()
    if free is not None and free < need:
        raise ConversionFailed(f"its conversion takes about {need} bytes of memory, and {free} are free")


def _whole(plan: _Plan) -> bool:
    """Whether a model is more than the encoder of one."""
    return _auto_class(plan.config, plan.head) is not transformers.AutoModelForTextEncoding


def _place(plan: _Plan, options: LoadOptions) -> converted.Place:
    """Where the model's graph is kept."""
    paths = sorted(path for path in plan.folder.iterdir() if path.is_file())
    marks = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    wanted = [plan.head, plan.record.gguf_file, plan.trusted, options.allow_pickle]
    form = "encoder" if plan.head in converted_encoder.HEADS else ""
    return converted.Place(plan.folder, [marks, wanted], plan.placement.quantization, form)


def _bare(record: ModelRecord) -> ModelRecord:
    """What a conversion needs to know of a record."""
    return ModelRecord(record.model_id, record.name, record.model_type, gguf_file=record.gguf_file)


def convert(wanted: Wanted, progress: Progress) -> None:
    """Make a model's graph and keep it; for any but a small model in a process of its own, see `converting`.

    Raises:
        ConversionFailed: OpenVINO cannot compute it, or there is no room for its graph. As `load`, besides.
    """
    record, options, folder, spare = wanted.record, wanted.options, wanted.folder, wanted.spare
    plan = _look(record, options, folder, wanted.settings)
    exact = replace(plan, placement=replace(plan.placement, quantization=None))
    progress.begin("read", _file_bytes(plan, options))
    with _watched(progress):
        model = _read_model(exact, options, None)
    progress.begin("convert")
    try:
        place, quantization = _place(plan, options), plan.placement.quantization
        if plan.head in converted_encoder.HEADS:
            tokenizer = _read_tokenizer(record.model_id, folder, plan.config, plan.trusted)
            converted_encoder.make(model, tokenizer, place, quantization, spare, lambda: progress.cancelled)
        else:
            converted.make(model, place, quantization, spare, lambda: progress.cancelled)
    except (NotBatchable, library.OpenVINOMissing) as error:
        raise ConversionFailed(str(error)) from error
    except OSError as error:
        raise ConversionFailed(f"its graph cannot be written: {files.public(error, folder)}") from error


def _read_shell(plan: _Plan, options: LoadOptions) -> Any:
    """The model without its weights: what transformers makes of its folder, with shapes for numbers."""
    if plan.gguf is not None:
        config = copy.deepcopy(plan.config)
        with torch.device("meta"), torch.no_grad():
            model = _auto_class(config, plan.head).from_config(config, dtype=torch.float32).eval()
        return make_shell(model)
    return make_shell(_read_model(plan, options, None, hollow=True))


def _effective(plan: _Plan, model: Any, options: LoadOptions) -> dict[str, Any]:
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
        "slots": _engine_options(plan, options).max_batch,
    }


def _file_bytes(plan: _Plan, options: LoadOptions) -> int:
    """Bytes of the files that the weights are read from."""
    if plan.record.gguf_file is not None:
        return (plan.folder / plan.record.gguf_file).stat().st_size
    return files.weights_bytes(plan.record.model_id, plan.folder, allow_pickle=options.allow_pickle)


def _key(plan: _Plan, options: LoadOptions, adapters: Mapping[str, Path]) -> tuple[Any, ...]:
    """What tells these weights, as they are loaded, from any others."""
    folders = (plan.folder, *adapters.values())
    paths = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
    marks = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    wanted = (plan.head, str(plan.placement), plan.record.gguf_file, tuple(adapters))
    return (marks, *wanted, options.engine.kv_cache_bytes)


def _check_context(plan: _Plan) -> None:
    asked, own = plan.placement.max_context, getattr(plan.config.get_text_config(), "max_position_embeddings", None)
    if asked is not None and own and asked > own > 0:
        raise InvalidRequest(
            f"Invalid value for field 'max_context': model '{plan.record.model_id}' reads {own} tokens at most",
            "max_context",
        )


def _check_compile(plan: _Plan) -> None:
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


@contextmanager
def _watched(progress: Progress) -> Iterator[None]:
    """Tell `progress` how many of the weights are read, as transformers tells its own progress bar.

    Its hook is the process's, as are the switches it builds models under: used with the lock for these only.
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
    modeling_gguf_pytorch_utils.tqdm = lambda *arguments, **named: watch(unpacking, arguments, named)
    try:
        yield
    finally:
        transformers.utils.logging.set_tqdm_hook(before)
        modeling_gguf_pytorch_utils.tqdm = unpacking


def _pooling(folder: Path, model: Any, trusted: bool) -> Pooling | LocalLLMError | None:
    """What a sentence-transformers folder says of making vectors; what is wrong there is told to who asks for one."""
    try:
        return find_pooling(folder, model, trusted=trusted)
    except InvalidRequest as error:
        return error
    except Exception as error:
        logger.info("the modules of a sentence-transformers model cannot be used", exc_info=error)
        return InvalidRequest(f"This model's modules.json cannot be used: {files.public(error, folder)}")


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


def _read_model(plan: _Plan, options: LoadOptions, offload: Path | None, *, hollow: bool = False) -> Any:
    """The model as the plan says; a `hollow` one has shapes and no numbers. Parts may be put into `offload`."""
    model_id, placement = plan.record.model_id, plan.placement
    spread: dict[str, Any] = {}
    if placement.device_map is not None:
        spread = {"device_map": placement.device_map, "offload_folder": offload}
    elif hollow:
        spread = {"device_map": {"": "meta"}}
    if placement.attention is not None:
        spread["attn_implementation"] = placement.attention
    auto_class, gguf_file = _auto_class(plan.config, plan.head), plan.record.gguf_file
    dtype = placement.dtype or "auto"
    try:
        if plan.gguf is not None and gguf_file is not None:
            model, info = gguf_files.read_model(
                model_id, plan.folder, gguf_file, plan.gguf, auto_class, plan.config, dtype=dtype, **spread
            )
        else:
            model, info = auto_class.from_pretrained(
                plan.folder,
                config=plan.config,
                dtype=dtype,
                use_safetensors=None if options.allow_pickle else True,
                trust_remote_code=plan.trusted,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported in the info, and refused below in words of our own
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
            quantize(model, placement.quantization, placement.device)
        return model if placement.device_map is not None else model.to(placement.device)
    except LocalLLMError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(f"Not enough memory on {placement.device} to load model '{model_id}'") from error
    except Exception as error:
        if "allocate memory" in str(error):  # what torch's CPU allocator says
            raise OutOfMemory(f"Not enough memory on {placement.device} to load model '{model_id}'") from error
        if placement.attention is not None and re.search("attention|attn|flash|flex", str(error), re.IGNORECASE):
            raise InvalidRequest(
                f"Invalid value for field 'attn_implementation': model '{model_id}' cannot be loaded with it here: "
                f"{files.public(error, plan.folder)}",
                "attn_implementation",
            ) from error
        if placement.device_map is not None and isinstance(error, ValueError) and "device_map" in str(error):
            raise InvalidRequest(
                f"Invalid value for field 'device_map': {files.public(error, plan.folder)}", "device_map"
            ) from error
        raise _refusal(model_id, plan.folder, error, "its weights or its config.json") from error


def _check_map(device_map: Any, model: Any) -> None:
    """Refuse a map that names what the model does not have, or leaves out what it has: transformers passes over both.

    Raises:
        InvalidRequest: naming the module.
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
