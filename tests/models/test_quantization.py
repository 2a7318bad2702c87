"""Quantized models: what they take is what was told, their answers are near, and nobody's company changes an answer."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import causal_models
import pytest
import torch
import transformers
from conftest import ROOT, STARTER
from lora_models import save_adapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from huggingface.engine.torch.parity import batch_runner
from huggingface.errors import InvalidRequest, ModelUnsupported
from huggingface.loading import pretrained, quantization
from huggingface.loading.lora import attach
from huggingface.loading.narrow import NarrowLinear, whole_products_are_exact
from huggingface.loading.placement import place
from huggingface.loading.plan import look
from huggingface.loading.quantization import (
    SCHEMES,
    predicted_bytes,
    quantize,
    stored_bytes,
    tensor_bytes,
)
from huggingface.loading.torch import TorchCompute
from huggingface.model.loaded import LoadedModel
from huggingface.model.parts import Setup
from huggingface.registry.records import LoadSettings, ModelRecord
from huggingface.types import EngineOptions, GenerationRequest, LoadOptions

Load = Callable[[str], Any]

CLASSES = {
    "llama": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "bert-nli": transformers.AutoModelForSequenceClassification,
    "bert-mlm": transformers.AutoModelForMaskedLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "bart": transformers.AutoModelForSeq2SeqLM,
}


@pytest.fixture
def load(tiny: Callable[[str], str], models_dir: Path) -> Load:
    """A tiny model in float32, by its short name."""

    def read(name: str) -> Any:
        folder = models_dir / tiny(name)
        return CLASSES[name].from_pretrained(folder, dtype=torch.float32).eval()

    return read


def odd_llama() -> Any:
    """A Llama whose layers have 48 and 80 inputs, which no group size divides, and an output layer of its own."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def wide_llama(**changes: Any) -> Any:
    """A Llama of some width, whose weights are mostly in its layers."""
    torch.manual_seed(1)
    settings = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(**settings | {"num_attention_heads": 4, "num_key_value_heads": 2} | changes)
    return transformers.LlamaForCausalLM(config).eval()


EXACT = pytest.mark.skipif(not whole_products_are_exact(), reason="this machine does not add whole numbers up exactly")
BOTH_WAYS = pytest.mark.parametrize(
    "whole", [pytest.param(True, id="whole", marks=EXACT), pytest.param(False, id="float")]
)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "device"), [("int3", "cpu"), ("INT8", "cpu"), ("", "cpu"), ("int8", "mps")])
def test_a_scheme_that_is_not_to_be_had_is_refused_by_its_field(scheme: str, device: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        quantization.check(scheme, device)
    assert caught.value.field == "quantization"


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_package_that_is_lacking_is_named() -> None:
    with pytest.raises(ModelUnsupported, match=r"pip install bitsandbytes==\d"):
        quantization.check("int4", "cuda:0")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_to_be_had_on_a_cpu(scheme: str) -> None:
    quantization.check(scheme, "cpu")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_whose_weights_would_stay_is_refused_and_left_alone(scheme: str) -> None:
    model = nn.Sequential(nn.Embedding(10000, 64), nn.Linear(64, 64))
    with pytest.raises(ModelUnsupported, match="almost none of its weights"):
        quantize(model, scheme, "cpu")
    assert type(model[1]) is nn.Linear


# What it takes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_model_takes_the_bytes_that_were_told(load: Load, name: str, scheme: str) -> None:
    model = load(name)
    before, told = tensor_bytes(model), predicted_bytes(model, scheme, "cpu")
    quantize(model, scheme, "cpu")
    assert tensor_bytes(model) == told
    assert told < before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_bytes_are_told_without_the_weights(scheme: str) -> None:
    model = wide_llama()
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config)
    told = predicted_bytes(empty, scheme, "cpu")
    quantize(model, scheme, "cpu")
    assert tensor_bytes(model) == pytest.approx(told, rel=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [odd_llama, wide_llama], ids=["odd", "wide"])
def test_the_bytes_are_told_of_layers_that_do_not_fit_4_bits_too(make: Callable[[], Any], scheme: str) -> None:
    model = make()
    told = predicted_bytes(model, scheme, "cpu")
    quantize(model, scheme, "cpu")
    assert tensor_bytes(model) == told


def test_a_layer_that_does_not_fit_4_bits_has_8() -> None:
    model = odd_llama()
    quantize(model, "int4", "cpu")
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.steps is None
    assert layer.mlp.down_proj.steps is not None
    assert model.lm_head.steps is None, "the output layer keeps 8 bits"
    assert type(model.model.embed_tokens) is nn.Embedding


def test_storages_are_counted_once() -> None:
    model = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    model[1].weight = model[0].weight
    model.register_buffer("part", model[0].weight.data[:2])
    assert tensor_bytes(model) == 8 * 8 * 4


def test_what_onednn_has_laid_out_is_counted() -> None:
    model = nn.Linear(64, 64, bias=False)
    model.packed = torch.ops.mkldnn._reorder_linear_weight(model.weight.data, 16)
    assert tensor_bytes(model) == 2 * 64 * 64 * 4


# What it answers ------------------------------------------------------------------------------------------------------


def rounded(layer: nn.Module, bits: int, *, whole: bool) -> NarrowLinear:
    """What takes the place of a layer, multiplying in whole numbers or by floats."""
    model = nn.Sequential(layer)
    quantize(model, f"int{bits}", "cpu")
    made = model[0]
    assert isinstance(made, NarrowLinear)
    assert (made.steps is None) == (bits == 8)
    made.whole = whole
    return made


@BOTH_WAYS
@pytest.mark.parametrize(("bits", "apart"), [(8, 0.01), (4, 0.1)])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_product_is_near_that_of_the_floats(kind: str, bits: int, apart: float, whole: bool) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(96, 40) if kind == "linear" else Conv1D(40, 96)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    made = rounded(layer, bits, whole=whole)
    values = torch.randn(2, 300, 96)
    wanted = layer(values)
    assert ((made(values) - wanted).norm() / wanted.norm()).item() < apart


@EXACT
@pytest.mark.parametrize("bits", [8, 4])
def test_both_ways_of_multiplying_are_one(bits: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(640, 64)
    whole, floats = (rounded(layer, bits, whole=whole) for whole in (True, False))
    values = torch.randn(7, 640) * torch.logspace(-3, 3, 7)[:, None]
    apart = (whole(values) - floats(values)).norm(dim=1) / floats(values).norm(dim=1)
    assert apart.max().item() < 2e-4, "values lose nothing but what 16 bits cannot hold"


@pytest.mark.parametrize("bits", [8, 4])
def test_what_4_bits_can_hold_is_held(bits: int) -> None:
    """Sixteen evenly spaced values around nothing, as files of 4 bits have them."""
    torch.manual_seed(0)
    weight = (torch.randint(0, 16, (64, 64)) - 7.5) * 0.01
    weight[:, ::32], weight[:, 1::32] = -0.075, 0.075
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = weight
    made = rounded(layer, bits, whole=False)
    values = torch.eye(64)
    assert ((made(values).t() - weight).norm() / weight.norm()).item() < 0.01


@BOTH_WAYS
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_its_company(bits: int, whole: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(320, 48).requires_grad_(False)
    made = rounded(layer, bits, whole=whole)
    rows = torch.randn(600, 320)
    rows[1] *= 1e4
    rows[2] = 0
    together = made(rows)
    for index in (0, 1, 2, 3, 299, 599):
        alone = made(rows[index : index + 1])[0]
        assert torch.allclose(alone, together[index], rtol=1e-5, atol=1e-5 * float(together[index].abs().max()))
    if whole and bits == 8:
        assert torch.equal(made(rows[:16]), torch.cat([made(row[None]) for row in rows[:16]]))


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor of floats that anything computes."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **kwargs or {})
        if isinstance(made, torch.Tensor) and made.is_floating_point() and made.device.type == "cpu":
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("count", [1, 8, 9, 300])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_is_never_wide_as_a_whole(bits: int, count: int) -> None:
    """Weights become floats a block at a time: all of them would leave the caches, and take four times the memory."""
    layer = nn.Linear(4096, 4096, bias=False).requires_grad_(False)
    made = rounded(layer, bits, whole=False)
    with Largest() as largest:
        made(torch.ones(count, 4096))
    assert largest.bytes <= layer.weight.numel()


@pytest.mark.parametrize("inputs", [32, 96, 128, 160])
@pytest.mark.parametrize("outputs", [1, 5000])
@pytest.mark.parametrize("count", [1, 8, 9, 300])
@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_of_a_layer_make_up_its_product(bits: int, count: int, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    made = rounded(nn.Linear(inputs, outputs, bias=False), bits, whole=False)
    values = torch.randn(count, inputs)
    wanted = values.double() @ rounded_weight(made).t().double()
    assert torch.allclose(made(values).double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@BOTH_WAYS
@pytest.mark.parametrize("bits", [8, 4])
def test_floats_of_16_bits_are_multiplied_and_given_back(bits: int, whole: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2048, 32, dtype=dtype)
    made = rounded(layer, bits, whole=whole)
    values = torch.rand(5, 2048, dtype=dtype)
    found, wanted = made(values), layer.float()(values.float())
    assert found.dtype == dtype
    assert ((found.float() - wanted).norm() / wanted.norm()).item() < (0.02 if bits == 8 else 0.1)


@EXACT
def test_a_row_that_is_no_number_harms_no_other() -> None:
    layer = nn.Linear(64, 32)
    made = rounded(layer, 8, whole=True)
    rows = torch.randn(3, 64)
    wanted = made(rows)
    rows[1, 5] = float("nan")
    found = made(rows)
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])
    assert found[1].isnan().all()


def rounded_weight(layer: NarrowLinear) -> torch.Tensor:
    """The weights that a layer stands for, (outputs, inputs)."""
    if layer.steps is None or layer.middles is None:
        return layer.codes.float() * layer.scale[:, None]
    halves = torch.cat([torch.bitwise_left_shift(layer.codes, 4) >> 4, layer.codes >> 4])  # below, and above
    whole = halves.float() * layer.steps.float().repeat_interleave(32, 0)
    return ((whole + layer.middles.float().repeat_interleave(32, 0)) * layer.scale).t()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CLASSES)
def test_nothing_but_the_weights_is_rounded(load: Load, name: str, scheme: str) -> None:
    """A model of floats that has the rounded weights answers the same."""
    model, plain = load(name), load(name)
    quantize(model, scheme, "cpu")
    layers = {name: each for name, each in model.named_modules() if isinstance(each, NarrowLinear)}
    assert len(layers) > 5
    with torch.no_grad():
        for place, layer in layers.items():
            old = plain.get_submodule(place)
            weight = rounded_weight(layer)
            old.weight.copy_(weight.t() if isinstance(old, Conv1D) else weight)
    ids = torch.randint(5, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        found, wanted = (each(input_ids=ids, **more).logits for each in (model, plain))
    assert ((found - wanted).norm() / wanted.norm()).item() < 2e-2, "T5 at random weights makes much of little"


@pytest.mark.parametrize(("scheme", "apart"), [("int8", 0.03), ("int4", 0.2)])
def test_a_quantized_model_answers_nearly_as_the_model_does(scheme: str, apart: float) -> None:
    model = wide_llama()
    ids = torch.randint(0, 64, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(ids).logits
        quantize(model, scheme, "cpu")
        found = model(ids).logits
    assert ((found - wanted).norm() / wanted.norm()).item() < apart


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pipelines_and_beams_take_a_quantized_model(
    load: Load, tiny: Callable[[str], str], models_dir: Path, scheme: str
) -> None:
    model = load("t5")
    quantize(model, scheme, "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_dir / tiny("t5"))
    inputs = tokenizer("a cat and a dog", return_tensors="pt")
    assert model.generate(**inputs, num_beams=3, max_new_tokens=6).shape[1] > 1
    classifier = load("bert-nli")
    quantize(classifier, scheme, "cpu")
    own = transformers.AutoTokenizer.from_pretrained(models_dir / tiny("bert-nli"))
    pipeline = transformers.pipeline("text-classification", model=classifier, tokenizer=own)
    assert 0 < pipeline("a cat")[0]["score"] <= 1


def test_what_a_model_looks_at_of_a_weight_is_its_type_and_shape() -> None:
    model = wide_llama()
    quantize(model, "int8", "cpu")
    weight = model.lm_head.weight
    assert (weight.dtype, tuple(weight.shape)) == (torch.float32, (64, 128))
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"


# In the engine --------------------------------------------------------------------------------------------------------


def served(model: Any, tokenizer: Any, model_id: str) -> LoadedModel:
    setup = Setup(ModelRecord(model_id, model_id, "text-generation"), "causal-lm", "cpu", {})
    return LoadedModel(setup, TorchCompute("causal-lm", model), tokenizer, EngineOptions())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_text_is_generates_alone_and_in_a_batch(
    load: Load, tiny: Callable[[str], str], models_dir: Path, name: str, scheme: str
) -> None:
    model = load(name)
    quantize(model, scheme, "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_dir / tiny(name))
    reference = copy.deepcopy(model)
    prompts = [f"the {word} of number {index}" for index in range(4) for word in ("cat", "dog", "tree", "house")]
    wanted = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = reference.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        wanted.append(tokenizer.decode(out, skip_special_tokens=True))
    loaded = served(model, tokenizer, f"tiny/{name}")
    try:
        status = loaded.status
        assert status is not None
        ask = [GenerationRequest({"max_new_tokens": 8, "do_sample": False}, prompt=prompt) for prompt in prompts]
        alone = ["".join(chunk.text for chunk in loaded.generate(request)) for request in ask[:2]]
        tickets = [loaded.generate(request) for request in ask]
        together = ["".join(chunk.text for chunk in ticket) for ticket in tickets]
    finally:
        loaded.close()
    assert alone == wanted[:2]
    assert together == wanted


# The starter model ----------------------------------------------------------------------------------------------------


def perplexity(model: Any, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        logits = model(ids[None, :-1], use_cache=False).logits[0].float()
    return math.exp(float(nn.functional.cross_entropy(logits, ids[1:])))


@pytest.mark.parametrize(("scheme", "worse", "share"), [("int8", 1.02, 0.26), ("int4", 1.08, 0.18)])
def test_the_starter_model_is_smaller_and_knows_as_much(
    starter_models_dir: Path, scheme: str, worse: float, share: float
) -> None:
    folder = starter_models_dir / STARTER
    text = (ROOT / "benchmarks" / "perplexity.txt").read_text("utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text)["input_ids"][:400])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before, told, plain = tensor_bytes(model), predicted_bytes(model, scheme, "cpu"), perplexity(model, ids)
    quantize(model, scheme, "cpu")
    assert tensor_bytes(model) == told
    assert told < share * before
    assert perplexity(model, ids) < worse * plain
    assert isinstance(model.lm_head, NarrowLinear)
    assert model.lm_head.codes is model.model.embed_tokens.codes, "one table for both"
    batch_runner(model)  # raises where the batch does not give the model's own numbers


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", causal_models.BATCHED)
def test_16_bits_are_widened_layer_by_layer_to_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, scheme: str
) -> None:
    """Weights are read as they lie in their file, so that memory never has the whole model in float32."""
    model, tokenizer = causal_models.build(name)
    model.to(dtype).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    record = ModelRecord("tiny/model", name, "text-generation")
    plan = look(record, LoadOptions(models_dir=tmp_path), tmp_path, LoadSettings(quantization=scheme, device="cpu"))
    read: list[set[torch.dtype]] = []

    def note(model: Any, *arguments: Any) -> None:
        read.append({each.weight.dtype for each in model.modules() if type(each) in (nn.Linear, Conv1D)})
        quantize(model, *arguments)

    monkeypatch.setattr(pretrained, "quantize", note)
    found = pretrained.read_model(plan, LoadOptions(models_dir=tmp_path), None)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    quantize(wanted, scheme, "cpu")
    kept = {torch.float32} if "gemma" in name else set()  # their tables of tokens are of a class of their own
    assert read == [{dtype} | kept]
    assert (found.dtype, found.config.dtype) == (wanted.dtype, wanted.config.dtype) == (torch.float32, torch.float32)
    numbers, exact = ({**dict(each.named_buffers()), **each.state_dict()} for each in (found, wanted))
    assert numbers.keys() == exact.keys()
    for key, tensor in exact.items():
        assert numbers[key].dtype is tensor.dtype, key
        assert torch.equal(numbers[key], tensor), key
    ids = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(found(input_ids=ids).logits, wanted(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_model_computes_itself_is_never_rounded_to_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """Marian's positions are parameters that no file has."""
    config = transformers.MarianConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    transformers.MarianMTModel(config).to(dtype).save_pretrained(tmp_path)
    options, settings = LoadOptions(models_dir=tmp_path), LoadSettings(quantization="int8", device="cpu")
    plan = look(ModelRecord("tiny/model", "marian", "translation"), options, tmp_path, settings)
    found = pretrained.read_model(plan, options, None)
    wanted = transformers.MarianMTModel(config)
    for half in ("encoder", "decoder"):
        positions = [getattr(each.model, half).embed_positions.weight for each in (found, wanted)]
        assert torch.equal(*positions)


def test_weights_of_several_types_are_read_as_they_are(tmp_path: Path) -> None:
    """What a config says of the dtype does not count: numbers of 32 bits are never rounded to it first."""
    model, tokenizer = causal_models.build("llama")
    model.model.layers[0].to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    tokenizer.save_pretrained(tmp_path)
    record = ModelRecord("tiny/model", "llama", "text-generation")
    plan = look(record, LoadOptions(models_dir=tmp_path), tmp_path, LoadSettings(quantization="int8", device="cpu"))
    found = pretrained.read_model(plan, LoadOptions(models_dir=tmp_path), None)
    assert torch.equal(found.model.norm.weight, model.model.norm.weight)
    wanted = quantization_of(model.float())
    assert torch.equal(found.lm_head.codes, wanted.lm_head.codes)


def quantization_of(model: Any) -> Any:
    """The model, quantized."""
    quantize(model, "int8", "cpu")
    return model


# 16 bits in memory, float32 in what is computed ----------------------------------------------------------------------


def read(folder: Path, settings: LoadSettings) -> Any:
    """A model as a load with these settings reads it."""
    options = LoadOptions(models_dir=folder)
    plan = look(ModelRecord("tiny/model", "model", "text-generation"), options, folder, settings)
    return pretrained.read_model(plan, options, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", causal_models.BATCHED)
def test_16_bits_in_memory_make_the_numbers_of_float32(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Logits are float32's but for the order of additions, greedy texts are the same, and the bytes are foreseen."""
    model, tokenizer = causal_models.build(name)
    model.to(dtype).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    told = stored_bytes(wanted)
    found = read(tmp_path, LoadSettings(dtype="stored", device="cpu"))
    layers = [each for each in found.modules() if isinstance(each, NarrowLinear)]
    assert layers
    assert {each.codes.dtype for each in layers} == {dtype}
    assert {each.dtype for each in found.parameters()} == {torch.float32}
    assert (found.dtype, found.config.dtype) == (torch.float32, torch.float32)
    assert tensor_bytes(found) == told < tensor_bytes(wanted)
    ids = torch.randint(5, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        logits, exact = (each(input_ids=ids).logits for each in (found, wanted))
        assert torch.allclose(logits, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
        for row in ids:
            assert torch.equal(*(each.generate(row[None], **settings) for each in (found, wanted)))


def test_a_model_in_16_bits_is_served_in_a_batch_and_has_adapters(tmp_path: Path) -> None:
    model, tokenizer = causal_models.build("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = read(tmp_path, LoadSettings(dtype="stored", device="cpu"))
    batch_runner(found)  # raises where it gives other numbers
    folder = save_adapter(model.float(), tmp_path / "adapter", 1, target_modules=["q_proj", "down_proj"])
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(10, 30)[None]
    with torch.inference_mode():
        plain = wanted(ids).logits
        for each in (found, wanted):
            attach("tiny/model", each, {"a": folder}, tokenizer).activate(each, "a")
        assert torch.allclose(found(ids).logits, wanted(ids).logits, atol=1e-5)
        assert not torch.allclose(wanted(ids).logits, plain, atol=1e-3)


def test_weights_of_32_bits_stay_as_they_are_among_others(tmp_path: Path) -> None:
    model, tokenizer = causal_models.build("llama")
    model.to(torch.bfloat16).model.layers[0].mlp.float()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1e-5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = read(tmp_path, LoadSettings(dtype="stored", device="cpu"))
    assert torch.equal(found.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    assert isinstance(found.model.layers[1].mlp.up_proj, NarrowLinear)


@pytest.mark.parametrize(
    "settings",
    [{"device_map": "auto"}, {"quantization": "int8", "device": "cpu"}, {"compile": True, "device": "cpu"}],
)
def test_16_bits_are_kept_where_nothing_else_wants_the_weights(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        place(LoadSettings(dtype="stored", **settings), LoadOptions(models_dir=tmp_path))
    assert caught.value.field == "dtype"
