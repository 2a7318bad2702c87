"""transformers' own pipelines, made safe to serve: each refuses inputs that are too long for the model's positions.

Pipelines that run the model once for each item are split there, so that items are batched across calls; the others
check the cancellation before every forward pass. Importing this imports torch and transformers. Used on the model's
engine thread only. Must not know HTTP.
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
from ..modeling.demand import MemoryClaims, asked_of
from ..modeling.stopping import each_token
from .inputs import refuse
from .json_values import json_value
from .padded_batch import Lane, Outputs, Tensors, token_count
from .positions import max_positions


class CallGuard:
    """Goes before a pipeline's `forward`. `cancellation` is the running request's."""

    cancellation: Cancellation = NEVER
    limit: int | None = None  # the most tokens that the model can read
    reads_nothing = False  # whether an input without any token is valid

    def forward(self, model_inputs: Any, **parameters: Any) -> Any:
        """Runs `Pipeline.forward` on one item (or one piece of one), unless cancelled, empty or too long."""
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
        """Refuses an item without tokens, or with more than the model can read."""
        if tokens == 0 and not self.reads_nothing:
            raise refuse("inputs", "holds no token")
        if self.limit is not None and tokens > self.limit:
            raise refuse("inputs", f"{tokens} tokens, but the model can read at most {self.limit}")

    def blame(self, error: Exception, tokens: int) -> Exception:
        """Returns a refusal if the error means more tokens than the model has positions, otherwise the error."""
        config = self.model.config.get_text_config()  # type: ignore[attr-defined]
        maximum = getattr(config, "max_position_embeddings", None)
        if not isinstance(error, IndexError) or maximum is None or tokens <= maximum:
            return error
        refusal = refuse("inputs", f"{tokens} tokens, but the model can read at most {maximum}")
        refusal.__cause__ = error
        return refusal


class TextGeneration(CallGuard, TextGenerationPipeline):  # type: ignore[misc]
    """Adds limits that depend on the prompt's length, and checks the cancellation after each token."""

    reads_nothing = True
    claims: MemoryClaims | None = None  # claims the memory of generations

    def preprocess(self, prompt_text: Any, **parameters: Any) -> Any:
        """Tokenizes the prompt; a chat goes through the model's own template, which may refuse it."""
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
        """Runs `Pipeline.forward` on one prompt, and checks the cancellation after each token."""
        tokens = int(model_inputs["input_ids"].shape[-1])
        parameters.update(self._lengths(tokens, parameters))
        if "custom_generate" in parameters or self.claims is None:  # the caller generates the tokens
            return super().forward(model_inputs, stopping_criteria=each_token(self.cancellation), **parameters)
        with self.claims.held(asked_of(self.model, parameters, tokens)) as reached:
            criteria = each_token(self.cancellation, lambda ids: reached(ids.shape[1]))
            return super().forward(model_inputs, stopping_criteria=criteria, **parameters)

    def _lengths(self, tokens: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Checks the prompt and the requested lengths; returns the settings to add so that they apply.

        In `generate` the number of new tokens beats the total length, wherever it comes from; here the request's
        settings beat the model's files. Where the request sets neither, the model's room is the limit.
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


class Batched(CallGuard):
    """A pipeline that runs the model once for each row.

    Its `_forward` is split where it calls the model: `read` is the part before, `found` the part after. `lane` runs the
    rows; pipelines of one model with the same `outputs` may share it.
    """

    lane: Lane
    outputs: tuple[str | int, ...] = ("logits",)
    per_token = True  # whether outputs are per token or per row
    plain = False  # whether `postprocess` returns JSON values

    @property
    def width(self) -> int:
        """How many numbers the outputs have per token, if very many."""
        return 1

    def open_lane(self) -> Lane:
        """Creates a lane for this pipeline's model and outputs."""
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
        """The inputs one by one; may add the parameters that the pipeline's own `__call__` adds."""
        del parameters
        return inputs if isinstance(inputs, list) else [inputs]

    def whole(self, inputs: Any, parameters: Mapping[str, Any], answers: list[Any]) -> Any:
        """A call's result from the answers to its inputs, nested as by the pipeline's own `__call__`."""
        del parameters
        return answers if isinstance(inputs, list) else answers[0]

    def read(self, item: Mapping[str, Any]) -> tuple[Tensors, Any]:
        """The model's inputs from a preprocessed item, and what `found` needs of the item."""
        return dict(item), None

    def found(self, known: Any, outputs: Outputs) -> Any:
        """The result of the pipeline's `_forward`, as far as `postprocess` reads it."""
        del known
        return {"logits": outputs[0]}


class FillMask(Batched, FillMaskPipeline):  # type: ignore[misc]
    """`fill-mask`, in rows."""

    @property
    def width(self) -> int:
        """The size of the vocabulary: each word has a score."""
        return int(self.model.config.get_text_config().vocab_size)

    def whole(self, inputs: Any, parameters: Mapping[str, Any], answers: list[Any]) -> Any:
        """A list of one text gets that text's answer."""
        return answers[0] if len(answers) == 1 else super().whole(inputs, parameters, answers)

    def read(self, item: Mapping[str, Any]) -> tuple[Tensors, Any]:
        """Keeps the tokens, in which `found` looks for the mask."""
        return dict(item), item["input_ids"]

    def found(self, known: Any, outputs: Outputs) -> Any:
        """Scores of the whole vocabulary, and the tokens."""
        return {"logits": outputs[0], "input_ids": known}


class TextClassification(Batched, TextClassificationPipeline):  # type: ignore[misc]
    """`text-classification`, in rows."""

    per_token = False

    def whole(self, inputs: Any, parameters: Mapping[str, Any], answers: list[Any]) -> Any:
        """A single text, but not a single pair, gets a list with its best label."""
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
        """Separates the model's inputs from the tokens' places in the text."""
        known = {name: item.get(name) for name in (*self._NOT_READ, "input_ids")}
        return {name: value for name, value in item.items() if name not in self._NOT_READ}, known

    def found(self, known: Any, outputs: Outputs) -> Any:
        """The labels' scores for each token, and the tokens' places."""
        return {**known, "logits": outputs[0]}


class ZeroShotClassification(Batched, ZeroShotClassificationPipeline):  # type: ignore[misc]
    """`zero-shot-classification`, in rows: a text with each of the labels."""

    per_token = False

    def read(self, item: Mapping[str, Any]) -> tuple[Tensors, Any]:
        """The inputs that the tokenizer names."""
        tensors = {name: item[name] for name in self.tokenizer.model_input_names}
        return tensors, {name: item[name] for name in ("candidate_label", "sequence")}

    def found(self, known: Any, outputs: Outputs) -> Any:
        """Scores of entailment and the like, and their label."""
        return {**known, "logits": outputs[0]}


class FeatureExtraction(Batched, FeatureExtractionPipeline):  # type: ignore[misc]
    """`feature-extraction`, in rows."""

    outputs = (0,)  # the hidden states, under any name
    plain = True

    def postprocess(self, model_outputs: Any, **parameters: Any) -> Any:
        """The hidden states as lists of numbers; checked while they are a tensor, because there may be millions."""
        if not torch.isfinite(model_outputs[0]).all():
            raise GenerationFailed("The model computed a value that is not a finite number")
        return super().postprocess(model_outputs, **parameters)

    def found(self, known: Any, outputs: Outputs) -> Any:
        """The hidden states, by their position."""
        del known
        return outputs


class PipelineWork:
    """One call of a batched pipeline: a `batching.Work`. Its parameters apply only before and after the model."""

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
        """The rows of one input, none longer than the model can read."""
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
        """A refusal if the model has no position for the last of the tokens; otherwise the error."""
        blamed: Exception = self._pipeline.blame(error, tokens)
        return blamed


# Whole calls ----------------------------------------------------------------------------------------------------------


class TableQuestionAnswering(CallGuard, TableQuestionAnsweringPipeline):  # type: ignore[misc]
    """Checks the table's size: a model has vectors for a limited number of rows, columns and ranks."""

    def forward(self, model_inputs: Any, **parameters: Any) -> Any:
        """Runs `Pipeline.forward` on one table with its queries, unless it has more rows or columns than the model
        knows."""
        maximum = model_inputs["token_type_ids"].flatten(0, -2).amax(0).tolist()
        sizes = self.model.config.type_vocab_sizes
        if any(number >= size for number, size in zip(maximum, sizes, strict=True)):
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
    """Creates the guarded pipeline of a task (named as in `TASKS`) around `model`, without a copy.

    The pipeline may change settings of `tokenizer` (padding), so nothing else may use that tokenizer.
    """
    # accelerate feeds a model on several devices at its first one, which only the pipeline itself may choose.
    device = None if getattr(model, "hf_device_map", None) is not None else model.device
    pipeline = _CLASSES[task](model=model, tokenizer=tokenizer, task=task, device=device)
    pipeline.limit = max_positions(model)
    return pipeline
