"""Runs tasks on one loaded model: the same weights under every pipeline, results as plain JSON values.

`submit`, `close`, `pending` and `opened` may be used from any thread, all else only on the model's engine thread. Owns
the pipelines, a tokenizer that they may change, and the waiting calls; the batcher decides which rows share a pass.
Must not know the registry, HTTP or pydantic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from ..cancellation import NEVER, Cancellation
from ..errors import (
    EngineFailed,
    GenerationFailed,
    LocalLLMError,
    MissingField,
    OutOfMemory,
    UnsupportedTask,
    explained,
)
from ..host.memory import ran_out_of_memory
from . import Head, canonical_task, supported_tasks, text_generation
from . import inputs as shapes
from .batching import Batcher, Request, TaskCall, Work
from .generation import generation_arguments
from .json_values import json_value
from .padded_batch import Lane, Outputs, Tensors, token_count
from .vocabulary import NoRow, check_vocabulary, field_of

if TYPE_CHECKING:
    from ..modeling.demand import MemoryClaims
    from .embedding import Pooling


class OnDemand(Protocol):
    """Holds weights that are loaded on demand."""

    def release_idle(self) -> None:
        """Drops weights that were loaded on demand."""


class TaskRunner:
    """The tasks of one loaded model besides `/generate`."""

    def __init__(
        self,
        model_id: str,
        model: Any,
        tokenizer: Any,
        head: Head,
        pooling: Callable[[], Pooling | None] = lambda: None,
        active: Callable[[str | None], AbstractContextManager[Any]] = nullcontext,
        on_demand: OnDemand | None = None,
        claims: MemoryClaims | None = None,
    ) -> None:
        """`model` is a `PreTrainedModel` in eval mode of the kind `head`; neither it nor `tokenizer` is changed.

        Args:
            pooling: returns what makes one vector of a text's tokens, if the folder says how, or raises why not.
            active: lets the model answer as one of its adapters, by name, until the block ends.
            resting: holds weights that only some tasks need.
            claims: claims the memory of generations.
        """
        self._model_id = model_id
        self._pooling = pooling
        self._active = active
        self._on_demand = on_demand
        self._claims = claims
        self._model = model
        self._shared_tokenizer = tokenizer
        self._own_tokenizer: Any = None
        self._head: Head = head
        self._supported: tuple[str, ...] | None = None
        self._pipelines: dict[tuple[str | None, str], Any] = {}
        self._lanes: dict[tuple[str | None, tuple[str | int, ...]], Lane] = {}
        self._questions: dict[str | None, Any] = {}
        self._opened: dict[str, None] = {}
        self._calls = Batcher(begin=self._begin, whole=self._whole, explain=self._explain, finished=self._finished)

    @property
    def opened(self) -> tuple[str, ...]:
        """The names of the tasks that have run since the load; all translations count as one."""
        return tuple(self._opened)

    @property
    def supported(self) -> tuple[str, ...]:
        """The tasks that this model can do; the first read may run the model on a token or two."""
        if self._supported is None:
            self._supported = self._find_supported()
        return self._supported

    def note(self, task: str) -> None:
        """Records that a task has run, here or elsewhere. Any thread."""
        self._opened["translation" if task.startswith("translation_") else task] = None

    def submit(
        self, task: str, inputs: Any, parameters: Mapping[str, Any], cancellation: Cancellation = NEVER
    ) -> TaskCall:
        """Queues `task` on `inputs`, one item or a list; `step` does it as transformers' pipeline of that name.

        `parameters` are those of `TASK_PARAMETERS`, validated; `adapter` among them names one of the model's adapters.
        `cancellation` is checked on the engine's thread, before each batch, item and token. Any thread. All errors come
        from the call's `future`: those of `run`, and `Cancelled` after `close`.
        """
        return self._calls.submit(task, inputs, parameters, cancellation)

    def step(self) -> bool:
        """Does the next bounded piece of the submitted calls; returns whether there is more. Errors go to the calls.

        One piece is one batch of rows of any of the calls or, for tasks that generate and for tables, one whole call.
        """
        return self._calls.step()

    def fail(self, error: LocalLLMError) -> None:
        """Fails all submitted calls that are not done with this error."""
        self._calls.fail(error)

    def release_idle(self) -> None:
        """Drops weights that were loaded on demand, after some time without calls."""
        if self._on_demand is not None:
            self._on_demand.release_idle()

    def close(self) -> None:
        """Cancels all calls that are not done, and those submitted later."""
        self._calls.close()
        self.release_idle()

    @property
    def pending(self) -> int:
        """How many submitted calls have no result yet."""
        return self._calls.pending

    def run(self, task: str, inputs: Any, parameters: Mapping[str, Any], cancellation: Cancellation = NEVER) -> Any:
        """Does `task` at once, item after item: as `submit`, and to the last bit as transformers.

        `cancellation` is checked between items, between the pieces of one, and between tokens.

        Raises:
            InvalidRequest: the inputs or a parameter are unusable with this model, or it cannot do the task.
            Cancelled: by `cancellation`.
            GenerationFailed, OutOfMemory: the model failed.
        """
        request = Request(task, inputs, parameters, cancellation)
        with explained(partial(self._explain, request)):
            work = self._begin(request)
            result = self._whole(request) if work is None else _one_by_one(work, cancellation)
        self._finished(request)
        return result

    # A call's life ----------------------------------------------------------------------------------------------------

    def _begin(self, request: Request) -> Work | None:
        adapter, request = _split(request)
        if request.task in ("sentence-embeddings", "rerank"):
            make = self._embedding if request.task == "sentence-embeddings" else self._reranking
            return make(request, adapter)
        name = canonical_task(request.task)
        if name not in map(canonical_task, self.supported):
            raise UnsupportedTask(self._model_id, request.task, self.supported)
        if name == "question-answering":
            from .question_answering import QuestionAnswering, QuestionWork

            if adapter not in self._questions:
                self._questions[adapter] = QuestionAnswering(self._model, self._tokenizer)
                self._questions[adapter].lane = self._lane(self._questions[adapter].lane, adapter)
            return QuestionWork(self._questions[adapter], request.inputs, request.parameters)
        if name not in _CHECKS or name == "table-question-answering":
            return None
        from .pipelines import PipelineWork

        inputs, parameters = self._checked(name, request)
        return PipelineWork(self._pipeline(name, adapter), inputs, parameters)

    def _embedding(self, request: Request, adapter: str | None) -> Work:
        from .embedding import EmbeddingWork

        pooling = self._pooling()
        config, whole = self._model.config, "feature-extraction" in self.supported
        decodes = config.is_encoder_decoder and hasattr(self._model.base_model, "decoder")
        if (decodes and pooling is None) or not (decodes or whole):
            raise UnsupportedTask(self._model_id, "embeddings", self.supported)
        # As sentence-transformers: only the encoder of a model that needs a decoder's input.
        pipeline = self._pipeline("feature-extraction", adapter, None if whole else self._model.get_encoder())
        limits = (pipeline.limit, config.get_text_config().vocab_size)
        return EmbeddingWork(pipeline, self._tokenizer, pooling, request.inputs, request.parameters, limits)

    def _reranking(self, request: Request, adapter: str | None) -> Work:
        from .reranking import RerankWork

        if self._head != "sequence-classification":
            raise UnsupportedTask(self._model_id, "rerank", self.supported)
        if self._model.config.num_labels != 1:
            raise shapes.refuse("model", f"has {self._model.config.num_labels} labels; a cross-encoder has one")
        pipeline = self._pipeline("text-classification", adapter)
        return RerankWork(pipeline, self._tokenizer, self._model.config, request.inputs, request.parameters)

    def _whole(self, request: Request) -> Any:
        adapter, request = _split(request)
        with self._active(adapter):
            return self._answer(request)

    def _answer(self, request: Request) -> Any:
        name, parameters = canonical_task(request.task), dict(request.parameters)
        if name == "table-question-answering":
            return json_value(self._call(name, *self._checked(name, request), request.cancellation))
        from ..modeling.steps import watched
        from .text2text import Text2Text

        with watched(self._model, self._model_id):
            if name == "text-generation":
                inputs, parameters = text_generation.checked(request.inputs, parameters, self._model, self._tokenizer)
                return json_value(self._call(name, inputs, parameters, request.cancellation))
            parameters = generation_arguments(parameters, self._model)
            answer = Text2Text(self._model, self._tokenizer, request.task, claims=self._claims)
            return json_value(answer(request.inputs, cancellation=request.cancellation, **parameters))

    def _checked(self, name: str, request: Request) -> tuple[Any, dict[str, Any]]:
        """The checked inputs and parameters of a call for the pipeline of the task `name`."""
        parameters = dict(request.parameters)
        check = shapes.words if parameters.get("is_split_into_words") else _CHECKS[name]
        inputs = check(request.inputs)
        self._check_parameters(name, inputs, parameters)
        return inputs, parameters

    def _finished(self, request: Request) -> None:
        self.note(request.task)

    def _explain(self, request: Request, error: Exception) -> LocalLLMError:
        if isinstance(error, NoRow):
            return error.refusal(
                field_of(error.token, request.task, request.inputs, request.parameters, self._tokenizer)
            )
        return self.failure(request.task, request.parameters, error)

    def _check_parameters(self, name: str, inputs: Any, parameters: dict[str, Any]) -> None:
        """Refuses what only this model's tokenizer and vocabulary show to be wrong."""
        tokenizer = self._tokenizer
        if name == "zero-shot-classification" and "candidate_labels" not in parameters:
            raise MissingField("candidate_labels")
        if name == "fill-mask":
            vocabulary = self._model.config.get_text_config().vocab_size
            if parameters.get("top_k", 1) > vocabulary:
                raise shapes.refuse("top_k", f"must be at most {vocabulary}, the size of the model's vocabulary")
            targets = parameters.get("targets", [])
            for target in [targets] if isinstance(targets, str) else targets:
                ids = tokenizer.encode(target, add_special_tokens=False)
                if not ids:
                    raise shapes.refuse("targets", f"'{target}' holds no token of the model's vocabulary")
                check_vocabulary(max(ids), vocabulary, "targets")
        if "stride" in parameters:
            room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
            if parameters["stride"] >= room:
                raise shapes.refuse("stride", f"must be less than {room}, the tokens that fit into one piece")
        for field in ("", "tokenizer_kwargs.", "tokenize_kwargs."):
            arguments = parameters.get(field[:-1], {}) if field else parameters
            if "max_length" not in arguments or not arguments.get("add_special_tokens", True):
                continue
            pair = any(isinstance(item, dict) for item in (inputs if isinstance(inputs, list) else [inputs]))
            special = tokenizer.num_special_tokens_to_add(pair=pair)
            if arguments["max_length"] <= special:
                raise shapes.refuse(field + "max_length", f"must exceed the {special} special tokens of an input")

    def _call(self, name: str, inputs: Any, parameters: dict[str, Any], cancellation: Cancellation) -> Any:
        pipeline = self._pipeline(name)
        pipeline.call_count = 0  # the pipeline counts calls only to complain of many
        pipeline.cancellation = cancellation
        try:
            return pipeline(inputs, **parameters)
        finally:
            del pipeline.cancellation  # it may keep the whole request alive

    def _pipeline(self, name: str, adapter: str | None = None, part: Any = None) -> Any:
        """The pipeline of a task, around a `part` of the model if given; each adapter has its own lane."""
        key = (adapter, name if part is None else f"{name} of a part")
        if key not in self._pipelines:
            from .pipelines import Batched, open_pipeline

            model = self._model.base_model if name == "feature-extraction" else self._model
            pipeline = open_pipeline(name, model if part is None else part, self._tokenizer)
            if name == "text-generation":
                pipeline.claims = self._claims
            if part is not None:
                pipeline.lane = self._lane(pipeline.open_lane(), adapter)
            elif isinstance(pipeline, Batched):
                lane = (adapter, pipeline.outputs)
                if lane not in self._lanes:
                    self._lanes[lane] = self._lane(pipeline.open_lane(), adapter)
                pipeline.lane = self._lanes[lane]
            self._pipelines[key] = pipeline
        return self._pipelines[key]

    def _lane(self, lane: Lane, adapter: str | None) -> Lane:
        return lane if adapter is None else _AdaptedLane(lane, lambda: self._active(adapter))

    @property
    def _tokenizer(self) -> Any:
        """A copy: pipelines set its padding, and two threads cannot use one at the same moment ("Already borrowed")."""
        if self._own_tokenizer is None:
            self._own_tokenizer = copy.deepcopy(self._shared_tokenizer)
        return self._own_tokenizer

    def _find_supported(self) -> tuple[str, ...]:
        names = list(supported_tasks(self._head))
        mask = getattr(self._shared_tokenizer, "mask_token_id", None) is not None
        if self._head == "seq2seq-lm":
            from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

            if mask and type(self._model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
                names.append("fill-mask")
            names.append("feature-extraction")
        elif not mask and "fill-mask" in names:
            names.remove("fill-mask")
        if "feature-extraction" in names and not self._gives_features():
            names.remove("feature-extraction")
        return tuple(names)

    def _gives_features(self) -> bool:
        """Whether the model under the head runs on a text alone; an encoder-decoder is tried on one token."""
        base = self._model.base_model
        if base is self._model and self._head != "base":
            return False
        if not self._model.config.is_encoder_decoder:
            return True
        import torch

        padding = self._model.config.get_text_config().pad_token_id
        token = torch.full((1, 1), 1 if padding == 0 else 0, dtype=torch.long, device=base.device)
        try:
            with torch.no_grad():
                base(input_ids=token)
        # The ways in which models report missing decoder_input_ids.
        except (ValueError, TypeError, AttributeError, RuntimeError, IndexError):
            return False
        return True

    def failure(self, task: str, parameters: Mapping[str, Any], error: Exception) -> LocalLLMError:
        """The error for the caller from a failure inside transformers. Any thread."""
        import torch

        reason = str(error)
        if ran_out_of_memory(error):
            return OutOfMemory(f"Not enough memory on the device for '{task}' on model '{self._model_id}'")
        if isinstance(error, torch.AcceleratorError):  # CUDA refuses everything afterwards
            return EngineFailed(self._model_id)
        if type(error).__name__ == "PipelineException" and "mask_token" in reason:
            mask = self._shared_tokenizer.mask_token
            return shapes.refuse("inputs", f"must hold the model's mask token {mask}")
        if isinstance(error, ValueError | TypeError | AssertionError):
            for field in parameters:
                if f"`{field}`" in reason or f"{field}=" in reason:
                    return shapes.refuse(field, reason)
        return GenerationFailed(f"Model '{self._model_id}' failed to do '{task}'")


class _AdaptedLane(Lane):
    """A lane in which the model answers as one of its adapters."""

    def __init__(self, lane: Lane, active: Callable[[], AbstractContextManager[Any]]) -> None:
        """`lane` is a new lane that nothing else uses."""
        vars(self).update(vars(lane))
        self._active = active

    def run(self, rows: Sequence[Tensors]) -> list[Outputs | GenerationFailed | None]:
        """As `Lane.run`."""
        with self._active():
            return super().run(rows)


def _split(request: Request) -> tuple[str | None, Request]:
    """The name of the request's adapter, and the request without it."""
    parameters = dict(request.parameters)
    adapter = parameters.pop("adapter", None)
    return adapter, replace(request, parameters=parameters)


def _one_by_one(work: Work, cancellation: Cancellation) -> Any:
    """The result of a call, with each row computed alone."""

    def computed(index: int) -> Iterator[tuple[Any, Outputs]]:
        for tensors, known in work.rows(index):
            cancellation.check()
            try:
                outputs = work.lane.run_alone(tensors)
            except Exception as error:
                raise work.blame(error, token_count(tensors)) from error
            yield known, outputs

    return work.whole([work.answer(list(computed(index))) for index in range(work.count)])


_CHECKS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "fill-mask": shapes.nonempty_texts,
        "text-classification": shapes.texts_or_pairs,
        "token-classification": shapes.texts,
        "zero-shot-classification": shapes.nonempty_texts,
        "feature-extraction": shapes.texts,
        "table-question-answering": shapes.tables,
    }
)
