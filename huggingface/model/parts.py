"""The parts of a model in memory, built once it is known how the model is served.

Runs on the thread that prepares the model. Must not know files, the registry's file, the manager or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..cancellation import Cancellation
from ..engine.batch import Runner, TransformersBatch
from ..engine.constraints import constraints_of
from ..engine.engine import Engine
from ..engine.generate_fallback import Solo, unset
from ..engine.input_processor import Preparer
from ..engine.lengths import TextLengths
from ..engine.logprobs import TokenTexts
from ..engine.openvino.encoder import Encoder
from ..engine.slots import first_bank
from ..engine.torch.lora import Adapters
from ..engine.torch.rotary import forget_between_passes
from ..errors import InvalidRequest, LocalLLMError
from ..host.memory import release_freed
from ..modeling.demand import MemoryClaims
from ..registry.records import ModelRecord
from ..tasks import Head
from ..tasks.embedding import Pooling
from ..tasks.generation import generation_arguments
from ..tasks.positions import contexts
from ..tasks.runner import TaskRunner
from ..tasks.text_generation import TextGenerations
from ..tasks.vocabulary import check_vocabulary, guard_vocabulary, vocabulary_rows
from ..types import EngineOptions, Pending
from .memory import ModelMemory

GENERATION = "text-generation"  # the one task that the batch computes


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model was loaded; `effective` are the effective settings, by name."""

    record: ModelRecord
    head: Head
    device: str
    effective: Mapping[str, Any]
    backend_reason: str | None = None  # why the preferred backend does not compute the model
    pending: Pending | None = None  # what the preferred backend lacks, while another one computes the model
    max_context: int | None = None
    commit: str | None = None  # of the repository, where the model came from the Hub
    folder: Path | None = None  # for parts that are offloaded to the disk; deleted with the model


@dataclass(frozen=True, slots=True)
class Serving:
    """How a backend serves a model: in a batch by a `runner`, or one request at a time for a `reason`.

    `encoder` replaces the model's own forward pass where a graph computes it. `declined` says why a backend that was
    tried does not compute this model. `unwritten` returns the bytes that count as the model's but are not in memory.
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
    """A model that a backend has opened.

    `model` is transformers' own; with a graph, its weights are in memory only while they are needed.
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
        """Finds the best way to serve the model. Runs on the thread that prepares the model.

        Raises:
            InvalidRequest: the backend was asked for by name and cannot compute the model.
            Cancelled: by `cancellation`.
        """


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a model in memory; dropped together."""

    serving: Serving
    engine: Engine
    tasks: TaskRunner
    preparer: Preparer
    solo: Solo
    claims: MemoryClaims
    tokenizer: Any
    lengths: TextLengths
    context: int | None
    batched: bool
    generations: TextGenerations
    adapters: Adapters

    def check_lengths(self, values: Mapping[str, Any], cancellation: Cancellation) -> None:
        """Refuses texts far longer than the model can read, before a task's tokenizer takes the engine's thread.

        Raises:
            InvalidRequest: a text is too long; it names the field.
            Cancelled: by `cancellation`.
        """
        if (field := self.lengths.check(dict(values), "", cancellation)) is not None:
            reason = f"longer than {self.lengths.of_text} tokens, the limit for one text"
            raise InvalidRequest(f"Invalid value for field '{field}': {reason}", field)


def build(
    setup: Setup,
    compute: Compute,
    tokenizer: Any,
    options: EngineOptions,
    pooling: Pooling | LocalLLMError | None,
    memory: ModelMemory,
    closing: Cancellation,
) -> Parts:
    """Finds out how a model is served, and builds the parts that serve it.

    Raises:
        InvalidRequest: the backend was asked for by name and cannot compute the model.
        Cancelled: by `closing`.
    """
    model_id, model = setup.record.model_id, compute.model
    forget_between_passes(model)
    kept = unset(model)
    rows = vocabulary_rows(model)
    guard_vocabulary(model, tokenizer)
    serving = compute.serve(memory, closing)
    constraints = constraints_of(model, tokenizer)
    texts = TokenTexts(tokenizer, lambda: constraints.tokens)
    batch, runner = None, serving.runner
    if runner is not None:
        runner.cache.take = memory.take_cache
        batch = TransformersBatch(model_id, runner, texts, options)
        token_bytes = runner.cache.token_bytes
        memory.account.reserve_floor(setup.device, first_bank(options.kv_cache_bytes // token_bytes) * token_bytes)
    memory.unwritten = serving.unwritten

    def find() -> Pooling | None:
        if isinstance(pooling, LocalLLMError):
            raise pooling
        return pooling

    adapters, relieve = compute.adapters, memory.account.evict_one
    lengths_of = contexts(model, setup.max_context)
    lengths = TextLengths(tokenizer, lengths_of[0])
    claims = MemoryClaims(model_id, model, memory.take_passing, memory.max_beside, relieve)
    tasks = TaskRunner(model_id, model, tokenizer, setup.head, find, adapters.active, serving.encoder, claims)
    preparer = Preparer(
        model_id,
        model,
        tokenizer,
        contexts=lengths_of,
        room=None if batch is None else batch.slots.longest,
        constraints=constraints,
        arguments=lambda given: generation_arguments(given, model),
        lengths=lengths,
        check_adapter=adapters.check,
        check_vocabulary=lambda highest, field: check_vocabulary(highest, rows, field),
    )
    parts = Parts(
        serving=serving,
        engine=Engine(model_id, batch, tasks, options, serving.reason, relieve, lambda: use_device(setup.device)),
        tasks=tasks,
        preparer=preparer,
        solo=Solo(model_id, model, tokenizer, texts, claims, adapters.active, kept),
        claims=claims,
        tokenizer=tokenizer,
        lengths=lengths,
        context=lengths_of[0],
        batched=batch is not None,
        generations=TextGenerations(model, tokenizer, lambda given, error: tasks.failure(GENERATION, given, error)),
        adapters=adapters,
    )
    memory.set_copied(serving.copied_bytes)
    release_freed()  # the trials took memory
    return parts


def use_device(device: str) -> None:
    """Makes a CUDA device the thread's current one: kernels outside torch run there, not on their tensors' device."""
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
