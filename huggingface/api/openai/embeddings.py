"""`POST /v1/embeddings` and `POST /v1/rerank`: computes vectors of texts, and ranks documents for a query.

Sources: "Embeddings", OpenAI API reference; the rerank route is that of Cohere and Jina.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import InvalidRequest
from ...registry.records import ModelRecord
from ..http.fields import note_ignored
from ..requests.leasing import leased_model
from ..requests.services import services
from .answers import EmbeddingsAnswer, Pooling, Ranked, RerankAnswer
from .serving import new_id
from .text_schemas import EmbeddingBody, RerankBody


def embed(record: ModelRecord, body: EmbeddingBody) -> EmbeddingsAnswer:
    """Computes vectors of texts.

    Raises: the errors of loading and computing.
    """
    given = {"truncate": body.truncate, "prompt_name": body.prompt_name, "dimensions": body.dimensions}
    parameters = {name: value for name, value in given.items() if value is not None}
    with leased_model(record, "embeddings", body.timeout, keep_alive=body.keep_alive) as (flight, model):
        if body.input_type is not None:
            parameters |= _prompt_of(body.input_type, model.prompts)
        result = model.run("sentence-embeddings", body.input, parameters, flight.cancellation, body.adapter)
        pooling: Pooling = "sentence-transformers" if model.pools else "mean"
    services().registry.record_use(record.model_id)
    written = _as_base64 if body.encoding_format == "base64" else list
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": written(vector)}
            for index, vector in enumerate(result["embeddings"])
        ],
        "model": record.model_id,
        "usage": {"prompt_tokens": result["tokens"], "total_tokens": result["tokens"]},
        "pooling": pooling,
    }


def _prompt_of(input_type: str, prompts: Mapping[str, str]) -> dict[str, Any]:
    """The parameter for an input type.

    Raises:
        InvalidRequest: the model has prompts, but none for this type.
    """
    if input_type in prompts:
        return {"prompt_name": input_type}
    if any(prompts.values()):
        names = ", ".join(sorted(prompts))
        raise InvalidRequest(f"Invalid value for field 'input_type': must be one of {names}", "input_type")
    note_ignored("input_type")
    return {}


def rerank(record: ModelRecord, body: RerankBody) -> RerankAnswer:
    """Ranks documents by how well they answer a query, the best first.

    Raises: the errors of loading and computing.
    """
    documents = [each if isinstance(each, str) else each.text for each in body.documents]
    parameters = {} if body.truncate is None else {"truncate": body.truncate}
    with leased_model(record, "rerank", body.timeout, keep_alive=body.keep_alive) as (flight, model):
        result = model.run(
            "rerank", {"query": body.query, "documents": documents}, parameters, flight.cancellation, body.adapter
        )
    services().registry.record_use(record.model_id)
    ranked = sorted(enumerate(result["scores"]), key=lambda item: -item[1])
    results = [Ranked(index=index, relevance_score=score) for index, score in ranked[: body.top_n]]
    if body.return_documents:
        for each in results:
            each["document"] = {"text": documents[each["index"]]}
    return {
        "id": new_id("rerank-"),
        "object": "list",
        "model": record.model_id,
        "results": results,
        "usage": {"prompt_tokens": result["tokens"], "total_tokens": result["tokens"]},
    }


def _as_base64(vector: Sequence[float]) -> str:
    """Encodes a vector as little-endian float32 in base64."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
