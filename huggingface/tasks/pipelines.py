"""transformers' own pipelines, made safe to serve: each refuses an input that the model has no positions for before
it reaches the model. Those that run it once for each item are cut in two there, so that items can be batched across
calls; the others ask whether to go on before every forward pass.

Importing this imports torch and transformers. Used on the model's engine thread only. Must not know HTTP.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    FeatureExtractionPipeline,
    FillMaskPipeline,
    TableQuestionAnsweringPipeline,
    TextClassificationPipeline,
    TextGenerationPipeline,
    TokenClassificationPipeline,
    ZeroShotClassificationPipeline,
)
from transformers.pipelines.base import ChunkPipeline

from ..cancellation import NEVER, Cancellation
from ..errors import GenerationFailed
from ..modeling.demand import Claims, asked_of
from .generation import stop_when
from .inputs import refuse
from .json_values import json_value
from .padded_batch import Lane, Outputs, Tensors, token_count
from .positions import max_positions


class Guard:
    """What is put in front of a pipeline's `forward`. `cancellation` is the running request's."""

    cancellation: Cancellation = NEVER
    limit: int | None = None  # tokens that the model can read
    reads_nothing = False  # whether an input without any token means something

    def forward(self, model_inputs: Any, **parameters: Any) -> Any:
        """`Pipeline.forward` of one item (or one piece of one), unless cancelled, empty or too long."""
        self.cancellation.check()
        tokens = token_count(model_inputs)
        self.check(tokens)
        try:
            return super().forward(model_inputs, **parameters)  # type: ignore[misc]
        except IndexError as error:
            blamed = self.blame(error, tokens)
            if blamed is error:
                raise
            raise blamed from error

    def check(self, tokens: int) -> None:
        """Refuse an item of no tokens, or of more than the model can read."""
        if tokens == 0 and not self.reads_nothing:
            raise refuse("inputs", "holds no token")
        if self.limit is not None and tokens > self.limit:
            raise refuse("inputs", f"{tokens} tokens, but the model can read at most {self.limit}")

    def blame(self, error: Exception, tokens: int) -> Exception:
        """What an error of the model on so many tokens means: positions that are not found by their name, on a CPU."""
        config = self.model.config.get_text_config()  # type: ignore[attr-defined]
        most = getattr(config, "max_position_embeddings", None)
        if not isinstance(error, IndexError) or most is None or tokens <= most:
            return error
        refusal = refuse("inputs", f"{tokens} tokens, but the model can read at most {most}")
        refusal.__cause__ = error
        return refusal


class TextGeneration(Guard, TextGenerationPipeline):  # type: ignore[misc]
    """Adds what the prompt's length decides, and the question after each token whether to go on."""

    reads_nothing = True
    claims: Claims | None = None  # asks for the memory that is taken

    def preprocess(self, prompt_text: Any, **parameters: Any) -> Any:
        """The prompt's tokens; a chat goes through the model's own template, which may refuse it."""
        try:
            return super().preprocess(prompt_text, **parameters)
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            if "`hole`" in str(error):
                raise refuse(
                    "handle_long_generation", "the new tokens alone are more than the model can read"
                ) from error
            if isinstance(prompt_text, str):
                raise
            raise refuse("inputs", f"the model's chat template does not accept this chat: {error}") from error

    def forward(self, model_inputs: Any, **parameters: Any) -> Any:
        """`Pipeline.forward` of one prompt, asking after each token whether to go on."""
        tokens = int(model_inputs["input_ids"].shape[-1])
        parameters.update(self._lengths(tokens, parameters))
        if "custom_generate" in parameters or self.claims is None:  # somebody else makes the tokens
            return super().forward(model_inputs, stopping_criteria=stop_when(self.cancellation), **parameters)
        with self.claims.held(asked_of(self.model, parameters, tokens)) as reached:
            criteria = stop_when(self.cancellation, reached)
            return super().forward(model_inputs, stopping_criteria=criteria, **parameters)

    def _lengths(self, tokens: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Check the prompt and the lengths asked for; returns what to add to them so that they are what counts.

        `generate` lets the number of new tokens win over the total length wherever it comes from; here what the request
        gives wins over what the model's files give. Where the request gives neither, the model's room is the limit.
        """
        config = self.model.generation_config
        if tokens == 0:
            if config.bos_token_id is None:
                raise refuse("inputs", "holds no token, and the model has none to begin with")
            tokens = 1
        added: dict[str, Any] = {}
        prefix = asked.get("prefix_length", 0)  # not counted in a total length
        if "max_new_tokens" in asked:
            field = "max_new_tokens"
            total = tokens + asked["max_new_tokens"]
            added["max_length"] = None
        elif "max_length" in asked:
            field = "max_length"
            total = prefix + asked["max_length"]
            added.update(max_length=total, max_new_tokens=None)
        else:
            field = ""
            new = config.max_new_tokens
            if new is None and config.max_length is None:
                new = self._default_generation_config.max_new_tokens
            total = prefix + config.max_length if new is None else tokens + new
        if total <= tokens:
            if field:
                raise refuse(field, f"must exceed the prompt, which has {tokens - prefix} tokens")
            raise refuse("inputs", f"{tokens} tokens, but the model's own settings end a text at {total}")
        # The last token is never read, so it needs no position.
        if self.limit is not None and tokens <= self.limit < total - 1:
            room = self.limit + 1 - tokens
            if field:
                asking = f"the prompt has {tokens} tokens and the model can read at most {self.limit}"
                raise refuse(field, f"{asking}, which leaves room for {room} new tokens")
            total = self.limit + 1
            added.update(max_new_tokens=room, max_length=None)
        return added | self._least(tokens, prefix, total, asked)

    def _least(self, tokens: int, prefix: int, total: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        if "min_new_tokens" in asked:
            field, least, added = "min_new_tokens", tokens + asked["min_new_tokens"], {"min_length": None}
        elif "min_length" in asked:
            field, least = "min_length", prefix + asked["min_length"]
            added = {"min_length": least, "min_new_tokens": None}
        else:
            return {}
        if least > total:
            raise refuse(field, f"asks for {least} tokens with the prompt, but the text may have at most {total}")
        return added


# Batched across calls -------------------------------------------------------------------------------------------------


class Batched(Guard):
    """A pipeline that runs the model once for each row. Its `_forward` is cut in two where it calls the model:
    `read` is what comes before, `found` what comes after. `lane` is where the rows go; pipelines of one model with the
    same `outputs` may share it.
    """

    lane: Lane
    outputs: tuple[str | int, ...] = ("logits",)
    per_token = True  # whether the outputs have something for each token, or for each row
    plain = False  # whether `postprocess` gives JSON values

    @property
    def width(self) -> int:
        """How many numbers the outputs have for each token, where that is very many."""
        return 1

    def open_lane(self) -> Lane:
        """A lane for this pipeline's model and outputs."""
        pipeline: Any = self
        model = pipeline.model
        without_cache = not self.per_token and "use_cache" in inspect.signature(model.forward).parameters
        return Lane(
            model,
            pipeline.tokenizer,
            self.outputs,
            device=pipeline.device,
            per_token=self.per_token,
            width=self.width,
            fixed={"use_cache": False} if without_cache else {},
        )

    def listed(self, inputs: Any, parameters: dict[str, Any]) -> list[Any]:
        """The inputs one by one; may add to the parameters what the pipeline's own `__call__` adds."""
        del parameters
        return inputs if isinstance(inputs, list) else [inputs]

    def whole(self, inputs: Any, parameters: Mapping[str, Any], answers: list[Any]) -> Any:
        """The result of a call from the answers to each of its inputs, as the pipeline's own `__call__` nests them."""
        del parameters
        return answers if isinstance(inputs, list) else answers[0]

    def read(self, item: Mapping[str, Any]) -> tuple[Tensors, Any]:
        """What the model gets of a preprocessed item, and what `found` must know of it."""
        return dict(item), None

    def found(self, known: Any, outputs: Outputs) -> Any:
        """What the pipeline's `_forward` would have returned, as far as `postprocess` reads it."""
        del known
        return {"logits": outputs[0]}


class FillMask(Batched, FillMaskPipeline):  # type: ignore[misc]
    """`fill-mask`, in rows."""

    @property
    def width(self) -> int:
        """A score for each word of the vocabulary."""
        return int(self.model.config.get_text_config().vocab_size)

    def whole(self, inputs: Any, parameters: Mapping[str, Any], answers: list[Any]) -> Any:
        """A list of one text has the answer of that text."""
        return answers[0] if len(answers) == 1 else super().whole(inputs, parameters, answers)

    def read(self, item: Mapping[str, Any]) -> tuple[Tensors, Any]:
        """The tokens are read again for where the mask is."""
        return dict(item), item["input_ids"]

    def found(self, known: Any, outputs: Outputs) -> Any:
        """Scores of the whole vocabulary, and the tokens."""
        return {"logits": outputs[0], "input_ids": known}


class TextClassification(Batched, TextClassificationPipeline):  # type: ignore[misc]
    """`text-classification`, in rows."""

    per_token = False

    def whole(self, inputs: Any, parameters: Mapping[str, Any], answers: list[Any]) -> Any:
        """A single text, but not a single pair, has a list of its one best label."""
        if isinstance(inputs, str) and "top_k" not in parameters:
            return answers
        return super().whole(inputs, parameters, answers)


class TokenClassification(Batched, TokenClassificationPipeline):  # type: ignore[misc]
    """`token-classification`, in rows: the pieces of a text."""

    _NOT_READ = ("special_tokens_mask", "offset_mapping", "sentence", "is_last", "word_ids", "word_to_chars_map")

    def listed(self, inputs: Any, parameters: dict[str, Any]) -> list[Any]:
        """The texts, or lists of words."""
        parameters.setdefault("is_split_into_words", False)
        parameters.setdefault("delimiter", None)
        if parameters["is_split_into_words"] and not isinstance(inputs[0], list):
            return [inputs]
        return super().listed(inputs, parameters)

    def read(self, item: Mapping[str, Any]) -> tuple[Tensors, Any]:
        """All but what says where the tokens stand in the text."""
        known = {name: item.get(name) for name in (*self._NOT_READ, "input_ids")}
        return {name: value for name, value in item.items() if name not in self._NOT_READ}, known

    def found(self, known: Any, outputs: Outputs) -> Any:
        """Scores of the labels for each token, and where it stands."""
        return {**known, "logits": outputs[0]}


class ZeroShotClassification(Batched, ZeroShotClassificationPipeline):  # type: ignore[misc]
    """`zero-shot-classification`, in rows: a text with each of the labels."""

    per_token = False

    def read(self, item: Mapping[str, Any]) -> tuple[Tensors, Any]:
        """What the tokenizer says that the model gets."""
        tensors = {name: item[name] for name in self.tokenizer.model_input_names}
        return tensors, {name: item[name] for name in ("candidate_label", "sequence")}

    def found(self, known: Any, outputs: Outputs) -> Any:
        """Scores of entailment and the like, and for which label."""
        return {**known, "logits": outputs[0]}


class FeatureExtraction(Batched, FeatureExtractionPipeline):  # type: ignore[misc]
    """`feature-extraction`, in rows."""

    outputs = (0,)  # the hidden states, whatever they are called
    plain = True

    def postprocess(self, model_outputs: Any, **parameters: Any) -> Any:
        """The hidden states as lists of numbers, looked at while they are a tensor: there may be millions."""
        if not torch.isfinite(model_outputs[0]).all():
            raise GenerationFailed("The model computed a value that is not a finite number")
        return super().postprocess(model_outputs, **parameters)

    def found(self, known: Any, outputs: Outputs) -> Any:
        """The hidden states, looked up by their place."""
        del known
        return outputs


class PipelineWork:
    """One call of a batched pipeline: a `batching.Work`. Its parameters act before and after the model only."""

    def __init__(self, pipeline: Any, inputs: Any, parameters: Mapping[str, Any]) -> None:
        """`inputs` are checked, `parameters` those of the pipeline's `__call__`."""
        self._pipeline, self._inputs, self._parameters = pipeline, inputs, parameters
        keywords = dict(parameters)
        self._items = pipeline.listed(inputs, keywords)
        before, _, after = pipeline._sanitize_parameters(**keywords)
        self._before = {**pipeline._preprocess_params, **before}
        self._after = {**pipeline._postprocess_params, **after}
        self.lane: Lane = pipeline.lane
        self.count = len(self._items)

    def rows(self, index: int) -> Iterator[tuple[Tensors, Any]]:
        """The rows of one input, none of them longer than the model can read."""
        made = self._pipeline.preprocess(self._items[index], **self._before)
        for item in made if isinstance(self._pipeline, ChunkPipeline) else [made]:
            tensors, known = self._pipeline.read(item)
            self._pipeline.check(token_count(tensors))
            yield tensors, known

    def answer(self, rows: Sequence[tuple[Any, Outputs]]) -> Any:
        """The answer to one input, as JSON values."""
        found = [self._pipeline.found(known, outputs) for known, outputs in rows]
        chunks = isinstance(self._pipeline, ChunkPipeline)
        answer = self._pipeline.postprocess(found if chunks else found[0], **self._after)
        return answer if self._pipeline.plain else json_value(answer)

    def whole(self, answers: list[Any]) -> Any:
        """The call's result, nested as the pipeline's own."""
        return self._pipeline.whole(self._inputs, self._parameters, answers)

    def blame(self, error: Exception, tokens: int) -> Exception:
        """A refusal, if the model has no position for the last of the tokens."""
        blamed: Exception = self._pipeline.blame(error, tokens)
        return blamed


# Whole calls ----------------------------------------------------------------------------------------------------------


class TableQuestionAnswering(Guard, TableQuestionAnsweringPipeline):  # type: ignore[misc]
    """Adds a look at the table's size: a model has a vector for each row, column and rank up to a number of them."""

    def forward(self, model_inputs: Any, **parameters: Any) -> Any:
        """`Pipeline.forward` of one table with its queries, unless it has more rows or columns than the model knows."""
        most = model_inputs["token_type_ids"].flatten(0, -2).amax(0).tolist()
        sizes = self.model.config.type_vocab_sizes
        if any(number >= size for number, size in zip(most, sizes, strict=True)):
            raise refuse("inputs", f"the model reads tables of at most {sizes[1] - 1} columns and {sizes[2] - 1} rows")
        found = super().forward(model_inputs, **parameters)
        outputs = found["outputs"]
        for tensor in outputs.values() if isinstance(outputs, Mapping) else outputs:
            if torch.is_tensor(tensor) and not bool((tensor < torch.inf).all()):
                raise GenerationFailed("The model computed a value that is not a number")
        return found


_CLASSES: Mapping[str, Any] = MappingProxyType(
    {
        "text-generation": TextGeneration,
        "fill-mask": FillMask,
        "text-classification": TextClassification,
        "token-classification": TokenClassification,
        "zero-shot-classification": ZeroShotClassification,
        "feature-extraction": FeatureExtraction,
        "table-question-answering": TableQuestionAnswering,
    }
)


def open_pipeline(task: str, model: Any, tokenizer: Any) -> Any:
    """The guarded pipeline of a task (named as in `TASKS`) around `model` itself, where it is, without a copy.

    The pipeline may change settings of `tokenizer` (padding), so it must be one that nobody else uses.
    """
    # A model spread over devices by accelerate is fed on its first one, which only the pipeline itself may choose.
    device = None if getattr(model, "hf_device_map", None) is not None else model.device
    pipeline = _CLASSES[task](model=model, tokenizer=tokenizer, task=task, device=device)
    pipeline.limit = max_positions(model)
    return pipeline
