"""Hugging Face's inference protocol on a live server, by `huggingface_hub`'s own client."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import requests
from conftest import PATIENCE, Server
from embedding_models import build_embedding
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

TABLE = {"name": ["cat", "dog"], "age": ["1", "2"]}
CONTEXT = "the cat sat on the mat and the dog ran to the house"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """A live server of these tests' own: they register models under other types than others do."""
    server = Server(tmp_path_factory.mktemp("server"), models_dir)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def add(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> Callable[..., str]:
    """Registers a tiny model, one of sentence-transformers' as `st-…`, and gives its address."""

    def make(name: str, model_type: str) -> str:
        model_id = build_embedding(models_dir, tiny, name[3:]) if name.startswith("st-") else tiny(name)
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


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_pieces_of_a_stream_add_up_to_the_text(add: Callable[..., str], name: str) -> None:
    """Characters of several tokens come whole, and no special token is among the pieces."""
    client = InferenceClient(model=add(name, "text-generation"))
    form: Any = {"type": "regex", "value": "é猫🙂 ok"}
    assert list(filter(None, client.text_generation("a", grammar=form, max_new_tokens=30, stream=True)))[:3] == [
        *"é猫🙂"
    ]
    for prompt, grammar in itertools.product(("the cat", "a dog sat", "house"), (None, form)):
        options: dict[str, Any] = {"max_new_tokens": 40, "grammar": grammar}
        whole = client.text_generation(prompt, **options)
        assert "".join(client.text_generation(prompt, **options, stream=True)) == whole
        told = client.text_generation(prompt, **options, details=True)
        assert "".join(token.text for token in told.details.tokens if not token.special) == whole


def test_a_text_goes_on_as_far_as_the_published_default_where_nothing_sets_a_limit(text: InferenceClient) -> None:
    """That is 1024 tokens, or all that the model has room for."""
    told = text.text_generation("the cat", details=True)
    read = list(text.text_generation("the cat", max_new_tokens=1, stream=True, details=True))[-1].details.input_length
    assert (told.details.finish_reason, told.details.generated_tokens) == ("length", 256 - read + 1)


def test_the_best_of_several_texts_is_the_likeliest(text: InferenceClient) -> None:
    told = text.text_generation("the cat", max_new_tokens=8, do_sample=True, seed=5, best_of=4, details=True)
    texts = [told.details, *told.details.best_of_sequences]
    means = [np.mean([token.logprob for token in each.tokens]) for each in texts]
    assert len(means) == 4
    assert means == sorted(means, reverse=True)
    again = text.text_generation("the cat", max_new_tokens=8, do_sample=True, seed=told.details.seed)
    assert again == told.generated_text


def test_an_encoder_decoder_makes_text_in_the_same_protocol(add: Callable[..., str]) -> None:
    """The clients have one method for both kinds of models."""
    client = InferenceClient(model=add("bart", "summarization") + "?task=text-generation")
    whole = client.text_generation("the cat", max_new_tokens=6)
    assert whole
    told = list(client.text_generation("the cat", max_new_tokens=6, stream=True, details=True))
    assert told[-1].generated_text == whole == "".join(event.token.text for event in told)
    own = InferenceClient(model=add("marian", "text2text-generation"))
    assert own.text_generation("the cat", max_new_tokens=6)


def test_stops_end_the_text(text: InferenceClient) -> None:
    whole = text.text_generation("the cat", max_new_tokens=20)
    stop = whole[8:10]
    for name in ("stop", "stop_sequences"):
        body = {"inputs": "the cat", "parameters": {"max_new_tokens": 20, name: [stop], "details": True}}
        [answer] = requests.post(text.model, json=body, timeout=PATIENCE).json()
        assert answer["generated_text"] == whole[: whole.index(stop)]
        assert answer["details"]["finish_reason"] == "stop_sequence"
    form: Any = {"type": "regex", "value": "yes"}
    told = text.text_generation("the cat", grammar=form, stop=["no"], max_new_tokens=20, details=True)
    assert (told.generated_text, told.details.finish_reason) == ("yes", "eos_token")
    whole = text.text_generation("the cat", max_new_tokens=20)
    over = text.text_generation("the cat", stop=["t" + whole[:2]], max_new_tokens=20, details=True)
    assert over.details.finish_reason == "stop_sequence"
    events = list(text.text_generation("the cat", stop=[whole[4:6]], max_new_tokens=20, stream=True, details=True))
    assert events[-1].details.finish_reason == "stop_sequence"
    assert events[-1].generated_text == "".join(event.token.text for event in events)
    form = {"type": "regex", "value": "a猫b"}
    for stream in (False, True):
        made: Any = text.text_generation("c", grammar=form, stop=["猫"], max_new_tokens=9, stream=stream, details=True)
        last = list(made)[-1] if stream else made
        assert (last.generated_text, last.details.finish_reason) == ("a", "stop_sequence")


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
    answer = requests.post(f"{client.model}?task={task}", json=body, timeout=PATIENCE)
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


def test_parameters_of_a_generation_stand_at_the_top_as_well(add: Callable[..., str]) -> None:
    """As `/pipeline` has them, and huggingface.js's own README sends them."""
    options: dict[str, Any] = {"max_new_tokens": 9, "num_beams": 1}
    for name, model_type, query in (
        ("bart", "summarization", ""),
        ("t5", "translation", "?task=translation_en_to_fr"),
        ("t5", "translation", "?task=text2text-generation"),
    ):
        address = add(name, model_type) + query

        def ask(parameters: dict[str, Any], address: str = address) -> requests.Response:
            return requests.post(address, json={"inputs": CONTEXT, "parameters": parameters}, timeout=PATIENCE)

        apart = ask({"generate_parameters": options})
        assert ask(options).json() == apart.json()
        assert ask({**options, "generate_parameters": {"num_beams": 1}}).json() == apart.json()
        assert ask({**options, "max_new_tokens": 3}).json() != apart.json()
        assert ask({"max_length": 8, "min_length": 8, "num_beams": 1, "truncation": True}).status_code == 200
        twice = ask({**options, "generate_parameters": {"num_beams": 2}})
        assert (twice.status_code, "twice: num_beams" in twice.json()["error"]) == (400, True)
        wrong = ask({"max_length": "5"})
        assert "'parameters.max_length'" in wrong.json()["error"]


def test_zero_shot_classification_is_chosen_by_its_labels(add: Callable[..., str]) -> None:
    address, labels = add("bert-nli", "text-classification"), {"candidate_labels": ["cat", "dog"]}
    named = requests.post(f"{address}?task=zero-shot-classification", json={"inputs": "a", "parameters": labels})
    chosen = requests.post(address, json={"inputs": "a", "parameters": labels}, timeout=PATIENCE)
    assert chosen.status_code == 200, chosen.text
    assert chosen.json() == named.json()
    assert (
        requests.post(address, json={"inputs": ["a"], "parameters": labels}, timeout=PATIENCE).json() == chosen.json()
    )
    several = requests.post(address, json={"inputs": ["a", "a"], "parameters": labels}, timeout=PATIENCE).json()
    body = {"inputs": ["a", "a"], "parameters": labels}
    task = {"task": "zero-shot-classification"}
    assert several == requests.post(address, params=task, json=body, timeout=PATIENCE).json()
    assert len(several) == 2
    for each in several:  # some processors add up two texts in another order than one
        assert [found["label"] for found in each] == [found["label"] for found in chosen.json()]
        assert [found["score"] for found in each] == pytest.approx([found["score"] for found in chosen.json()])
    plain = requests.post(address, json={"inputs": "a", "parameters": {"candidate_labels": None}}, timeout=PATIENCE)
    assert len(plain.json()[0]) == 3


def test_an_address_tells_its_health_and_what_is_there(
    add: Callable[..., str], server: Server, models_dir: Path, tiny: Callable[[str], str]
) -> None:
    """Without loading the model; one whose own name ends so is not hidden by it."""
    address = add("gpt2", "text-generation")
    path = address.removeprefix(server.api)
    server.call("DELETE", "/cache")
    client = InferenceClient(model=address, provider="hf-inference", token="hf_none")
    assert client.health_check() is True
    told = client.get_endpoint_info()
    assert server.call("GET", "/cache").json()["total_cached"] == 0
    assert (told["model_id"], told["model_pipeline_tag"]) == ("tiny/gpt2", "text-generation")
    assert told["max_total_tokens"] == 256
    assert (told["model_dtype"], told["model_device_type"], told["router"]) == (None, "cpu", "local-llm")
    client.text_generation("a", max_new_tokens=1)
    assert client.get_endpoint_info()["model_dtype"] == "torch.float32"
    server.call("PUT", path, json={"status": "disabled"})
    assert client.health_check() is False
    server.call("PUT", path, json={"status": "available"})
    nothing = InferenceClient(model=f"{server.api}/models/no/such", provider="hf-inference", token="hf_none")
    assert nothing.health_check() is False
    with pytest.raises(HfHubHTTPError, match="404"):
        nothing.get_endpoint_info()
    for name in ("health", "info"):
        model_id = f"tiny/{name}"
        if not (models_dir / model_id).exists():
            shutil.copytree(models_dir / tiny("gpt2"), models_dir / model_id)
        server.add(model_id, "text-generation")
        assert server.call("GET", f"/models/{model_id}").json()["model"]["model_id"] == model_id
        assert server.call("GET", f"/models/{model_id}/health").json() == {"success": True, "status": "ok"}
        assert server.call("GET", f"/models/{model_id}/info").json()["model_id"] == model_id


def test_table_question_answering(add: Callable[..., str], server: Server) -> None:
    client = InferenceClient(model=add("tapas", "table-question-answering"))
    wanted = pipeline(server, client.model, "table-question-answering", {"table": TABLE, "query": "cat"})
    found = client.table_question_answering(TABLE, "cat")
    assert (found.answer, found.cells) == (wanted["answer"], wanted["cells"])
    assert client.table_question_answering(TABLE, "cat", model=client.model) == found  # it then sends that along
    published = requests.post(client.model, json={"inputs": {"table": TABLE, "question": "cat"}}, timeout=PATIENCE)
    assert published.json()["answer"] == found.answer


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


def test_what_is_registered_counts_more_than_what_is_published(server: Server, add: Callable[..., str]) -> None:
    address = add("roberta-mlm", "fill-mask")
    path = address.removeprefix(server.api)
    server.call("PUT", path, json={"parameters": {"top_k": 2}})
    assert len(InferenceClient(model=address).fill_mask("the <mask> sat")) == 2
    address = add("bert-nli", "text-classification")
    path = address.removeprefix(server.api)
    client = InferenceClient(model=address)
    assert len(client.text_classification("the cat")) == 3
    server.call("PUT", path, json={"parameters": {"top_k": 1}})
    assert len(client.text_classification("the cat")) == 1
    assert len(client.text_classification("the cat", top_k=2)) == 2
    server.call("PUT", path, json={"parameters": {}})


# Parameters -----------------------------------------------------------------------------------------------------------

LONG = "the cat sat in London " * 200
QUESTION = {
    "question": "Where is the cat?",
    "context": "The cat sat on the mat. The dog ran to the house in London.",
}
LABELS = {"candidate_labels": ["animal", "city", "food"]}
PAIR = {"source_sentence": "the cat", "sentences": ["a dog", "the mat sat"]}
GREEDY = {"do_sample": False, "num_beams": 1, "max_new_tokens": 12}
SPACED = {"generate_parameters": {**GREEDY, "sequence_bias": [[[225], 100.0], [[225, 18], 300.0]]}}
SHORT = {"max_new_tokens": 16}
DRAWN = {**SHORT, "do_sample": True, "seed": 3}
GPT2 = ("gpt2", "text-generation", "the cat sat on the mat")
TRANSLATE = {"src_lang": "en_XX", "tgt_lang": "fr_XX", "generate_parameters": GREEDY}

# Of each task's published parameters: model, type, inputs, what else is asked, and a value that changes the answer.
CHANGES: dict[str, dict[str, tuple[str, str, Any, dict[str, Any], Any]]] = {
    "TextGenerationInputGenerateParameters": {
        "best_of": (*GPT2, DRAWN, 16),
        "decoder_input_details": (*GPT2, {**SHORT, "details": True}, True),
        "details": (*GPT2, SHORT, True),
        "do_sample": (*GPT2, {**SHORT, "seed": 3}, True),
        "frequency_penalty": (*GPT2, SHORT, 2.0),
        "grammar": (*GPT2, SHORT, {"type": "json", "value": '{"type": "boolean"}'}),
        "max_new_tokens": (*GPT2, SHORT, 3),
        "repetition_penalty": (*GPT2, SHORT, 5.0),
        "return_full_text": (*GPT2, SHORT, True),
        "seed": (*GPT2, DRAWN, 4),
        "stop": (*GPT2, SHORT, ["a", "e", "o"]),
        "temperature": (*GPT2, DRAWN, 0.05),
        "top_k": (*GPT2, DRAWN, 1),
        "top_n_tokens": (*GPT2, SHORT, 2),
        "top_p": (*GPT2, DRAWN, 0.01),
        "truncate": (*GPT2, SHORT, 1),
        "typical_p": (*GPT2, DRAWN, 0.01),
    },
    "SummarizationParameters": {
        "clean_up_tokenization_spaces": ("bart", "summarization", CONTEXT, SPACED, True),
        "generate_parameters": ("bart", "summarization", CONTEXT, {}, GREEDY),
        "truncation": ("bart", "summarization", LONG, {"generate_parameters": GREEDY}, "longest_first"),
    },
    "TranslationParameters": {
        "clean_up_tokenization_spaces": ("bart", "summarization", CONTEXT, SPACED, True),
        "generate_parameters": ("mbart", "translation", CONTEXT, TRANSLATE, {**GREEDY, "max_new_tokens": 3}),
        "src_lang": ("mbart", "translation", CONTEXT, TRANSLATE, "de_DE"),
        "tgt_lang": ("mbart", "translation", CONTEXT, TRANSLATE, "de_DE"),
        "truncation": ("mbart", "translation", LONG, TRANSLATE, "only_first"),
    },
    "QuestionAnsweringParameters": {
        "align_to_words": ("bert-qa", "question-answering", QUESTION, {"top_k": 50}, False),
        "doc_stride": ("bert-qa", "question-answering", QUESTION, {"max_seq_len": 20, "top_k": 9}, 2),
        "handle_impossible_answer": ("bert-qa", "question-answering", QUESTION, {"top_k": 200}, True),
        "max_answer_len": ("bert-qa", "question-answering", QUESTION, {"top_k": 5}, 1),
        "max_seq_len": ("bert-qa", "question-answering", QUESTION, {"doc_stride": 3, "top_k": 9}, 20),
        "top_k": ("bert-qa", "question-answering", QUESTION, {}, 3),
    },
    "FillMaskParameters": {
        "targets": ("bert-mlm", "fill-mask", "the [MASK] sat", {}, ["the", "a"]),
        "top_k": ("bert-mlm", "fill-mask", "the [MASK] sat", {}, 2),
    },
    "TextClassificationParameters": {
        "function_to_apply": ("distilbert-sst2", "text-classification", "good", {}, "none"),
        "top_k": ("distilbert-sst2", "text-classification", "good", {}, 1),
    },
    "TokenClassificationParameters": {
        "aggregation_strategy": ("bert-ner", "token-classification", CONTEXT, {}, "none"),
        "ignore_labels": ("bert-ner", "token-classification", CONTEXT, {}, ["PER"]),
        "stride": ("bert-ner", "token-classification", LONG, {}, 10),
    },
    "ZeroShotClassificationParameters": {
        "candidate_labels": ("bert-nli", "text-classification", CONTEXT, LABELS, ["other", "labels"]),
        "hypothesis_template": ("bert-nli", "text-classification", CONTEXT, LABELS, "The cat {}"),
        "multi_label": ("bert-nli", "text-classification", CONTEXT, LABELS, True),
    },
    "TableQuestionAnsweringParameters": {
        "sequential": (
            "tapas",
            "table-question-answering",
            {"table": TABLE, "query": ["how old is the cat", "who"]},
            {},
            True,
        ),
        "truncation": (
            "tapas",
            "table-question-answering",
            {"table": {"a": ["the cat sat"] * 200}, "query": "a"},
            {},
            False,
        ),
    },
    "FeatureExtractionInput": {
        "dimensions": ("st-prompts", "feature-extraction", "the cat", {}, 5),
        "normalize": ("st-prompts", "feature-extraction", "the cat", {}, True),
        "prompt_name": ("st-prompts", "feature-extraction", "the cat", {}, "query"),
        "truncate": ("st-short", "feature-extraction", LONG, {}, True),
    },
    "SentenceSimilarityInput": {
        "dimensions": ("st-prompts", "feature-extraction", PAIR, {}, 5),
        "prompt_name": ("st-prompts", "feature-extraction", PAIR, {}, "query"),
        "truncate": ("st-short", "feature-extraction", {**PAIR, "source_sentence": LONG}, {}, True),
    },
}
# And those that are refused: the value.
REFUSED: dict[str, dict[str, tuple[str, str, Any, Any]]] = {
    "TextGenerationInputGenerateParameters": {"adapter_id": (*GPT2, "b"), "watermark": (*GPT2, True)},
    "QuestionAnsweringParameters": {"max_question_len": ("bert-qa", "question-answering", QUESTION, 2)},
    "TableQuestionAnsweringParameters": {
        "padding": ("tapas", "table-question-answering", {"table": TABLE, "query": "cat"}, "max_length"),
    },
    "FeatureExtractionInput": {
        "encoding_format": ("st-prompts", "feature-extraction", "the cat", "base64"),
        "truncation_direction": ("st-prompts", "feature-extraction", "the cat", "left"),
    },
}
TASK_OF = {"ZeroShotClassificationParameters": "?task=zero-shot-classification"}


@pytest.mark.parametrize("published", CHANGES)
def test_every_published_parameter_is_looked_at_here(published: str) -> None:
    """The client's types are made of the published schemas."""
    names = {field.name for field in dataclasses.fields(getattr(huggingface_hub, published))}
    assert names - {"inputs", "parameters"} <= CHANGES[published].keys() | REFUSED.get(published, {}).keys()


def body_of(published: str, inputs: Any, parameters: dict[str, Any]) -> dict[str, Any]:
    """A body as the clients make it: those of features have their parameters beside the inputs."""
    beside = published == "FeatureExtractionInput"
    return {"inputs": inputs, **parameters} if beside else {"inputs": inputs, "parameters": parameters}


@pytest.mark.parametrize(
    ("published", "field"), [(published, field) for published, fields in CHANGES.items() for field in fields]
)
def test_a_published_parameter_changes_the_answer(add: Callable[..., str], published: str, field: str) -> None:
    name, model_type, inputs, others, value = CHANGES[published][field]
    address = add(name, model_type) + TASK_OF.get(published, "")
    without = requests.post(address, json=body_of(published, inputs, others), timeout=PATIENCE)
    with_it = requests.post(address, json=body_of(published, inputs, {**others, field: value}), timeout=PATIENCE)
    assert with_it.json() != without.json()
    assert with_it.status_code == 200, with_it.text
    null = requests.post(address, json=body_of(published, inputs, {**others, field: None}), timeout=PATIENCE)
    if field not in others:
        assert alike(null.json(), without.json())


def alike(one: Any, other: Any) -> bool:
    """Whether two answers are equal, but for the rounding of numbers: the second text finds its beginning computed."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-5
    return bool(one == other)


@pytest.mark.parametrize(
    ("published", "field"), [(published, field) for published, fields in REFUSED.items() for field in fields]
)
def test_a_published_parameter_is_refused_by_its_name(add: Callable[..., str], published: str, field: str) -> None:
    name, model_type, inputs, value = REFUSED[published][field]
    address = add(name, model_type)
    answer = requests.post(address, json=body_of(published, inputs, {field: value}), timeout=PATIENCE)
    assert answer.status_code == 400
    wanted = field if published == "FeatureExtractionInput" else f"parameters.{field}"
    assert f"'{wanted}'" in answer.json()["error"]


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
        answer = requests.post(text.model, data=body, headers={"Content-Type": "application/json"}, timeout=PATIENCE)
    else:
        answer = requests.post(text.model, json=body, timeout=PATIENCE)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


# A model of each task, its type, `?task=`, and a body that it does.
DOORS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "text-generation": ("gpt2", "text-generation", "", {"inputs": "a", "parameters": {"max_new_tokens": 2}}),
    "summarization": ("bart", "summarization", "", {"inputs": "a"}),
    "translation": ("t5", "translation", "translation_en_to_fr", {"inputs": "a"}),
    "question-answering": ("bert-qa", "question-answering", "", {"inputs": QUESTION}),
    "fill-mask": ("bert-mlm", "fill-mask", "", {"inputs": "the [MASK]"}),
    "text-classification": ("distilbert-sst2", "text-classification", "", {"inputs": "a"}),
    "token-classification": ("bert-ner", "token-classification", "", {"inputs": "a cat"}),
    "zero-shot-classification": (
        "bert-nli",
        "text-classification",
        "zero-shot-classification",
        {"inputs": "a", "parameters": LABELS},
    ),
    "table-question-answering": (
        "tapas",
        "table-question-answering",
        "",
        {"inputs": {"table": TABLE, "query": "cat"}},
    ),
    "feature-extraction": ("bert-embed", "feature-extraction", "", {"inputs": "a"}),
    "sentence-embedding": ("st-prompts", "feature-extraction", "", {"inputs": "a"}),
    "sentence-similarity": ("st-prompts", "feature-extraction", "sentence-similarity", {"inputs": PAIR}),
}
NAMED: list[tuple[dict[str, Any], str]] = [
    *(({"inputs": wrong}, "inputs") for wrong in (None, 3, True, [], {}, [3], [None], [[]], {"nonsense": 1})),
    ({"parameters": []}, "parameters"),
    ({"parameters": "a"}, "parameters"),
    ({"parameters": {"nonsense": 1}}, "parameters.nonsense"),
    ({"nonsense": 1}, "nonsense"),
    ({"options": {"nonsense": 1}}, "options.nonsense"),
    ({"options": {"wait_for_model": False}}, "options.wait_for_model"),
    ({"stream": "yes"}, "stream"),
]


@pytest.mark.parametrize("task", DOORS)
def test_every_task_refuses_malformed_bodies_by_the_name_of_what_is_wrong(add: Callable[..., str], task: str) -> None:
    """With a 400, at once, and the task goes on to serve."""
    name, model_type, query, body = DOORS[task]
    address = add(name, model_type) + (f"?task={query}" if query else "")
    for wrong, named in NAMED:
        answer = requests.post(address, json={**body, **wrong}, timeout=PATIENCE)
        assert answer.status_code == 400, (wrong, answer.text)
        assert named in answer.json()["error"], (wrong, answer.text)
        assert answer.json()["success"] is False
    for data in ("", "[]", "null", "{", '"a"', '{"inputs": "a", "inputs": "b"}'):
        answer = requests.post(address, data=data, headers={"Content-Type": "application/json"}, timeout=PATIENCE)
        assert answer.status_code == 400, (data, answer.text)
    if task != "text-generation":
        answer = requests.post(address, json={**body, "stream": True}, timeout=PATIENCE)
        assert (answer.status_code, "'stream'" in answer.json()["error"]) == (400, True)
    assert requests.post(address, json=body, timeout=PATIENCE).status_code == 200


def test_what_only_the_model_can_tell_is_named_as_in_the_body(add: Callable[..., str]) -> None:
    def said(name: str, model_type: str, body: dict[str, Any], query: str = "") -> str:
        answer = requests.post(add(name, model_type) + query, json=body, timeout=PATIENCE)
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]

    mask = {"inputs": "a [MASK]", "parameters": {"top_k": 10**6}}
    assert "'parameters.top_k'" in said("bert-mlm", "fill-mask", mask)
    making = {"inputs": "a", "parameters": {"generate_parameters": {"max_new_tokens": -1}}}
    assert "'parameters.generate_parameters.max_new_tokens'" in said("bart", "summarization", making)
    labels = said("bert-nli", "text-classification", {"inputs": "a"}, "?task=zero-shot-classification")
    assert "parameters.candidate_labels" in labels
    for value in (3, {"type": "nonsense"}):
        form = {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": value}}}
        assert "'parameters.grammar.value'" in said("gpt2", "text-generation", form)
    assert "'inputs'" in said("gpt2", "text-generation", {"inputs": LONG})
    assert "'parameters.best_of'" in said("gpt2", "text-generation", {"inputs": "a", "parameters": {"best_of": 2}})
    assert "'inputs'" in said("st-short", "feature-extraction", {"inputs": LONG})
    assert "inputs.sentences.1" in said("st-short", "feature-extraction", {"inputs": {**PAIR, "sentences": ["a", 3]}})
    assert "inputs.more" in said("st-short", "feature-extraction", {"inputs": {**PAIR, "more": 1}})
    twice = {"inputs": "a", "normalize": True, "parameters": {"normalize": False}}
    assert "twice: normalize" in said("st-short", "feature-extraction", twice)
    assert "'task'" in said("gpt2", "text-generation", {"inputs": "a"}, "?task=")


def test_the_clients_tell_what_the_server_said(server: Server, add: Callable[..., str]) -> None:
    sorter = InferenceClient(model=add("distilbert-sst2", "text-classification"))
    with pytest.raises(HfHubHTTPError, match="top_k"):
        sorter.text_classification("the cat", top_k=-1)
    with pytest.raises(HfHubHTTPError, match="cannot do"):
        InferenceClient(model=f"{sorter.model}?task=fill-mask").fill_mask("the [MASK]")
    answer = requests.post(sorter.model, json={"inputs": "a", "stream": True}, timeout=PATIENCE)
    assert (answer.status_code, "stream" in answer.json()["error"]) == (400, True)
    missing = requests.post(f"{server.api}/models/no/such", json={"inputs": "a"}, timeout=PATIENCE)
    assert missing.status_code == 404
