"""Hugging Face's inference protocol on a live server, by `huggingface_hub`'s own client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from conftest import Server
from embedding_models import build_embedding
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

# A model for each task, its model type, an input, and parameters of which each changes the answer.
TABLE = {"name": ["cat", "dog"], "age": ["1", "2"]}
CONTEXT = "the cat sat on the mat and the dog ran to the house"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """A live server of these tests' own: they register models under other types than others do."""
    server = Server(tmp_path_factory.mktemp("server"), models_dir)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def add(server: Server, tiny: Callable[[str], str]) -> Callable[..., str]:
    """Registers a tiny model and gives its address."""

    def make(name: str, model_type: str) -> str:
        model_id = tiny(name)
        server.add(model_id, model_type)
        return f"{server.api}/models/{model_id}"

    return make


@pytest.fixture(scope="module")
def text(add: Callable[..., str]) -> InferenceClient:
    """The client of a model that makes text."""
    return InferenceClient(model=add("gpt2", "text-generation"))


def pipeline(server: Server, model: str, task: str, inputs: Any, **parameters: Any) -> Any:
    """What `/pipeline` gives."""
    body = {"model_id": model.split("/models/")[1], "task": task, "inputs": inputs, **parameters}
    answer = server.call("POST", "/pipeline", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


# Text generation ------------------------------------------------------------------------------------------------------


def test_text_is_generated(text: InferenceClient, server: Server) -> None:
    """Greedy unless asked otherwise, without the prompt unless asked for, as `/pipeline` makes it."""
    prompt = "the cat sat"
    made = text.text_generation(prompt, max_new_tokens=12)
    [wanted] = pipeline(server, text.model, "text-generation", prompt, max_new_tokens=12, do_sample=False)
    assert prompt + made == wanted["generated_text"]
    assert text.text_generation(prompt, max_new_tokens=12, return_full_text=True) == wanted["generated_text"]


def test_details_tell_the_tokens(text: InferenceClient) -> None:
    told = text.text_generation(
        "the cat sat", max_new_tokens=6, details=True, decoder_input_details=True, top_n_tokens=3
    )
    assert told.details.finish_reason == "length"
    assert told.details.generated_tokens == len(told.details.tokens) == 6
    assert "".join(token.text for token in told.details.tokens) == told.generated_text
    assert all(token.logprob <= 0 for token in told.details.tokens)
    assert [len(top) for top in told.details.top_tokens] == [3] * 6
    assert "".join(token.text for token in told.details.prefill) == "the cat sat"
    assert told.details.prefill[0].logprob is None


def test_a_stream_has_an_event_for_each_token(text: InferenceClient) -> None:
    whole = text.text_generation("the cat", max_new_tokens=7)
    assert "".join(text.text_generation("the cat", max_new_tokens=7, stream=True)) == whole
    events = list(text.text_generation("the cat", max_new_tokens=7, stream=True, details=True))
    assert [event.index for event in events] == list(range(1, 8))
    assert [event.generated_text for event in events] == [None] * 6 + [whole]
    assert events[-1].details.finish_reason == "length"
    assert events[-1].details.generated_tokens == 7
    assert events[-1].details.input_length > 0
    assert all(event.details is None for event in events[:-1])


@pytest.mark.parametrize(
    "parameters",
    [
        {"do_sample": True, "seed": 3},
        {"temperature": 3.0, "seed": 3},
        {"top_k": 3, "temperature": 5.0, "seed": 1},
        {"top_p": 0.5, "temperature": 3.0, "seed": 2},
        {"typical_p": 0.3, "temperature": 3.0, "seed": 2},
        {"repetition_penalty": 5.0},
        {"frequency_penalty": 2.0},
        {"max_new_tokens": 3},
        {"truncate": 1},
        {"best_of": 4, "do_sample": True, "seed": 1},
        {"return_full_text": True},
        {"grammar": {"type": "regex", "value": "[0-9]{4}"}},
        {"grammar": {"type": "json", "value": {"type": "object", "properties": {"a": {"type": "boolean"}}}}},
    ],
)
def test_each_parameter_changes_the_text(text: InferenceClient, parameters: dict[str, Any]) -> None:
    body = {"inputs": "the cat sat on the mat", "parameters": {"max_new_tokens": 16}}
    plain = requests.post(text.model, json=body, timeout=60).json()
    changed = requests.post(text.model, json={**body, "parameters": {"max_new_tokens": 16, **parameters}}, timeout=60)
    assert changed.status_code == 200, changed.text
    assert changed.json() != plain


def test_stops_end_the_text(text: InferenceClient) -> None:
    whole = text.text_generation("the cat", max_new_tokens=20)
    stop = whole[8:10]
    for name in ("stop", "stop_sequences"):
        body = {"inputs": "the cat", "parameters": {"max_new_tokens": 20, name: [stop], "details": True}}
        [answer] = requests.post(text.model, json=body, timeout=60).json()
        assert answer["generated_text"] == whole[: whole.index(stop)]
        assert answer["details"]["finish_reason"] == "stop_sequence"


def test_a_chat_has_its_address_under_the_models(add: Callable[..., str]) -> None:
    client = InferenceClient(model=add("llama", "conversational"))
    messages = [{"role": "user", "content": "where is the cat?"}]
    answer = client.chat_completion(messages, max_tokens=8, temperature=0.0)
    assert answer.usage.completion_tokens <= 8
    pieces = client.chat_completion(messages, max_tokens=8, temperature=0.0, stream=True)
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert said == answer.choices[0].message.content
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["yes", "no"]}}}
    formed = client.chat_completion(messages, response_format=form)
    assert formed.choices[0].message.content in ('"yes"', '"no"')


# Other tasks ----------------------------------------------------------------------------------------------------------


def test_summarization_and_translation(add: Callable[..., str], server: Server) -> None:
    client = InferenceClient(model=add("bart", "summarization"))
    [wanted] = pipeline(server, client.model, "summarization", CONTEXT, max_new_tokens=9, num_beams=1)
    options = {"max_new_tokens": 9, "num_beams": 1}
    assert client.summarization(CONTEXT, generate_parameters=options).summary_text == wanted["summary_text"]
    client = InferenceClient(model=add("t5", "translation"))
    task = "translation_en_to_fr"
    [wanted] = pipeline(server, client.model, task, CONTEXT, max_new_tokens=9, num_beams=1)
    body = {"inputs": CONTEXT, "parameters": {"generate_parameters": options}}
    answer = requests.post(f"{client.model}?task={task}", json=body, timeout=60)
    assert answer.json() == [wanted]


def test_question_answering(add: Callable[..., str], server: Server) -> None:
    client = InferenceClient(model=add("bert-qa", "question-answering"))
    inputs = {"question": "where is the cat", "context": CONTEXT}
    wanted = pipeline(server, client.model, "question-answering", inputs)
    found = client.question_answering("where is the cat", CONTEXT)
    assert (found.answer, found.start, found.end) == (wanted["answer"], wanted["start"], wanted["end"])
    several = client.question_answering("where is the cat", CONTEXT, top_k=3)
    assert len(several) == 3


def test_fill_mask(add: Callable[..., str], server: Server) -> None:
    client = InferenceClient(model=add("bert-mlm", "fill-mask"))
    wanted = pipeline(server, client.model, "fill-mask", "the [MASK] sat", top_k=2)
    found = client.fill_mask("the [MASK] sat", top_k=2)
    assert [element.token_str for element in found] == [element["token_str"] for element in wanted]
    wanted = pipeline(server, client.model, "fill-mask", "the [MASK] sat", targets=["the", "dog"])
    found = client.fill_mask("the [MASK] sat", targets=["the", "dog"])
    assert [(element.token_str, element.score) for element in found] == [
        (element["token_str"], pytest.approx(element["score"])) for element in wanted
    ]


def test_text_classification(add: Callable[..., str], server: Server) -> None:
    client = InferenceClient(model=add("distilbert-sst2", "text-classification"))
    wanted = pipeline(server, client.model, "text-classification", "the cat", top_k=None)
    found = client.text_classification("the cat")
    assert [(element.label, element.score) for element in found] == [(each["label"], each["score"]) for each in wanted]
    assert len(client.text_classification("the cat", top_k=1)) == 1
    raw = client.text_classification("the cat", function_to_apply="none")
    assert [element.score for element in raw] != [element.score for element in found]


def test_token_classification(add: Callable[..., str], server: Server) -> None:
    client = InferenceClient(model=add("bert-ner", "token-classification"))
    wanted = pipeline(server, client.model, "token-classification", CONTEXT, aggregation_strategy="simple")
    found = client.token_classification(CONTEXT)
    assert [element.entity_group for element in found] == [each["entity_group"] for each in wanted]
    tokens = client.token_classification(CONTEXT, aggregation_strategy="none")
    assert all(element.entity is not None for element in tokens)
    label = wanted[0]["entity_group"]
    rest = client.token_classification(CONTEXT, ignore_labels=[label, "O"])
    assert label not in {element.entity_group for element in rest}


def test_zero_shot_classification(add: Callable[..., str], server: Server) -> None:
    client = InferenceClient(model=add("bert-nli", "text-classification") + "?task=zero-shot-classification")
    labels = ["cat", "dog", "house"]
    model = client.model.partition("?")[0]
    wanted = pipeline(server, model, "zero-shot-classification", "the cat", candidate_labels=labels)
    found = client.zero_shot_classification("the cat", labels)
    assert [element.label for element in found] == wanted["labels"]
    assert [element.score for element in found] == pytest.approx(wanted["scores"])
    many = client.zero_shot_classification("the cat", labels, multi_label=True, hypothesis_template="a {}.")
    assert [element.score for element in many] != [element.score for element in found]


def test_table_question_answering(add: Callable[..., str], server: Server) -> None:
    client = InferenceClient(model=add("tapas", "table-question-answering"))
    wanted = pipeline(server, client.model, "table-question-answering", {"table": TABLE, "query": "cat"})
    found = client.table_question_answering(TABLE, "cat")
    assert (found.answer, found.cells) == (wanted["answer"], wanted["cells"])


def test_features_and_similarity(
    add: Callable[..., str], server: Server, models_dir: Path, tiny: Callable[[str], str]
) -> None:
    plain = InferenceClient(model=add("bert-embed", "feature-extraction"))
    wanted = pipeline(server, plain.model, "feature-extraction", "the cat")
    assert np.allclose(plain.feature_extraction("the cat"), wanted, atol=1e-5)
    model_id = build_embedding(models_dir, tiny, "prompts")
    server.add(model_id, "feature-extraction")
    client = InferenceClient(model=f"{server.api}/models/{model_id}")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(models_dir / model_id), device="cpu")
    texts = ["the cat", "a dog", "the cat sat on the mat"]
    assert np.allclose(client.feature_extraction(texts), model.encode(texts), atol=1e-5)
    unit = model.encode(texts, normalize_embeddings=True)
    assert np.allclose(client.feature_extraction(texts, normalize=True), unit, atol=1e-5)
    named = model.encode(texts[:1], prompt_name="query")[0]
    assert np.allclose(client.feature_extraction(texts[0], prompt_name="query"), named, atol=1e-5)
    assert len(client.feature_extraction(texts[0], dimensions=5)) == 5
    found = client.sentence_similarity(texts[0], other_sentences=texts[1:])
    assert found == pytest.approx([float(unit[0] @ unit[1]), float(unit[0] @ unit[2])], abs=1e-5)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, "inputs"),
        ([], "object"),
        ("{", "JSON"),
        ({}, "inputs"),
        ({"inputs": 3}, "inputs"),
        ({"inputs": ["a", "b"]}, "inputs"),
        ({"inputs": "a", "nonsense": 1}, "nonsense"),
        ({"inputs": "a", "parameters": []}, "parameters"),
        ({"inputs": "a", "parameters": {"nonsense": 1}}, "parameters.nonsense"),
        ({"inputs": "a", "parameters": {"watermark": True}}, "parameters.watermark"),
        ({"inputs": "a", "parameters": {"adapter_id": "b"}}, "parameters.adapter_id"),
        ({"inputs": "a", "parameters": {"temperature": "hot"}}, "parameters.temperature"),
        ({"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "(a"}}}, "unclosed"),
        ({"inputs": "a", "stream": "yes"}, "stream"),
        ({"inputs": "a", "stream": True, "parameters": {"best_of": 2}}, "best_of"),
        ({"inputs": "a", "options": {"wait_for_model": False}}, "options"),
        ({"inputs": "the cat " * 3000}, "tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(text: InferenceClient, body: Any, said: str) -> None:
    if isinstance(body, str):
        answer = requests.post(text.model, data=body, headers={"Content-Type": "application/json"}, timeout=60)
    else:
        answer = requests.post(text.model, json=body, timeout=60)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_the_clients_tell_what_the_server_said(server: Server, add: Callable[..., str]) -> None:
    sorter = InferenceClient(model=add("distilbert-sst2", "text-classification"))
    with pytest.raises(HfHubHTTPError, match="top_k"):
        sorter.text_classification("the cat", top_k=-1)
    with pytest.raises(HfHubHTTPError, match="cannot do"):
        InferenceClient(model=f"{sorter.model}?task=fill-mask").fill_mask("the [MASK]")
    answer = requests.post(sorter.model, json={"inputs": "a", "stream": True}, timeout=60)
    assert (answer.status_code, "stream" in answer.json()["error"]) == (400, True)
    missing = requests.post(f"{server.api}/models/no/such", json={"inputs": "a"}, timeout=60)
    assert missing.status_code == 404
