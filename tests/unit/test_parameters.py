"""The parameter models: what is accepted, and in which words the rest is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from huggingface.api.parameters.schemas import (
    TASK_PARAMETERS,
    GenerationParameters,
    Parameters,
    request_error,
    validate,
)
from huggingface.errors import InvalidRequest, MissingField, UnknownField
from huggingface.tasks import TASKS

MODELS: dict[str, type[Parameters]] = {"generate": GenerationParameters, **TASK_PARAMETERS}

# A value of the wrong kind and values out of range for each parameter, wherever it occurs.
BAD: dict[str, list[Any]] = {
    "max_new_tokens": ["5", 1.5, True, 0, -1, 2**31],
    "max_length": ["5", 1.5, True, 0, -1],
    "min_new_tokens": ["5", 1.5, True, -1],
    "min_length": ["5", 1.5, True, -1],
    "max_time": ["5", True, 0, -1.0, math.inf],
    "stop_strings": [5, "", [], [""], ["a", 5], {"a": "b"}, "\ud800"],
    "stop_sequence": [5, "", "\ud800"],
    "eos_token_id": ["a", -1, [], [1, "a"], [-1], 1.5, True],
    "do_sample": ["true", 1],
    "temperature": ["1", True, -1, math.nan, math.inf, -math.inf, 1e-9, 1e9],
    "top_p": ["1", True, 0, 5, -0.1, math.nan],
    "min_p": ["1", True, -0.1, 1.1, math.nan],
    "top_h": ["1", True, 0, 1.1, math.nan],
    "typical_p": ["1", True, 0, 1.1, math.nan],
    "epsilon_cutoff": ["1", True, -0.1, 1, math.nan],
    "eta_cutoff": ["1", True, -0.1, 1, math.nan],
    "repetition_penalty": ["1", True, 0, -1, math.nan, math.inf, 1e-30],
    "encoder_repetition_penalty": ["1", True, 0, -1, math.nan, math.inf, 1e30],
    "no_repeat_ngram_size": ["1", 1.5, True, -1],
    "encoder_no_repeat_ngram_size": ["1", 1.5, True, -1],
    "bad_words_ids": [5, [], [5], [[]], [["a"]], [[-1]]],
    "suppress_tokens": [5, [], ["a"], [-1], [1.5]],
    "begin_suppress_tokens": [5, [], ["a"], [-1]],
    "forced_bos_token_id": ["a", -1, [1], True],
    "forced_eos_token_id": ["a", -1, [], ["a"], True],
    "decoder_start_token_id": ["a", -1, [1], True],
    "sequence_bias": [
        5,
        [],
        [5],
        [[5, 1.0]],
        [[[5], "a"]],
        [[[], 1.0]],
        [[[5], math.nan]],
        [[[5], 1e30]],
        {"5": 1},
    ],
    "exponential_decay_length_penalty": [
        5,
        [],
        [1],
        [1, 2, 3],
        [1.5, 1.1],
        [-1, 1.1],
        [1, 0],
        [1, math.inf],
        [1, 9],
    ],
    "guidance_scale": ["1", True, 0.5, 1000, math.nan],
    "renormalize_logits": ["true", 1],
    "num_beams": ["1", 1.5, True, 0, 10**6],
    "length_penalty": ["1", True, math.nan, math.inf, 1e9],
    "early_stopping": ["always", 1],
    "num_return_sequences": ["1", 1.5, True, 0, 10**6],
    "presence_penalty": ["1", True, -2.1, 2.1],
    "frequency_penalty": ["1", True, -2.1, 2.1],
    "logit_bias": [{}, [1], {"x": 1}, {"-1": 1}, {"01": 1}, {"1": "2"}, {"1": 101}],
    "repeat_last_n": ["1", True, -2, 1.5],
    "stop_token_ids": ["a", 5, [], [1, "a"], [-1], [1.5]],
    "ignore_eos": ["true", 1],
    "seed": ["1", 1.5, True, -1, 2**63],
    "return_full_text": ["true", 1],
    "prefix": [5, "\ud800"],
    "truncation": ["perhaps", 1],
    "handle_long_generation": ["cut", True],
    "add_special_tokens": ["true", 1],
    "skip_special_tokens": ["true", 1],
    "clean_up_tokenization_spaces": ["true", 1],
    "continue_final_message": ["true", 1],
    "src_lang": [5, ""],
    "tgt_lang": [5, ""],
    "doc_stride": ["1", 1.5, True, -1],
    "max_answer_len": ["1", 1.5, True, 0],
    "max_seq_len": ["1", 1.5, True, 0],
    "max_question_len": ["1", 1.5, True, 0],
    "handle_impossible_answer": ["true", 1],
    "align_to_words": ["true", 1],
    "targets": [5, "", [], [""], [5], "\ud800"],
    "tokenizer_kwargs": [5, [], "a"],
    "tokenize_kwargs": [5, [], "a"],
    "function_to_apply": ["default", "SOFTMAX", 5],
    "aggregation_strategy": ["best", 5],
    "ignore_labels": ["O", 5, [5], ["\ud800"]],
    "stride": ["1", 1.5, True, -1],
    "is_split_into_words": ["true", 1],
    "delimiter": [5, "\ud800"],
    "candidate_labels": [5, "", " , ", [], [""], [5]],
    "hypothesis_template": [5, "", "no place", "{} and {}", "{x}", "{0.__class__}", "{", "{!r}", "{:>9}"],
    "multi_label": ["true", 1],
    "sequential": ["true", 1],
}
BAD_TOP_K = {"fill-mask": [0], "text-classification": [0], "question-answering": [0]}
NEEDED = {"zero-shot-classification": {"candidate_labels": ["a"]}}


@pytest.mark.parametrize("name", MODELS)
def test_every_bad_value_is_refused_with_the_name_of_its_field(name: str) -> None:
    model = MODELS[name]
    assert model.model_fields
    for field in model.model_fields:
        wrong = BAD[field] if field != "top_k" else ["1", 1.5, True, -1, 2**31, *BAD_TOP_K.get(name, [])]
        for value in wrong:
            with pytest.raises(InvalidRequest) as refused:
                validate(model, {**NEEDED.get(name, {}), field: value})
            assert refused.value.field is not None
            assert refused.value.field.split(".")[0] == field, (field, value)
            assert str(refused.value).startswith(f"Invalid value for field '{refused.value.field}': must ")


@pytest.mark.parametrize("name", MODELS)
def test_an_unknown_parameter_is_refused_by_name_and_the_known_ones_are_listed(name: str) -> None:
    for stranger in ("return_tensors", "batch_size", "streamer", "generation_config", "penalty_alpha", "beams"):
        with pytest.raises(UnknownField, match=rf"^Unknown field: {stranger}\. Accepted here: ") as refused:
            validate(MODELS[name], {**NEEDED.get(name, {}), stranger: 1})
        assert refused.value.field == stranger
        assert sorted(MODELS[name].model_fields)[0] in str(refused.value)


def test_every_task_has_its_parameters() -> None:
    assert list(TASK_PARAMETERS) == list(TASKS)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_described(name: str) -> None:
    for field, schema in MODELS[name].model_json_schema()["properties"].items():
        assert schema.get("description"), field


def test_only_the_parameters_that_were_given_come_back_and_whole_numbers_do_for_others() -> None:
    given = {"temperature": 1, "top_k": 0, "eos_token_id": [1, 2], "stop_strings": "x", "early_stopping": "never"}
    checked = validate(GenerationParameters, given)
    assert checked == given
    assert type(checked["temperature"]) is float
    assert validate(GenerationParameters, {}) == {}


@pytest.mark.parametrize("name", MODELS)
def test_a_null_is_a_field_left_out_and_3_0_is_a_whole_number(name: str) -> None:
    model, needed = MODELS[name], NEEDED.get(name, {})
    nulls = dict.fromkeys([*model.model_fields.keys() - needed.keys() - model.nulls, "stranger"])
    assert validate(model, {**nulls, **needed}) == needed
    for field in {"max_new_tokens", "top_k", "max_answer_len", "stride"} & model.model_fields.keys():
        checked = validate(model, {**needed, field: 3.0})
        assert (checked[field], type(checked[field])) == (3, int)


@pytest.mark.parametrize(
    ("sent", "meant"), [("max_new_token", "max_new_tokens"), ("top_kk", "top_k"), ("seeds", "seed")]
)
def test_the_nearest_known_name_is_suggested(sent: str, meant: str) -> None:
    with pytest.raises(UnknownField, match=rf"^Unknown field: parameters\.{sent}\. Did you mean {meant}\?$"):
        validate(GenerationParameters, {sent: 1}, prefix="parameters.")


def test_null_labels_of_text_classification_mean_all_of_them() -> None:
    assert validate(TASK_PARAMETERS["text-classification"], {"top_k": None}) == {"top_k": None}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"max_length": 9, "max_new_tokens": 9}, "max_length"),
        ({"min_length": 3, "min_new_tokens": 3}, "min_length"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens"),
        ({"min_new_tokens": 5, "max_length": 4}, "min_new_tokens"),
        ({"min_length": 5, "max_length": 4}, "min_length"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences"),
        ({"num_return_sequences": 2, "do_sample": False}, "num_return_sequences"),
        ({"num_return_sequences": 2, "temperature": 0}, "num_return_sequences"),
        ({"num_return_sequences": 2, "num_beams": 1, "do_sample": False}, "num_return_sequences"),
        ({"suppress_tokens": [1, 2], "forced_eos_token_id": [1]}, "forced_eos_token_id"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused_with_the_name_of_one(
    given: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate(TASK_PARAMETERS["text-generation"], given)
    assert refused.value.field == field


def test_several_answers_without_sampling_are_possible_where_four_beams_are_the_default() -> None:
    summarization = TASK_PARAMETERS["summarization"]
    assert validate(summarization, {"num_return_sequences": 4, "do_sample": False})
    with pytest.raises(InvalidRequest, match="must not exceed num_beams"):
        validate(summarization, {"num_return_sequences": 5})


@pytest.mark.parametrize(
    ("task", "given", "field"),
    [
        ("text-generation", {"stop_sequence": "a", "stop_strings": "a"}, "stop_sequence"),
        ("text-classification", {"max_length": 5, "truncation": False}, "max_length"),
        ("fill-mask", {"tokenizer_kwargs": {"max_length": 5, "truncation": False}}, "tokenizer_kwargs.max_length"),
        ("fill-mask", {"tokenizer_kwargs": {"padding": True}}, "tokenizer_kwargs.padding"),
        ("feature-extraction", {"truncation": True, "tokenize_kwargs": {"truncation": True}}, "truncation"),
        ("feature-extraction", {"truncation": False, "tokenize_kwargs": {"max_length": 5}}, "truncation"),
        ("token-classification", {"stride": 3, "aggregation_strategy": "none"}, "stride"),
        ("token-classification", {"delimiter": "-"}, "delimiter"),
        ("summarization", {"suppress_tokens": [1], "forced_bos_token_id": 1}, "forced_bos_token_id"),
    ],
)
def test_task_parameters_that_do_not_fit_together_are_refused_with_the_name_of_one(
    task: str, given: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate(TASK_PARAMETERS[task], given)
    assert refused.value.field == field


def test_labels_of_zero_shot_classification_are_required() -> None:
    with pytest.raises(MissingField, match=r"^Missing required field: candidate_labels$"):
        validate(TASK_PARAMETERS["zero-shot-classification"], {"multi_label": "yes", "stranger": 1})


def test_a_prefix_tells_where_the_parameters_stand() -> None:
    with pytest.raises(
        InvalidRequest, match=r"^Invalid value for field 'parameters\.top_p': must be at most 1$"
    ) as bad:
        validate(GenerationParameters, {"top_p": 5}, prefix="parameters.")
    assert bad.value.field == "parameters.top_p"
    with pytest.raises(UnknownField, match=r"^Unknown field: parameters\.top_q\. "):
        validate(GenerationParameters, {"top_q": 5}, prefix="parameters.")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1}, "'temperature': must be at least 0"),
        ({"top_p": math.nan}, "'top_p': must be a finite number"),
        ({"max_new_tokens": 0}, "'max_new_tokens': must be at least 1"),
        ({"max_new_tokens": "5"}, "'max_new_tokens': must be a whole number"),
        ({"do_sample": "yes"}, "'do_sample': must be true or false"),
        ({"early_stopping": "x"}, "'early_stopping': must be true or false or 'never'"),
        ({"eos_token_id": "x"}, "'eos_token_id': must be a whole number or a list"),
        ({"eos_token_id": [1, "x"]}, "'eos_token_id.1': must be a whole number"),
        ({"eos_token_id": []}, "'eos_token_id': must not be empty"),
        ({"stop_strings": ["a", ""]}, "'stop_strings.1': must not be empty"),
    ],
)
def test_the_reason_is_plain_english(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate(GenerationParameters, given)
    assert str(refused.value) == f"Invalid value for field {message}"


class Message(BaseModel):
    """A part of a body, as a route has it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    role: str
    content: str


class Body(BaseModel):
    """A body, as a route has it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model_id: str
    name: str
    messages: list[Message] = Field(default_factory=list)


def refusal(body: Any) -> InvalidRequest:
    """What is said of a body that is wrong."""
    with pytest.raises(ValidationError) as found:
        Body.model_validate(body)
    return request_error(found.value)


def test_of_several_faults_a_missing_field_is_told_first_then_an_unknown_one_then_a_wrong_value() -> None:
    everything = {"model_id": 5, "messages": [{"role": 5}], "stranger": 1}
    assert str(refusal(everything)) == "Missing required field: name"
    assert str(refusal({"stranger": 1})) == "Missing required field: model_id"
    assert str(refusal({"model_id": 5, "name": "a", "stranger": 1})) == "Unknown field: stranger"
    assert str(refusal({"model_id": 5, "name": 6})) == "Invalid value for field 'model_id': must be text"


def test_a_fault_within_a_field_is_named_with_its_path() -> None:
    body = {"model_id": "a", "name": "b"}
    missing = refusal({**body, "messages": [{"role": "user", "content": "x"}, {"role": "user"}]})
    assert isinstance(missing, MissingField)
    assert missing.field == "messages.1.content"
    assert refusal({**body, "messages": [{"role": 5, "content": "x"}]}).field == "messages.0.role"
    assert refusal({**body, "messages": [{"role": "a", "content": "x", "y": 1}]}).field == "messages.0.y"


def test_a_body_that_is_no_object_is_refused_as_a_whole() -> None:
    assert str(refusal([1])) == "Invalid request: the body must be an object"
