"""transformers' own pipelines, made safe to serve: each asks whether to go on before every forward pass, and refuses
an input that the model has no positions for before it reaches the model.

Importing this imports torch and transformers. Used on the model's worker thread only. Must not know JSON or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

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

from ..errors import Cancelled
from .generation import stop_when
from .inputs import refuse
from .positions import max_positions


class Guard:
    """What is put in front of a pipeline's `forward`. `cancelled` is the running request's."""

    cancelled: Callable[[], bool] = staticmethod(lambda: False)
    limit: int | None = None  # tokens that the model can read
    reads_nothing = False  # whether an input without any token means something

    def forward(self, model_inputs: Any, **parameters: Any) -> Any:
        """`Pipeline.forward` of one item (or one piece of one), unless cancelled, empty or too long."""
        if self.cancelled():
            raise Cancelled
        tokens = model_inputs["input_ids"].shape[-1]
        if tokens == 0 and not self.reads_nothing:
            raise refuse("inputs", "holds no token")
        if self.limit is not None and tokens > self.limit:
            raise refuse("inputs", f"{tokens} tokens, but the model can read at most {self.limit}")
        try:
            return super().forward(model_inputs, **parameters)  # type: ignore[misc]
        except IndexError as error:  # positions that are not found by their name, on a CPU
            config = self.model.config.get_text_config()  # type: ignore[attr-defined]
            most = getattr(config, "max_position_embeddings", None)
            if most is None or tokens <= most:
                raise
            raise refuse("inputs", f"{tokens} tokens, but the model can read at most {most}") from error


class TextGeneration(Guard, TextGenerationPipeline):  # type: ignore[misc]
    """Adds what the prompt's length decides, and the question after each token whether to go on."""

    reads_nothing = True

    def preprocess(self, prompt_text: Any, **parameters: Any) -> Any:
        """The prompt's tokens; a chat goes through the model's own template, which may refuse it."""
        try:
            return super().preprocess(prompt_text, **parameters)
        except (TemplateError, TypeError, ValueError) as error:
            if "`hole`" in str(error):
                raise refuse(
                    "handle_long_generation", "the new tokens alone are more than the model can read"
                ) from error
            if isinstance(prompt_text, str):
                raise
            raise refuse("inputs", f"the model's chat template does not accept this chat: {error}") from error

    def forward(self, model_inputs: Any, **parameters: Any) -> Any:
        """`Pipeline.forward` of one prompt, asking after each token whether to go on."""
        parameters.update(self._lengths(model_inputs["input_ids"].shape[-1], parameters))
        return super().forward(model_inputs, stopping_criteria=stop_when(self.cancelled), **parameters)

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


class FillMask(Guard, FillMaskPipeline):  # type: ignore[misc]
    """Guarded `fill-mask`."""


class TextClassification(Guard, TextClassificationPipeline):  # type: ignore[misc]
    """Guarded `text-classification`."""


class TokenClassification(Guard, TokenClassificationPipeline):  # type: ignore[misc]
    """Guarded `token-classification`."""


class ZeroShotClassification(Guard, ZeroShotClassificationPipeline):  # type: ignore[misc]
    """Guarded `zero-shot-classification`."""


class FeatureExtraction(Guard, FeatureExtractionPipeline):  # type: ignore[misc]
    """Guarded `feature-extraction`."""


class TableQuestionAnswering(Guard, TableQuestionAnsweringPipeline):  # type: ignore[misc]
    """Adds a look at the table's size: a model has a vector for each row, column and rank up to a number of them."""

    def forward(self, model_inputs: Any, **parameters: Any) -> Any:
        """`Pipeline.forward` of one table with its queries, unless it has more rows or columns than the model knows."""
        most = model_inputs["token_type_ids"].flatten(0, -2).amax(0).tolist()
        sizes = self.model.config.type_vocab_sizes
        if any(number >= size for number, size in zip(most, sizes, strict=True)):
            raise refuse("inputs", f"the model reads tables of at most {sizes[1] - 1} columns and {sizes[2] - 1} rows")
        return super().forward(model_inputs, **parameters)


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
