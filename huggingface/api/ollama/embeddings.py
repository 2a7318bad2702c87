"""`POST /api/embed` and the older `POST /api/embeddings`: vectors of texts.

Vectors of `/api/embed` have length 1, as Ollama's have. Serves any request thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from ...registry.records import ModelRecord
from ..http.fields import note_ignored
from ..requests.fan_out import named
from ..requests.leasing import leased_model
from ..requests.services import services
from .answering import Times
from .names import find
from .options import OPTIONS, Wanted, refused
from .schemas import OllamaAsked, OllamaEmbedBody, OllamaEmbeddingsBody


def embed(body: OllamaEmbedBody) -> dict[str, Any]:
    """Computes vectors of texts; without a text, loads the model.

    Raises: the errors of loading and computing.
    """
    begun = time.monotonic()
    texts = [body.input] if isinstance(body.input, str) and body.input else list(body.input)
    parameters: dict[str, Any] = {"truncate": body.truncate is not False}
    if body.dimensions is not None:
        parameters["dimensions"] = body.dimensions
    vectors, tokens, loaded = _vectors(find(body.model), body, texts, parameters)
    return {
        "model": body.model,
        "embeddings": [_of_length_one(vector) for vector in vectors],
        **Times(begun, loaded).to_dict(),
        "prompt_eval_count": tokens,
    }


def embed_prompt(body: OllamaEmbeddingsBody) -> dict[str, Any]:
    """Computes the vector of a text; without one, loads the model.

    Raises: the errors of loading and computing.
    """
    texts = [body.prompt] if body.prompt else []
    with named({"input": "prompt"}):
        vectors, _, _ = _vectors(find(body.model), body, texts, {"truncate": True})
    return {"embedding": vectors[0] if vectors else []}


def _vectors(
    record: ModelRecord, body: OllamaAsked, texts: Sequence[str], parameters: dict[str, Any]
) -> tuple[list[list[float]], int, float]:
    """The vectors, the number of tokens read, and the time when the model was loaded."""
    wanted = Wanted.of(body.options)
    for name in body.options.model_fields_set if body.options is not None else ():
        if name != "num_ctx" and OPTIONS[name].asks is not None:
            note_ignored(f"options.{name}")  # sampling has no effect on a vector
    with leased_model(record, "embeddings", body.timeout, keep_alive=body.keep_alive) as (flight, model):
        loaded = time.monotonic()
        if wanted.num_ctx is not None:
            longest = max((len(model.encode(text, flight.cancellation)) for text in texts), default=0)
            if longest > wanted.num_ctx:
                raise refused("num_ctx", f"a text has {longest} tokens, and is not cut to {wanted.num_ctx}")
            note_ignored("options.num_ctx")
        if not texts:
            return [], 0, loaded
        result = model.run("sentence-embeddings", list(texts), parameters, flight.cancellation, body.adapter)
    services().registry.record_use(record.model_id)
    return result["embeddings"], result["tokens"], loaded


def _of_length_one(vector: Sequence[float]) -> list[float]:
    length = max(math.sqrt(math.fsum(value * value for value in vector)), 1e-12)
    return [value / length for value in vector]
