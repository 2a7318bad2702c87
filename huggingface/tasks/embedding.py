"""Vectors for whole texts, and how well texts answer a query: `sentence-transformers` on weights already loaded.

A sentence-transformers folder says how the vectors of a text's tokens become one (pooling, projections, normalization)
and which prompts go before texts; its modules are that library's own. Any other model's tokens are averaged, as the
library does. Rows are batched across calls as those of `feature-extraction` are. Engine's thread only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import GenerationFailed, InvalidRequest
from .lane import Lane, Outputs, Tensors, token_count

EMBEDDINGS = "sentence-embeddings"
RERANK = "rerank"


class Pooling:
    """How a sentence-transformers folder makes one vector of a text's."""

    def __init__(self, folder: Path) -> None:
        """Read it.

        Raises:
            InvalidRequest: it has modules of its own code.
            Others as sentence-transformers does.
        """
        kinds = [module["type"] for module in json.loads((folder / "modules.json").read_text("utf-8"))]
        for kind in kinds:
            if not kind.startswith("sentence_transformers."):
                raise InvalidRequest(f"This model's vectors are made by Python code of its own ({kind})")
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer._load_with_module_classes(
            str(folder), {kinds[0]: _stand_in()}, device="cpu", local_files_only=True
        ).eval()
        self.modules = list(model)[1:]
        self.prompts: dict[str, str] = {name: text for name, text in (model.prompts or {}).items() if text}
        self.default_prompt: str | None = model.default_prompt_name
        self.unit_length = bool(self.modules) and type(self.modules[-1]).__name__ == "Normalize"
        said = _read(folder / "sentence_bert_config.json")
        self.most: int | None = said.get("max_seq_length")
        self.lower = bool(said.get("do_lower_case"))

    @property
    def leaves_prompt_out(self) -> bool:
        """Whether the prompt's tokens do not count in the average."""
        return any(getattr(module, "include_prompt", True) is False for module in self.modules)


def find_pooling(folder: Path) -> Pooling | None:
    """How this folder makes vectors of texts; None for one that is not of sentence-transformers' for that.

    Raises:
        InvalidRequest: it is of another kind of that library's, whose vectors are none of these.
        Others as `Pooling`.
    """
    if not (folder / "modules.json").is_file():
        return None
    kind = _read(folder / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    if kind == "CrossEncoder":
        return None
    if kind != "SentenceTransformer":
        raise InvalidRequest(f"This model is a {kind} of sentence-transformers, which makes other vectors than these")
    return Pooling(folder)


def note_activation(config: Any, folder: Path) -> None:
    """Put what a cross-encoder's folder says of its activation where older ones have it: into the model's config."""
    said = _read(folder / "config_sentence_transformers.json").get("activation_fn")
    if said is not None and getattr(config, "sentence_transformers", None) is None:
        config.sentence_transformers = {"activation_fn": said}


class EmbeddingWork:
    """The vectors of some texts: a `batching.Work`. Its result: `embeddings`, and how many `tokens` were read."""

    def __init__(
        self,
        pipeline: Any,
        tokenizer: Any,
        pooling: Pooling | None,
        inputs: Any,
        parameters: Mapping[str, Any],
        limits: tuple[int | None, int | None],
    ) -> None:
        """`pipeline` is the model's for its features. `inputs` are texts or lists of token ids, one or several;
        `limits` are how many tokens the model can read, and how many tokens it knows.

        Raises:
            InvalidRequest: the model has no such prompt.
        """
        self.lane: Lane = pipeline.lane
        self._pipeline = pipeline
        self._tokenizer = tokenizer
        self._pooling = pooling
        single = isinstance(inputs, str) or (bool(inputs) and isinstance(inputs[0], int))
        self._items: list[str | list[int]] = [inputs] if single else list(inputs)
        self._prompt = self._find_prompt(parameters)
        self._truncate = bool(parameters.get("truncate"))
        self._dimensions: int | None = parameters.get("dimensions")
        mosts = [limits[0]] if pooling is None else [limits[0], pooling.most or _sane(tokenizer.model_max_length)]
        self._most = min((most for most in mosts if most is not None), default=None)
        self._vocabulary = limits[1]
        self.count = len(self._items)
        self._tokens = 0

    def rows(self, index: int) -> Iterator[tuple[Tensors, Any]]:
        """The one row of a text."""
        item = self._items[index]
        if isinstance(item, str):
            row = self._read_text(self._prompt + item)
        else:
            for token in item:
                if self._vocabulary is not None and not 0 <= token < self._vocabulary:
                    reason = f"token {token} is not among the model's {self._vocabulary}"
                    raise InvalidRequest(f"Invalid value for field 'input': {reason}", "input")
            ids = torch.tensor([item])
            row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        count = token_count(row)
        if self._most is not None and count > self._most:
            if not self._truncate:
                reason = f"{count} tokens, but the model reads {self._most}; 'truncate' cuts a text"
                raise InvalidRequest(f"Invalid value for field 'input': {reason}", "input")
            row = self._cut(item)
            count = token_count(row)
        self._tokens += count
        yield row, row["attention_mask"]

    def answer(self, rows: Sequence[tuple[Any, Outputs]]) -> list[float]:
        """One vector."""
        [(mask, outputs)] = rows
        states = outputs[0].float()
        features = {"token_embeddings": states, "attention_mask": mask}
        with torch.inference_mode():
            if self._pooling is None:
                weights = mask[..., None].to(states.dtype)
                vector = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
            else:
                if self._prompt and self._pooling.leaves_prompt_out:
                    features["prompt_length"] = self._prompt_tokens()
                for module in self._pooling.modules:
                    features = module(features)
                vector = features["sentence_embedding"]
            vector = self._shortened(vector)
        if not torch.isfinite(vector).all():
            raise GenerationFailed("The model computed a value that is not a finite number")
        return [float(value) for value in vector[0].tolist()]

    def whole(self, answers: list[Any]) -> Any:
        """All vectors, and the count."""
        return {"embeddings": answers, "tokens": self._tokens}

    def blame(self, error: Exception, tokens: int) -> Exception:
        """As the pipeline's."""
        blamed: Exception = self._pipeline.blame(error, tokens)
        return blamed

    def _find_prompt(self, parameters: Mapping[str, Any]) -> str:
        known = self._pooling.prompts if self._pooling is not None else {}
        name = parameters.get("prompt_name")
        if name is None:
            default = self._pooling.default_prompt if self._pooling is not None else None
            return known.get(default or "", "")
        if name not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise InvalidRequest(
                f"Invalid value for field 'prompt_name': this model has no prompt '{name}'; {there}", "prompt_name"
            )
        return known[name]

    def _read_text(self, text: str, **options: Any) -> dict[str, Any]:
        if self._pooling is not None and self._pooling.lower:
            text = text.lower()
        read = self._tokenizer(text, return_tensors="pt", return_attention_mask=True, **options)
        if read["input_ids"].shape[1] == 0:
            raise InvalidRequest("Invalid value for field 'input': holds no token", "input")
        return dict(read)

    def _cut(self, item: str | list[int]) -> dict[str, Any]:
        if isinstance(item, str):
            return self._read_text(self._prompt + item, truncation=True, max_length=self._most)
        ids = torch.tensor([item[: self._most]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _prompt_tokens(self) -> int:
        """As `SentenceTransformer` counts them: without the end token that the tokenizer adds."""
        ids = self._read_text(self._prompt)["input_ids"][0].tolist()
        ends = (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        return len(ids) - (ids[-1] in ends)

    def _shortened(self, vector: torch.Tensor) -> torch.Tensor:
        most = self._dimensions
        if most is None:
            return vector
        if most > vector.shape[1]:
            reason = f"must be at most {vector.shape[1]}, all that the model's vectors have"
            raise InvalidRequest(f"Invalid value for field 'dimensions': {reason}", "dimensions")
        vector = vector[:, :most]
        if self._pooling is not None and self._pooling.unit_length:
            vector = torch.nn.functional.normalize(vector, dim=1)
        return vector


class RerankWork:
    """How well each of some documents answers a query: a `batching.Work`. Its result: `scores`, and `tokens` read.

    As `sentence_transformers.CrossEncoder.predict`: the one logit, by default through a sigmoid.
    """

    def __init__(
        self,
        pipeline: Any,
        tokenizer: Any,
        activation: Callable[[torch.Tensor], torch.Tensor],
        inputs: Mapping[str, Any],
        parameters: Mapping[str, Any],
    ) -> None:
        """`pipeline` is the model's for classification, `inputs` are the `query` and the `documents`."""
        self.lane: Lane = pipeline.lane
        self._pipeline = pipeline
        self._tokenizer = tokenizer
        self._activation = activation
        self._query: str = inputs["query"]
        self._documents: list[str] = inputs["documents"]
        self._truncate = bool(parameters.get("truncate"))
        self._most: int | None = pipeline.limit
        self.count = len(self._documents)
        self._tokens = 0

    def rows(self, index: int) -> Iterator[tuple[Tensors, Any]]:
        """The one row of a document: the query and it."""
        row = dict(self._tokenizer(self._query, self._documents[index], return_tensors="pt"))
        count = token_count(row)
        if self._most is not None and count > self._most:
            if not self._truncate:
                reason = f"{count} tokens with the query, but the model reads {self._most}; 'truncate' cuts them"
                raise InvalidRequest(f"Invalid value for field 'documents.{index}': {reason}", f"documents.{index}")
            row = dict(
                self._tokenizer(
                    self._query,
                    self._documents[index],
                    return_tensors="pt",
                    truncation="longest_first",
                    max_length=self._most,
                )
            )
            count = token_count(row)
        self._tokens += count
        yield row, None

    def answer(self, rows: Sequence[tuple[Any, Outputs]]) -> float:
        """One score."""
        [(_, outputs)] = rows
        score = self._activation(outputs[0].float()).reshape(-1)[0]
        if not torch.isfinite(score):
            raise GenerationFailed("The model computed a value that is not a finite number")
        return float(score)

    def whole(self, answers: list[Any]) -> Any:
        """All scores, and the count."""
        return {"scores": answers, "tokens": self._tokens}

    def blame(self, error: Exception, tokens: int) -> Exception:
        """As the pipeline's."""
        blamed: Exception = self._pipeline.blame(error, tokens)
        return blamed


def activation_of(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a cross-encoder's config says becomes of its logit: one of torch's own functions, else the sigmoid."""
    said = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    said = said or getattr(config, "sbert_ce_default_activation_function", None)
    if isinstance(said, str) and said.startswith("torch.nn.modules."):
        kind = getattr(torch.nn, said.rpartition(".")[2], None)
        if kind is not None:
            made: Callable[[torch.Tensor], torch.Tensor] = kind()
            return made
    return torch.sigmoid


def _stand_in() -> Any:
    """What sentence-transformers gets in place of the transformer, which is in memory already."""
    from sentence_transformers.base.modules.module import Module

    class StandIn(Module):  # type: ignore[misc]
        max_seq_length = tokenizer = None

        def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
            return features

        @classmethod
        def load(cls, *_: Any, **__: Any) -> StandIn:
            return cls()

        def save(self, *_: Any, **__: Any) -> None:
            raise NotImplementedError

    return StandIn


def _sane(length: int) -> int | None:
    """A tokenizer's limit; the huge number that transformers puts where there is none, is none."""
    return length if length < 2**31 else None


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (FileNotFoundError, ValueError):
        return {}
