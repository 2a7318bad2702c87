"""Computes vectors of whole texts: `sentence-transformers` on weights already loaded.

A sentence-transformers folder says how texts are read, which prompts go before them, and how the vectors of a text's
tokens become one (pooling, projections, normalization); the library's own code does it. For other models the vectors
are averaged, as the library does. Rows are batched across calls like those of `feature-extraction`. Engine's thread
only, except `find_pooling`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import GenerationFailed, InvalidRequest
from .padded_batch import Lane, Outputs, Tensors, token_count

CONFIG = "config_sentence_transformers.json"

# Modules that need more than the last layer.
_UNSERVED = frozenset({"WeightedLayerPooling"})


class Pooling:
    """How a sentence-transformers folder reads texts, and makes one vector of a text's tokens."""

    def __init__(self, folder: Path, model: Any, *, trusted: bool = False) -> None:
        """Reads the folder; its weights are in `model`. `trusted`: its code may run.

        Raises:
            InvalidRequest: its vectors need code of its own, or do not come from a text's last hidden states.
            Otherwise errors of sentence-transformers.
        """
        kinds = [module["type"] for module in json.loads((folder / "modules.json").read_text("utf-8"))]
        for kind in kinds:
            if not kind.startswith("sentence_transformers."):
                raise InvalidRequest(f"This model's vectors are made by Python code of its own ({kind})")
        names = [kind.rpartition(".")[2] for kind in kinds]
        if names[0] != "Transformer" or _UNSERVED.intersection(names):
            raise InvalidRequest(
                f"This model's vectors are made by modules that are not served here: {', '.join(names)}"
            )
        from sentence_transformers import SentenceTransformer

        whole = SentenceTransformer._load_with_module_classes(
            str(folder),
            {kinds[0]: _reader_class(model)},
            device="cpu",
            local_files_only=True,
            trust_remote_code=trusted,
        ).eval()
        self._reader, *self._modules = whole
        if self._reader.module_output_name != "token_embeddings" or not self._reads_texts():
            raise InvalidRequest("This model's vectors do not come from its last hidden states")
        said = dict(self._reader.processing_kwargs.get("text", {}))
        # Padding of a single text would only be cut off again.
        self._reader.processing_kwargs = {**self._reader.processing_kwargs, "text": {**said, "padding": False}}
        self.prompts: dict[str, str] = {
            name: text or "" for name, text in _read(folder / CONFIG).get("prompts", {}).items()
        }
        self.default_prompt: str = whole.prompts.get(whole.default_prompt_name or "", "")
        self.unit_length = bool(self._modules) and type(self._modules[-1]).__name__ == "Normalize"
        self.maximum: int | None = said.get("max_length", sane_length(self._reader.max_seq_length))

    def _reads_texts(self) -> bool:
        """Whether texts, or chats made of them, go through the model itself."""
        ways = self._reader.modality_config
        way = ways.get("message", ways.get("text"))
        return way is not None and way["method"] == "forward" and way["method_output_name"] == "last_hidden_state"

    def read(self, text: str, prompt: str, maximum: int | None = None) -> dict[str, Any]:
        """The features that `SentenceTransformer` makes of a text for its model, cut to `maximum` tokens."""
        cut = {"truncation": False} if maximum is None else {"max_length": maximum}
        return dict(self._reader.preprocess([text], prompt=prompt or None, processing_kwargs={"text": cut}))

    def takes(self, name: str) -> bool:
        """Whether the model's forward pass takes the argument."""
        known = self._reader.model_forward_params
        return known is None or name in known

    def pool(self, features: dict[str, Any]) -> torch.Tensor:
        """Computes the vector (1, dimensions) from features with `token_embeddings` (1, tokens, width)."""
        for module in self._modules:
            features = module(features)
        vector: torch.Tensor = features["sentence_embedding"]
        return vector


def find_pooling(folder: Path, model: Any, *, trusted: bool = False) -> Pooling | None:
    """The folder's pooling; None if it is not a sentence-transformers model for embeddings.

    Raises:
        InvalidRequest: it is another kind of sentence-transformers model, with other vectors.
        Otherwise as `Pooling`.
    """
    if not (folder / "modules.json").is_file():
        return None
    kind = _read(folder / CONFIG).get("model_type", "SentenceTransformer")
    if kind == "CrossEncoder":
        return None
    if kind != "SentenceTransformer":
        raise InvalidRequest(f"This model is a {kind} of sentence-transformers, which makes another kind of vectors")
    return Pooling(folder, model, trusted=trusted)


class EmbeddingWork:
    """The vectors of some texts: a `batching.Work`. Its result has `embeddings` and the number of `tokens` read."""

    def __init__(
        self,
        pipeline: Any,
        tokenizer: Any,
        pooling: Pooling | None,
        inputs: Any,
        parameters: Mapping[str, Any],
        limits: tuple[int | None, int | None],
    ) -> None:
        """Reads the inputs and parameters.

        Args:
            pipeline: the model's pipeline for features.
            inputs: texts or lists of token ids, one or several.
            limits: the most tokens that the model reads, and the size of its vocabulary.

        Raises:
            InvalidRequest: the model has no such prompt, or no text could follow it.
        """
        self.lane: Lane = pipeline.lane
        self._pipeline = pipeline
        self._tokenizer = tokenizer
        self._pooling = pooling
        single = isinstance(inputs, str) or (bool(inputs) and isinstance(inputs[0], int))
        self._items: list[str | list[int]] = [inputs] if single else list(inputs)
        self._prompt = self._find_prompt(parameters.get("prompt_name"))
        self._truncate = bool(parameters.get("truncate"))
        self._dimensions: int | None = parameters.get("dimensions")
        maxima = [limits[0], None if pooling is None else pooling.maximum]
        self._maximum = min((maximum for maximum in maxima if maximum is not None), default=None)
        self._vocabulary = limits[1]
        self.count = len(self._items)
        self._tokens = 0

    def rows(self, index: int) -> Iterator[tuple[Tensors, Any]]:
        """The one row of a text."""
        item = self._items[index]
        features = self._read(item)
        count = token_count(features)
        if count == 0:
            raise InvalidRequest("Invalid value for field 'input': holds no token", "input")
        if self._maximum is not None and count > self._maximum:
            if not self._truncate:
                reason = f"{count} tokens, but the model reads {self._maximum}; 'truncate' cuts a text"
                raise InvalidRequest(f"Invalid value for field 'input': {reason}", "input")
            features = self._read(item, self._maximum)
            count = token_count(features)
        self._tokens += count
        yield {name: value for name, value in features.items() if self._is_tensor(name, value)}, features

    def answer(self, rows: Sequence[tuple[Any, Outputs]]) -> list[float]:
        """The text's vector."""
        [(features, outputs)] = rows
        states, mask = outputs[0].float(), features["attention_mask"]
        with torch.inference_mode():
            if self._pooling is None:
                weights = mask[..., None].to(states.dtype)
                vector = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
            else:
                vector = self._pooling.pool({**features, "token_embeddings": states})
            vector = self._shortened(vector)
        if not torch.isfinite(vector).all():
            raise GenerationFailed("The model computed a value that is not a finite number")
        return [float(value) for value in vector[0].tolist()]

    def whole(self, answers: list[Any]) -> Any:
        """All vectors, and the number of tokens."""
        return {"embeddings": answers, "tokens": self._tokens}

    def blame(self, error: Exception, tokens: int) -> Exception:
        """As the pipeline's `blame`."""
        blamed: Exception = self._pipeline.blame(error, tokens)
        return blamed

    def _find_prompt(self, name: str | None) -> str:
        known = self._pooling.prompts if self._pooling is not None else {}
        if name is None:
            return self._pooling.default_prompt if self._pooling is not None else ""
        if name not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise InvalidRequest(
                f"Invalid value for field 'prompt_name': this model has no prompt '{name}'; {there}", "prompt_name"
            )
        if not all(isinstance(item, str) for item in self._items):
            reason = "a prompt cannot go before token ids"
            raise InvalidRequest(f"Invalid value for field 'prompt_name': {reason}", "prompt_name")
        return known[name]

    def _read(self, item: str | list[int], maximum: int | None = None) -> dict[str, Any]:
        """The features of a text or of token ids, the model's inputs among them; cut to `maximum` tokens."""
        if not isinstance(item, str):
            for token in item:
                if self._vocabulary is not None and not 0 <= token < self._vocabulary:
                    reason = f"token {token} is not in the model's vocabulary of {self._vocabulary}"
                    raise InvalidRequest(f"Invalid value for field 'input': {reason}", "input")
            ids = torch.tensor([item[:maximum]])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self._pooling is not None:
            return self._pooling.read(item, self._prompt, maximum)
        cut = {} if maximum is None else {"truncation": True, "max_length": maximum}
        return dict(self._tokenizer(item, return_tensors="pt", return_attention_mask=True, **cut))

    def _is_tensor(self, name: str, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and (self._pooling is None or self._pooling.takes(name))

    def _shortened(self, vector: torch.Tensor) -> torch.Tensor:
        maximum = self._dimensions
        if maximum is None:
            return vector
        if maximum > vector.shape[1]:
            reason = f"must be at most {vector.shape[1]}, the length of the model's vectors, not {maximum}"
            raise InvalidRequest(f"Invalid value for field 'dimensions': {reason}", "dimensions")
        vector = vector[:, :maximum]
        if self._pooling is not None and self._pooling.unit_length:
            vector = torch.nn.functional.normalize(vector, dim=1)
        return vector


def _reader_class(model: Any) -> Any:
    """The library's `Transformer`, which reads texts, without weights: the model is in memory already."""
    from sentence_transformers.base.modules import Transformer

    class Shape(torch.nn.Module):
        """The parts of a model that are used without running it."""

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.forward = model.base_model.forward

    class Reader(Transformer):  # type: ignore[misc]
        def _load_model(self, _: str, __: str, config: Any, *___: Any, **____: Any) -> Any:
            return Shape(config)

    return Reader


def sane_length(length: int | None) -> int | None:
    """A tokenizer's limit; None for the huge number that transformers uses where there is none."""
    return length if length is not None and length < 2**31 else None


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (FileNotFoundError, ValueError):
        return {}
