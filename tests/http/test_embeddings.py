"""Embeddings and reranking over HTTP, by OpenAI's own client: the numbers are those of sentence-transformers."""

from __future__ import annotations

import base64
import json
import shutil
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
from conftest import PATIENCE, Server
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


# What `save` makes: the model under the modules, how they pool, and what else is said.
VARIANTS: dict[str, dict[str, Any]] = {
    "several": {"mode": ("cls", "max", "mean_sqrt_len_tokens")},
    "root-of-length": {"mode": "mean_sqrt_len_tokens"},
    "layer-norm": {"layer_norm": True},
    "weighted-outside": {"mode": "weightedmean", "prompts": {"q": "the cat "}, "default": "q", "include": False},
    "encoder-of-t5": {"base": "t5"},
    "whole-bart": {"base": "bart"},
    "chat": {"base": "llama", "mode": "lasttoken"},
    "chat-prompt": {"base": "llama", "prompts": {"q": "the cat "}, "default": "q"},
}


@pytest.fixture(scope="module")
def save(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> Callable[..., str]:
    """Has sentence-transformers save a model of `VARIANTS`, registers it, and gives its id.

    `changes` are what its JSON files then say besides, `name` what it is called if it is not the variant itself.
    """

    def make(variant: str, name: str = "", **changes: dict[str, Any]) -> str:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

        how = VARIANTS.get(variant, {})
        model_id = f"tiny/st-made-{name or variant}"
        if not (models_dir / model_id).is_dir():
            transformer = Transformer(str(models_dir / tiny(how.get("base", "bert-embed"))))
            pooling = Pooling(
                transformer.get_embedding_dimension(), how.get("mode", "mean"), include_prompt=how.get("include", True)
            )
            modules: list[torch.nn.Module] = [transformer, pooling]
            if how.get("layer_norm"):
                modules.append(LayerNorm(pooling.get_embedding_dimension()))
            prompts, default = how.get("prompts"), how.get("default")
            SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name=default, device="cpu").save(
                str(models_dir / model_id), create_model_card=False
            )
            for file, values in changes.items():
                path = models_dir / model_id / f"{file}.json"
                said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
                path.write_text(json.dumps({**said, **values}), "utf-8")
            server.add(model_id, "feature-extraction")
        return model_id

    return make


@pytest.mark.parametrize("name", VARIANTS)
def test_modules_models_and_chat_templates_are_used_as_the_library_uses_them(
    name: str, client: openai.OpenAI, save: Callable[..., str], models_dir: Path
) -> None:
    model = save(name)
    texts = [*TEXTS, "The CAT is ΟΔΟΣ"]
    assert np.allclose(vectors(client, model, texts), expected(models_dir, model, texts), atol=1e-5)


def test_a_folder_of_an_older_version_says_the_same(
    client: openai.OpenAI, save: Callable[..., str], models_dir: Path
) -> None:
    """Of how texts are read: the file had another name for some models, and lengths and letters stood in it."""
    model = save("older", sentence_roberta_config={"max_seq_length": 9, "do_lower_case": True})
    (models_dir / model / "sentence_bert_config.json").unlink()
    texts = ["the CAT sat on the mat and the dog sat on the cat", "The CAT"]
    with pytest.raises(openai.BadRequestError, match="reads 9"):
        vectors(client, model, texts)
    cut = vectors(client, model, texts, extra_body={"truncate": True})
    assert np.allclose(cut, expected(models_dir, model, texts), atol=1e-5)


def test_a_prompt_may_be_empty(client: openai.OpenAI, embedding: Callable[[str], str], models_dir: Path) -> None:
    model = embedding("prompts")  # which has one by default
    bare = vectors(client, model, TEXTS, extra_body={"prompt_name": "document"})
    assert np.allclose(bare, expected(models_dir, model, TEXTS, prompt_name="document"), atol=1e-5)
    assert not np.allclose(bare, vectors(client, model, TEXTS), atol=1e-3)


def test_no_prompt_concerns_tokens(client: openai.OpenAI, save: Callable[..., str], models_dir: Path) -> None:
    """None goes before them, so none of them is left out of the average; naming one is refused."""
    model = save("weighted-outside")
    ids = AutoTokenizer.from_pretrained(models_dir / model)(TEXTS[0])["input_ids"]
    plain = expected(models_dir, model, TEXTS[:1], prompt="")
    assert np.allclose(vectors(client, model, ids), plain, atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="token ids") as caught:
        vectors(client, model, ids, extra_body={"prompt_name": "q"})
    assert caught.value.param == "prompt_name"


@pytest.mark.parametrize("kind", ["sentence_transformers.base.modules.router.Router", "custom_code.Transformer"])
def test_modules_that_are_not_served_are_refused_by_their_names(
    kind: str, client: openai.OpenAI, save: Callable[..., str], models_dir: Path
) -> None:
    model = save("refused", kind.rpartition(".")[2].lower())
    path = models_dir / model / "modules.json"
    first, *others = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps([{**first, "type": kind}, *others]), "utf-8")
    with pytest.raises(openai.BadRequestError, match=kind.rpartition(".")[2]):
        vectors(client, model, TEXTS)


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
    plain = requests.post(url, json=body, timeout=PATIENCE).json()
    coded = requests.post(url, json={**body, "encoding_format": "base64"}, timeout=PATIENCE).json()
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
    answer = requests.post(f"{server.url}/v1/embeddings", json=body, timeout=PATIENCE)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"


def test_models_that_give_no_vectors_say_so(client: openai.OpenAI, server: Server, tiny: Callable[[str], str]) -> None:
    for name, task in (("tapas", "table-question-answering"), ("t5", "summarization"), ("mbart", "translation")):
        model = tiny(name)
        server.add(model, task)
        with pytest.raises(openai.BadRequestError, match=task):
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
    answer = requests.post(f"{server.url}/v1/rerank", json=body, timeout=PATIENCE).json()
    documents = [*TEXTS, "on the mat"]
    scores = CrossEncoder(str(models_dir / model), device="cpu").predict([(body["query"], text) for text in documents])
    ranked = sorted(range(len(documents)), key=lambda index: -scores[index])
    assert [result["index"] for result in answer["results"]] == ranked
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(float(scores[result["index"]]), abs=1e-5)
        assert "document" not in result
    best = requests.post(
        f"{server.url}/v1/rerank", json={**body, "top_n": 2, "return_documents": True}, timeout=PATIENCE
    )
    assert [result["document"]["text"] for result in best.json()["results"]] == [documents[i] for i in ranked[:2]]


@pytest.mark.parametrize(
    "said",
    [
        {"activation_fn": "torch.nn.modules.activation.Tanh"},
        {"activation_fn": "torch.nn.Identity"},
        {"activation_fn": "somebody.elses.Code"},
        {"prompts": {"q": "a dog "}, "default_prompt_name": "q"},
    ],
)
def test_what_a_cross_encoders_folder_says_counts(
    said: dict[str, Any], server: Server, models_dir: Path, tiny: Callable[[str], str], request: pytest.FixtureRequest
) -> None:
    """Its own file before the model's config; pairs are cut at the tokenizer's limit, not at the model's."""
    from sentence_transformers import CrossEncoder

    model = f"tiny/cross-{request.node.callspec.id}"
    folder = models_dir / model
    shutil.copytree(models_dir / build_cross_encoder(models_dir, tiny), folder)
    for file, changes in (
        ("config_sentence_transformers.json", said),
        ("config.json", {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.ReLU"}}),
    ):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")
    server.add(model, "text-classification")
    documents = [*TEXTS, "the cat and a dog " * 20]
    body = {"model": model, "query": "where is the cat", "documents": documents}
    refused = requests.post(f"{server.url}/v1/rerank", json=body, timeout=PATIENCE)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"documents.{len(TEXTS)}")
    assert "reads 64" in refused.json()["error"]["message"]
    answer = requests.post(f"{server.url}/v1/rerank", json={**body, "truncate": True}, timeout=PATIENCE).json()
    scores = CrossEncoder(str(folder), device="cpu").predict([(body["query"], text) for text in documents])
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(float(scores[result["index"]]), rel=1e-5, abs=1e-5)


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
        answer = requests.post(f"{server.url}/v1/rerank", json={**good, **change}, timeout=PATIENCE)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    long = {**good, "documents": ["the cat " * 400], "truncate": True}
    assert requests.post(f"{server.url}/v1/rerank", json=long, timeout=PATIENCE).status_code == 200
