"""A model in memory: its engine, its tasks, and how requests reach them.

`loader` builds it from files, the manager keeps it. Any thread may call it. Must not know files, the registry, the
manager or HTTP.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..cancellation import NEVER, Cancellation
from ..engine.batch import sequence_of
from ..engine.bulk import run_in_batch
from ..engine.engine import Engine
from ..engine.failures import typed
from ..engine.ticket import Ticket
from ..errors import Cancelled, EngineFailed, LocalLLMError, UnsupportedTask
from ..host.memory import retried
from ..modeling.demand import asked_of
from ..tasks.embedding import Pooling
from ..tasks.runner import TaskRunner
from ..types import ChatTraits, EngineOptions, EngineStatus, GenerationRequest, Sizes, timestamp
from .memory import Memory, ModelMemory, free
from .parts import GENERATION, Compute, Parts, Setup, build
from .preparation import Preparation

# The sampling parameters of a generation config that a caller may set too.
_DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "top_h")


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
        self._memory.set_weights(compute.weights)
        self._options = options
        self._backend, self.backend_reason = compute.backend, setup.backend_reason
        # Of one call: so that another call's prompts find slots meanwhile.
        self._max_prompts = max(1, options.max_batch // 2)

        def make(closing: Cancellation) -> Parts:
            parts = build(setup, compute, tokenizer, options, pooling, self._memory, closing)
            self._backend = parts.serving.backend
            self.backend_reason = parts.serving.declined or self.backend_reason
            return parts

        self.preparation = Preparation(setup, compute.model, self._memory, make)
        self._parts = self.preparation.parts

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
        parts = self.preparation.done
        return () if parts is None else parts.tasks.opened

    @property
    def status(self) -> EngineStatus | None:
        """What the engine is doing; None after the model was unloaded."""
        if not self.preparation.settles(0):
            return EngineStatus("starting", None, None, 0, 0, 0, 0, 0, 0, self._options.kv_cache_bytes)
        parts = self.preparation.done
        return None if parts is None else parts.engine.status()

    @property
    def engine(self) -> Engine:
        """The engine that runs all of the model's work, once the model is prepared.

        Raises: as `prepared`.
        """
        return self._parts().engine

    @property
    def tasks(self) -> TaskRunner:
        """The model's tasks. For the engine's thread, except where a method says otherwise.

        Raises: as `prepared`.
        """
        return self._parts().tasks

    @property
    def own_parameters(self) -> Mapping[str, Any]:
        """The sampling parameters in the model's generation config; its lengths and end tokens apply in any case."""
        config = getattr(self._parts().solo.model, "generation_config", None)  # only models that generate have one
        return {name: value for name in _DRAWING if (value := getattr(config, name, None)) is not None}

    def decode(self, tokens: Sequence[int]) -> str:
        """Decodes tokens to text, special tokens included."""
        with typed(self.model_id):
            return str(self._parts().tokenizer.decode(list(tokens), skip_special_tokens=False))

    def count_tokens(self, text: str) -> int:
        """Counts a text's tokens, without special ones."""
        with typed(self.model_id):
            return len(
                self._parts().tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            )

    def encode(self, text: str, cancellation: Cancellation = NEVER) -> list[int]:
        """Tokenizes a text, with the special tokens that the tokenizer adds.

        Raises:
            InvalidRequest: the text is far longer than the model can read.
            Cancelled: by `cancellation`.
        """
        parts = self._parts(cancellation)
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
        parts = self._parts(cancellation)
        self._check_generates(parts)
        return parts.preparer.count(request, cancellation)

    @property
    def chat(self) -> ChatTraits:
        """How the model lays chats out."""
        tokenizer = self._parts().tokenizer
        added = tokenizer.added_tokens_decoder
        special = frozenset(token.content for token in added.values() if token.special)
        ids = {token.content: id_ for id_, token in added.items()}
        described = getattr(tokenizer, "response_template", None)
        return ChatTraits(tokenizer.chat_template, ids, special, described if isinstance(described, Mapping) else None)

    @property
    def failed(self) -> bool:
        """Whether the engine is broken, so that a load replaces the model."""
        return self.preparation.failed

    def generate(self, request: GenerationRequest, cancellation: Cancellation = NEVER) -> Ticket:
        """Queues a generation; its ticket delivers the text, and the errors of the engine.

        `cancellation`, which every step checks, or a cancel of the ticket ends the generation.

        Raises:
            UnsupportedTask: the model has no head that generates text.
            InvalidRequest: the model cannot honour the prompt or a parameter.
            QueueFull, OutOfMemory, EngineFailed, Cancelled: the generation was not queued.
        """
        parts = self._parts(cancellation)
        self._check_generates(parts)
        submitted = time.monotonic()
        prepared = parts.preparer.prepare(request, cancellation)
        ticket = Ticket(prepared.prompt_tokens, prepared.end, cancellation)
        if parts.batched and prepared.resolved is not None:
            parts.engine.submit(sequence_of(prepared, prepared.resolved, parts.tokenizer, ticket, request.streams))
        else:

            def generate(cancellation: Cancellation) -> None:
                retried(
                    lambda: parts.solo.generate(prepared, request.streams, submitted, ticket.put, cancellation),
                    lambda: not ticket.made and self._memory.account.evict_one(),
                )

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
        parts = self._parts(cancellation)
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

        def run() -> Any:
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

        return retried(run, self._memory.account.evict_one)

    def prepared(self, cancellation: Cancellation = NEVER) -> None:
        """Waits until the model is prepared: until it is known how it is served.

        Raises:
            Cancelled: by `cancellation`, or the model is being unloaded.
            EngineFailed: the model cannot be served.
        """
        self._parts(cancellation)

    def close(self) -> None:
        """Cancels running work and gives the memory back to the system. The model cannot be used afterwards."""
        if not self.preparation.close():
            return
        self._memory.forget()
        if self.setup.folder is not None:
            shutil.rmtree(self.setup.folder, ignore_errors=True)
        free()
