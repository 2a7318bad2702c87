"""A model in memory: its engine, its tasks, and how requests are put to them.

`loader` makes it of files, the manager keeps it. Any thread may call it. Must not know files, the registry, the manager
or HTTP.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .engine.batch import TransformersBatch, sequence_of
from .engine.constraints import Constraints
from .engine.engine import Engine
from .engine.parity import batch_runner
from .engine.prepare import Preparer
from .engine.prompts import run_in_batch
from .engine.runner import BatchRunner, NotBatchable
from .engine.solo import Solo
from .engine.ticket import Ticket
from .engine.tokens import TokenTexts
from .errors import Cancelled, LocalLLMError, UnsupportedTask
from .memory import release_freed
from .records import ChatTraits, EngineOptions, EngineStatus, GenerationRequest, ModelRecord, timestamp
from .tasks import Head
from .tasks.embedding import Pooling
from .tasks.generation import generation_arguments
from .tasks.positions import max_positions
from .tasks.runner import TaskRunner
from .tasks.text_generation import TextGenerations

logger = logging.getLogger(__name__)

_GENERATION = "text-generation"  # the one task whose work the batch does

# Of a generation config: what an answer's caller may set too.
_DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "top_h")

_LOOK_AGAIN = 0.1  # seconds between two looks at whether the one who waits is still there


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
        free()


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


def free() -> None:
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
