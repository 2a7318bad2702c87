"""A model in memory: its engine, its tasks, how requests are put to them, and how much memory it takes.

`loader` makes it of files, the manager keeps it. Any thread may call it. Must not know files, the registry, the manager
or HTTP.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from .cancellation import NEVER, Cancellation
from .engine.batch import Runner, TransformersBatch, sequence_of
from .engine.bulk import run_in_batch
from .engine.constraints import constraints_of
from .engine.engine import Engine
from .engine.failures import typed
from .engine.generate_fallback import Solo, unset
from .engine.input_processor import Preparer
from .engine.lengths import Lengths
from .engine.logprobs import TokenTexts
from .engine.openvino.encoder import Encoder
from .engine.slots import first_bank
from .engine.ticket import Ticket
from .engine.torch.lora import Adapters
from .engine.torch.rotary import forget_between_passes
from .errors import Cancelled, EngineFailed, InvalidRequest, LocalLLMError, OutOfMemory, UnsupportedTask
from .host.memory import forget_frames, release_freed
from .model_memory import Memory, ModelMemory, detach, free
from .modeling.demand import Claims, asked_of
from .registry.records import ModelRecord
from .tasks import Head
from .tasks.embedding import Pooling
from .tasks.generation import generation_arguments
from .tasks.positions import contexts
from .tasks.runner import TaskRunner
from .tasks.text_generation import TextGenerations
from .tasks.vocabulary import check_vocabulary, guard_vocabulary, vocabulary_rows
from .types import ChatTraits, EngineOptions, EngineStatus, GenerationRequest, Pending, Sizes, timestamp

logger = logging.getLogger(__name__)

_GENERATION = "text-generation"  # the one task whose work the batch does

# Of a generation config: what an answer's caller may set too.
_DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "top_h")

_DETACHED_AT_ONCE = 64 * 2**20  # bytes of weights that are copied out of their file before the load is over


@dataclass(frozen=True, slots=True)
class Setup:
    """What a model was loaded as: `effective` are the settings that are in effect, by their names."""

    record: ModelRecord
    head: Head
    device: str
    effective: Mapping[str, Any]
    backend_reason: str | None = None  # why a backend that is preferred to the one that computes it does not
    pending: Pending | None = None  # what a backend that is preferred lacks, where another one computes meanwhile
    max_context: int | None = None
    commit: str | None = None  # of its repository, where it came from the Hub
    folder: Path | None = None  # of its own, for parts that are offloaded to the disk; goes with the model


@dataclass(frozen=True, slots=True)
class Serving:
    """How a backend serves a model: in a batch by a `runner`, or one request at a time for a `reason`.

    `encoder` stands behind the model's own forward pass, where a graph computes that. `declined` is why a backend that
    was tried with this model does not compute it. `unwritten` are bytes that count as the model's and do not lie in
    memory.
    """

    backend: str
    runner: Runner | None = None
    reason: str | None = None
    encoder: Encoder | None = None
    declined: str | None = None
    unwritten: Callable[[], int] = lambda: 0

    @property
    def copied_bytes(self) -> int:
        """Bytes of weights that have a copy in another layout."""
        computes = self.runner or self.encoder
        return 0 if computes is None else computes.copied_bytes


class Compute(Protocol):
    """What a backend has opened a model with.

    `model` is transformers' own; with a graph, its weights are there only while they are needed.
    """

    model: Any
    adapters: Adapters

    @property
    def backend(self) -> str:
        """The backend's name."""

    @property
    def weights(self) -> Mapping[str, int]:
        """Bytes of the weights on each device."""

    def serve(self, memory: ModelMemory, cancellation: Cancellation) -> Serving:
        """Find out how the model is served best. On the thread that the model is prepared on.

        Raises:
            InvalidRequest: the backend was asked for by name, and cannot compute the model.
            Cancelled: by `cancellation`.
        """


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a model in memory is made of; dropped as a whole."""

    engine: Engine
    tasks: TaskRunner
    preparer: Preparer
    solo: Solo
    claims: Claims
    tokenizer: Any
    lengths: Lengths
    batched: bool
    generations: TextGenerations
    adapters: Adapters


class LoadedModel:
    """A model in memory: one set of weights that serves every generation and every task of its head.

    Any thread may call it; the work runs on the model's own thread, many generations in one batch.
    """

    def __init__(
        self,
        setup: Setup,
        compute: Compute,
        tokenizer: Any,
        options: EngineOptions,
        pooling: Pooling | LocalLLMError | None = None,
        memory: Memory | None = None,
    ) -> None:
        """`pooling` is what makes one vector of a text's, or why there is none; `memory` is where the model asks for
        memory.

        How the model is served best is found out on a thread of its own, which every request waits for.
        """
        self.setup = setup
        self.model_id = setup.record.model_id
        self.model_type = setup.record.model_type
        self.head = setup.head
        self.device = setup.device
        self.dtype = str(compute.model.dtype).removeprefix("torch.")
        self.loaded_at = timestamp()
        self.pools = pooling is not None
        # Texts that go before others, by their names.
        self.prompts: Mapping[str, str] = pooling.prompts if isinstance(pooling, Pooling) else {}
        self._memory = ModelMemory(setup.device, memory)
        self._options = options
        self._backend, self.backend_reason = compute.backend, setup.backend_reason
        self._memory.set_weights(compute.weights)
        # Of one call, so that another finds a place meanwhile.
        self._most_prompts = max(1, options.max_batch // 2)
        self._contexts = contexts(compute.model, setup.max_context)
        self._closing = Cancellation()
        self.resident = False  # whether its weights lie in memory of its own, and not in a mapped file
        self._made: Future[_Parts] | None = Future()
        small = self._memory.sizes.weights <= _DETACHED_AT_ONCE
        if small:
            detach(compute.model)
        # It ends, as the load's thread does: see `loader.load`.
        work = partial(self._prepare, self._made, compute, tokenizer, pooling, small)
        self._preparing = threading.Thread(target=work, name=f"prepare-{self.model_id}")
        self._preparing.start()

    def _prepare(
        self,
        parts: Future[_Parts],
        compute: Compute,
        tokenizer: Any,
        pooling: LocalLLMError | Pooling | None,
        detached: bool,
    ) -> None:
        """Take the weights into memory of its own, and find out how the model is served."""
        try:
            use_device(self.device)
            if not detached:
                detach(compute.model, self._closing)
            self.resident = True
            parts.set_result(self._make_parts(compute, tokenizer, pooling))
        except BaseException as error:
            forget_frames(error)
            if not isinstance(error, LocalLLMError):
                logger.exception("%s could not be prepared", self.model_id)
                error = EngineFailed(self.model_id)
            parts.set_exception(error)
        finally:
            self._memory.account.settle()

    def _make_parts(self, compute: Compute, tokenizer: Any, pooling: Pooling | LocalLLMError | None) -> _Parts:
        """Find out how the model is served, and build all that serves it."""
        model_id, model, options, memory = self.model_id, compute.model, self._options, self._memory
        forget_between_passes(model)
        kept = unset(model)
        rows = vocabulary_rows(model)
        guard_vocabulary(model, tokenizer)
        serving = compute.serve(memory, self._closing)
        self._backend, self.backend_reason = serving.backend, serving.declined or self.backend_reason
        constraints = constraints_of(model, tokenizer)
        texts = TokenTexts(tokenizer, lambda: constraints.tokens)
        batch, runner = None, serving.runner
        if runner is not None:
            runner.cache.take = memory.take_cache
            batch = TransformersBatch(model_id, runner, texts, options)
            token_bytes = runner.cache.token_bytes
            memory.account.keep(self.device, first_bank(options.kv_cache_bytes // token_bytes) * token_bytes)
        memory.unwritten = serving.unwritten

        def find() -> Pooling | None:
            if isinstance(pooling, LocalLLMError):
                raise pooling
            return pooling

        adapters, relieve = compute.adapters, memory.account.relieve
        claims = Claims(model_id, model, memory.take_passing, memory.most_beside, relieve)
        tasks = TaskRunner(model_id, model, tokenizer, self.head, find, adapters.active, serving.encoder, claims)
        engine = Engine(model_id, batch, tasks, options, serving.reason, relieve, lambda: use_device(self.device))
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
            check_adapter=adapters.check,
            check_vocabulary=lambda highest, field: check_vocabulary(highest, rows, field),
        )
        solo = Solo(model_id, model, tokenizer, texts, claims, adapters.active, kept)
        generations = TextGenerations(model, tokenizer, lambda given, error: tasks.failure(_GENERATION, given, error))
        memory.set_copied(serving.copied_bytes)
        release_freed()  # trying took memory
        return _Parts(
            engine, tasks, preparer, solo, claims, tokenizer, lengths, batch is not None, generations, adapters
        )

    @property
    def effective(self) -> Mapping[str, Any]:
        """The settings that are in effect, by their names."""
        return {**self.setup.effective, "backend": self._backend}

    @property
    def sizes(self) -> Sizes:
        """How much memory it takes at this moment."""
        return self._memory.sizes

    @property
    def expected_back(self) -> int:
        """Bytes that the system should have back once it is closed."""
        return self._memory.expected_back

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

    def encode(self, text: str, cancellation: Cancellation = NEVER) -> list[int]:
        """The tokens of a text, with the special ones that the model's tokenizer adds.

        Raises:
            InvalidRequest: it has far more than the model can read. Cancelled: by `cancellation`.
        """
        parts = self._open(cancellation)
        with typed(self.model_id):
            _check_lengths(parts, {"inputs": text}, cancellation)
            return list(parts.tokenizer(text, return_attention_mask=False)["input_ids"])

    def count_prompt(self, request: GenerationRequest, cancellation: Cancellation = NEVER) -> int:
        """How many tokens the prompt of a generation is, special ones included; its context may hold fewer.

        Raises:
            UnsupportedTask: the model has no head that generates text.
            InvalidRequest: its chat template refuses the messages, or they are far beyond its context.
            Cancelled: by `cancellation`.
        """
        parts = self._open(cancellation)
        self._check_generates(parts)
        return parts.preparer.count(request, cancellation)

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
        """Whether its engine is broken, and a load replaces the model."""
        parts, done = self._made, self._done
        if done is not None:
            return done.engine.failed
        return parts is not None and parts.done()

    def generate(self, request: GenerationRequest, cancellation: Cancellation = NEVER) -> Ticket:
        """Queue a generation; its ticket gives the text, and the errors of what computes it.

        It is given up by `cancellation`, which is asked at every step, or when the ticket is cancelled.

        Raises:
            UnsupportedTask: the model has no head that generates text.
            InvalidRequest: the prompt or a parameter is one that this model cannot honour.
            QueueFull, OutOfMemory, EngineFailed, Cancelled: it was not taken into the queue.
        """
        parts = self._open(cancellation)
        self._check_generates(parts)
        submitted = time.monotonic()
        prepared = parts.preparer.prepare(request, cancellation)
        ticket = Ticket(prepared.prompt_tokens, prepared.end, cancellation)
        if parts.batched and prepared.settled is not None:
            parts.engine.submit(sequence_of(prepared, prepared.settled, parts.tokenizer, ticket, request.streams))
        else:

            def generate(cancellation: Cancellation) -> None:
                try:
                    parts.solo.generate(prepared, request.streams, submitted, ticket.put, cancellation)
                except OutOfMemory as error:
                    if ticket.made or not self._memory.account.relieve():
                        raise
                    forget_frames(error)
                    parts.solo.generate(prepared, request.streams, submitted, ticket.put, cancellation)

            parts.claims.check(prepared.asked)
            parts.engine.submit_job(ticket, generate)
        return ticket

    def _check_generates(self, parts: _Parts) -> None:
        if self.head not in ("causal-lm", "seq2seq-lm"):
            raise UnsupportedTask(self.model_id, "generate", parts.engine.call(lambda: parts.tasks.supported))

    def run(
        self,
        task: str,
        inputs: Any,
        parameters: Mapping[str, Any],
        cancellation: Cancellation = NEVER,
        adapter: str | None = None,
    ) -> Any:
        """Run a task and return its result as JSON values; it is batched with whoever else asks at the time.

        Prompts of `text-generation` run as generations do, unless they ask for what only the model itself can: beams.
        `adapter` names one of the model's.

        Raises:
            UnsupportedTask: the model cannot do it. InvalidRequest: inputs or parameters that it cannot honour.
            QueueFull: as many calls wait as may.
            Cancelled: by `cancellation`, or the model is being unloaded.
        """
        parts = self._open(cancellation)
        parts.adapters.check(adapter)
        _check_lengths(parts, {"inputs": inputs, **parameters}, cancellation)
        if task == _GENERATION and parts.batched and asked_of(parts.solo.model, parameters, 0).rows == 1:
            generation = parts.generations.begin(inputs, parameters)
            limits: dict[str, Any] = {"most": self._most_prompts, "context": self._contexts[0]}
            limits["check_vocabulary"] = parts.preparer.check_vocabulary
            if run_in_batch(generation, parts.engine, **limits, cancellation=cancellation, adapter=adapter):
                parts.tasks.note(task)
                return generation.result()
        if adapter is not None:
            parameters = {**parameters, "adapter": adapter}
        try:
            return self._run(parts, task, inputs, parameters, cancellation)
        except OutOfMemory as error:
            if not self._memory.account.relieve():
                raise
            forget_frames(error)
            return self._run(parts, task, inputs, parameters, cancellation)

    def _run(
        self, parts: _Parts, task: str, inputs: Any, parameters: Mapping[str, Any], cancellation: Cancellation
    ) -> Any:
        parts.engine.check_queue_for_task()
        call = parts.tasks.submit(task, inputs, parameters, cancellation)
        parts.engine.wake()
        try:
            return cancellation.result(call.future)
        except Cancelled:
            call.cancel()
            if parts.engine.failed:  # it broke between the look at its queue and the call
                raise EngineFailed(self.model_id) from None
            raise

    def settles(self, seconds: float) -> bool:
        """Wait so long at most until it is known how it is served; tells whether it is."""
        made = self._made
        return made is None or bool(wait([made], seconds).done)

    def prepared(self, cancellation: Cancellation = NEVER) -> None:
        """Wait until it is known how it is served.

        Raises:
            Cancelled: by `cancellation`, or it is being unloaded. EngineFailed: it cannot be served.
        """
        self._open(cancellation)

    def _open(self, cancellation: Cancellation = NEVER) -> _Parts:
        parts = self._made
        if parts is None:
            raise Cancelled(f"Model '{self.model_id}' has been taken out of memory")
        return cancellation.result(parts)

    def close(self) -> None:
        """Cancel what runs, and give the memory back to the system. The model cannot be used afterwards."""
        self._closing.cancel()
        parts, self._made = self._made, None
        if parts is None:
            return
        if parts.exception() is None:  # waits for it to be prepared, which is given up soon
            parts.result().engine.close()
            parts.result().preparer.close()
        del parts
        self._preparing.join()  # it holds the model
        self._memory.forget()
        if self.setup.folder is not None:
            shutil.rmtree(self.setup.folder, ignore_errors=True)
        free()


def _check_lengths(parts: _Parts, values: Mapping[str, Any], cancellation: Cancellation) -> None:
    """Refuse what holds a text far longer than the model can read; a task's tokenizer has the engine's thread."""
    if (field := parts.lengths.check(dict(values), "", cancellation)) is not None:
        reason = f"longer than {parts.lengths.of_text} tokens, the most that is read of one text"
        raise InvalidRequest(f"Invalid value for field '{field}': {reason}", field)


def use_device(device: str) -> None:
    """Make a CUDA device this thread's current one: kernels that are not torch's run there, not at their tensors."""
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
