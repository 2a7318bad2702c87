"""A step without numbers is a failure of its own kind, on every path that a model is asked on, and never an answer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import changed_models
import pytest
import torch
from causal_models import build, serve
from task_models import HEAD_OF, TABLE, Models, on_one_thread
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from huggingface.errors import GenerationFailed, InvalidRequest
from huggingface.tasks.runner import TaskRunner
from huggingface.types import GenerationRequest

BROKEN = [math.nan, math.inf, -math.inf]
WAYS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": True},
    {"do_sample": True, "seed": 3},
    {"num_beams": 2, "do_sample": False},
    {"num_beams": 2, "do_sample": True},
    {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    {"num_return_sequences": 2, "do_sample": True},
    {"guidance_scale": 2.0, "do_sample": False},
    {"min_new_tokens": 3, "repetition_penalty": 1.2, "do_sample": False},
]


@pytest.fixture(scope="module")
def models(models_dir: Path, tiny: Callable[[str], str]) -> Iterator[Models]:
    """The tiny models of the session."""
    with on_one_thread():
        yield Models(models_dir, tiny)


class Head(torch.nn.Module):
    """A layer that gives one number for all."""

    def __init__(self, layer: torch.nn.Module, number: float) -> None:
        super().__init__()
        self.layer, self.number = layer, number

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """As the layer, but for the numbers."""
        return torch.full_like(self.layer(states), self.number)


@pytest.mark.parametrize("number", BROKEN)
@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_a_model_whose_logits_are_no_numbers_says_so_however_it_is_asked(name: str, number: float) -> None:
    """Greedy, drawn, by beams, several texts, streamed, with log-probabilities: all fail by the same words."""
    model, tokenizer = build(name)
    model.lm_head = Head(model.lm_head, number)
    loaded = serve(name, model, tokenizer)
    for way in WAYS:
        for told in ({}, {"streams": True}, {"logprobs": 1}, {"logprobs": 0, "prompt_logprobs": True}):
            if "logprobs" in told and way.get("num_beams", 1) > 1:
                continue
            request = GenerationRequest({"max_new_tokens": 3, **way}, prompt="The cat", **told)
            with pytest.raises(GenerationFailed, match="not numbers"):
                list(loaded.generate(request))
    for parameters in ({}, {"num_beams": 2}, {"do_sample": False, "num_beams": 2, "num_return_sequences": 2}):
        with pytest.raises(GenerationFailed, match="not numbers"):
            loaded.run("text-generation", "The cat", {"max_new_tokens": 3, **parameters})
    loaded.close()


def test_a_later_step_without_numbers_ends_a_text_that_has_begun() -> None:
    """What was sent of a text stays what it is; then comes the failure, and no text of padding."""
    model, tokenizer = build("bloom")
    loaded = serve("bloom", model, tokenizer)
    greedy = {"do_sample": False, "max_new_tokens": 8}
    whole = "".join(chunk.text for chunk in loaded.generate(GenerationRequest(greedy, prompt="The cat")))
    steps = []

    def break_down(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        return logits if len(steps) < 5 else logits.fill_(math.nan)

    handle = model.lm_head.register_forward_hook(break_down)
    begun = ""
    ticket = loaded.generate(GenerationRequest(greedy, prompt="The cat", streams=True))
    with pytest.raises(GenerationFailed, match="not numbers"):
        for chunk in ticket:
            begun += chunk.text
    assert whole.startswith(begun)
    handle.remove()
    again = "".join(chunk.text for chunk in loaded.generate(GenerationRequest(greedy, prompt="The cat")))
    assert again == whole
    loaded.close()


@pytest.mark.parametrize(
    ("name", "tasks"),
    [("bart", ("text2text-generation", "summarization")), ("t5", ("translation_en_to_fr", "summarization"))],
)
def test_an_encoder_decoder_without_numbers_says_so(models: Models, name: str, tasks: tuple[str, ...]) -> None:
    """Its tasks search by beams unless they are told otherwise."""
    model_id, model, tokenizer = models.load(name)
    model.lm_head = Head(model.lm_head, math.nan)
    runner = TaskRunner(model_id, model, tokenizer, "seq2seq-lm")
    for task in tasks:
        for parameters in ({}, {"num_beams": 1}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}):
            with pytest.raises(GenerationFailed, match="not numbers"):
                runner.run(task, "the cat", {"max_new_tokens": 4, **parameters})


@pytest.mark.parametrize("number", BROKEN[:2])
@pytest.mark.parametrize(
    ("name", "layer", "task", "inputs", "parameters"),
    [
        ("distilbert-sst2", "classifier", "sentiment-analysis", "good", {}),
        ("distilbert-sst2", "classifier", "text-classification", ["good", "bad"], {"top_k": None}),
        ("bert-nli", "classifier", "zero-shot-classification", "a", {"candidate_labels": ["b", "c"]}),
        ("bert-ner", "classifier", "ner", "the cat", {}),
        ("bert-ner", "classifier", "ner", "the cat", {"aggregation_strategy": "simple"}),
        ("bert-qa", "qa_outputs", "question-answering", {"question": "a", "context": "b c d"}, {}),
        ("bert-qa", "qa_outputs", "question-answering", {"question": "a", "context": "b"}, {"top_k": 3}),
        ("bert-mlm", "cls", "fill-mask", "a [MASK]", {}),
        ("bert-mlm", "cls", "fill-mask", "a [MASK]", {"targets": ["cat"]}),
        ("bert-embed", "pooler", "feature-extraction", "the cat", {}),
        ("bert-embed", "pooler", "sentence-embeddings", "the cat", {}),
        ("tapas", "dropout", "table-question-answering", {"table": TABLE, "query": "a"}, {}),
        ("tapas", "dropout", "table-question-answering", {"table": TABLE, "query": ["a", "b"]}, {"sequential": True}),
    ],
)
def test_a_task_whose_numbers_are_none_is_a_failure_and_no_empty_answer(
    models: Models, name: str, layer: str, task: str, inputs: Any, parameters: dict[str, Any], number: float
) -> None:
    model_id, model, tokenizer = models.load(name)
    if layer == "pooler":
        with torch.no_grad():
            model.embeddings.LayerNorm.weight.fill_(number)
    else:
        setattr(model, layer, Head(getattr(model, layer), number))
    runner = TaskRunner(model_id, model, tokenizer, HEAD_OF[name])
    with pytest.raises(GenerationFailed):
        runner.run(task, inputs, parameters)


def test_a_text_without_numbers_harms_none_of_those_that_are_computed_beside_it(models: Models) -> None:
    """A list with such a text fails; calls that shared its batches have their answers, and batches go on."""
    model_id, model, tokenizer = models.load("bert-ner")
    good = [f"the cat {word}" for word in ("sat", "ran", "ate", "lay")]
    wanted = [models.run("bert-ner", "ner", text, ignore_labels=[]) for text in good]
    bad = tokenizer("~", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = math.nan
    runner = TaskRunner(model_id, model, tokenizer, "token-classification")
    batches: list[int] = []
    model.register_forward_pre_hook(lambda _, __, inputs: batches.append(len(inputs["input_ids"])), with_kwargs=True)
    for _ in range(5):
        broken = runner.submit("ner", "the cat ~", {})
        calls = [runner.submit("ner", text, {"ignore_labels": []}) for text in good]
        while runner.step():
            pass
        with pytest.raises(GenerationFailed, match="not a number"):
            broken.future.result(0)
        for call, answer in zip(calls, wanted, strict=True):
            found = call.future.result(0)
            assert [each["entity"] for each in found] == [each["entity"] for each in answer]
    assert batches == [5, 1, 1, 5, 5, 5, 5], "all at once each time; the first time two of them alone to compare"


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("way", [{"do_sample": False}, {"do_sample": True}, {"do_sample": True, "seed": 1}])
def test_parameters_that_leave_no_token_are_refused_and_draw_none(name: str, way: dict[str, Any]) -> None:
    """One token is left, which may come once: there is none to follow it, in a batch as alone; others go on."""
    model, tokenizer = build(name)
    loaded = serve(name, model, tokenizer)
    only = [token for token in range(model.config.vocab_size) if token != 300]
    banned = {"suppress_tokens": only, "no_repeat_ngram_size": 1, "max_new_tokens": 5, **way}
    plain = GenerationRequest({"do_sample": False, "max_new_tokens": 5}, prompt="The cat")
    wanted = [chunk.whole for chunk in loaded.generate(plain)][-1]
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(lambda: [chunk.whole for chunk in loaded.generate(plain)][-1])
        with pytest.raises(InvalidRequest, match="forbid every token"):
            list(loaded.generate(GenerationRequest(banned, prompt="The cat")))
        assert beside.result() == wanted
    loaded.close()


@pytest.mark.parametrize(("name", "kind"), [("gpt2", AutoModelForCausalLM), ("bart", AutoModelForSeq2SeqLM)])
def test_clients_of_every_protocol_are_told_of_it(name: str, kind: Any, client: Any, models_dir: Path) -> None:
    """A model whose weights are no numbers is a 500, or an error among a stream's events, and never a 200 with text."""
    model_id = f"tiny/{name}-without-numbers"
    folder = changed_models.copy(models_dir, name, model_id)
    model = kind.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.save_pretrained(folder)
    model_type = "text-generation" if name == "gpt2" else "text2text-generation"
    client.post("/api/huggingface/models", json={"model_id": model_id, "name": name, "model_type": model_type})
    for way in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
        body = {"model_id": model_id, "prompt": "The cat", "max_new_tokens": 3, **way}
        answer = client.post("/api/huggingface/generate", json=body)
        assert answer.status_code == 500, answer.get_data(as_text=True)
        assert "not numbers" in answer.get_json()["error"]
        answer = client.post("/api/huggingface/generate", json={**body, "stream": True})
        assert "not numbers" in answer.get_data(as_text=True)
        assert '"success": true' not in answer.get_data(as_text=True)
    body = {"model": model_id, "prompt": "The cat", "max_tokens": 3}
    for more in ({}, {"temperature": 0}, {"n": 2}, {"n": 1, "best_of": 2}, {"stream": True}):
        answer = client.post("/v1/completions", json={**body, **more})
        text = answer.get_data(as_text=True)
        assert "not numbers" in text
        assert answer.status_code == 500 or '"finish_reason":"' not in text
    answer = client.post("/api/huggingface/pipeline", json={"model_id": model_id, "task": model_type, "inputs": "a"})
    assert answer.status_code == 500, json.dumps(answer.get_json())
