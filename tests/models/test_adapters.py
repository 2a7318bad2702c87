"""Adapters: each request is answered as peft would answer with its adapter alone, whoever else shares the batch."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from causal_models import LARGE, build, build_config
from loaded_parts import laying_out
from lora_models import Served, reference, save_adapter
from safetensors.torch import load_file, save_file
from test_slots import Lists
from tiny_tokenizers import TEXT
from transformers import pipeline

from huggingface.cancellation import NEVER
from huggingface.engine.bulk import run_in_batch
from huggingface.engine.slots import SMALLEST, SlotTable
from huggingface.errors import (
    FilesCorrupt,
    FilesMissing,
    FilesRefused,
    GenerationFailed,
    InvalidRequest,
    LoadError,
    ModelUnsupported,
)
from huggingface.inspection.preflight import Preflight
from huggingface.loading.lora import attach
from huggingface.loading.quantization import quantize
from huggingface.registry.records import ModelRecord
from huggingface.tasks.runner import TaskRunner
from huggingface.tasks.text_generation import TextGenerations
from huggingface.types import LoadOptions

pytestmark = [
    # What peft says when the tests save adapters.
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
]

WORDS = TEXT.split()
GREEDY = {"do_sample": False, "max_new_tokens": 20}
# Three adapters that differ in where they are, in rank and in scale.
ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
EVERYWHERE: dict[str, Any] = {"target_modules": "all-linear", "r": 8, "lora_alpha": 4, "use_rslora": True}
HEAD: dict[str, Any] = {
    "target_modules": ["down_proj", "lm_head", "k_proj"],
    "r": 2,
    "lora_dropout": 0.5,
    "rank_pattern": {"lm_head": 6},
}


def make(name: str, root: Path, *configs: dict[str, Any], **options: Any) -> tuple[Served, dict[str | None, Any]]:
    """A model served with an adapter for each config, called a, b, c, and what it is to be compared with."""
    return make_of(name, build(name)[0], root, *configs, **options)


def make_of(
    name: str, model: Any, root: Path, *configs: dict[str, Any], **options: Any
) -> tuple[Served, dict[str | None, Any]]:
    """The same of a model that is there."""
    named = dict(zip("abc", configs, strict=False))
    folders = {letter: save_adapter(model, root / letter, ord(letter), **config) for letter, config in named.items()}
    references = {letter: reference(model, folder) for letter, folder in folders.items()}
    return Served(name, folders, copy.deepcopy(model), **options), {None: model, **references}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, dict[str | None, Any]]]:
    served, references = make("llama", tmp_path_factory.mktemp("adapters"), ATTENTION, EVERYWHERE, HEAD)
    yield served, references
    served.engine.close()


def check_batch(served: Served, references: dict[str | None, Any], rows: int = 16) -> None:
    """Many rows at once, each of the next adapter: all get what they would get alone."""
    names = list(references)
    jobs = [(" ".join(WORDS[at : at + 2 + 2 * at]), names[at % len(names)]) for at in range(rows)]
    tickets = [served.generate(prompt, GREEDY, adapter) for prompt, adapter in jobs]
    for (prompt, adapter), ticket in zip(jobs, tickets, strict=True):
        assert list(ticket)[-1].whole == served.expect(references[adapter], prompt, GREEDY), adapter
    assert len({served.text("The cat", GREEDY, adapter) for adapter in names}) > 1


# In the batch ---------------------------------------------------------------------------------------------------------


def test_sixteen_rows_of_three_adapters_and_the_base_share_one_pass(llama: Any) -> None:
    """Greedy text in a mixed batch equals that of peft with the row's adapter alone, and of the base without peft."""
    served, references = llama
    assert (served.runner.mixes, served.runner.by_segments) == (True, True)
    check_batch(served, references)


@pytest.mark.parametrize(
    ("name", "targets", "by_segments"),
    [
        ("gpt2", ["c_attn", "c_fc"], True),
        ("gemma2-eager", ["q_proj", "v_proj"], False),
        ("gemma3-mixed", ["q_proj", "v_proj"], True),
        ("falcon", ["query_key_value"], False),
        ("phi3", ["qkv_proj"], True),
    ],
)
def test_adapters_are_mixed_in_other_families(name: str, targets: list[str], by_segments: bool, tmp_path: Path) -> None:
    """Fused projections, transposed weights, windows, and attention that is given one segment at a time."""
    served, references = make(name, tmp_path, {"target_modules": targets}, {"target_modules": targets, "r": 2})
    try:
        assert (served.runner.mixes, served.runner.by_segments) == (True, by_segments)
        check_batch(served, references, rows=8)
    finally:
        served.engine.close()


@pytest.mark.parametrize(
    "special",
    [
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "lora_bias": True},
    ],
    ids=["dora", "words", "bias"],
)
def test_adapters_that_are_more_than_two_factors_are_batched_each_in_a_pass_of_its_own(
    special: dict[str, Any], tmp_path: Path
) -> None:
    """Their layers are switched between the passes of a step; everybody's text is right all the same."""
    served, references = make("llama", tmp_path, ATTENTION, special)
    try:
        assert served.runner.mixes is False
        check_batch(served, references)
    finally:
        served.engine.close()


def test_a_model_that_is_not_batched_has_adapters_too(tmp_path: Path) -> None:
    """One request at a time, each with its own adapter."""
    served, references = make("bloom", tmp_path, {"target_modules": ["query_key_value"]})
    try:
        assert served.runner is None
        check_batch(served, references, rows=4)
    finally:
        served.engine.close()


def test_with_weights_laid_out_anew_adapters_give_the_same(tmp_path: Path) -> None:
    """The base's products under the adapters are packed and unpacked as everybody's are; the factors are left alone."""
    large, _ = build_config("LlamaConfig", LARGE)
    served, references = make_of("llama", large, tmp_path, ATTENTION, EVERYWHERE, HEAD, findings=laying_out())
    base = [weight for name, weight in served.model.named_parameters() if ".base_layer." in name]
    factors = [weight for name, weight in served.model.named_parameters() if ".lora_" in name]
    assert base
    assert factors
    try:
        check_batch(served, references, rows=8)
        assert all(weight.numel() == 0 for weight in base)
        assert all(weight.numel() for weight in factors)
        beams = {"num_beams": 2, "do_sample": False, "max_new_tokens": 6}
        assert served.text("The cat", beams, "b") == served.expect(references["b"], "The cat", beams)
        assert all(weight.numel() for weight in base)
    finally:
        served.engine.close()


def test_a_prompt_is_not_read_again_by_its_adapter_but_by_any_other(llama: Any) -> None:
    """Keys and values are reused by the same adapter only."""
    served, references = llama
    prompt = " ".join(reversed(WORDS[:50]))  # no other test says a text that begins so
    cached = []
    for adapter in (None, "a", "b", "a", None, "b"):
        last = served.last(prompt, GREEDY, adapter)
        assert last.whole == served.expect(references[adapter], prompt, GREEDY)
        assert last.usage is not None
        cached.append(last.usage.cached_tokens)
    tokens = len(served.tokenizer(prompt)["input_ids"])
    assert all(count < 5 for count in cached[:3])  # the beginning that all texts have
    assert cached[3:] == [tokens - 1] * 3


def test_slots_of_one_adapter_are_of_no_use_to_another() -> None:
    """The table looks for a prefix among the slots of the same adapter, and a slot that changes hands begins empty."""
    table = SlotTable(Lists(), 2 * SMALLEST)
    slot = table.take([1, 2, 3, 4], 10, "a")
    assert slot is not None
    slot.tokens.extend([1, 2, 3, 4])
    table.release(slot)
    others = [table.take([1, 2, 3, 4], 10, adapter) for adapter in (None, "b")]
    assert [other and other.tokens for other in others] == [[], []]
    for other in others:
        assert other is not None
        table.release(other, keep=False)
    again = SlotTable(Lists(), 8 * SMALLEST)
    slot = again.take([1, 2, 3, 4], 10, "a")
    assert slot is not None
    slot.tokens.extend([1, 2, 3, 4])
    again.release(slot)
    same = again.take([1, 2, 3, 4, 5], 10, "a")
    assert same is not None
    assert same.tokens == [1, 2, 3, 4]


def test_what_an_adapter_draws_by_chance_is_repeatable(llama: Any) -> None:
    """A seed gives the same text in company as alone."""
    served, _ = llama
    drawn = {"do_sample": True, "seed": 5, "max_new_tokens": 20}
    alone = served.text("The cat", drawn, "c")
    with ThreadPoolExecutor(4) as pool:
        assert (
            list(pool.map(lambda name: served.text("The cat", drawn, name), ("a", "c", None, "c")))[1::2] == [alone] * 2
        )


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantized_base_has_adapters(scheme: str, tmp_path: Path) -> None:
    """Factors stand beside the rounded weights; in company the text is that of the model itself with the adapter."""
    model, tokenizer = build("llama")
    folders = {letter: save_adapter(model, tmp_path / letter, ord(letter), **ATTENTION) for letter in "ab"}
    magnitudes = save_adapter(model, tmp_path / "c", 3, target_modules=["q_proj"], use_dora=True)
    quantize(model, scheme, "cpu")
    with pytest.raises(ModelUnsupported, match="quantization"):
        attach("tiny/llama", copy.deepcopy(model), {"mine": magnitudes}, tokenizer)
    plain = copy.deepcopy(model)
    served = Served("llama", folders, model)
    try:
        assert served.runner.mixes
        tickets = [served.generate("The cat sat", GREEDY, adapter) for adapter in (None, "a", "b")]
        texts = [list(ticket)[-1].whole for ticket in tickets]

        def alone(adapter: str | None) -> str:
            with served.adapters.active(adapter):
                return served.expect(served.model, "The cat sat", GREEDY)

        assert texts == [served.engine.call(lambda name=name: alone(name)) for name in (None, "a", "b")]
        assert texts[0] == served.expect(plain, "The cat sat", GREEDY)
        assert len(set(texts)) == 3
    finally:
        served.engine.close()


# Alone ----------------------------------------------------------------------------------------------------------------


def test_beams_have_their_adapter_and_leave_the_base_behind(llama: Any) -> None:
    """What has the model to itself is answered by its adapter; the next one without is answered by the base."""
    served, references = llama
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8}
    for adapter in ("a", None, "c", "b", None):
        assert served.text("The old", beams, adapter) == served.expect(references[adapter], "The old", beams)


def test_a_generation_that_fails_leaves_the_base_behind(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it ends, by an error or by its caller's leaving, no adapter stays at work."""
    served, references = llama
    beams = {"num_beams": 2, "do_sample": False, "max_new_tokens": 200}

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(served.model, "forward", fail)
        with pytest.raises(GenerationFailed):
            served.text("The cat", beams, "a")
    ticket = served.generate("The cat", beams, "b")
    time.sleep(0.05)
    ticket.cancel()
    with pytest.raises(Exception, match="cancelled"):
        list(ticket)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        found = served.engine.call(lambda: served.model(ids).logits)
        assert torch.equal(found, references[None](ids).logits)


def test_the_base_is_what_it_was_to_the_last_bit(llama: Any) -> None:
    """Attached adapters that nobody asks for change no number, and none is trained."""
    served, references = llama
    ids = torch.tensor([served.tokenizer(" ".join(WORDS[:40]))["input_ids"]])
    with torch.inference_mode():
        assert torch.equal(served.engine.call(lambda: served.model(ids).logits), references[None](ids).logits)
    assert not any(parameter.requires_grad for parameter in served.model.parameters())


def test_an_unknown_adapter_is_refused_by_name(llama: Any) -> None:
    """The refusal names the field and lists what there is."""
    served, _ = llama
    with pytest.raises(InvalidRequest, match=r"'d'\. It has: a, b, c$") as refused:
        served.generate("The cat", GREEDY, "d")
    assert refused.value.field == "adapter"
    model, _ = build("gpt2")
    with pytest.raises(InvalidRequest, match="It has: none"):
        attach("tiny/gpt2", model, {}).check("a")


# Tasks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "auto", "head", "task", "inputs", "parameters"),
    [
        ("bert-nli", "SequenceClassification", "sequence-classification", "text-classification", WORDS[:9], {}),
        ("bert-ner", "TokenClassification", "token-classification", "token-classification", ["the cat sat"], {}),
        ("bert-qa", "QuestionAnswering", "question-answering", "question-answering", None, {}),
        ("bert-mlm", "MaskedLM", "masked-lm", "fill-mask", ["the [MASK] sat"], {"top_k": 3}),
        ("t5", "Seq2SeqLM", "seq2seq-lm", "text2text-generation", ["the cat sat"], {"max_new_tokens": 8}),
    ],
)
def test_a_task_is_done_by_its_adapter(
    name: str, auto: str, head: Any, task: str, inputs: Any, parameters: Any, models_dir: Path, tmp_path: Path
) -> None:
    """Calls of two adapters and of the base, together: each is answered as its own adapter answers alone."""
    folder = models_dir / tiny_models.build(models_dir, name)
    model = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    targets = {"target_modules": ["q", "v"] if name == "t5" else ["query", "value"], "task_type": None}
    folders = {letter: save_adapter(model, tmp_path / letter, ord(letter), **targets) for letter in "ab"}
    references: dict[str | None, Any] = {
        None: model,
        **{each: reference(model, path) for each, path in folders.items()},
    }
    adapted = copy.deepcopy(model)
    adapters = attach(name, adapted, folders, tokenizer)
    runner = TaskRunner(name, adapted, tokenizer, head, active=adapters.active)
    if inputs is None:
        inputs = [{"question": "Where is the cat?", "context": "The cat sat on the mat."}]
    asked = [None, "a", "b", "a", None]
    calls = [runner.submit(task, inputs, {**parameters, **({"adapter": each} if each else {})}) for each in asked]
    while runner.pending:
        runner.step()
    for each, call in zip(asked, calls, strict=True):
        plain = model if each is None else references[each].base_model.model
        wanted = TaskRunner(name, plain, tokenizer, head).run(task, inputs, parameters)
        assert _rounded(call.future.result(0)) == _rounded(wanted), each
        assert _rounded(runner.run(task, inputs, {**parameters, "adapter": each})) == _rounded(wanted)
    assert len({json.dumps(_rounded(call.future.result(0))) for call in calls}) > 1


def test_prompts_of_a_task_are_made_by_their_adapter_in_the_batch(llama: Any) -> None:
    """`text-generation` gives what transformers' pipeline gives with the adapter at work."""
    served, references = llama
    texts = TextGenerations(served.model, served.tokenizer, lambda _, error: GenerationFailed(str(error)))
    prompts = [" ".join(WORDS[at : at + 5]) for at in range(4)]
    for adapter in ("a", None):
        call = texts.begin(prompts, {"max_new_tokens": 8, "do_sample": False})
        done = run_in_batch(call, served.engine, maximum=4, context=512, cancellation=NEVER, adapter=adapter)
        plain = references[adapter] if adapter is None else references[adapter].base_model.model
        wanted = pipeline("text-generation", model=plain, tokenizer=served.tokenizer)(
            prompts, max_new_tokens=8, do_sample=False
        )
        assert done
        assert call.result() == wanted


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


# What is refused ------------------------------------------------------------------------------------------------------


def config(**values: Any) -> Any:
    """Changes an adapter's config."""

    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def tensors(change: Any) -> Any:
    """Changes an adapter's weights."""

    def changed(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return changed


def pickled(folder: Path) -> None:
    """Leaves pickled weights only."""
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def cut(folder: Path) -> None:
    """Cuts the weights short."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def other_tokens(folder: Path) -> None:
    """Adds a tokenizer that has one more token than the base's."""
    token = {"id": 300, "content": "<|tool|>", "special": True}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [token]}))


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), FilesMissing, "no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), FilesCorrupt, "not JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), FilesCorrupt, "not a JSON object"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), FilesMissing, "no adapter_model.safetensors"),
        (pickled, FilesRefused, "pickled"),
        (cut, FilesCorrupt, "damaged or incomplete"),
        (other_tokens, ModelUnsupported, "tokenizer of its own"),
        (config(peft_type="PREFIX_TUNING"), ModelUnsupported, "PREFIX_TUNING"),
        (config(peft_type="IA3"), ModelUnsupported, "IA3"),
        (config(modules_to_save=["lm_head"]), ModelUnsupported, "modules_to_save"),
        (config(bias="all"), ModelUnsupported, "biases"),
        (config(init_lora_weights="pissa"), ModelUnsupported, "pissa"),
        (config(init_lora_weights="olora"), ModelUnsupported, "olora"),
        (config(megatron_config={"x": 1}, megatron_core="antigravity"), ModelUnsupported, "Megatron"),
        (config(layer_replication=[[0, 1]]), ModelUnsupported, "layer_replication"),
        (config(of_the_future=True), ModelUnsupported, "of_the_future"),
        (config(target_modules=["nowhere"]), FilesCorrupt, "nowhere"),
        (config(target_modules=["q_proj", "k_proj", "v_proj"]), FilesCorrupt, "tensors missing"),
        (config(r=6), FilesCorrupt, "cannot be used"),
        (config(r="many"), FilesCorrupt, "cannot be used"),
        (tensors(lambda weights: weights.popitem()), FilesCorrupt, "1 tensors missing"),
        (tensors(lambda weights: next(iter(weights.values())).fill_(float("nan"))), FilesCorrupt, "not all numbers"),
        (
            tensors(lambda weights: weights.update({"base_model.model.lm_head.weight": torch.ones(4, 4)})),
            ModelUnsupported,
            "changes the base's",
        ),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_by_name(
    damage: Any, error: type[LoadError], says: str, tmp_path: Path
) -> None:
    """The message names the adapter and the model and says what is wrong, and holds no path of this machine."""
    model, tokenizer = build("llama")
    folder = save_adapter(model, tmp_path / "adapter", 1, **ATTENTION)
    damage(folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(error, match=says) as refused:
        attach("tiny/llama", model, {"mine": folder}, tokenizer)
    assert "Adapter 'mine' of model 'tiny/llama'" in str(refused.value)
    assert str(tmp_path) not in str(refused.value)
    after = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())


TOLD = (
    (config(peft_type="IA3"), "only LORA"),
    (config(modules_to_save=["lm_head"]), "modules_to_save"),
    (config(bias="all"), "biases"),
    (config(init_lora_weights="pissa"), "pissa"),
    (config(r=6), "of rank 4"),
    (pickled, "pickled"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
)


def check_told(root: Path, model: Any, tokenizer: Any, says: str) -> None:
    """Preflight and load refuse the adapter of `org/base` in the same words."""
    preflight = Preflight(LoadOptions(root))
    with pytest.raises(LoadError, match=says) as refused:
        attach("org/base", model, {"mine": root / "org" / "adapter"}, tokenizer)
    details = preflight.look(ModelRecord("org/base", "base", "text-generation", adapters={"mine": "org/adapter"}))
    assert details["adapters"] == {"mine": str(refused.value)}
    assert details["problem"] == str(refused.value)


@pytest.mark.parametrize(("damage", "says"), TOLD)
def test_preflight_tells_in_the_loads_words_why_an_adapter_cannot_be_used(
    damage: Any, says: str, tmp_path: Path
) -> None:
    model, tokenizer = build("llama")
    model.save_pretrained(tmp_path / "org" / "base")
    tokenizer.save_pretrained(tmp_path / "org" / "base")
    save_adapter(model, tmp_path / "org" / "adapter", 1, **ATTENTION)
    record = ModelRecord("org/base", "base", "text-generation", adapters={"mine": "org/adapter", "gone": "org/gone"})
    options = LoadOptions(tmp_path, offline=True)
    details = Preflight(options).look(record)
    assert details["adapters"]["mine"] is None
    assert "org/gone" in details["adapters"]["gone"]
    damage(tmp_path / "org" / "adapter")
    check_told(tmp_path, model, tokenizer, says)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_preflight_sees_that_an_adapter_is_of_a_wider_base(name: str, tmp_path: Path) -> None:
    model, tokenizer = build(name)
    model.save_pretrained(tmp_path / "org" / "base")
    tokenizer.save_pretrained(tmp_path / "org" / "base")
    wide = copy.deepcopy(model.config)
    wide.hidden_size = 2 * wide.hidden_size
    other = transformers.AutoModelForCausalLM.from_config(wide)
    save_adapter(other, tmp_path / "org" / "adapter", 1, target_modules=["c_attn"] if name == "gpt2" else ["q_proj"])
    check_told(tmp_path, model, tokenizer, "it belongs to another base")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    """Shapes that do not fit, and layers that are not there."""
    wide = build("llama")[0].config
    wide.hidden_size, wide.head_dim = 64, 16
    model, tokenizer = build("llama")
    other = save_adapter(transformers.AutoModelForCausalLM.from_config(wide), tmp_path / "wide", 1, **ATTENTION)
    with pytest.raises(FilesCorrupt, match="Adapter 'mine'"):
        attach("tiny/llama", model, {"mine": other}, tokenizer)
    deep = build("llama")[0].config
    deep.num_hidden_layers = 3
    other = save_adapter(transformers.AutoModelForCausalLM.from_config(deep), tmp_path / "deep", 1, **ATTENTION)
    with pytest.raises(FilesCorrupt, match="no place for"):
        attach("tiny/llama", build("llama")[0], {"mine": other}, tokenizer)


def test_an_adapter_of_positions_is_refused(tmp_path: Path) -> None:
    """How many positions a model has is read from the table itself, which has to be found."""
    model, tokenizer = build("gpt2")
    folder = save_adapter(model, tmp_path / "adapter", 1, target_modules=["wpe"])
    with pytest.raises(ModelUnsupported, match="Embedding"):
        attach("tiny/gpt2", model, {"mine": folder}, tokenizer)


def test_one_adapter_under_two_names_and_in_half_precision(tmp_path: Path) -> None:
    """Names may hold what they like; factors in float16 are computed with in float32, as peft does."""
    model, _ = build("llama")
    folder = save_adapter(model, tmp_path / "adapter", 1, **ATTENTION)
    tensors(lambda weights: weights.update({name: tensor.half() for name, tensor in weights.items()}))(folder)
    shutil.copytree(folder, tmp_path / "b")
    wanted = reference(model, folder)
    served = Served("llama", {"org/my.lora": folder, "lora_A": tmp_path / "b"}, copy.deepcopy(model))
    try:
        for name in ("org/my.lora", "lora_A"):
            assert served.text("The cat", GREEDY, name) == served.expect(wanted, "The cat", GREEDY)
    finally:
        served.engine.close()
