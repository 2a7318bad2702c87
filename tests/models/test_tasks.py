"""Tasks on real models: results are those of transformers' own pipelines, and bad requests are refused by name."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from task_models import CHAT, HEAD_OF, LONG, TABLE, Models, on_one_thread

from huggingface.errors import InvalidRequest, UnsupportedTask
from huggingface.tasks import HEADS, MODEL_TYPES, TASKS, canonical_task, supported_tasks
from huggingface.tasks.runner import TaskRunner


@pytest.fixture(scope="module")
def models(models_dir: Path, tiny: Callable[[str], str]) -> Iterator[Models]:
    """The tiny models of the session."""
    with on_one_thread():
        yield Models(models_dir, tiny)


# The table ------------------------------------------------------------------------------------------------------------


def test_a_task_is_known_by_its_name_its_aliases_and_translation_by_its_languages() -> None:
    assert all(canonical_task(name) == name for name in TASKS)
    assert canonical_task("sentiment-analysis") == "text-classification"
    assert canonical_task("ner") == "token-classification"
    assert canonical_task("translation_en_to_fr") == "translation"


@pytest.mark.parametrize("task", ["", "summarise", "translation_en", "translation_to_fr", "translation_en_to_", "Ner"])
def test_an_unknown_task_is_refused_with_the_names_there_are(task: str) -> None:
    with pytest.raises(InvalidRequest, match="sentiment-analysis") as refused:
        canonical_task(task)
    assert refused.value.field == "task"


def test_the_eight_documented_model_types_and_every_task_may_be_registered() -> None:
    documented = {"text-generation", "conversational", "text2text-generation", "summarization", "translation"}
    documented |= {"question-answering", "fill-mask", "sentiment-analysis"}
    assert documented | set(TASKS) | {"ner"} == set(MODEL_TYPES)
    for name, kind in MODEL_TYPES.items():
        assert (kind.name, set(kind.heads) <= set(HEADS)) == (name, True)
        assert any(kind.task in map(canonical_task, supported_tasks(head)) for head in kind.heads)
    assert MODEL_TYPES["conversational"].heads == ("causal-lm", "seq2seq-lm")


def test_the_table_of_tasks_is_read_without_torch() -> None:
    code = "import sys, huggingface.tasks, huggingface.api.parameters.schemas; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent.parent)


@pytest.mark.parametrize("name", HEAD_OF)
def test_a_model_does_every_task_that_its_head_is_said_to_do(models: Models, name: str) -> None:
    runner = models.runner(name)
    assert set(supported_tasks(HEAD_OF[name])) <= set(runner.supported)


def test_feature_extraction_is_offered_by_encoder_decoders_only_where_a_text_alone_is_enough(models: Models) -> None:
    assert "feature-extraction" in models.runner("bart").supported
    assert "feature-extraction" not in models.runner("t5").supported
    with pytest.raises(UnsupportedTask, match="It can do: text2text-generation, summarization"):
        models.run("t5", "feature-extraction", "the cat")


def test_a_task_that_the_model_cannot_do_is_refused_with_those_it_can(models: Models) -> None:
    with pytest.raises(UnsupportedTask) as refused:
        models.run("distilbert-sst2", "fill-mask", "the cat")
    assert str(refused.value) == (
        "Model 'tiny/distilbert-sst2' cannot do 'fill-mask'. It can do: "
        "sentiment-analysis, text-classification, zero-shot-classification, feature-extraction"
    )


# The same answer as transformers --------------------------------------------------------------------------------------

SAME: list[tuple[str, str, Any, dict[str, Any]]] = [
    *[
        (model, "text-generation", inputs, parameters)
        for model in ("gpt2", "llama")
        for inputs in ("The cat sat", ["The cat sat"], ["The cat sat", "a dog"], "")
        for parameters in (
            {"max_new_tokens": 6},
            {"max_new_tokens": 6, "do_sample": False},
            {"max_length": 16},
            {"max_length": 16, "prefix": "Once "},
            {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2},
            {"max_new_tokens": 9, "stop_sequence": "e", "return_full_text": False},
            {"min_length": 8, "max_length": 16, "top_k": 5},
        )
    ],
    *[
        ("llama", "text-generation", inputs, parameters)
        for inputs in (CHAT, [CHAT, [*CHAT, {"role": "assistant", "content": "The cat"}]])
        for parameters in ({"max_new_tokens": 5}, {"max_length": 60}, {"max_new_tokens": 5, "return_full_text": False})
    ],
    *[
        ("bert-mlm", "fill-mask", inputs, parameters)
        for inputs in ("the [MASK] sat", ["the [MASK] sat"], ["the [MASK] sat", "[MASK] [MASK]"])
        for parameters in ({}, {"top_k": 2}, {"targets": ["the", "a"]}, {"targets": "cats"})
    ],
    ("roberta-mlm", "fill-mask", "the <mask> sat", {}),
    ("bart", "fill-mask", "the <mask> sat", {}),
    *[
        ("distilbert-sst2", task, inputs, parameters)
        for task in ("sentiment-analysis", "text-classification")
        for inputs in ("good", ["good"], ["good", "bad", ""], {"text": "a", "text_pair": "b"}, [{"text": "a"}, "b"])
        for parameters in ({}, {"top_k": 1}, {"top_k": None}, {"function_to_apply": "sigmoid", "top_k": 2})
    ],
    *[
        ("bert-ner", task, inputs, parameters)
        for task in ("ner", "token-classification")
        for inputs in ("The cat sat in London", ["The cat sat in London", "a"], "")
        for parameters in (
            {},
            *({"aggregation_strategy": name} for name in ("none", "simple", "first", "average", "max")),
            {"ignore_labels": ["B-PER", "I-LOC"]},
        )
    ],
    ("bert-ner", "ner", LONG, {}),
    ("bert-ner", "ner", LONG, {"stride": 40, "aggregation_strategy": "simple"}),
    ("bert-ner", "ner", ["The", "cat"], {"is_split_into_words": True}),
    ("bert-ner", "ner", [["The", "cat"], ["a"]], {"is_split_into_words": True, "delimiter": "-"}),
    *[
        (model, "zero-shot-classification", inputs, parameters)
        for model in ("bert-nli", "distilbert-sst2")
        for inputs in ("the cat", ["the cat"], ["the cat", LONG])
        for parameters in (
            {"candidate_labels": ["animal", "city", "food"]},
            {"candidate_labels": "animal, city", "multi_label": True},
            {"candidate_labels": ["animal"], "hypothesis_template": "It is {}"},
        )
    ],
    *[
        (model, "feature-extraction", inputs, parameters)
        for model in HEAD_OF
        if model not in ("t5", "tapas")
        for inputs in ("the cat", ["the cat", "a dog ran"])
        for parameters in ({}, {"truncation": True})
    ],
    *[
        ("tapas", "table-question-answering", inputs, parameters)
        for inputs in (
            {"table": TABLE, "query": "how old is the cat"},
            [{"table": TABLE, "query": "how old is the cat"}],
            [{"table": TABLE, "query": "how old is the cat"}, {"table": TABLE, "query": "who"}],
            {"table": TABLE, "query": ["how old is the cat", "who"]},
            {"table": [{"name": "cat", "age": "1"}, {"name": "dog", "age": "2"}], "query": "who"},
        )
        for parameters in ({}, {"sequential": True})
    ],
]


def groups() -> list[Any]:
    """The cases by model and task."""
    return [
        pytest.param([case for case in SAME if case[:2] == key], id="-".join(key))
        for key in dict.fromkeys(case[:2] for case in SAME)
    ]


@pytest.mark.parametrize("cases", groups())
def test_a_task_answers_exactly_as_the_pipeline_of_transformers(models: Models, cases: list[Any]) -> None:
    for name, task, inputs, parameters in cases:
        before = copy.deepcopy(inputs)
        answer = models.run(name, task, inputs, **parameters)
        assert answer == models.upstream(name, task, inputs, **parameters), (inputs, parameters)
        assert inputs == before, "the caller's inputs were changed"


def test_the_aliases_are_the_tasks_they_stand_for_on_one_pipeline(models: Models) -> None:
    runner = TaskRunner(*models.load("distilbert-sst2"), "sequence-classification")
    assert runner.opened == ()
    assert runner.run("sentiment-analysis", "good", {}) == runner.run("text-classification", "good", {})
    runner.run("sentiment-analysis", "bad", {})
    assert runner.opened == ("sentiment-analysis", "text-classification")


def test_translations_between_any_languages_are_opened_as_one(models: Models) -> None:
    runner = TaskRunner(*models.load("t5"), "seq2seq-lm")
    for task in ("translation_en_to_fr", "translation_en_to_de", "summarization"):
        assert runner.run(task, "the cat", {"max_new_tokens": 20, "num_beams": 1})
    assert runner.opened == ("translation", "summarization")


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("gpt2", [("text-generation", "a", {"max_length": 9}), ("feature-extraction", "a", {})]),
        (
            "distilbert-sst2",
            [("zero-shot-classification", "a", {"candidate_labels": "x"}), ("sentiment-analysis", "a", {})],
        ),
        ("bart", [("summarization", "the cat", {"num_beams": 2, "max_length": 9}), ("fill-mask", "<mask>", {})]),
    ],
)
def test_running_tasks_changes_neither_the_model_nor_its_tokenizer(
    models: Models, name: str, calls: list[tuple[str, Any, dict[str, Any]]]
) -> None:
    model_id, model, tokenizer = models.load(name)

    def state() -> Any:
        return (
            model.config.to_dict(),
            model.generation_config.to_dict() if model.can_generate() else None,
            (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token, tokenizer.model_max_length),
            [parameter.data_ptr() for parameter in model.parameters()],
        )

    before = copy.deepcopy(state())
    runner = TaskRunner(model_id, model, tokenizer, HEAD_OF[name])
    for task, inputs, parameters in calls:
        runner.run(task, inputs, parameters)
    assert state() == before
