"""Embeddings and reranking over HTTP, by OpenAI's own client: the numbers are those of sentence-transformers."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
import torch
from conftest import Server
from embedding_models import POOLINGS, build_cross_encoder, build_embedding
from transformers import AutoModel, AutoTokenizer

TEXTS = ["the cat sat on the mat", "a dog", "the cat", "where is the dog and where is the cat", "the"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """A live server of these tests' own: they register models under other types than others do."""
    server = Server(tmp_path_factory.mktemp("server"), models_dir)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """OpenAI's client on the live server."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def embedding(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> Callable[[str], str]:
    """Registers a model of `POOLINGS` and gives its id."""

    def add(name: str) -> str:
        model_id = build_embedding(models_dir, tiny, name)
        server.add(model_id, "feature-extraction")
        return model_id

    return add


def vectors(client: openai.OpenAI, model: str, texts: Any, **options: Any) -> np.ndarray[Any, Any]:
    """What the route gives."""
    return np.array([item.embedding for item in client.embeddings.create(model=model, input=texts, **options).data])


def expected(models_dir: Path, model: str, texts: list[str], **options: Any) -> np.ndarray[Any, Any]:
    """What sentence-transformers gives."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(models_dir / model), device="cpu").encode(texts, **options)


@pytest.mark.parametrize("name", [name for name in POOLINGS if name != "short"])
def test_vectors_are_those_of_sentence_transformers(
    name: str, client: openai.OpenAI, embedding: Callable[[str], str], models_dir: Path
) -> None:
    model = embedding(name)
    assert np.allclose(vectors(client, model, TEXTS), expected(models_dir, model, TEXTS), atol=1e-5)
    assert np.allclose(vectors(client, model, TEXTS[0]), expected(models_dir, model, TEXTS[:1]), atol=1e-5)


@pytest.mark.parametrize("name", ["prompts", "outside"])
def test_a_prompt_goes_before_each_text(
    name: str, client: openai.OpenAI, embedding: Callable[[str], str], models_dir: Path
) -> None:
    model = embedding(name)
    named = vectors(client, model, TEXTS, extra_body={"prompt_name": "query"})
    assert np.allclose(named, expected(models_dir, model, TEXTS, prompt_name="query"), atol=1e-5)
    assert not np.allclose(named, vectors(client, model, TEXTS), atol=1e-3)
    with pytest.raises(openai.BadRequestError, match="query") as caught:
        vectors(client, model, TEXTS, extra_body={"prompt_name": "nonsense"})
    assert caught.value.param == "prompt_name"


def test_a_plain_encoders_vectors_are_the_mean_and_say_so(
    client: openai.OpenAI, server: Server, models_dir: Path, tiny: Callable[[str], str]
) -> None:
    for name in ("bert-embed", "bert-mlm"):
        model = tiny(name)
        server.add(model, "feature-extraction")
        answer = client.embeddings.create(model=model, input=TEXTS[:2])
        assert answer.model_extra == {"pooling": "mean"}
        tokenizer, plain = (
            AutoTokenizer.from_pretrained(models_dir / model),
            AutoModel.from_pretrained(models_dir / model),
        )
        for item, text in zip(answer.data, TEXTS, strict=False):
            with torch.inference_mode():
                mean = plain.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0]
            assert np.allclose(item.embedding, mean, atol=1e-5)
        count = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS[:2])
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == count


def test_tokens_are_taken_as_they_are(client: openai.OpenAI, embedding: Callable[[str], str], models_dir: Path) -> None:
    model = embedding("unit")
    tokenizer = AutoTokenizer.from_pretrained(models_dir / model)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert np.allclose(vectors(client, model, ids), vectors(client, model, TEXTS), atol=1e-6)
    assert np.allclose(vectors(client, model, ids[1]), vectors(client, model, TEXTS[1]), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="99999999"):
        vectors(client, model, [99999999])


def test_both_encodings_are_the_same_numbers(server: Server, embedding: Callable[[str], str]) -> None:
    body = {"model": embedding("dense"), "input": TEXTS}
    url = f"{server.url}/v1/embeddings"
    plain = requests.post(url, json=body, timeout=60).json()
    coded = requests.post(url, json={**body, "encoding_format": "base64"}, timeout=60).json()
    for one, other in zip(plain["data"], coded["data"], strict=True):
        raw = base64.b64decode(other["embedding"])
        assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(one["embedding"], abs=1e-7)


def test_fewer_dimensions(client: openai.OpenAI, embedding: Callable[[str], str]) -> None:
    """The first ones; as long as one again where the model's are."""
    for name, unit in (("unit", True), ("mean", False)):
        model = embedding(name)
        whole = vectors(client, model, TEXTS)
        short = vectors(client, model, TEXTS, dimensions=5)
        first = whole[:, :5]
        wanted = first / np.linalg.norm(first, axis=1, keepdims=True) if unit else first
        assert np.allclose(short, wanted, atol=1e-6)
        with pytest.raises(openai.BadRequestError, match=str(whole.shape[1])) as caught:
            vectors(client, model, TEXTS, dimensions=whole.shape[1] + 1)
        assert caught.value.param == "dimensions"


def test_a_text_that_is_too_long_is_refused_or_cut(
    client: openai.OpenAI, embedding: Callable[[str], str], models_dir: Path
) -> None:
    model = embedding("short")
    long = ["the cat sat on the mat and the dog sat on the cat"]
    with pytest.raises(openai.BadRequestError, match="reads 8"):
        vectors(client, model, long)
    cut = vectors(client, model, long, extra_body={"truncate": True})
    assert np.allclose(cut, expected(models_dir, model, long), atol=1e-5)


def test_callers_share_batches_and_each_gets_its_own(client: openai.OpenAI, embedding: Callable[[str], str]) -> None:
    model = embedding("unit")
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "a", "dog", "ran", "where", "is", "it"]
    lists = [[" ".join(words[: 1 + (row + column) % 12]) for column in range(1 + row)] for row in range(16)]
    alone = [vectors(client, model, texts) for texts in lists]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda texts: vectors(client, model, texts), lists))
    for one, other in zip(alone, together, strict=True):
        assert np.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": [[]]}, "input.0"),
        ({"input": None}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [-1]}, "input.0"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"truncate": "yes"}, "truncate"),
        ({"nonsense": 1}, "nonsense"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    change: dict[str, Any], field: str, server: Server, embedding: Callable[[str], str]
) -> None:
    body = {"model": embedding("mean"), "input": "the cat", **change}
    answer = requests.post(f"{server.url}/v1/embeddings", json=body, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"


def test_models_that_give_no_vectors_say_so(client: openai.OpenAI, server: Server, tiny: Callable[[str], str]) -> None:
    model = tiny("tapas")
    server.add(model, "table-question-answering")
    with pytest.raises(openai.BadRequestError, match="table-question-answering"):
        vectors(client, model, TEXTS)
    with pytest.raises(openai.NotFoundError) as caught:
        vectors(client, "no/such-model", TEXTS)
    assert caught.value.code == "model_not_found"


# Reranking ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_documents_are_ranked_as_a_cross_encoder_ranks_them(
    plain: bool, server: Server, models_dir: Path, tiny: Callable[[str], str]
) -> None:
    from sentence_transformers import CrossEncoder

    model = build_cross_encoder(models_dir, tiny, plain=plain)
    server.add(model, "text-classification")
    body = {"model": model, "query": "where is the cat", "documents": [*TEXTS, {"text": "on the mat"}]}
    answer = requests.post(f"{server.url}/v1/rerank", json=body, timeout=60).json()
    documents = [*TEXTS, "on the mat"]
    scores = CrossEncoder(str(models_dir / model), device="cpu").predict([(body["query"], text) for text in documents])
    ranked = sorted(range(len(documents)), key=lambda index: -scores[index])
    assert [result["index"] for result in answer["results"]] == ranked
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(float(scores[result["index"]]), abs=1e-5)
        assert "document" not in result
    best = requests.post(f"{server.url}/v1/rerank", json={**body, "top_n": 2, "return_documents": True}, timeout=60)
    assert [result["document"]["text"] for result in best.json()["results"]] == [documents[i] for i in ranked[:2]]


def test_reranking_refuses_what_it_cannot_do(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> None:
    cross = build_cross_encoder(models_dir, tiny)
    server.add(cross, "text-classification")
    sorter = tiny("distilbert-sst2")
    server.add(sorter, "text-classification")
    good = {"model": cross, "query": "the cat", "documents": TEXTS}
    for change, field in (
        ({"model": sorter}, "model"),
        ({"documents": []}, "documents"),
        ({"documents": [3]}, "documents.0"),
        ({"query": ""}, "query"),
        ({"top_n": 0}, "top_n"),
        ({"nonsense": 1}, "nonsense"),
        ({"documents": ["the cat " * 400]}, "documents.0"),
    ):
        answer = requests.post(f"{server.url}/v1/rerank", json={**good, **change}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    long = {**good, "documents": ["the cat " * 400], "truncate": True}
    assert requests.post(f"{server.url}/v1/rerank", json=long, timeout=60).status_code == 200
