"""A model in memory: its engine, its tasks, how requests are put to them, and how much memory it takes.

`loader` makes it of files, the manager keeps it. Any thread may call it. Must not know files, the registry, the manager
or HTTP.
"""

from __future__ import annotations

import gc
import logging
import shutil
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ..engine.batch import Runner, TransformersBatch, sequence_of
from ..engine.bulk import run_in_batch
from ..engine.constraints import Constraints
from ..engine.engine import Engine
from ..engine.failures import typed
from ..engine.generate_fallback import Solo, unset
from ..engine.input_processor import Preparer
from ..engine.layers import NotBatchable
from ..engine.lengths import Lengths
from ..engine.logprobs import TokenTexts
from ..engine.openvino.encoder import Encoder
from ..engine.openvino.lazy_weights import Reserve
from ..engine.openvino.runner import OpenVINORunner
from ..engine.slots import first_bank
from ..engine.ticket import Ticket
from ..engine.torch.parity import batch_runner
from ..engine.torch.rotary import forget_between_passes
from ..errors import Cancelled, EngineFailed, InvalidRequest, LocalLLMError, OutOfMemory, UnsupportedTask
from ..host.devices import free_bytes, indexed
from ..host.memory import drop_pages, forget_frames, mapped_files, release_freed
from ..modeling.demand import Claims, asked_of
from ..modeling.rotary import context
from ..registry.records import ModelRecord
from ..tasks import Head
from ..tasks.embedding import Pooling
from ..tasks.generation import generation_arguments
from ..tasks.positions import max_positions
from ..tasks.runner import TaskRunner
from ..tasks.text_generation import TextGenerations
from ..tasks.vocabulary import check_vocabulary, guard_vocabulary, vocabulary_rows
from ..types import PASSING, ChatTraits, EngineOptions, EngineStatus, GenerationRequest, Sizes, timestamp
from .lora import Adapters
from .openvino.decoder import Graph
from .openvino.encoder import EncoderGraph
from .quantization import QuantizedLinear
from .quantization import tensor_bytes as quantized_bytes

logger = logging.getLogger(__name__)

_GENERATION = "text-generation"  # the one task whose work the batch does

# Of a generation config: what an answer's caller may set too.
_DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "top_h")

_DETACHED_AT_ONCE = 64 * 2**20  # bytes of weights that are copied out of their file before the load is over
_LOOK_AGAIN = 0.1  # seconds between two looks at whether the one who waits is still there


class Memory(Protocol):
    """Where a model asks for memory, and says how much it has."""

    def note(self, part: str, sizes: Mapping[str, int]) -> None:
        """Say how many bytes a part of the model has on each device."""

    def take(self, part: str, device: str, size: int) -> bool:
        """Ask for bytes more, or give them back where they are negative; tells whether they may be taken."""

    def keep(self, device: str, size: int) -> None:
        """Have so many bytes of KV cache to itself, if they are there to be had, before they are taken."""

    def settle(self) -> None:
        """Say that all is taken and noted that a load takes: what was reserved for it may go to others."""

    def relieve(self) -> bool:
        """Have others give memory up; tells whether some did."""

    def most(self, device: str) -> int | None:
        """How many bytes the model could have if all others went; None where nothing limits them."""


class Unlimited:
    """Memory that nobody counts: for a model outside of a manager."""

    def note(self, part: str, sizes: Mapping[str, int]) -> None:
        """Nothing is noted."""

    def take(self, part: str, device: str, size: int) -> bool:  # noqa: ARG002 - the protocol's
        """Whether it is free."""
        free = free_bytes(device)
        return free is None or size <= free

    def keep(self, device: str, size: int) -> None:
        """Nothing is kept."""

    def settle(self) -> None:
        """Nothing was reserved."""

    def relieve(self) -> bool:
        """There is nobody else."""
        return False

    def most(self, device: str) -> int | None:  # noqa: ARG002 - the protocol's
        """Whatever is free."""
        return None


@dataclass(frozen=True, slots=True)
class Setup:
    """What a model was loaded as: `effective` are the settings that are in effect, by their names.

    `key` tells its weights and settings from any others, so that what was found out about them can be kept.
    """

    record: ModelRecord
    head: Head
    device: str
    effective: Mapping[str, Any]
    key: Hashable = None
    engine_reason: str | None = None  # why torch computes it, where OpenVINO does not
    converts: str | None = None  # what tells its graph from others, where torch computes until that is made
    max_context: int | None = None
    commit: str | None = None  # of its repository, where it came from the Hub
    folder: Path | None = None  # of its own, for parts that are offloaded to the disk; goes with the model


@dataclass(frozen=True, slots=True)
class Conversion:
    """A model that OpenVINO computes: its graph, and how to `read` the model itself when only that can do something.

    `weights` are the bytes of these. Where the graph proves to give other numbers on this machine than it did, `refuse`
    is told why, so that it is not tried again; torch computes then, unless `refuse` raises.
    """

    graph: Graph | EncoderGraph
    read: Callable[[], Any]
    weights: int
    refuse: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a model in memory is made of; let go of as a whole."""

    engine: Engine
    tasks: TaskRunner
    preparer: Preparer
    solo: Solo
    claims: Claims
    tokenizer: Any
    lengths: Lengths
    batched: bool
    generations: TextGenerations
    copied_bytes: int


class LoadedModel:
    """A model in memory: one set of weights that serves every generation and every task of its head.

    Any thread may call it; the work runs on the model's own thread, many generations in one batch.
    """

    def __init__(
        self,
        setup: Setup,
        model: Any,
        tokenizer: Any,
        options: EngineOptions,
        pooling: Pooling | LocalLLMError | None = None,
        memory: Memory | None = None,
        adapters: Adapters | None = None,
        conversion: Conversion | None = None,
    ) -> None:
        """`pooling` is what makes one vector of a text's, or why that cannot be had; `adapters` are on the model. With
        a `conversion`, `model` has no weights.

        How the model is served best is found out on a thread of its own, which whoever asks something waits for.
        """
        self.setup = setup
        self.model_id = setup.record.model_id
        self.model_type = setup.record.model_type
        self.head = setup.head
        self.device = setup.device
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.loaded_at = timestamp()
        self.pools = pooling is not None
        # Texts that go before others, by their names.
        self.prompts: Mapping[str, str] = pooling.prompts if isinstance(pooling, Pooling) else {}
        self._memory = memory or Unlimited()
        self._options = options
        self._adapters = adapters or Adapters(self.model_id, model, {})
        self._conversion = conversion
        self._engine, self.engine_reason = ("torch" if conversion is None else "openvino"), setup.engine_reason
        self._weights = tensor_bytes(model) if conversion is None else {"cpu": conversion.graph.weight_bytes}
        self._kv: dict[str, int] = {}
        self._peak = 0
        self._own = 0  # bytes of weights that are there beside the graph's
        self._elsewhere: Callable[[], int] = lambda: 0  # bytes that count as the model's and do not lie in memory
        self._counting = threading.Lock()
        self._memory.note("weights", self._weights)
        # Of one call, so that whoever comes meanwhile finds a place.
        self._most_prompts = max(1, options.max_batch // 2)
        self._contexts = _contexts(model, setup.max_context)
        self._closing = False
        self.resident = False  # whether its weights lie in memory of its own, and not in a mapped file
        self._made: Future[_Parts] | None = Future()
        self._note_peak()
        small = sum(self._weights.values()) <= _DETACHED_AT_ONCE
        if small:
            detach(model)
        # It ends, as the load's thread does: see `loader.load`.
        work = partial(self._prepare, self._made, model, tokenizer, pooling, small)
        self._preparing = threading.Thread(target=work, name=f"prepare-{self.model_id}")
        self._preparing.start()

    def _prepare(
        self, parts: Future[_Parts], model: Any, tokenizer: Any, pooling: LocalLLMError | Pooling | None, detached: bool
    ) -> None:
        """Take the weights into memory of its own, and find out how the model is served."""
        try:
            use_device(self.device)
            if not detached:
                detach(model, lambda: self._closing)
            self.resident = True
            parts.set_result(self._make_parts(model, tokenizer, pooling))
        except BaseException as error:
            forget_frames(error)
            if not isinstance(error, LocalLLMError):
                logger.exception("%s could not be prepared", self.model_id)
                error = EngineFailed(self.model_id)
            parts.set_exception(error)
        finally:
            self._memory.settle()

    def _make_parts(self, model: Any, tokenizer: Any, pooling: Pooling | LocalLLMError | None) -> _Parts:
        """Find out how the model is served, and build all that serves it."""
        model_id, options = self.model_id, self._options
        forget_between_passes(model)
        kept = unset(model)
        rows = vocabulary_rows(model)
        guard_vocabulary(model, tokenizer)
        made = None if self._conversion is None else self._openvino_runner(model, self._conversion)
        encoder = made if isinstance(made, Encoder) else None
        runner, reason = (made, None) if isinstance(made, OpenVINORunner) else self._batch_runner(model)
        constraints = _constraints(model, tokenizer)
        texts = TokenTexts(tokenizer, lambda: constraints.tokens)
        batch, copied = None, 0 if encoder is None else encoder.copied_bytes
        if runner is not None:
            runner.cache.take = self._take_cache
            batch = TransformersBatch(model_id, runner, texts, options)
            token_bytes = runner.cache.token_bytes
            self._memory.keep(self.device, first_bank(options.kv_cache_bytes // token_bytes) * token_bytes)
            copied = runner.copied_bytes
        if isinstance(made, OpenVINORunner):
            cache = made.cache
            self._elsewhere = lambda: cache.unwritten_bytes + copied  # a table is read where it lies in its file

        def find() -> Pooling | None:
            if isinstance(pooling, LocalLLMError):
                raise pooling
            return pooling

        active = self._adapters.active
        claims = Claims(
            model_id,
            model,
            lambda size: self._take_cache(self.device, size, PASSING),
            self._most_beside,
            self._memory.relieve,
        )
        tasks = TaskRunner(model_id, model, tokenizer, self.head, find, active, encoder, claims)
        engine = Engine(model_id, batch, tasks, options, reason, self._memory.relieve, lambda: use_device(self.device))
        lengths = Lengths(tokenizer, self._contexts[0])
        preparer = Preparer(
            model_id,
            model,
            tokenizer,
            contexts=self._contexts,
            room=None if batch is None else batch.slots.longest,
            constraints=constraints,
            arguments=lambda given: generation_arguments(given, model),
            lengths=lengths,
            check_adapter=self._adapters.check,
            check_vocabulary=lambda highest, field: check_vocabulary(highest, rows, field),
        )
        solo = Solo(model_id, model, tokenizer, texts, claims, active, kept)
        generations = TextGenerations(model, tokenizer, lambda given, error: tasks.failure(_GENERATION, given, error))
        if copied:
            self._memory.note("copies", {self.device: copied})
        parts = _Parts(
            engine, tasks, preparer, solo, claims, tokenizer, lengths, batch is not None, generations, copied
        )
        self._note_peak(copied)
        release_freed()  # trying took memory
        return parts

    def _openvino_runner(self, model: Any, conversion: Conversion) -> OpenVINORunner | Encoder | None:
        """What serves the model by its graph: in a batch, or behind its forward pass; None where torch is to."""
        graph, options = conversion.graph, self._options
        reserve = Reserve(model, conversion.read, self._take_own, conversion.weights)
        try:
            runner: OpenVINORunner | Encoder
            if isinstance(graph, EncoderGraph):
                runner = graph.encoder(model, reserve, lambda: self._closing)
            else:
                tokens = options.kv_cache_bytes // graph.token_bytes
                runner = graph.runner(tokens, reserve, lambda: self._closing)
        except NotBatchable as error:
            logger.warning("%s is not computed by OpenVINO: %s", self.model_id, error)
            conversion.refuse(str(error))
            self._engine, self.engine_reason = "torch", str(error)
            forget_frames(error)  # they hold what was compiled
            self._have_weights({})
            reserve.fetch()
            reserve.stay()
            self._have_weights(tensor_bytes(model))
            return None
        self._have_weights({"cpu": runner.weight_bytes})
        return runner

    def _have_weights(self, sizes: dict[str, int]) -> None:
        """Note what its weights take on each device from now on."""
        with self._counting:
            self._weights = sizes
        self._memory.note("weights", sizes)

    def _batch_runner(self, model: Any) -> tuple[Runner | None, str | None]:
        """What serves the model in a batch, or why it is served one request at a time."""
        if self.head == "seq2seq-lm":
            return None, "it is an encoder-decoder"
        if self.head != "causal-lm":
            return None, "it does not generate text"
        try:
            findings, key = self._options.findings, self.setup.key
            runner = batch_runner(model, findings, key, lambda: self._closing, self._adapters)
        except NotBatchable as error:
            logger.info("%s is served one request at a time: %s", self.model_id, error)
            return None, str(error)
        return runner, None

    def _take_own(self, size: int) -> bool:
        """Take memory for weights that are there beside the graph's for a while."""
        if not self._memory.take("own weights", "cpu", size):
            return False
        with self._counting:
            self._own += size
        self._note_peak()
        return True

    def _most_beside(self) -> int | None:
        """How many bytes there could ever be beside the weights."""
        most, device = self._memory.most(self.device), indexed(self.device)
        return None if most is None else max(0, most - self._weights.get(device, 0) - self._copied)

    def _take_cache(self, device: str, size: int, part: str = "kv cache") -> bool:
        if not self._memory.take(part, device, size):
            return False
        with self._counting:
            self._kv[device] = self._kv.get(device, 0) + size
        self._note_peak()
        return True

    def _note_peak(self, more: int = 0) -> None:
        with self._counting:
            present = sum(self._weights.values()) + sum(self._kv.values()) + self._own
            self._peak = max(self._peak, present + (more or self._copied))

    @property
    def _copied(self) -> int:
        parts = self._made
        return parts.result().copied_bytes if parts is not None and parts.done() and not parts.exception() else 0

    @property
    def effective(self) -> Mapping[str, Any]:
        """The settings that are in effect, by their names."""
        return {**self.setup.effective, "engine": self._engine}

    @property
    def sizes(self) -> Sizes:
        """How much memory it takes at this moment."""
        with self._counting:
            kv, copied = dict(self._kv), self._copied + self._own
        devices, device = dict(self._weights), indexed(self.device)
        devices[device] = devices.get(device, 0) + copied
        for place, size in kv.items():
            devices[place] = devices.get(place, 0) + size
        weights = sum(self._weights.values())
        return Sizes(
            weights, copied, sum(kv.values()), self._peak, {name: size for name, size in devices.items() if size}
        )

    @property
    def expected_back(self) -> int:
        """Bytes that the system should have back once it is closed: what was promised and never used is there now."""
        return self.sizes.total - self._elsewhere()

    @property
    def opened_tasks(self) -> tuple[str, ...]:
        """The tasks that were run since the load, whose pipelines are kept."""
        parts = self._done
        return () if parts is None else parts.tasks.opened

    @property
    def status(self) -> EngineStatus | None:
        """What its engine is doing; None where it has been taken out of memory."""
        parts = self._made
        if parts is not None and not parts.done():
            return EngineStatus("starting", None, None, 0, 0, 0, 0, 0, 0, self._options.kv_cache_bytes)
        done = self._done
        return None if done is None else done.engine.status()

    @property
    def engine(self) -> Engine:
        """What all of its work runs on, once it is known how it is served.

        Raises: as `prepared`.
        """
        return self._open().engine

    @property
    def tasks(self) -> TaskRunner:
        """What it can be asked besides texts, token by token; from `engine`'s thread, but for what says otherwise.

        Raises: as `prepared`.
        """
        return self._open().tasks

    @property
    def _done(self) -> _Parts | None:
        """What it is made of, if that is there and is whole."""
        parts = self._made
        return parts.result() if parts is not None and parts.done() and parts.exception() is None else None

    @property
    def own_parameters(self) -> Mapping[str, Any]:
        """What its generation config says of drawing tokens; lengths and ends apply anyhow."""
        config = getattr(self._open().solo.model, "generation_config", None)  # which only what generates has
        return {name: value for name in _DRAWING if (value := getattr(config, name, None)) is not None}

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        with typed(self.model_id):
            return str(self._open().tokenizer.decode(list(tokens), skip_special_tokens=False))

    def count_tokens(self, text: str) -> int:
        """How many tokens its tokenizer makes of a text, without special ones."""
        with typed(self.model_id):
            return len(self._open().tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"])

    def encode(self, text: str, gone: Callable[[], bool] = lambda: False) -> list[int]:
        """The tokens of a text, with the special ones that the model's tokenizer adds.

        Raises:
            InvalidRequest: it has far more than the model can read. Cancelled: `gone()` turned true.
        """
        parts = self._open(gone)
        with typed(self.model_id):
            _check_lengths(parts, {"inputs": text}, gone)
            return list(parts.tokenizer(text, return_attention_mask=False)["input_ids"])

    def count_prompt(self, request: GenerationRequest, gone: Callable[[], bool] = lambda: False) -> int:
        """How many tokens the prompt of a generation is, special ones included; its context may hold fewer.

        Raises:
            UnsupportedTask: the model has no head that generates text.
            InvalidRequest: its chat template refuses the messages, or they are far beyond its context.
            Cancelled: `gone()` turned true.
        """
        parts = self._open(gone)
        self._check_generates(parts)
        return parts.preparer.count(request, gone)

    @property
    def chat(self) -> ChatTraits:
        """How it lays chats out."""
        tokenizer = self._open().tokenizer
        added = tokenizer.added_tokens_decoder
        special = frozenset(token.content for token in added.values() if token.special)
        ids = {token.content: id_ for id_, token in added.items()}
        described = getattr(tokenizer, "response_template", None)
        return ChatTraits(tokenizer.chat_template, ids, special, described if isinstance(described, Mapping) else None)

    @property
    def failed(self) -> bool:
        """Whether its engine is broken, so that it is to be loaded anew."""
        parts, done = self._made, self._done
        if done is not None:
            return done.engine.failed
        return parts is not None and parts.done()

    def generate(self, request: GenerationRequest, gone: Callable[[], bool] = lambda: False) -> Ticket:
        """Queue a generation; its ticket gives the text, and the errors of what computes it.

        It is given up when `gone()`, which is asked at every step, or when the ticket is cancelled.

        Raises:
            UnsupportedTask: the model has no head that generates text.
            InvalidRequest: the prompt or a parameter is one that this model cannot honour.
            QueueFull, OutOfMemory, EngineFailed, Cancelled: it was not taken into the queue.
        """
        parts = self._open(gone)
        self._check_generates(parts)
        submitted = time.monotonic()
        prepared = parts.preparer.prepare(request, gone)
        ticket = Ticket(prepared.prompt_tokens, parts.engine.wake, prepared.end)
        if parts.batched and prepared.settled is not None:
            parts.engine.submit(sequence_of(prepared, prepared.settled, parts.tokenizer, ticket, gone, request.streams))
        else:

            def generate(given_up: Callable[[], bool]) -> None:
                try:
                    parts.solo.generate(prepared, request.streams, submitted, ticket.put, given_up)
                except OutOfMemory as error:
                    if ticket.made or not self._memory.relieve():
                        raise
                    forget_frames(error)
                    parts.solo.generate(prepared, request.streams, submitted, ticket.put, given_up)

            parts.claims.check(prepared.asked)
            parts.engine.submit_job(ticket, generate, gone)
        return ticket

    def _check_generates(self, parts: _Parts) -> None:
        if self.head not in ("causal-lm", "seq2seq-lm"):
            raise UnsupportedTask(self.model_id, "generate", parts.engine.call(lambda: parts.tasks.supported))

    def run(
        self,
        task: str,
        inputs: Any,
        parameters: Mapping[str, Any],
        gone: Callable[[], bool] = lambda: False,
        adapter: str | None = None,
    ) -> Any:
        """Run a task and return its result as JSON values; it is batched with whoever else asks at the time.

        Prompts of `text-generation` run as generations do, unless they ask for what only the model itself can: beams.
        `adapter` names one of the model's.

        Raises:
            UnsupportedTask: the model cannot do it. InvalidRequest: inputs or parameters that it cannot honour.
            QueueFull: as many calls wait as may.
            Cancelled: `gone()` turned true, or the model is being unloaded.
        """
        parts = self._open(gone)
        self._adapters.check(adapter)
        _check_lengths(parts, {"inputs": inputs, **parameters}, gone)
        if task == _GENERATION and parts.batched and asked_of(parts.solo.model, parameters, 0).rows == 1:
            generation = parts.generations.begin(inputs, parameters)
            limits: dict[str, Any] = {"most": self._most_prompts, "context": self._contexts[0]}
            limits["check_vocabulary"] = parts.preparer.check_vocabulary
            if run_in_batch(generation, parts.engine, **limits, gone=gone, adapter=adapter):
                parts.tasks.note(task)
                return generation.result()
        if adapter is not None:
            parameters = {**parameters, "adapter": adapter}
        try:
            return self._run(parts, task, inputs, parameters, gone)
        except OutOfMemory as error:
            if not self._memory.relieve():
                raise
            forget_frames(error)
            return self._run(parts, task, inputs, parameters, gone)

    def _run(
        self, parts: _Parts, task: str, inputs: Any, parameters: Mapping[str, Any], gone: Callable[[], bool]
    ) -> Any:
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
            except Cancelled:
                if parts.engine.failed:  # it broke between the look at its queue and the call
                    raise EngineFailed(self.model_id) from None
                raise

    def settles(self, seconds: float) -> bool:
        """Wait so long at most until it is known how it is served; tells whether it is."""
        made = self._made
        return made is None or bool(wait([made], seconds).done)

    def prepared(self, gone: Callable[[], bool] = lambda: False) -> None:
        """Wait until it is known how it is served.

        Raises:
            Cancelled: `gone()` turned true, or it is being unloaded. EngineFailed: it cannot be served.
        """
        self._open(gone)

    def _open(self, gone: Callable[[], bool] = lambda: False) -> _Parts:
        parts = self._made
        while parts is not None:
            try:
                return parts.result(_LOOK_AGAIN)
            except TimeoutError:
                if gone():
                    raise Cancelled from None
        raise Cancelled(f"Model '{self.model_id}' has been taken out of memory")

    def close(self) -> None:
        """Cancel what runs, and give the memory back to the system. The model cannot be used afterwards."""
        self._closing = True
        parts, self._made = self._made, None
        if parts is None:
            return
        if parts.exception() is None:  # waits for it to be prepared, which is given up soon
            parts.result().engine.close()
            parts.result().preparer.close()
        del parts
        self._preparing.join()  # it holds the model
        self._adapters = Adapters(self.model_id, None, {})  # so do these
        self._elsewhere = lambda: 0
        self._weights = {}
        if self.setup.folder is not None:
            shutil.rmtree(self.setup.folder, ignore_errors=True)
        free()


def _check_lengths(parts: _Parts, values: Mapping[str, Any], gone: Callable[[], bool]) -> None:
    """Refuse what holds a text far longer than the model can read; a task's tokenizer has the engine's thread."""
    if (field := parts.lengths.check(dict(values), "", gone)) is not None:
        reason = f"longer than {parts.lengths.of_text} tokens, the most that is read of one text"
        raise InvalidRequest(f"Invalid value for field '{field}': {reason}", field)


def free() -> None:
    """Give back what was let go of: models and pipelines refer to each other in circles, and allocators keep memory."""
    gc.collect()
    with suppress(torch.AcceleratorError):  # a device that has failed gives its memory back when the process ends
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    release_freed()


def use_device(device: str) -> None:
    """Make a CUDA device this thread's current one: kernels that are not torch's run there, not at their tensors."""
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


def _constraints(model: Any, tokenizer: Any) -> Constraints:
    """What constrains the model's texts; llguidance looks at the tokenizer when it is first asked."""
    own = model.generation_config.eos_token_id if model.can_generate() else None
    ends = own if isinstance(own, list) else [] if own is None else [own]
    words = getattr(model.config.get_text_config(), "vocab_size", 0)  # CANINE reads characters, and has none
    return Constraints(tokenizer, words, ends)


def detach(model: Any, given_up: Callable[[], bool] = lambda: False) -> None:
    """Copy weights that lie in a mapped file into memory of their own.

    Mapped, a load takes next to no time; but a file that somebody overwrites in place would take the whole process
    with it, and its pages would be counted for nobody. Tensors are changed one by one, and whoever computes meanwhile
    is not disturbed.

    Raises:
        Cancelled: `given_up()` turned true.
    """
    files = mapped_files()
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            address = tensor.data_ptr()
            if tensor.device.type != "cpu" or not any(start <= address < end for start, end in files):
                continue
            if given_up():
                raise Cancelled
            key = (address, tensor.shape)
            if key not in copies:
                copies[key] = tensor.data.clone()
                if tensor.is_contiguous():
                    drop_pages(address, tensor.numel() * tensor.itemsize)
            tensor.data = copies[key]


def tensor_bytes(model: Any) -> dict[str, int]:
    """Bytes of a model's tensors by device, each storage once."""
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
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


def _contexts(model: Any, most: int | None) -> tuple[int | None, int | None]:
    """How many tokens the model can read, and how many it can have in what it writes: its weights, its config or its
    settings say, whichever is least."""
    reads, writes = _own_contexts(model)
    if most is None:
        return reads, writes
    return min(reads or most, most), min(writes or most, most)


def _own_contexts(model: Any) -> tuple[int | None, int | None]:
    reads = max_positions(model)
    if reads is None:
        config = model.config.get_text_config()
        said = getattr(config, "max_position_embeddings", None)
        # XLNet says -1: no limit
        reads = context(said, getattr(config, "rope_parameters", None)) if said and said > 0 else None
    if not model.config.is_encoder_decoder:
        return reads, reads
    return reads, max_positions(model.get_decoder())
