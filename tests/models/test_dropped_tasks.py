"""The tasks that transformers 5 removed answer as transformers 4.57.6 did, and refuse by name what they cannot honour.

The golden results were made by `tests/golden/make_golden.py` on the same tiny models.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import build

from huggingface.cancellation import Cancellation
from huggingface.errors import Cancelled, InvalidRequest, UnknownField
from huggingface.tasks.question_answering import QuestionAnswering
from huggingface.tasks.text2text import Text2Text

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "tasks.json").read_text(encoding="utf-8"))["cases"]
FOX = "The quick brown fox jumps over the lazy dog."
CODES = {
    "mbart": ("en_XX", "ro_RO"),
    "mbart50": ("en_XX", "fr_XX"),
    "m2m100": ("en", "fr"),
    "nllb": ("eng_Latn", "fra_Latn"),
}


class Models:
    """Tiny models by name, each loaded once, as (model, tokenizer)."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.load = lru_cache(self._load)

    def _load(self, name: str) -> tuple[Any, Any]:
        folder = self._root / build(self._root, name)
        kind = (
            transformers.AutoModelForQuestionAnswering if name.endswith("-qa") else transformers.AutoModelForSeq2SeqLM
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")
            return kind.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)

    def text(self, name: str, task: str) -> Text2Text:
        return Text2Text(*self.load(name), task)

    def questions(self, name: str) -> QuestionAnswering:
        return QuestionAnswering(*self.load(name))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Models(tmp_path_factory.mktemp("models"))
    torch.set_num_threads(threads)


def _close(result: Any, wanted: Any) -> bool:
    """Equal, numbers to 1e-5."""
    if isinstance(wanted, float):
        return isinstance(result, float) and abs(result - wanted) <= 1e-5
    if isinstance(wanted, dict):
        return result.keys() == wanted.keys() and all(_close(result[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        if not isinstance(result, list):
            return False
        result, wanted = _comparable(result, wanted)
        return len(result) == len(wanted) and all(map(_close, result, wanted))
    return type(result) is type(wanted) and result == wanted


def _comparable(result: list[Any], wanted: list[Any]) -> tuple[list[Any], list[Any]]:
    """Both lists without what rounding decides: which of two answers of one score is first, and which are not quite 0.

    A list of a thousand answers ends with hundreds whose scores are 0 to any precision; a few of them more or less
    depend on the processor.
    """
    if not all(isinstance(item, dict) and {"score", "start"} <= item.keys() for item in [*result, *wanted]):
        return result, wanted
    if len(wanted) > 100:
        result, wanted = ([item for item in items if item["score"] > 1e-6] for items in (result, wanted))
    cuts = [i for i in range(1, len(wanted)) if abs(wanted[i]["score"] - wanted[i - 1]["score"]) > 1e-7]
    parts = list(pairwise([0, *cuts, len(wanted)]))

    def by_place(items: list[Any]) -> list[Any]:
        return [
            item
            for start, end in parts
            for item in sorted(items[start:end], key=lambda item: (item["start"], item["end"]))
        ]

    return (by_place(result), by_place(wanted)) if len(result) == len(wanted) else (result, wanted)


def _state(model: Any, tokenizer: Any) -> tuple[Any, ...]:
    """What a call must leave as it was, for others use the same model and tokenizer."""
    generation = model.generation_config.to_json_string(use_diff=False) if model.can_generate() else None
    languages = (getattr(tokenizer, "src_lang", None), getattr(tokenizer, "tgt_lang", None))
    return model.config.to_json_string(use_diff=False), generation, languages, tokenizer(FOX)["input_ids"]


# The same answers as 4.57.6 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "task"), sorted({(case["model"], case["task"]) for case in GOLDEN}), ids=lambda value: str(value)
)
def test_each_answer_equals_that_of_transformers_4_57_6(models: Models, model: str, task: str) -> None:
    """Texts, positions and shapes are the same and scores within 1e-5; model and tokenizer stay as they were."""
    ask: Any = models.questions(model) if task == "question-answering" else models.text(model, task)
    before = _state(*models.load(model))
    cases = [case for case in GOLDEN if (case["model"], case["task"]) == (model, task)]
    differing = []
    for case in cases:
        result = json.loads(json.dumps(ask(case["inputs"], **case["parameters"])))
        if not _close(result, case["result"]):
            differing.append((case["inputs"], case["parameters"], result, case["result"]))
    assert not differing, f"{len(differing)} of {len(cases)} differ, the first: {differing[0]}"
    assert _state(*models.load(model)) == before


@pytest.mark.parametrize("length", [2, 7, 30])
def test_a_max_length_that_is_asked_for_is_honoured(models: Models, length: int) -> None:
    """The answer ends there, whatever the default of 256 new tokens says."""
    model, tokenizer = models.load("nllb")
    made: list[int] = []
    original = model.generate
    try:
        model.generate = lambda **kwargs: made.append((rows := original(**kwargs)).shape[1]) or rows
        Text2Text(model, tokenizer, "text2text-generation")(FOX, max_length=length, min_length=length)
    finally:
        del model.generate
    assert made == [length]


def test_the_models_own_task_parameters_apply_to_their_task_only(models: Models) -> None:
    """T5's prefix and beams for German are not those for French, nor for a plain text."""
    answers = {
        task: models.text("t5", task)(FOX, max_new_tokens=8)[0].popitem()[1]
        for task in ("translation_en_to_de", "translation_en_to_fr", "summarization", "text2text-generation")
    }
    assert len(set(answers.values())) == len(answers)
    by_hand = models.text("t5", "text2text-generation")(
        FOX, max_new_tokens=8, prefix="translate English to French: ", num_beams=4, early_stopping=True
    )
    assert by_hand[0]["generated_text"] == answers["translation_en_to_fr"]


def test_stop_strings_end_the_answer(models: Models) -> None:
    """An answer stops at a stop string; the pipeline of 4.57.6 could not."""
    ask = models.text("marian", "translation")
    whole = ask(FOX, num_beams=1, max_new_tokens=30)[0]["translation_text"]
    stop = whole[6:8]
    cut = ask(FOX, num_beams=1, max_new_tokens=30, stop_strings=[stop])[0]["translation_text"]
    assert len(cut) < len(whole)
    assert stop in cut


def test_temperature_zero_is_greedy(models: Models) -> None:
    """Sampling at temperature 0 gives the likeliest text."""
    ask = models.text("bart", "summarization")
    sampled = ask(FOX, do_sample=True, temperature=0, num_beams=1, max_new_tokens=9)
    assert sampled == ask(FOX, do_sample=False, num_beams=1, max_new_tokens=9)


# Languages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", CODES)
def test_a_translation_between_many_languages_needs_both(models: Models, model: str) -> None:
    """Without languages the request is refused, naming the field that is missing."""
    source, target = CODES[model]
    ask = models.text(model, "translation")
    for given, missing in (({}, "src_lang"), ({"src_lang": source}, "tgt_lang"), ({"tgt_lang": target}, "src_lang")):
        with pytest.raises(InvalidRequest, match="src_lang and tgt_lang") as refused:
            ask(FOX, **given)
        assert refused.value.field == missing


@pytest.mark.parametrize("model", CODES)
@pytest.mark.parametrize("field", ["src_lang", "tgt_lang"])
@pytest.mark.parametrize("code", ["xx", "</s>", "The", ""])
def test_an_unknown_language_is_refused_with_those_there_are(models: Models, model: str, field: str, code: str) -> None:
    """A code that the tokenizer does not have names its field and leaves the tokenizer as it was."""
    source, target = CODES[model]
    before = _state(*models.load(model))
    with pytest.raises(InvalidRequest) as refused:
        models.text(model, "translation")(FOX, **{"src_lang": source, "tgt_lang": target, field: code})
    assert refused.value.field == field
    assert not code or target in str(refused.value)
    assert _state(*models.load(model)) == before


@pytest.mark.parametrize(("model", "task"), [("t5", "translation"), ("marian", "translation_en_to_de")])
def test_languages_are_refused_where_they_would_change_nothing(models: Models, model: str, task: str) -> None:
    """A model of one pair of languages does not accept codes in silence."""
    with pytest.raises(InvalidRequest, match="no language codes") as refused:
        models.text(model, task)(FOX, tgt_lang="fr")
    assert refused.value.field == "tgt_lang"


# What cannot be honoured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"temprature": 0.5}, "temprature"),
        ({"src_lang": "en"}, "src_lang"),
        ({"output_scores": True}, "output_scores"),
        ({"return_tensors": True}, "return_tensors"),
        ({"return_text": False}, "return_text"),
        ({"truncation": "yes"}, "truncation"),
        ({"stop_sequence": ""}, "stop_sequence"),
        ({"prefix": 5}, "prefix"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_length": 1}, "max_length"),
        ({"max_length": "9"}, "max_length"),
        ({"num_beams": 1, "num_return_sequences": 3}, "num_return_sequences"),
        ({"early_stopping": "maybe"}, "early_stopping"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_refused_by_name(
    models: Models, parameters: dict[str, Any], field: str
) -> None:
    """Nothing is ignored in silence, and nothing of the library's own errors comes through."""
    with pytest.raises(InvalidRequest) as refused:
        models.text("bart", "summarization")(FOX, **parameters)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("inputs", "field"),
    [(None, "inputs"), (5, "inputs"), ({}, "inputs"), ([], "inputs"), ([FOX, 5], "inputs.1"), ([[FOX]], "inputs.0")],
)
def test_inputs_that_are_not_text_are_refused_by_place(models: Models, inputs: Any, field: str) -> None:
    """`inputs` is a text or a list of texts."""
    with pytest.raises(InvalidRequest) as refused:
        models.text("bart", "summarization")(inputs)
    assert refused.value.field == field


def test_a_task_of_another_kind_is_refused(models: Models) -> None:
    """Only the three tasks from text to text can be opened."""
    with pytest.raises(InvalidRequest) as refused:
        models.text("bart", "fill-mask")
    assert refused.value.field == "task"


def test_a_text_longer_than_the_model_reads_is_refused_with_both_numbers(models: Models) -> None:
    """The message says how long the text is, how long it may be, and what to do."""
    with pytest.raises(
        InvalidRequest, match=r"has \d{4} tokens, and the model reads at most 512.*truncation"
    ) as refused:
        models.text("bart", "summarization")([FOX, FOX * 90])
    assert refused.value.field == "inputs.1"
    assert models.text("bart", "summarization")(FOX * 90, truncation=True, max_new_tokens=3)


def test_an_answer_longer_than_the_model_writes_is_refused(models: Models) -> None:
    """The decoder's positions end, and that is said before they do."""
    with pytest.raises(InvalidRequest, match="512") as refused:
        models.text("bart", "summarization")(FOX, max_new_tokens=600, min_length=590, num_beams=1)
    assert refused.value.field == "max_new_tokens"


def test_unknown_parameters_say_what_is_known(models: Models) -> None:
    """The refusal lists what is accepted, for both kinds of task."""
    with pytest.raises(UnknownField, match="num_beams"):
        models.text("t5", "summarization")(FOX, beams=2)
    with pytest.raises(UnknownField, match="max_answer_len"):
        models.questions("bert-qa")({"question": "Who?", "context": FOX}, max_answer_length=2)


# Giving up ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 4])
def test_a_cancelled_text_stops_at_the_next_token(models: Models, beams: int) -> None:
    """The probe is asked before every text and after every token, and its Yes is the end."""
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked == 5

    with pytest.raises(Cancelled):
        models.text("nllb", "summarization")(FOX, num_beams=beams, min_length=100, cancellation=Cancellation(cancelled))
    assert asked == 5


def test_a_cancelled_question_stops_at_the_next_piece(models: Models) -> None:
    """A long context is given up between its pieces."""
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    ask = models.questions("bert-qa")
    with pytest.raises(Cancelled):
        ask({"question": "Who?", "context": FOX * 90}, max_seq_len=64, cancellation=Cancellation(cancelled))
    assert asked == 3


# Questions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        (FOX, "inputs"),
        ([], "inputs"),
        ([FOX], "inputs.0"),
        ({"question": "Who?"}, "inputs.context"),
        ([{"context": FOX}], "inputs.0.question"),
        ({"question": "Who?", "context": ""}, "inputs.context"),
        ({"question": "", "context": FOX}, "inputs.question"),
        ({"question": None, "context": FOX}, "inputs.question"),
        ({"question": "Who?", "context": FOX, "id": 7}, "inputs.id"),
        ({"question": [], "context": FOX}, "inputs.question"),
        ({"question": ["Who?", 5], "context": FOX}, "inputs.question.1"),
        ({"question": ["Who?", "When?"], "context": [FOX]}, "inputs.context"),
        ({"question": "Who?", "context": [FOX]}, "inputs.context"),
    ],
)
def test_a_question_of_the_wrong_form_is_refused_by_place(models: Models, inputs: Any, field: str) -> None:
    """`inputs` is a question with its context, or a list of them."""
    with pytest.raises(InvalidRequest) as refused:
        models.questions("bert-qa")(inputs)
    assert refused.value.field == field


@pytest.mark.parametrize("model", ["bert-qa", "canine-qa"])
@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"top_k": 0}, "top_k"),
        ({"max_answer_len": 0}, "max_answer_len"),
        ({"max_seq_len": True}, "max_seq_len"),
        ({"doc_stride": -1}, "doc_stride"),
        ({"doc_stride": 65, "max_seq_len": 64}, "doc_stride"),
        ({"max_seq_len": 4, "doc_stride": 1}, "inputs.question"),
        ({"padding": "left"}, "padding"),
        ({"handle_impossible_answer": "yes"}, "handle_impossible_answer"),
    ],
)
def test_a_question_parameter_that_cannot_be_honoured_is_refused_by_name(
    models: Models, model: str, parameters: dict[str, Any], field: str
) -> None:
    """Lengths that leave no room for the context are refused; the tokenizer would abort the thread."""
    with pytest.raises(InvalidRequest) as refused:
        models.questions(model)({"question": "Who jumps over it?", "context": FOX * 9}, **parameters)
    assert refused.value.field == field


def test_pieces_must_hold_more_than_they_share(models: Models) -> None:
    """A `doc_stride` that leaves nothing new in a piece is refused with both numbers."""
    asked = {"question": "Who jumps over it?", "context": FOX * 9}
    with pytest.raises(InvalidRequest, match="must hold more than the 60") as refused:
        models.questions("bert-qa")(asked, max_seq_len=64, doc_stride=60)
    assert refused.value.field == "doc_stride"


def test_pieces_longer_than_the_model_reads_are_refused(models: Models) -> None:
    """The model's positions are a limit for `max_seq_len`."""
    with pytest.raises(InvalidRequest, match="at most 512") as refused:
        models.questions("roberta-qa")({"question": "Who?", "context": FOX * 90}, max_seq_len=700)
    assert refused.value.field == "max_seq_len"


def test_a_question_longer_than_asked_for_is_refused_not_cut(models: Models) -> None:
    """4.57.6 ignored `max_question_len` with most tokenizers; here it holds or is refused."""
    asked = {"question": "Who jumps over the lazy dog?", "context": FOX}
    with pytest.raises(InvalidRequest, match="questions are never cut") as refused:
        models.questions("bert-qa")(asked, max_question_len=3)
    assert refused.value.field == "max_question_len"


@pytest.mark.parametrize("model", ["bert-qa", "roberta-qa"])
def test_an_answer_stands_in_the_context_where_it_says(models: Models, model: str) -> None:
    """`context[start:end]` is the answer, also beyond the first piece and in text that is not ASCII."""
    context = " ".join(f"Zoë's naïve {number} café — 東京, ﬁne ½ 😀." for number in range(40))
    answers = models.questions(model)({"question": "Where?", "context": context}, top_k=50, max_seq_len=60)
    assert any(answer["start"] > 300 for answer in answers)
    assert all(context[answer["start"] : answer["end"]] == answer["answer"] for answer in answers)
