"""A model in memory: its engine, its tasks, and how requests reach them.

`loader` builds it from files, the manager keeps it. Any thread may call it. Must not know files, the registry, the
manager or HTTP.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from ..cancellation import NEVER, Cancellation
from ..engine.batch import sequence_of
from ..engine.bulk import run_in_batch
from ..engine.engine import Engine
from ..engine.failures import typed
from ..engine.ticket import Ticket
from ..errors import Cancelled, EngineFailed, LocalLLMError, OutOfMemory, UnsupportedTask
from ..host.memory import forget_frames
from ..modeling.demand import asked_of
from ..tasks.embedding import Pooling
from ..tasks.runner import TaskRunner
from ..types import ChatTraits, EngineOptions, EngineStatus, GenerationRequest, Sizes, timestamp
from .memory import Memory, ModelMemory, detach, free
from .parts import GENERATION, Compute, Parts, Setup, build, use_device

logger = logging.getLogger(__name__)

# The sampling parameters of a generation config that a caller may set too.
_DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "top_h")

_DETACHED_AT_ONCE = 64 * 2**20  # bytes of weights up to which a load itself copies them out of their file


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
        """`pooling` makes one vector from those of a text's tokens, or is the error that says why none is made.

        `memory` is the model's account. A thread of the model's own finds out how it is served best; every request
        waits for that.
        """
        self.setup = setup
        self.model_id = setup.record.model_id
        self.model_type = setup.record.model_type
        self.head = setup.head
        self.device = setup.device
        self.dtype = str(compute.model.dtype).removeprefix("torch.")
        self.loaded_at = timestamp()
        self.pools = pooling is not None
        # Texts to put before other texts, by name.
        self.prompts: Mapping[str, str] = pooling.prompts if isinstance(pooling, Pooling) else {}
        self._memory = ModelMemory(setup.device, memory)
        self._options = options
        self._backend, self.backend_reason = compute.backend, setup.backend_reason
        self._memory.set_weights(compute.weights)
        # Of one call: so that another call's prompts find slots meanwhile.
        self._max_prompts = max(1, options.max_batch // 2)
        self._closing = Cancellation()
        self.resident = False  # whether the weights are in memory of their own, not in a mapped file
        self._made: Future[Parts] | None = Future()
        small = self._memory.sizes.weights <= _DETACHED_AT_ONCE
        if small:
            detach(compute.model)
        # The thread ends after its work, as the load's does: see `loader.load`.
        work = partial(self._prepare, self._made, compute, tokenizer, pooling, small)
        self._preparing = threading.Thread(target=work, name=f"prepare-{self.model_id}")
        self._preparing.start()

    def _prepare(
        self,
        parts: Future[Parts],
        compute: Compute,
        tokenizer: Any,
        pooling: LocalLLMError | Pooling | None,
        detached: bool,
    ) -> None:
        """Copies the weights into memory of their own, and finds out how the model is served."""
        try:
            use_device(self.device)
            if not detached:
                detach(compute.model, self._closing)
            self.resident = True
            made = build(self.setup, compute, tokenizer, self._options, pooling, self._memory, self._closing)
            self._backend = made.serving.backend
            self.backend_reason = made.serving.declined or self.backend_reason
            parts.set_result(made)
        except BaseException as error:
            forget_frames(error)
            if not isinstance(error, LocalLLMError):
                logger.exception("%s could not be prepared", self.model_id)
                error = EngineFailed(self.model_id)
            parts.set_exception(error)
        finally:
            self._memory.account.commit()

    @property
    def effective(self) -> Mapping[str, Any]:
        """The effective settings, by name."""
        return {**self.setup.effective, "backend": self._backend}

    @property
    def sizes(self) -> Sizes:
        """How much memory the model takes now."""
        return self._memory.sizes

    @property
    def expected_back(self) -> int:
        """Bytes that a close should give back to the system."""
        return self._memory.expected_back

    @property
    def opened_tasks(self) -> tuple[str, ...]:
        """The tasks that have run since the load; their pipelines are kept."""
        parts = self._done
        return () if parts is None else parts.tasks.opened

    @property
    def status(self) -> EngineStatus | None:
        """What the engine is doing; None after the model was unloaded."""
        parts = self._made
        if parts is not None and not parts.done():
            return EngineStatus("starting", None, None, 0, 0, 0, 0, 0, 0, self._options.kv_cache_bytes)
        done = self._done
        return None if done is None else done.engine.status()

    @property
    def engine(self) -> Engine:
        """The engine that runs all of the model's work, once the model is prepared.

        Raises: as `prepared`.
        """
        return self._open().engine

    @property
    def tasks(self) -> TaskRunner:
        """The model's tasks. For the engine's thread, except where a method says otherwise.

        Raises: as `prepared`.
        """
        return self._open().tasks

    @property
    def _done(self) -> Parts | None:
        """The parts, if they are ready and whole."""
        parts = self._made
        return parts.result() if parts is not None and parts.done() and parts.exception() is None else None

    @property
    def own_parameters(self) -> Mapping[str, Any]:
        """The sampling parameters in the model's generation config; its lengths and end tokens apply in any case."""
        config = getattr(self._open().solo.model, "generation_config", None)  # only models that generate have one
        return {name: value for name in _DRAWING if (value := getattr(config, name, None)) is not None}

    def decode(self, tokens: Sequence[int]) -> str:
        """Decodes tokens to text, special tokens included."""
        with typed(self.model_id):
            return str(self._open().tokenizer.decode(list(tokens), skip_special_tokens=False))

    def count_tokens(self, text: str) -> int:
        """Counts a text's tokens, without special ones."""
        with typed(self.model_id):
            return len(self._open().tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"])

    def encode(self, text: str, cancellation: Cancellation = NEVER) -> list[int]:
        """Tokenizes a text, with the special tokens that the tokenizer adds.

        Raises:
            InvalidRequest: the text is far longer than the model can read.
            Cancelled: by `cancellation`.
        """
        parts = self._open(cancellation)
        with typed(self.model_id):
            parts.check_lengths({"inputs": text}, cancellation)
            return list(parts.tokenizer(text, return_attention_mask=False)["input_ids"])

    def count_prompt(self, request: GenerationRequest, cancellation: Cancellation = NEVER) -> int:
        """Counts the tokens of a generation's prompt, special ones included; they may exceed the model's context.

        Raises:
            UnsupportedTask: the model has no head that generates text.
            InvalidRequest: the chat template refuses the messages, or they are far longer than the context.
            Cancelled: by `cancellation`.
        """
        parts = self._open(cancellation)
        self._check_generates(parts)
        return parts.preparer.count(request, cancellation)

    @property
    def chat(self) -> ChatTraits:
        """How the model lays chats out."""
        tokenizer = self._open().tokenizer
        added = tokenizer.added_tokens_decoder
        special = frozenset(token.content for token in added.values() if token.special)
        ids = {token.content: id_ for id_, token in added.items()}
        described = getattr(tokenizer, "response_template", None)
        return ChatTraits(tokenizer.chat_template, ids, special, described if isinstance(described, Mapping) else None)

    @property
    def failed(self) -> bool:
        """Whether the engine is broken, so that a load replaces the model."""
        parts, done = self._made, self._done
        if done is not None:
            return done.engine.failed
        return parts is not None and parts.done()

    def generate(self, request: GenerationRequest, cancellation: Cancellation = NEVER) -> Ticket:
        """Queues a generation; its ticket delivers the text, and the errors of the engine.

        `cancellation`, which every step checks, or a cancel of the ticket ends the generation.

        Raises:
            UnsupportedTask: the model has no head that generates text.
            InvalidRequest: the model cannot honour the prompt or a parameter.
            QueueFull, OutOfMemory, EngineFailed, Cancelled: the generation was not queued.
        """
        parts = self._open(cancellation)
        self._check_generates(parts)
        submitted = time.monotonic()
        prepared = parts.preparer.prepare(request, cancellation)
        ticket = Ticket(prepared.prompt_tokens, prepared.end, cancellation)
        if parts.batched and prepared.resolved is not None:
            parts.engine.submit(sequence_of(prepared, prepared.resolved, parts.tokenizer, ticket, request.streams))
        else:

            def generate(cancellation: Cancellation) -> None:
                try:
                    parts.solo.generate(prepared, request.streams, submitted, ticket.put, cancellation)
                except OutOfMemory as error:
                    if ticket.made or not self._memory.account.evict_one():
                        raise
                    forget_frames(error)
                    parts.solo.generate(prepared, request.streams, submitted, ticket.put, cancellation)

            parts.claims.check(prepared.asked)
            parts.engine.submit_job(ticket, generate)
        return ticket

    def _check_generates(self, parts: Parts) -> None:
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
        """Runs a task and returns its result as JSON values; concurrent calls are batched.

        Prompts of `text-generation` run as generations do, unless they use beams, which only the model's own `generate`
        computes. `adapter` is one of the model's adapters.

        Raises:
            UnsupportedTask: the model cannot do the task.
            InvalidRequest: the model cannot honour the inputs or parameters.
            QueueFull: the task's queue is full.
            Cancelled: by `cancellation`, or the model is being unloaded.
        """
        parts = self._open(cancellation)
        parts.adapters.check(adapter)
        parts.check_lengths({"inputs": inputs, **parameters}, cancellation)
        if task == GENERATION and parts.batched and asked_of(parts.solo.model, parameters, 0).rows == 1:
            generation = parts.generations.begin(inputs, parameters)
            limits: dict[str, Any] = {"maximum": self._max_prompts, "context": parts.context}
            limits["check_vocabulary"] = parts.preparer.check_vocabulary
            if run_in_batch(generation, parts.engine, **limits, cancellation=cancellation, adapter=adapter):
                parts.tasks.note(task)
                return generation.result()
        if adapter is not None:
            parameters = {**parameters, "adapter": adapter}
        try:
            return self._run(parts, task, inputs, parameters, cancellation)
        except OutOfMemory as error:
            if not self._memory.account.evict_one():
                raise
            forget_frames(error)
            return self._run(parts, task, inputs, parameters, cancellation)

    def _run(
        self, parts: Parts, task: str, inputs: Any, parameters: Mapping[str, Any], cancellation: Cancellation
    ) -> Any:
        parts.engine.check_queue_for_task()
        call = parts.tasks.submit(task, inputs, parameters, cancellation)
        parts.engine.wake()
        try:
            return cancellation.result(call.future)
        except Cancelled:
            call.cancel()
            if parts.engine.failed:  # the engine broke after its queue was checked
                raise EngineFailed(self.model_id) from None
            raise

    def settles(self, seconds: float) -> bool:
        """Waits up to `seconds` until the model is prepared; returns whether it is."""
        made = self._made
        return made is None or bool(wait([made], seconds).done)

    def prepared(self, cancellation: Cancellation = NEVER) -> None:
        """Waits until the model is prepared: until it is known how it is served.

        Raises:
            Cancelled: by `cancellation`, or the model is being unloaded.
            EngineFailed: the model cannot be served.
        """
        self._open(cancellation)

    def _open(self, cancellation: Cancellation = NEVER) -> Parts:
        parts = self._made
        if parts is None:
            raise Cancelled(f"Model '{self.model_id}' was unloaded")
        return cancellation.result(parts)

    def close(self) -> None:
        """Cancels running work and gives the memory back to the system. The model cannot be used afterwards."""
        self._closing.cancel()
        parts, self._made = self._made, None
        if parts is None:
            return
        if parts.exception() is None:  # waits for the preparation, which the cancel above ends soon
            parts.result().engine.close()
            parts.result().preparer.close()
        del parts
        self._preparing.join()  # the thread holds the model
        self._memory.forget()
        if self.setup.folder is not None:
            shutil.rmtree(self.setup.folder, ignore_errors=True)
        free()
