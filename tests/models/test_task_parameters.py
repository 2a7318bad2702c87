"""Every parameter that a task accepts changes the answer of some model: none is accepted and then ignored."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from task_models import CHAT, TABLE, Models, on_one_thread

from huggingface.api.parameters.schemas import TASK_PARAMETERS, CommonGeneration, validate
from huggingface.errors import InvalidRequest


@pytest.fixture(scope="module")
def models(models_dir: Path, tiny: Callable[[str], str]) -> Iterator[Models]:
    """The tiny models of the session."""
    with on_one_thread():
        yield Models(models_dir, tiny)


TEXT = "The cat sat on the mat and the dog sat"


def some_tokens(seed: int, count: int) -> list[int]:
    """Tokens that are not special."""
    return sorted(random.Random(seed).sample(range(3, 512), count))


def some_ends(seed: int) -> dict[str, Any]:
    """Beams that end at different lengths, because many tokens end them."""
    return {"num_beams": 3, "eos_token_id": some_tokens(seed, 60), "length_penalty": 3.0}


# For each parameter: what else is asked in both calls, and the parameter's value in the second.
GREEDY = {"do_sample": False, "num_beams": 1, "max_new_tokens": 12}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 1.0}
BEAMS = {**GREEDY, "num_beams": 3}
COMMON: dict[str, tuple[dict[str, Any], Any]] = {
    "max_new_tokens": ({"do_sample": False, "num_beams": 1}, 3),
    "max_time": (GREEDY, 1e-9),
    "do_sample": (GREEDY, True),
    "temperature": (SAMPLED, 0.05),
    "top_k": (SAMPLED, 1),
    "top_p": (SAMPLED, 0.01),
    "min_p": (SAMPLED, 1.0),
    "top_h": (SAMPLED, 0.01),
    "typical_p": (SAMPLED, 0.01),
    "epsilon_cutoff": (SAMPLED, 0.9),
    "eta_cutoff": (SAMPLED, 0.9),
    "repetition_penalty": (GREEDY, 5.0),
    "encoder_repetition_penalty": (GREEDY, 50.0),
    "no_repeat_ngram_size": (GREEDY, 1),
    "encoder_no_repeat_ngram_size": ({**GREEDY, "encoder_repetition_penalty": 50.0}, 1),
    "forced_eos_token_id": (GREEDY, 200),
    "sequence_bias": (GREEDY, [[[77], 100.0]]),
    "exponential_decay_length_penalty": (GREEDY, [1, 2.0]),
    "num_beams": (GREEDY, 4),
    "num_return_sequences": (BEAMS, 2),
}
# Those that depend on which tokens the model makes: its second greedy token, and that token's text.
BY_MODEL: dict[str, dict[str, tuple[dict[str, Any], Any]]] = {
    "gpt2": {
        "max_length": ({"do_sample": False}, 16),
        "min_new_tokens": ({**GREEDY, "eos_token_id": 413}, 5),
        "min_length": ({**GREEDY, "eos_token_id": 413}, 22),
        "stop_strings": (GREEDY, "gh"),
        "eos_token_id": (GREEDY, 413),
        "bad_words_ids": (GREEDY, [[413]]),
        "suppress_tokens": (GREEDY, [413]),
        "begin_suppress_tokens": (GREEDY, [371]),
        "renormalize_logits": ({**BEAMS, "suppress_tokens": some_tokens(3, 200)}, True),
        "length_penalty": ({**GREEDY, **some_ends(1)}, -5.0),
        "early_stopping": ({**GREEDY, **some_ends(3)}, True),
        "guidance_scale": (GREEDY, 5.0),
        "return_full_text": (GREEDY, False),
        "prefix": (GREEDY, "Once "),
        "stop_sequence": (GREEDY, ["gh", "zzz"]),
        "skip_special_tokens": ({**GREEDY, "forced_eos_token_id": 0}, False),
    },
    "bart": {
        "max_length": ({"do_sample": False, "num_beams": 1}, 5),
        "min_new_tokens": ({**GREEDY, "eos_token_id": 8}, 5),
        "min_length": ({**GREEDY, "eos_token_id": 8}, 8),
        "stop_strings": (GREEDY, "B"),
        "eos_token_id": (GREEDY, 8),
        "bad_words_ids": (GREEDY, [[8]]),
        "suppress_tokens": (GREEDY, [8]),
        "begin_suppress_tokens": (GREEDY, [8]),
        "renormalize_logits": ({**BEAMS, "suppress_tokens": some_tokens(0, 200)}, True),
        "length_penalty": ({**GREEDY, **some_ends(0)}, -5.0),
        "early_stopping": ({**GREEDY, **some_ends(0)}, True),
        "forced_bos_token_id": (GREEDY, 50),
        "decoder_start_token_id": (GREEDY, 50),
        "prefix": (GREEDY, "summarize: "),
        "stop_sequence": (GREEDY, "B"),
    },
}
LONG = "the cat sat in London " * 200
QUESTION = {"question": "Where is the cat?", "context": "The cat sat on the mat. The dog ran to the house in London."}
LABELS = {"candidate_labels": ["animal", "city", "food"]}

# A task's own: model, inputs, what else is asked, and the value.
OWN: dict[str, dict[str, tuple[str, Any, dict[str, Any], Any]]] = {
    "text-generation": {
        "truncation": ("gpt2", LONG, {**GREEDY, "max_new_tokens": 1}, True),
        "handle_long_generation": ("gpt2", LONG, GREEDY, "hole"),
        "add_special_tokens": ("llama", TEXT, GREEDY, False),
        "clean_up_tokenization_spaces": ("gpt2", TEXT, GREEDY, True),
        "continue_final_message": ("llama", CHAT, GREEDY, True),
    },
    "text2text-generation": {
        "truncation": ("bart", LONG, GREEDY, True),
        "clean_up_tokenization_spaces": (
            "bart",
            TEXT,
            {**GREEDY, "sequence_bias": [[[225], 100.0], [[225, 18], 300.0]]},
            True,
        ),
    },
    "translation": {
        "src_lang": ("mbart", TEXT, {**GREEDY, "tgt_lang": "fr_XX"}, "de_DE"),
        "tgt_lang": ("mbart", TEXT, {**GREEDY, "src_lang": "en_XX"}, "de_DE"),
    },
    "question-answering": {
        "top_k": ("bert-qa", QUESTION, {}, 3),
        "doc_stride": ("bert-qa", QUESTION, {"max_seq_len": 20, "top_k": 9}, 2),
        "max_answer_len": ("bert-qa", QUESTION, {"top_k": 5}, 1),
        "max_seq_len": ("bert-qa", QUESTION, {"doc_stride": 3, "top_k": 9}, 20),
        "max_question_len": ("bert-qa", QUESTION, {}, 2),
        "handle_impossible_answer": ("bert-qa", QUESTION, {"top_k": 200}, True),
        "align_to_words": ("bert-qa", QUESTION, {"top_k": 50}, False),
    },
    "fill-mask": {
        "top_k": ("bert-mlm", "the [MASK] sat", {}, 2),
        "targets": ("bert-mlm", "the [MASK] sat", {}, ["the", "a"]),
        "tokenizer_kwargs": ("bert-mlm", "the [MASK] sat", {}, {"max_length": 5}),
    },
    "text-classification": {
        "top_k": ("distilbert-sst2", "good", {}, None),
        "function_to_apply": ("distilbert-sst2", "good", {}, "none"),
        "truncation": ("distilbert-sst2", LONG, {}, True),
        "max_length": ("distilbert-sst2", TEXT, {}, 5),
    },
    "token-classification": {
        "aggregation_strategy": ("bert-ner", TEXT, {}, "max"),
        "ignore_labels": ("bert-ner", TEXT, {}, ["B-PER", "I-PER"]),
        "stride": ("bert-ner", LONG, {"aggregation_strategy": "simple"}, 10),
        "is_split_into_words": ("bert-ner", TEXT.split(), {}, True),
        "delimiter": ("bert-ner", TEXT.split(), {"is_split_into_words": True}, "---"),
    },
    "zero-shot-classification": {
        "candidate_labels": ("bert-nli", TEXT, LABELS, ["other", "labels"]),
        "hypothesis_template": ("bert-nli", TEXT, LABELS, "The cat {}"),
        "multi_label": ("bert-nli", TEXT, LABELS, True),
    },
    "feature-extraction": {
        "truncation": ("bert-embed", LONG, {}, True),
        "tokenize_kwargs": ("bert-embed", TEXT, {}, {"add_special_tokens": False}),
    },
    "table-question-answering": {
        "sequential": ("tapas", {"table": TABLE, "query": ["how old is the cat", "who"]}, {}, True),
        "truncation": ("tapas", {"table": {"a": ["the cat sat"] * 200}, "query": "a"}, {}, "do_not_truncate"),
    },
}


# What these models cannot honour: byte-level tokens leave no such spaces, and a question is never cut.
REFUSED = {("text-generation", "clean_up_tokenization_spaces"), ("question-answering", "max_question_len")}


def outcome(models: Models, name: str, task: str, inputs: Any, parameters: dict[str, Any]) -> Any:
    """The answer, or the refusal, of a request whose parameters are checked as a route checks them."""
    try:
        return models.run(name, task, inputs, **validate(TASK_PARAMETERS[task], parameters))
    except InvalidRequest as refused:
        return refused


def effects() -> Iterator[Any]:
    """A case for each accepted parameter of each task."""
    for task, model in TASK_PARAMETERS.items():
        for field in model.model_fields:
            if field in OWN.get(task, {}):
                case = OWN[task][field]
            else:
                name = "gpt2" if task == "text-generation" else "bart"
                common = {**COMMON, **BY_MODEL[name]}
                if task not in ("text-generation", "text2text-generation"):
                    continue  # the same code on the same model class, and the same parameters: see below
                case = (name, TEXT, *common[field])
            yield pytest.param(task, field, *case, id=f"{task}-{field}")


def test_summaries_and_translations_take_what_text2text_generation_takes() -> None:
    text2text = TASK_PARAMETERS["text2text-generation"]
    assert TASK_PARAMETERS["summarization"] is text2text
    assert issubclass(TASK_PARAMETERS["translation"], text2text)
    assert issubclass(text2text, CommonGeneration)


@pytest.mark.parametrize(("task", "field", "name", "inputs", "others", "value"), list(effects()))
def test_a_parameter_changes_the_answer(
    models: Models, task: str, field: str, name: str, inputs: Any, others: dict[str, Any], value: Any
) -> None:
    without = outcome(models, name, task, inputs, others)
    with_it = outcome(models, name, task, inputs, {**others, field: value})
    assert with_it != without
    if (task, field) in REFUSED:
        assert isinstance(with_it, InvalidRequest)
        assert with_it.field == field
    else:
        assert not isinstance(with_it, InvalidRequest), with_it
