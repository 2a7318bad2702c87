"""Calls of many callers share forward passes, and each gets what it would have got alone, or by itself a refusal."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import PATIENCE
from task_models import HEAD_OF, LONG, Models, on_one_thread
from test_tasks import SAME
from transformers import AutoTokenizer

from huggingface.cancellation import Cancellation
from huggingface.errors import Cancelled, GenerationFailed, InvalidRequest, LocalLLMError, OutOfMemory
from huggingface.tasks.batching import TaskCall
from huggingface.tasks.runner import TaskRunner

BATCHED = ("fill-mask", "text-classification", "token-classification", "zero-shot-classification", "feature-extraction")
BATCHED += ("sentiment-analysis", "ner")
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "dogs", "ran", "over", "green", "hills", "to", "an", "old"]
WORDS += ["house", "in", "London"]
FEW = 20  # times fewer forward passes than texts, at least
PADDING = 0.25


@pytest.fixture(scope="module")
def models(models_dir: Path, tiny: Callable[[str], str]) -> Iterator[Models]:
    """The tiny models of the session."""
    with on_one_thread():
        yield Models(models_dir, tiny)


def texts(count: int, longest: int = 12, seed: int = 0) -> list[str]:
    """Texts of 1 to `longest` words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def finish(runner: TaskRunner, *calls: TaskCall) -> list[Any]:
    """Step until nothing is left; what each call gave, errors as they are."""
    while runner.step():
        pass
    assert runner.pending == 0
    return [outcome(call) for call in calls]


def outcome(call: TaskCall) -> Any:
    try:
        return call.future.result(timeout=0)
    except LocalLLMError as error:
        return error


def exact(models: Models, name: str) -> tuple[str, Any, Any]:
    """A model in double precision: the sharp attention of the tiny ones makes much of the last bit of a float."""
    model_id, model, tokenizer = models.load(name)
    return model_id, model.double(), tokenizer


def near(one: Any, other: Any) -> bool:
    """Whether two results are the same, numbers to 1e-5."""
    if isinstance(other, float):
        return isinstance(one, float) and abs(one - other) <= 1e-5 * max(1, abs(other))
    if isinstance(other, dict):
        return isinstance(one, dict) and one.keys() == other.keys() and all(near(one[key], other[key]) for key in other)
    if isinstance(other, list):
        return isinstance(one, list) and len(one) == len(other) and all(map(near, one, other))
    return type(one) is type(other) and one == other


@contextmanager
def forwards(model: Any) -> Iterator[list[Any]]:
    """The attention masks (or else the tokens) of the forward passes of a model."""
    seen: list[Any] = []

    def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        seen.append(torch.ones_like(inputs["input_ids"]) if mask is None else mask)

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


# The same answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in HEAD_OF if any(case[0] == name and case[1] in BATCHED for case in SAME)]
)
def test_calls_of_all_tasks_and_parameters_at_once_answer_as_the_pipelines_of_transformers(
    models: Models, name: str
) -> None:
    cases = [case for case in SAME if case[0] == name and case[1] in BATCHED]
    random.Random(1).shuffle(cases)
    model_id, model, tokenizer = models.load(name)
    runner = TaskRunner(model_id, model, tokenizer, HEAD_OF[name])  # type: ignore[arg-type]
    with forwards(model.base_model) as seen:
        calls = [runner.submit(task, inputs, parameters) for _, task, inputs, parameters in cases]
        assert runner.pending == len(calls)
        found = finish(runner, *calls)
    for (_, task, inputs, parameters), answer in zip(cases, found, strict=True):
        assert near(answer, models.upstream(name, task, inputs, **parameters)), (task, inputs, parameters)
    assert max(map(len, seen)) > 1
    assert set(runner.opened) == {case[1] for case in cases}


def test_questions_of_several_callers_answer_as_each_alone(models: Models) -> None:
    context = "The cat sat on the mat. The dog ran to the house in London. "
    calls: list[tuple[Any, dict[str, Any]]] = [
        ({"question": "Where is the cat?", "context": context}, {}),
        ({"question": "Where is the cat?", "context": context * 20}, {"top_k": 3, "max_seq_len": 60, "doc_stride": 20}),
        ([{"question": question, "context": context * 3} for question in ("Who ran?", "Where?")], {}),
        ({"question": ["Who?", "Where is the dog?"], "context": context}, {"handle_impossible_answer": True}),
        ({"question": "Where?", "context": context}, {"padding": "max_length", "max_seq_len": 100, "top_k": 2}),
    ]
    model_id, model, tokenizer = models.load("bert-qa")
    runner = TaskRunner(model_id, model, tokenizer, "question-answering")
    wanted = [runner.run("question-answering", inputs, parameters) for inputs, parameters in calls]
    with forwards(model) as seen:
        submitted = [runner.submit("question-answering", inputs, parameters) for inputs, parameters in calls]
        found = finish(runner, *submitted)
    assert near(found, wanted)
    assert max(map(len, seen)) > 4


def test_callers_on_threads_of_their_own_each_get_their_answer(models: Models) -> None:
    runner = TaskRunner(*models.load("distilbert-sst2"), "sequence-classification")
    answers: dict[int, Any] = {}

    def ask(index: int) -> None:
        answers[index] = runner.submit("sentiment-analysis", WORDS[index], {"top_k": 1 + index % 2}).future.result(
            timeout=PATIENCE
        )

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(WORDS))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if not runner.step():
            time.sleep(0.001)
    for index, word in enumerate(WORDS):
        assert near(answers[index], runner.run("sentiment-analysis", word, {"top_k": 1 + index % 2}))


def test_two_tasks_on_one_head_share_a_forward_pass(models: Models) -> None:
    runner = TaskRunner(*(loaded := models.load("distilbert-sst2")), "sequence-classification")
    with forwards(loaded[1]) as seen:
        pair = runner.submit("text-classification", {"text": "the cat", "text_pair": "This example is a dog."}, {})
        labels = runner.submit("zero-shot-classification", "the cat", {"candidate_labels": ["a dog", "a cat"]})
        runner.step()
    assert len(seen[0]) == 3
    assert pair.done()
    assert labels.done()


# Long lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "head"),
    [
        ("distilbert-sst2", "sentiment-analysis", "sequence-classification"),
        ("bert-embed", "feature-extraction", "base"),
        ("gpt2", "feature-extraction", "causal-lm"),
    ],
)
def test_a_thousand_texts_take_few_forward_passes_and_come_in_their_order(
    models: Models, name: str, task: str, head: Any
) -> None:
    loaded = exact(models, name)
    runner = TaskRunner(*loaded, head)
    inputs = texts(1000)
    with forwards(loaded[1].base_model) as seen:
        (found,) = finish(runner, runner.submit(task, inputs, {}))
    assert len(seen) <= 1000 / FEW
    assert near(found, [runner.run(task, [text], {})[0] for text in inputs])


def test_batches_are_bounded_in_tokens_and_in_padding(models: Models) -> None:
    loaded = models.load("distilbert-sst2")
    runner = TaskRunner(*loaded, "sequence-classification")
    with forwards(loaded[1]) as seen:
        calls = [runner.submit("sentiment-analysis", texts(100, 90, seed), {}) for seed in range(5)]
        finish(runner, *calls)
    batches = [mask for mask in seen if len(mask) > 1]
    assert sum(map(len, batches)) >= 490
    assert all(mask.numel() <= 512 for mask in batches)
    assert all(mask.sum() >= (1 - PADDING) * mask.numel() for mask in batches)
    assert sum(int(mask.sum()) for mask in batches) >= 0.95 * sum(mask.numel() for mask in batches)


def test_scores_of_a_whole_vocabulary_are_never_many_at_once(models: Models) -> None:
    """With 131072 words, 40 short texts are more than one batch: its scores are 16 million at most."""
    model_id, model, tokenizer = models.load("bert-mlm")
    known, words = model.config.vocab_size, 2**17
    model.resize_token_embeddings(words, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().bias[known:] = -1e4  # words that the tokenizer does not have
    runner = TaskRunner(model_id, model, tokenizer, "masked-lm")
    with forwards(model) as seen:
        (found,) = finish(runner, runner.submit("fill-mask", ["the [MASK] sat"] * 40, {}))
    assert len(found) == 40
    assert all(mask.numel() * words <= 2**24 for mask in seen)
    assert max(map(len, seen)) > 1


# Turns ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 9, 12])
def test_a_short_call_is_in_one_of_the_next_two_batches_of_long_ones(models: Models, steps: int) -> None:
    loaded = models.load("distilbert-sst2")
    runner = TaskRunner(*loaded, "sequence-classification")
    finish(runner, runner.submit("sentiment-analysis", [*texts(200, 40), LONG[:200]], {}))  # batches are known
    long = [runner.submit("sentiment-analysis", texts(1000, 30, seed), {}) for seed in range(3)]
    for _ in range(steps):
        runner.step()
    short = runner.submit("sentiment-analysis", "the cat sat in London " * 15, {})
    with forwards(loaded[1]) as seen:
        while not short.done():
            runner.step()
    assert len(seen) <= 2
    assert not any(call.done() for call in long)
    assert all(len(found) == 1000 for found in finish(runner, *long))


def test_a_long_call_gets_on_while_short_ones_keep_coming(models: Models) -> None:
    runner = TaskRunner(*models.load("distilbert-sst2"), "sequence-classification")
    long = runner.submit("sentiment-analysis", texts(300, 30), {})
    for _ in range(100):
        runner.submit("sentiment-analysis", "the cat sat in London " * 20, {})
        runner.step()
    assert long.done()


def test_a_call_that_generates_takes_one_step_among_the_others(models: Models) -> None:
    runner = TaskRunner(*models.load("gpt2"), "causal-lm")
    asked = {"max_new_tokens": 4, "do_sample": False}
    calls = [
        runner.submit("feature-extraction", texts(50), {}),
        runner.submit("text-generation", ["the cat", "a dog"], asked),
        runner.submit("feature-extraction", "a", {}),
    ]
    features, generated, single = finish(runner, *calls)
    assert generated == runner.run("text-generation", ["the cat", "a dog"], asked)
    assert near([features[0], single], [runner.run("feature-extraction", text, {}) for text in (texts(50)[0], "a")])


# Giving up ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["gone", "cancel"])
def test_a_long_call_that_is_given_up_stops_before_the_next_batch_and_harms_no_other(models: Models, how: str) -> None:
    loaded = exact(models, "bert-embed")
    runner = TaskRunner(*loaded, "base")
    gone = Cancellation()
    with forwards(loaded[1]) as seen:
        long = runner.submit("feature-extraction", texts(1000), {}, gone)
        other = runner.submit("feature-extraction", texts(90, 40), {})
        while len(seen) < 5:
            runner.step()
        assert not long.done()
        gone.cancel() if how == "gone" else long.cancel()
        before = len(seen)
        (left, found) = finish(runner, long, other)
    assert isinstance(left, Cancelled)
    assert near(found, runner.run("feature-extraction", texts(90, 40), {}))
    rows = Counter(len(mask) for mask in seen[before:])
    assert sum(size * times for size, times in rows.items()) <= 90 + 8  # some are computed alone too, to compare


def test_a_client_that_is_gone_before_its_turn_costs_no_forward_pass(models: Models) -> None:
    loaded = models.load("gpt2")
    runner = TaskRunner(*loaded, "causal-lm")
    assert runner.supported
    with forwards(loaded[1].base_model) as seen:
        calls = [
            runner.submit(task, "the cat", {}, Cancellation(lambda: True))
            for task in ("feature-extraction", "text-generation")
        ]
        assert all(isinstance(found, Cancelled) for found in finish(runner, *calls))
    assert seen == []
    assert runner.opened == ()


def test_a_task_that_generates_can_be_cancelled_between_tokens_from_another_thread(models: Models) -> None:
    loaded = models.load("gpt2")
    runner = TaskRunner(*loaded, "causal-lm")
    call = runner.submit("text-generation", "the cat", {"max_new_tokens": 200})
    with forwards(loaded[1]) as seen:
        hook = loaded[1].register_forward_hook(lambda *_: call.cancel() if len(seen) == 5 else None)
        (found,) = finish(runner, call)
        hook.remove()
    assert isinstance(found, Cancelled)
    assert len(seen) == 5


def test_closing_cancels_what_waits_and_what_comes_later(models: Models) -> None:
    runner = TaskRunner(*models.load("bert-embed"), "base")
    calls = [runner.submit("feature-extraction", texts(400), {}), runner.submit("feature-extraction", "a", {})]
    runner.step()
    late = runner.submit("feature-extraction", texts(5), {})
    runner.close()
    assert runner.pending == 0
    after = runner.submit("feature-extraction", "a", {})
    assert all(isinstance(outcome(call), Cancelled) for call in (calls[0], late, after))
    assert not runner.step()


# Failing --------------------------------------------------------------------------------------------------------------


def test_a_refused_input_fails_its_own_call_only(models: Models) -> None:
    runner = TaskRunner(*models.load("bert-mlm"), "masked-lm")
    wrong: list[tuple[str, Any, dict[str, Any]]] = [
        ("fill-mask", ["the [MASK]", "no mask"], {}),
        ("fill-mask", ["the [MASK]", f"[MASK] {LONG}"], {}),
        ("fill-mask", "", {}),
        ("fill-mask", "[MASK]", {"targets": [" "]}),
        ("fill-mask", "[MASK]", {"top_k": 1000}),
        ("summarization", "the cat", {}),
        ("no such task", "the cat", {}),
    ]
    calls = [runner.submit("fill-mask", f"{word} [MASK]", {}) for word in WORDS]
    failing = [runner.submit(*each) for each in wrong]
    found = finish(runner, *calls, *failing)
    for word, answer in zip(WORDS, found, strict=False):
        assert near(answer, runner.run("fill-mask", f"{word} [MASK]", {}))
    for (task, inputs, parameters), refusal in zip(wrong, found[len(calls) :], strict=True):
        with pytest.raises(InvalidRequest) as alone:
            runner.run(task, inputs, parameters)
        assert isinstance(refusal, InvalidRequest)
        assert (str(refusal), refusal.field) == (str(alone.value), alone.value.field)


@contextmanager
def failing_on(model: Any, token: int, error: Exception) -> Iterator[None]:
    """A model that raises where it reads a token."""

    def check(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if (inputs["input_ids"] == token).any():
            raise error

    hook = model.register_forward_pre_hook(check, with_kwargs=True)
    yield
    hook.remove()


def test_a_row_that_fails_inside_the_model_fails_its_own_call_only(models: Models) -> None:
    model_id, model, tokenizer = models.load("distilbert-sst2")
    runner = TaskRunner(model_id, model, tokenizer, "sequence-classification")
    bad = tokenizer("zebra", add_special_tokens=False)["input_ids"][0]
    lists = [["the cat", "a zebra", "dogs"] if index == 2 else texts(6, seed=index) for index in range(6)]
    with failing_on(model, bad, RuntimeError("boom")):
        found = finish(runner, *[runner.submit("sentiment-analysis", inputs, {}) for inputs in lists])
        for inputs, answer in zip(lists, found, strict=True):
            if "a zebra" in inputs:
                assert isinstance(answer, GenerationFailed)
                assert isinstance(answer.__cause__, RuntimeError)
            else:
                assert near(answer, runner.run("sentiment-analysis", inputs, {}))
    with forwards(model) as seen:
        finish(runner, runner.submit("sentiment-analysis", texts(60), {}))
    assert max(map(len, seen)) > 1, "one bad row must not end batching for good"


def test_a_batch_that_the_memory_has_no_room_for_is_halved_until_it_has(models: Models) -> None:
    loaded = models.load("bert-embed")
    runner = TaskRunner(*loaded, "base")

    def check(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if inputs["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError

    hook = loaded[1].register_forward_pre_hook(check, with_kwargs=True)
    calls = [runner.submit("feature-extraction", inputs, {}) for inputs in (texts(60), ["the cat " * 100])]
    found, lacking = finish(runner, *calls)
    hook.remove()
    assert near(found, runner.run("feature-extraction", texts(60), {}))
    assert isinstance(lacking, OutOfMemory)


def test_a_client_that_cannot_be_asked_harms_no_other(models: Models) -> None:
    runner = TaskRunner(*models.load("bert-embed"), "base")

    def broken() -> bool:
        raise OSError

    calls = [
        runner.submit("feature-extraction", "a", {}, Cancellation(broken)),
        runner.submit("feature-extraction", "a", {}),
    ]
    lost, found = finish(runner, *calls)
    assert isinstance(lost, GenerationFailed)
    assert near(found, runner.run("feature-extraction", "a", {}))


# Models that padding changes ------------------------------------------------------------------------------------------

_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_BERT = {**_SHAPE, "max_position_embeddings": 514, "pad_token_id": 0}
_BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "pad_token_id": 1}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "eos_token_id": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 1, "eos_token_id": 2}
_T5 |= {"decoder_start_token_id": 1}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512}
_XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}

# Class; its config; the model that the tokenizer is from; the tokenizer's settings.
ODD: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "convolutions see the padding": ("ConvBertForSequenceClassification", _BERT, "bert-nli", {}),
    "a mask that is never taken": ("FNetModel", _BERT, "bert-nli", {"model_input_names": ["input_ids"]}),
    "no padding token": ("GPT2Model", _GPT2, "gpt2", {}),
    "no padding token in the model": ("GPT2ForSequenceClassification", _GPT2, "roberta-mlm", {}),
    "another padding token": ("GPT2ForSequenceClassification", {**_GPT2, "pad_token_id": 7}, "roberta-mlm", {}),
    "its own padding token": ("GPT2ForSequenceClassification", {**_GPT2, "pad_token_id": 1}, "roberta-mlm", {}),
    "padding on the left": ("GPT2Model", _GPT2, "roberta-mlm", {"padding_side": "left"}),
    "rotation, padding on the left": (
        "LlamaForSequenceClassification",
        {**_SHAPE, "pad_token_id": 1},
        "roberta-mlm",
        {},
    ),
    "positions by what is no padding": (
        "XLMRobertaForSequenceClassification",
        {**_BERT, "pad_token_id": 1},
        "roberta-mlm",
        {},
    ),
    "other positions from another length": ("MPNetModel", {**_BERT, "pad_token_id": 1}, "roberta-mlm", {}),
    "relative positions": (
        "DebertaV2ForSequenceClassification",
        {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 2},
        "bert-nli",
        {},
    ),
    "relative positions and a memory": (
        "XLNetForSequenceClassification",
        _XLNET,
        "bert-nli",
        {"padding_side": "left", "pad_token_type_id": 3},
    ),
    "the last end counts": ("BartForSequenceClassification", _BART, "roberta-mlm", {}),
    "the last end counts, relative positions": ("T5ForSequenceClassification", _T5, "roberta-mlm", {}),
    "a state that runs on": (
        "MambaModel",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "roberta-mlm",
        {},
    ),
    "fewer states than tokens": (
        "FunnelBaseModel",
        {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]},
        "bert-nli",
        {},
    ),
    "sparse attention of long texts": (
        "BigBirdModel",
        {**_BERT, "block_size": 8, "num_random_blocks": 1},
        "bert-nli",
        {},
    ),
    "windows": ("LongformerForSequenceClassification", {**_BERT, "attention_window": [8, 8]}, "bert-nli", {}),
    "attention within chunks": (
        "ReformerModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "attention_head_size": 16,
            "feed_forward_size": 64,
            "attn_layers": ["local", "local"],
            "axial_pos_embds": False,
            "max_position_embeddings": 512,
            "local_attn_chunk_length": 8,
        },
        "bert-nli",
        {},
    ),
}


PADDED_RIGHT = {
    "its own padding token",
    "rotation, padding on the left",
    "positions by what is no padding",
    "other positions from another length",
    "relative positions",
    "relative positions and a memory",
    "the last end counts",
    "the last end counts, relative positions",
    "a state that runs on",
    "windows",
}


def odd(models: Models, name: str) -> tuple[TaskRunner, Any, str]:
    """A model with random weights, its runner, and what can be asked of it."""
    architecture, config, tokens, settings = ODD[name]
    folder = models.directory / models.build(tokens)
    tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=512, **config)).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(
                4 if parameter.dim() > 1 else 1
            )  # as wide as trained ones: no difference is too small to see
    classifies = architecture.endswith("Classification")
    head: Any = "sequence-classification" if classifies else "base"
    return (
        TaskRunner(name, model, tokenizer, head),
        model,
        "text-classification" if classifies else "feature-extraction",
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_rows_are_padded_only_where_it_does_not_change_the_answer(models: Models, name: str) -> None:
    runner, model, task = odd(models, name)
    inputs = [*texts(60, 9), *texts(20, 60), "the cat </s> sat", "a <pad> b"]
    with forwards(model) as seen:
        calls = [runner.submit(task, part, {}) for part in (inputs, inputs[::-1], inputs[5])]
        found = finish(runner, *calls)
    alone = [runner.run(task, [text], {})[0] for text in inputs]
    assert near(found[0], alone)
    assert near(found[1], alone[::-1])
    assert near(found[2], runner.run(task, inputs[5], {}))
    with forwards(model) as seen:  # now that the model is known
        (again,) = finish(runner, runner.submit(task, inputs, {}))
    assert near(again, alone)
    if name != "attention within chunks":  # which is right for some lengths only
        assert any((mask == 0).any() for mask in seen) == (name in PADDED_RIGHT)
    assert len(seen) <= len(inputs)


def test_a_call_without_inputs_has_its_result_at_once(models: Models) -> None:
    """It has no row that could be waited for."""
    runner = models.runner("bert-embed")
    call = runner.submit("sentence-embeddings", [], {})
    assert finish(runner, call) == [{"embeddings": [], "tokens": 0}]
