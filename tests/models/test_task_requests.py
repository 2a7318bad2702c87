"""What a task refuses and by which name, how it is cancelled, and that many calls cost no memory."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from task_models import CHAT, LONG, TABLE, Models, on_one_thread

from huggingface.cancellation import Cancellation
from huggingface.errors import Cancelled, GenerationFailed, InvalidRequest, MissingField
from huggingface.tasks.positions import max_positions
from huggingface.tasks.runner import TaskRunner


@pytest.fixture(scope="module")
def models(models_dir: Path, tiny: Callable[[str], str]) -> Iterator[Models]:
    """The tiny models of the session."""
    with on_one_thread():
        yield Models(models_dir, tiny)


# What the prompt's length decides -------------------------------------------------------------------------------------


def new_tokens(models: Models, name: str, prompt: str, **parameters: Any) -> int:
    """How many tokens a greedy answer has, counted by what the model was asked to compute."""
    runner = models.runner(name)
    seen = []
    counting = Cancellation(lambda: bool(seen.append(1)))
    runner.run("text-generation", prompt, {"do_sample": False, **parameters}, counting)
    return len(seen) - 1  # asked once before the prompt, then after each token


def test_a_total_length_that_is_asked_for_is_honoured_over_the_models_own_number_of_new_tokens(
    models: Models,
) -> None:
    model_id, model, tokenizer = models.load("gpt2")
    model.generation_config.max_new_tokens = 3
    runner = TaskRunner(model_id, model, tokenizer, "causal-lm")
    models.runners["gpt2-short"] = runner
    prompt = len(tokenizer("The cat sat")["input_ids"])
    assert new_tokens(models, "gpt2-short", "The cat sat") == 3
    assert new_tokens(models, "gpt2-short", "The cat sat", max_length=prompt + 8) == 8
    model.generation_config.max_new_tokens = None
    model.generation_config.max_length = prompt + 2
    assert new_tokens(models, "gpt2-short", "The cat sat") == 2
    assert new_tokens(models, "gpt2-short", "The cat sat", max_new_tokens=5) == 5


def test_without_a_length_256_tokens_are_made_or_as_many_as_the_model_has_room_for(models: Models) -> None:
    prompt = len(models.load("gpt2")[2]("The cat sat")["input_ids"])
    suppressed = {"suppress_tokens": [0]}  # the end of text
    assert new_tokens(models, "gpt2", "The cat sat", **suppressed) == 257 - prompt
    assert new_tokens(models, "llama", "The cat sat", suppress_tokens=[2]) == 256


@pytest.mark.parametrize(
    ("inputs", "parameters", "field", "words"),
    [
        (LONG, {}, "inputs", "tokens, but the model can read at most 256"),
        (["a", LONG], {"max_new_tokens": 1}, "inputs", "at most 256"),
        ("The cat", {"max_new_tokens": 300}, "max_new_tokens", "leaves room for 254 new tokens"),
        ("The cat", {"max_length": 300}, "max_length", "the model can read at most 256"),
        ("The cat sat on the mat", {"max_length": 3}, "max_length", "must exceed the prompt, which has 9 tokens"),
        ("The cat", {"min_length": 50, "max_new_tokens": 4}, "min_length", "asks for 50 tokens"),
        ("The cat", {"min_new_tokens": 300}, "min_new_tokens", "may have at most 257"),
        (LONG, {"handle_long_generation": "hole", "max_new_tokens": 300}, "handle_long_generation", "more than"),
    ],
)
def test_a_length_that_the_model_has_no_room_for_is_refused_with_the_numbers(
    models: Models, inputs: Any, parameters: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        models.run("gpt2", "text-generation", inputs, **parameters)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "name", ["gpt2", "bart", "bert-mlm", "roberta-mlm", "distilbert-sst2", "bert-ner", "bert-embed"]
)
def test_the_longest_input_is_exactly_what_the_model_can_read(models: Models, name: str) -> None:
    _, model, _ = models.load(name)
    base, limit = model.base_model, max_positions(model)
    assert limit is not None
    # Token 4 is no padding in any of them; RoBERTa numbers positions of padding otherwise.
    with torch.no_grad():
        base(input_ids=torch.full((1, limit), 4))
        with pytest.raises((IndexError, RuntimeError)):
            base(input_ids=torch.full((1, limit + 1), 4))


def test_models_that_compute_positions_have_no_longest_input(models: Models) -> None:
    assert max_positions(models.load("llama")[1]) is None
    assert max_positions(models.load("t5")[1]) is None


@pytest.mark.parametrize(
    ("name", "task", "inputs"),
    [
        ("bert-mlm", "fill-mask", f"[MASK] {LONG}"),
        ("distilbert-sst2", "text-classification", LONG),
        ("bert-embed", "feature-extraction", LONG),
        ("bert-embed", "feature-extraction", ["a", LONG]),
    ],
)
def test_a_text_too_long_for_the_model_is_refused_with_both_numbers(
    models: Models, name: str, task: str, inputs: Any
) -> None:
    with pytest.raises(InvalidRequest, match=r"inputs': \d{4} tokens, but the model can read at most 512") as refused:
        models.run(name, task, inputs)
    assert refused.value.field == "inputs"


# Wrong inputs ---------------------------------------------------------------------------------------------------------

NOT_TEXT: list[Any] = [None, 5, True, {}, {"a": "b"}, [], [5], [None], ["a", 5], "\ud800", ["\ud800"]]


@pytest.mark.parametrize(
    ("name", "task", "parameters", "wrong"),
    [
        ("gpt2", "text-generation", {"max_new_tokens": 2}, [*NOT_TEXT, [[]], ["a", []]]),
        (
            "llama",
            "text-generation",
            {"max_new_tokens": 2},
            [
                [{"role": "user"}],
                [{"content": "a"}],
                [{"role": 5, "content": "a"}],
                [{"role": "user", "content": 5}],
                [{"role": "user", "content": None}],
                [CHAT, "a"],
                [CHAT, []],
                [*CHAT, "a"],
            ],
        ),
        ("bert-mlm", "fill-mask", {}, [*NOT_TEXT, "", "no mask", ["[MASK]", "no mask"], ["[MASK]", ""], [["[MASK]"]]]),
        (
            "distilbert-sst2",
            "sentiment-analysis",
            {},
            [*NOT_TEXT, [["a", "b"]], {"text_pair": "a"}, {"text": 5}, {"text": "a", "padding": "max_length"}],
        ),
        ("bert-ner", "ner", {}, [*NOT_TEXT, [["a"]]]),
        ("bert-ner", "ner", {"is_split_into_words": True}, [*NOT_TEXT, "a", [["a"], []], [["a"], "b"]]),
        ("bert-nli", "zero-shot-classification", {"candidate_labels": ["a"]}, [*NOT_TEXT, "", ["a", ""]]),
        ("bert-embed", "feature-extraction", {}, [*NOT_TEXT, [["a"]]]),
        ("gpt2", "feature-extraction", {}, [*NOT_TEXT, ""]),
        (
            "tapas",
            "table-question-answering",
            {},
            [
                *NOT_TEXT,
                "a",
                {"query": "a"},
                {"table": TABLE},
                {"table": TABLE, "query": ""},
                {"table": TABLE, "query": []},
                {"table": TABLE, "query": ["a", ""]},
                {"table": TABLE, "query": 5},
                {"table": TABLE, "query": "a", "more": 1},
                {"table": None, "query": "a"},
                {"table": "a", "query": "a"},
                {"table": {}, "query": "a"},
                {"table": {"a": []}, "query": "a"},
                {"table": {"a": "b"}, "query": "a"},
                {"table": {"a": [5]}, "query": "a"},
                {"table": {"a": ["1"], "b": ["1", "2"]}, "query": "a"},
                {"table": [{"a": "1"}, {"b": "1"}], "query": "a"},
                {"table": [], "query": "a"},
                {"table": [["a"]], "query": "a"},
                {"table": {"a": ["1"] * 300}, "query": "a"},
                {"table": {str(column): ["1"] for column in range(300)}, "query": "a"},
            ],
        ),
        ("bart", "summarization", {}, [*NOT_TEXT]),
        ("bert-qa", "question-answering", {}, [*NOT_TEXT, {"question": "a"}, {"question": "", "context": "a"}]),
    ],
)
def test_inputs_of_the_wrong_shape_are_refused_and_named(
    models: Models, name: str, task: str, parameters: dict[str, Any], wrong: list[Any]
) -> None:
    for inputs in wrong:
        with pytest.raises(InvalidRequest) as refused:
            models.run(name, task, inputs, **parameters)
        assert refused.value.field is not None, inputs
        assert refused.value.field.split(".")[0] == "inputs", inputs


@pytest.mark.parametrize(
    ("name", "task", "inputs", "parameters", "field"),
    [
        ("gpt2", "text-generation", CHAT, {}, "inputs"),
        ("llama", "text-generation", CHAT, {"prefix": "a"}, "prefix"),
        ("llama", "text-generation", CHAT, {"add_special_tokens": True}, "add_special_tokens"),
        ("llama", "text-generation", "a", {"continue_final_message": True}, "continue_final_message"),
        ("gpt2", "text-generation", "a", {"clean_up_tokenization_spaces": True}, "clean_up_tokenization_spaces"),
        ("gpt2", "text-generation", "a", {"num_return_sequences": 2, "do_sample": False}, "num_return_sequences"),
        ("gpt2", "text-generation", "a", {"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences"),
        ("gpt2", "text-generation", "a", {"eos_token_id": 512}, "eos_token_id"),
        ("gpt2", "text-generation", "a", {"suppress_tokens": [1, 512]}, "suppress_tokens"),
        ("gpt2", "text-generation", "a", {"suppress_tokens": list(range(512))}, "suppress_tokens"),
        ("gpt2", "text-generation", "a", {"bad_words_ids": [[1], [1, 512]]}, "bad_words_ids"),
        ("gpt2", "text-generation", "a", {"sequence_bias": [[[1, 512], 1.0]]}, "sequence_bias"),
        ("bart", "summarization", "a", {"forced_bos_token_id": 512}, "forced_bos_token_id"),
        ("bart", "summarization", "a", {"num_return_sequences": 5}, "num_return_sequences"),
        ("bert-mlm", "fill-mask", "[MASK]", {"top_k": 1000}, "top_k"),
        ("bert-mlm", "fill-mask", "[MASK]", {"targets": ["the", " "]}, "targets"),
        ("bert-mlm", "fill-mask", "[MASK]", {"tokenizer_kwargs": {"max_length": 2}}, "tokenizer_kwargs.max_length"),
        ("bert-embed", "feature-extraction", "a", {"tokenize_kwargs": {"max_length": 2}}, "tokenize_kwargs.max_length"),
        ("distilbert-sst2", "text-classification", "a", {"max_length": 2}, "max_length"),
        ("distilbert-sst2", "text-classification", {"text": "a", "text_pair": "b"}, {"max_length": 3}, "max_length"),
        ("bert-ner", "ner", "a", {"stride": 510}, "stride"),
        ("bert-qa", "question-answering", {"question": "a", "context": "b"}, {"doc_stride": 500}, "doc_stride"),
        ("t5", "translation_en_to_fr", "a", {"src_lang": "en"}, "src_lang"),
    ],
)
def test_a_parameter_that_this_model_cannot_honour_is_refused_by_name(
    models: Models, name: str, task: str, inputs: Any, parameters: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        models.run(name, task, inputs, **parameters)
    assert refused.value.field == field


def test_a_chat_that_the_template_does_not_accept_is_refused_with_the_templates_words(models: Models) -> None:
    model_id, model, tokenizer = models.load("llama")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    runner = TaskRunner(model_id, model, tokenizer, "causal-lm")
    with pytest.raises(InvalidRequest, match="does not accept this chat: roles must alternate") as refused:
        runner.run("text-generation", CHAT, {})
    assert refused.value.field == "inputs"


def test_zero_shot_classification_without_labels_says_what_is_missing(models: Models) -> None:
    with pytest.raises(MissingField, match=r"^Missing required field: candidate_labels$"):
        models.run("bert-nli", "zero-shot-classification", "the cat")


def test_a_result_that_json_cannot_say_is_a_failure_and_never_an_answer(models: Models) -> None:
    model_id, model, tokenizer = models.load("bert-embed")
    with torch.no_grad():
        model.embeddings.LayerNorm.weight[0] = math.nan
    with pytest.raises(GenerationFailed):
        TaskRunner(model_id, model, tokenizer, "base").run("feature-extraction", "the cat", {})


def test_a_failure_inside_the_model_is_typed_and_tells_nothing_but_model_and_task(models: Models) -> None:
    model_id, model, tokenizer = models.load("distilbert-sst2")
    model.classifier = torch.nn.Linear(3, 3)
    runner = TaskRunner(model_id, model, tokenizer, "sequence-classification")
    with pytest.raises(GenerationFailed) as failed:
        runner.run("sentiment-analysis", "good", {})
    assert str(failed.value) == "Model 'tiny/distilbert-sst2' failed to do 'sentiment-analysis'"
    assert isinstance(failed.value.__cause__, RuntimeError)
    assert runner.opened == ()


def test_positions_that_are_not_recognised_are_still_an_error_of_the_request(models: Models) -> None:
    model_id, model, tokenizer = models.load("gpt2")
    model.transformer.add_module("places", model.transformer.wpe)
    del model.transformer._modules["wpe"]
    type(model.transformer).wpe = property(lambda self: self.places)  # the same table by a name of its own
    try:
        assert max_positions(model) is None
        runner = TaskRunner(model_id, model, tokenizer, "causal-lm")
        with pytest.raises(InvalidRequest, match="at most 256"):
            runner.run("feature-extraction", LONG, {})
    finally:
        del type(model.transformer).wpe


# Cancelling, and many calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "inputs", "parameters"),
    [
        ("gpt2", "text-generation", "a", {"max_new_tokens": 200}),
        ("gpt2", "text-generation", "a", {"max_new_tokens": 200, "num_beams": 2}),
        ("bart", "summarization", "the cat", {"min_new_tokens": 20, "max_new_tokens": 30}),
        ("bert-mlm", "fill-mask", ["[MASK]"] * 9, {}),
        ("distilbert-sst2", "sentiment-analysis", ["a"] * 9, {}),
        ("bert-nli", "zero-shot-classification", "a", {"candidate_labels": list("abcdefghi")}),
        ("bert-ner", "ner", "the cat " * 2000, {"stride": 0, "aggregation_strategy": "simple"}),
        ("bert-embed", "feature-extraction", ["a"] * 9, {}),
        ("tapas", "table-question-answering", [{"table": TABLE, "query": "a"}] * 9, {}),
        ("bert-qa", "question-answering", [{"question": "a", "context": "b"}] * 9, {}),
    ],
)
def test_a_cancelled_task_stops_between_tokens_items_and_pieces(
    models: Models, name: str, task: str, inputs: Any, parameters: dict[str, Any]
) -> None:
    asked: list[int] = []
    cancellation = Cancellation(lambda: len(asked) > 2 or bool(asked.append(1)))
    with pytest.raises(Cancelled):
        models.runner(name).run(task, inputs, parameters, cancellation)
    assert len(asked) == 3
    assert models.run(name, task, inputs[:1] if isinstance(inputs, list) else inputs, **parameters)


def resident() -> int:
    """The memory that this process has, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_memory_stays_flat_over_many_calls_of_many_lengths(models: Models) -> None:
    def calls(count: int) -> None:
        for index in range(count):
            text = "the cat sat " * (index % 30 + 1)
            models.run("distilbert-sst2", "sentiment-analysis", [text, "good"])
            models.run("bert-ner", "ner", text, aggregation_strategy="simple")
            if index % 10 == 0:
                models.run("gpt2", "text-generation", text, max_new_tokens=3)
                models.run("bert-nli", "zero-shot-classification", text, candidate_labels=["a", f"label {index}"])
        gc.collect()

    calls(100)
    before = resident()
    calls(300)
    assert resident() - before < 4 * 2**20


def test_a_finished_call_keeps_nothing_of_the_request(models: Models) -> None:
    class Request:
        def cancelled(self) -> bool:
            return False

    request = Request()
    models.runner("gpt2").run("text-generation", "a", {"max_new_tokens": 2}, Cancellation(request.cancelled))
    gc.collect()
    assert not [found for found in gc.get_referrers(request) if type(found).__name__ == "method"]
