"""Scores documents for a query: a cross-encoder of `sentence-transformers`, on weights already loaded.

Owns what such a model's folder says beyond its weights: the activation of its one logit, and the prompt before a query.
Rows are batched across calls like those of `text-classification`. Engine's thread only, except `note_cross_encoder`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import GenerationFailed, InvalidRequest
from .embedding import CONFIG, sane_length
from .padded_batch import Lane, Outputs, Tensors, token_count

Activation = Callable[[torch.Tensor], torch.Tensor]


def note_cross_encoder(config: Any, folder: Path) -> None:
    """Copies a cross-encoder's activation and prompt from its folder into the model's config.

    Older folders have the activation in the config; where both have it, the newer place wins, as in the library.
    """
    try:
        said = dict(json.loads((folder / CONFIG).read_text("utf-8")))
    except (FileNotFoundError, ValueError):
        return
    if said.get("model_type") != "CrossEncoder":
        return
    noted: dict[str, Any] = {}
    if _activation(said.get("activation_fn")) is not None:
        noted["activation_fn"] = said["activation_fn"]
    if prompt := (said.get("prompts") or {}).get(said.get("default_prompt_name")):
        noted["prompt"] = prompt
    if noted:
        config.sentence_transformers = {**(getattr(config, "sentence_transformers", None) or {}), **noted}


class RerankWork:
    """Scores of documents for a query: a `batching.Work`. Its result has `scores`, and the number of `tokens` read.

    As `sentence_transformers.CrossEncoder.predict`: the one logit, by default through a sigmoid.
    """

    def __init__(
        self, pipeline: Any, tokenizer: Any, config: Any, inputs: Mapping[str, Any], parameters: Mapping[str, Any]
    ) -> None:
        """`pipeline` is the model's pipeline for classification, `inputs` are the `query` and the `documents`."""
        self.lane: Lane = pipeline.lane
        self._pipeline = pipeline
        self._tokenizer = tokenizer
        noted = getattr(config, "sentence_transformers", None) or {}
        self._activation = activation_of(config)
        self._query: str = noted.get("prompt", "") + inputs["query"]
        self._documents: list[str] = inputs["documents"]
        self._truncate = bool(parameters.get("truncate"))
        positions = getattr(config, "max_position_embeddings", -1)  # XLNet says -1: no limit
        maxima = [pipeline.limit, sane_length(tokenizer.model_max_length), positions if positions > 0 else None]
        self._maximum = min((maximum for maximum in maxima if maximum is not None), default=None)
        self.count = len(self._documents)
        self._tokens = 0

    def rows(self, index: int) -> Iterator[tuple[Tensors, Any]]:
        """The one row of a document: the query and the document."""
        row = self._read(index)
        count = token_count(row)
        if self._maximum is not None and count > self._maximum:
            if not self._truncate:
                reason = f"{count} tokens with the query, but the model reads {self._maximum}; 'truncate' cuts them"
                raise InvalidRequest(f"Invalid value for field 'documents.{index}': {reason}", f"documents.{index}")
            row = self._read(index, truncation="longest_first", max_length=self._maximum)
            count = token_count(row)
        self._tokens += count
        yield row, None

    def answer(self, rows: Sequence[tuple[Any, Outputs]]) -> float:
        """The document's score."""
        [(_, outputs)] = rows
        score = self._activation(outputs[0].float()).reshape(-1)[0]
        if not torch.isfinite(score):
            raise GenerationFailed("The model computed a value that is not a finite number")
        return float(score)

    def whole(self, answers: list[Any]) -> Any:
        """All scores, and the number of tokens."""
        return {"scores": answers, "tokens": self._tokens}

    def blame(self, error: Exception, tokens: int) -> Exception:
        """As the pipeline's `blame`."""
        blamed: Exception = self._pipeline.blame(error, tokens)
        return blamed

    def _read(self, index: int, **options: Any) -> dict[str, Any]:
        return dict(self._tokenizer(self._query, self._documents[index], return_tensors="pt", **options))


def activation_of(config: Any) -> Activation:
    """The activation in a cross-encoder's config: one of torch's own functions, else the sigmoid."""
    said = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    said = said or getattr(config, "sbert_ce_default_activation_function", None)
    return _activation(said) or torch.sigmoid


def _activation(said: Any) -> Activation | None:
    """The function with that name; None if it is not torch's own, because other code is not trusted."""
    if not isinstance(said, str) or not said.startswith("torch.nn."):
        return None
    kind = getattr(torch.nn, said.rpartition(".")[2], None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        return None
    made: Activation = kind()
    return made
