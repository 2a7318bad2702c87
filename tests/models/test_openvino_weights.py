"""How a graph gets its weights: one at a time from the model's files, in float32 or rounded."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import causal_models
import nncf
import numpy as np
import openvino
import pytest
import torch
from conftest import PATIENCE, ROOT, STARTER
from openvino import opset13 as ops
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma4TextConfig, LlamaConfig, LlamaForCausalLM

from huggingface.engine.openvino import agreement, graph
from huggingface.engine.openvino.blanks import Blanks, NotBlank
from huggingface.engine.openvino.constants import NumbersFile, settle
from huggingface.engine.openvino.fuse import value_products
from huggingface.loading import loader
from huggingface.loading.openvino import decoder
from huggingface.loading.plan import look
from huggingface.loading.pretrained import read_blank
from huggingface.registry.records import LoadSettings, ModelRecord
from huggingface.types import GenerationRequest, LoadOptions

FAMILIES = sorted(causal_models.BATCHED.keys() - causal_models.UNPAGED)
RECORD = ModelRecord("tiny/model", "model", "text-generation")
EXACT = LoadSettings(backend="openvino", dtype="float32")

# The process that converts, and what its own memory grows by, in bytes.
CONVERTING = """
import sys, threading, time
from pathlib import Path
from huggingface.loading.openvino import decoder, load
from huggingface.loading.openvino.subprocess import Wanted
from huggingface.progress import Progress
from huggingface.registry.records import LoadSettings, ModelRecord
from huggingface.types import LoadOptions

def own():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

models, quantization = Path(sys.argv[1]), sys.argv[2] or None
decoder.TRIED = 0
before, seen, done = own(), [], threading.Event()
def watch():
    while not done.wait(0.005):
        seen.append(own())
thread = threading.Thread(target=watch)
thread.start()
settings = LoadSettings(backend="openvino", dtype="float32", quantization=quantization)
record, options = ModelRecord("tiny/model", "model", "text-generation"), LoadOptions(models, "cpu")
load.convert(Wanted(record, options, models / "tiny/model", settings, models), Progress())
done.set()
thread.join()
print("grew by", max(seen) - before)
"""


def put(model: Any, tokenizer: Any, models: Path) -> Path:
    """Saves a model where `RECORD` finds it; returns its folder."""
    folder = models / "tiny" / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def kept(folder: Path) -> list[Path]:
    """The files of the model's graphs, and what is left of unfinished ones."""
    return sorted(path for path in (folder / ".local-llm").rglob("*") if path.is_file() and path.name != ".lock")


def weights(made: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    """The constants of a graph's products and tables, with what unpacks them: types, shapes and bytes."""
    found = []

    def walk(value: Any) -> None:
        node = value.get_node()
        if node.get_type_name() == "Constant":
            found.append(
                (str(node.get_element_type()), tuple(node.get_output_shape(0)), np.array(node.get_data()).tobytes())
            )
        elif node.get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape"):
            for source in node.input_values():
                walk(source)

    for node in made.get_ordered_ops():
        if node.get_type_name() in ("MatMul", "Gather"):
            for value in node.input_values():
                walk(value)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_rounded_to_8_bits_as_by_nncf(name: str) -> None:
    """Every whole number, scale and zero point is that of nncf without data, which rounds the whole graph at once."""
    logging.getLogger("nncf").setLevel(logging.ERROR)
    model, _ = causal_models.build(name)
    blanks, exact, rounded = Blanks(), NumbersFile(), NumbersFile()
    ours = graph.convert(model, blanks)
    theirs = ours.clone()
    settle(theirs, blanks, None, exact)
    settle(ours, blanks, "int8", rounded)
    theirs = nncf.compress_weights(theirs, mode=nncf.CompressWeightsMode.INT8_ASYM)
    assert weights(ours) == weights(theirs)


def products(*arrays: Any) -> Any:
    """A graph that multiplies by one weight after the other; each is (outputs, inputs)."""
    rows = value = ops.parameter([-1, arrays[0].shape[1]], np.float32)
    for each in arrays:
        value = ops.matmul(value, openvino.op.Constant(each, shared_memory=True), transpose_a=False, transpose_b=True)
    return openvino.Model([value], [rows])


def unpacked(made: Any) -> list[Any]:
    """The float32 weights of a graph's products, in order, as OpenVINO unpacks them."""
    found = []
    for node in made.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            alone = openvino.Model([node.input_value(1)], []).clone()
            [value] = openvino.Core().compile_model(alone, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([]).values()
            found.append(value)
    return found


def rounded_plainly(numbers: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """One group of numbers in 4 bits, each counted so often: the best of three spans, by least squares."""
    least, most = min(float(numbers.min()), 0.0), max(float(numbers.max()), 0.0)
    step = (most - least) / 15
    zero = round(-least / step)
    best, lowest = numbers, math.inf
    for share in (1, 0.9, 0.8):
        codes = (numbers / (share * step) + zero).round().clamp(0, 15) - zero
        scale = (counts * codes * numbers).sum() / (counts * codes * codes).sum()
        error = float((counts * (numbers - scale * codes) ** 2).sum())
        if error < lowest:
            best, lowest = scale * codes, error
    return best


@pytest.mark.parametrize("is_seen", [True, False])
def test_weights_in_4_bits_are_those_of_a_plain_search(is_seen: bool) -> None:
    """Each group of 32 numbers has the scale and the span that lose the least for inputs as large as those seen; the
    last weight has 8 bits."""
    generator = torch.Generator().manual_seed(0)
    first, last = torch.randn(5, 96, generator=generator), torch.randn(3, 5, generator=generator)
    inputs = torch.randn(7, 96, generator=generator) * torch.linspace(0.1, 9, 96)
    blanks, file = Blanks(), NumbersFile()
    blank = blanks.add([first], mapped=True)
    if is_seen:
        with blanks.filled():
            product = torch.nn.functional.linear(inputs, torch.nn.Parameter(torch.from_numpy(blank)))
        assert torch.allclose(product, inputs @ first.t(), atol=1e-5)
    made = products(blank, last.numpy())
    settle(made, blanks, "int4", file)
    small, wide = (torch.from_numpy(each) for each in unpacked(made))
    squares = inputs.square().sum(0)
    counts = (squares / squares.mean() + 0.1 if is_seen else torch.ones(96)).view(3, 32)
    groups = [[rounded_plainly(group, count) for group, count in zip(row.view(3, 32), counts, strict=True)]
              for row in first]  # fmt: skip
    wanted = torch.stack([torch.cat(row) for row in groups])
    assert torch.allclose(small, wanted, atol=2e-3 * float(first.abs().max()))
    assert torch.allclose(wide, last, atol=float(last.abs().max()) / 100)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_in_4_bits_are_near_the_models(name: str) -> None:
    """Whatever the family, and whether its weights are merged or not."""
    model, _ = causal_models.build(name)
    blanks, exact, rounded = Blanks(), NumbersFile(), NumbersFile()
    ours = graph.convert(model, blanks, "int4")
    whole = ours.clone()
    settle(whole, blanks, None, exact)
    settle(ours, blanks, "int4", rounded)
    for small, wanted in zip(unpacked(ours), unpacked(whole), strict=True):
        assert np.linalg.norm(small - wanted) < 0.1 * np.linalg.norm(wanted)


def test_int4_knows_nearly_as_much_as_the_starter_model_does(starter_models_dir: Path) -> None:
    """The perplexity of 4 bits is at most 1.08 times float32's, of a real text."""
    folder = starter_models_dir / STARTER
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer((ROOT / "benchmarks" / "perplexity.txt").read_text("utf-8"))["input_ids"][:1024]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    plain = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))
    del model, logits
    record = ModelRecord(STARTER, "starter", "text-generation")
    settings = LoadSettings(backend="openvino", dtype="float32", quantization="int4")
    options = LoadOptions(starter_models_dir, "cpu")
    loaded = loader.load(record, options, folder, settings=settings)
    told = loader.estimate(record, options, folder, settings)
    assert told.weights == pytest.approx(loaded.sizes.weights, rel=0.01)
    request = GenerationRequest({"do_sample": False, "max_new_tokens": 1}, tokens=ids, logprobs=0, prompt_logprobs=True)
    [chunk] = list(loaded.generate(request))
    loaded.close()
    found = -sum(token.logprob or 0.0 for token in chunk.prompt[1:]) / (len(ids) - 1)
    assert math.exp(found - plain) < 1.08


def test_an_attentions_values_keep_8_bits() -> None:
    """They cost little, and lose the most: the weights for queries and keys are merged without them."""
    model, _ = causal_models.build("llama")
    blanks, file = Blanks(), NumbersFile()
    made = graph.convert(model, blanks, "int4")
    values = [node for node in made.get_ops() if node.get_friendly_name() in value_products(made)]
    layers = [layer.self_attn for layer in model.model.layers]
    assert sorted(node.input_value(1).get_node().get_data().tobytes() for node in values) == sorted(
        layer.v_proj.weight.detach().numpy().tobytes() for layer in layers
    )
    settle(made, blanks, "int4", file)
    kinds = [kind for kind, shape, _ in weights(made) if len(shape) > 1 and kind.startswith("<Type: 'uint")]
    assert kinds.count("<Type: 'uint8_t'>") == 2 * (len(layers) + 2)  # each with its zero points; first and last too


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in FAMILIES), ("llama", torch.float16)])
def test_weights_that_stay_in_their_files_give_the_numbers_of_float32(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """torch computes with blanks what it computes with the weights; so does the graph."""
    model, tokenizer = causal_models.build(name)
    folder = put(model.to(dtype), tokenizer, tmp_path)
    options = LoadOptions(tmp_path, "cpu")
    blanks = Blanks()
    blank = read_blank(look(RECORD, options, folder, EXACT), options, blanks)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with blanks.filled():
        computed = agreement.torch_expects(blank)
    for seen, wanted in zip(computed, agreement.torch_expects(whole), strict=True):
        assert seen.tokens == wanted.tokens
        assert torch.allclose(seen.logits, wanted.logits, rtol=0, atol=1e-4)
    loaded = loader.load(RECORD, options, folder, settings=EXACT)
    assert loaded.effective["backend"] == "openvino"
    loaded.close()


def test_a_model_whose_layers_differ_is_estimated_in_every_form(tmp_path: Path) -> None:
    """As Gemma 4, whose config does not tell one width for all of its heads."""
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16}
    shape |= {"hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"]}
    AutoModelForCausalLM.from_config(Gemma4TextConfig(**shape)).save_pretrained(tmp_path)
    record, options = ModelRecord("tiny/gemma4", "Gemma", "text-generation"), LoadOptions(tmp_path.parent, "cpu")
    sizes = []
    for form in (None, "int8", "int4"):
        told = loader.estimate(record, options, tmp_path, LoadSettings(backend="openvino", quantization=form))
        assert told.backend == "openvino"
        sizes.append(told.weights)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_numbers_that_a_trace_computes_of_blanks_are_found_out() -> None:
    """A trace that folds weights into other constants would fold zeros: then the model is read."""
    blanks = Blanks()
    blank = blanks.add([torch.ones(4, 6)], mapped=True)
    blanks.check(blank)
    blanks.check(np.ones((4, 6), np.float32))
    blanks.check(np.zeros((1, 1, 6), np.float32))
    for folded in (blank * 2, blank.T.copy(), blank[1:].copy()):
        with pytest.raises(NotBlank):
            blanks.check(folded)


def test_a_graph_that_cannot_be_made_of_blanks_is_made_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a trace folds is found when the constants get their numbers; the load goes on with the weights in memory."""
    folder = put(*causal_models.build("llama"), tmp_path)
    forward = LlamaForCausalLM.forward

    def folding(self: Any, *arguments: Any, **named: Any) -> Any:
        """As the forward pass, with a number of the weights that a trace computes once."""
        output = forward(self, *arguments, **named)
        output.logits = output.logits + self.model.layers[0].mlp.up_proj.weight.sum(-1)[: output.logits.shape[-1]].sum()
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", folding)
    loaded = loader.load(RECORD, LoadOptions(tmp_path, "cpu"), folder, settings=EXACT)
    assert loaded.effective["backend"] == "openvino"
    loaded.close()


def large(models: Path) -> int:
    """Saves a model of 150 million random numbers in bfloat16; returns how many they are."""
    _, tokenizer = causal_models.build("llama")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=512,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=0.05)
    put(model, tokenizer, models)
    return sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's accounts of memory")
@pytest.mark.parametrize("scheme", ["", "int8", "int4"])
def test_a_conversion_holds_a_part_of_one_weight(scheme: str, tmp_path: Path) -> None:
    """Its own memory stays far below the model's, whatever the form: a float32 number has four bytes."""
    numbers = large(tmp_path)
    command = [sys.executable, "-c", CONVERTING, str(tmp_path), scheme]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE * 4)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.rpartition("grew by ")[2])
    assert grown < 1.5 * numbers


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_a_conversion_that_is_killed_while_it_writes_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    """Weights that are half written count for nothing, and go with the next conversion."""
    large(tmp_path)
    folder = tmp_path / "tiny" / "model"
    process = subprocess.Popen([sys.executable, "-c", CONVERTING, str(tmp_path), "int8"], cwd=ROOT)
    end = time.monotonic() + PATIENCE * 4
    while process.poll() is None and time.monotonic() < end:
        if any(path.name == "numbers.bin" and path.stat().st_size > 2**20 for path in kept(folder)):
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in kept(folder)] == ["numbers.bin"]
    settings = LoadSettings(backend="openvino", dtype="float32", quantization="int8")
    loaded = loader.load(RECORD, LoadOptions(tmp_path, "cpu"), folder, settings=settings)
    assert loaded.effective["backend"] == "openvino"
    loaded.close()
    assert [path.name for path in kept(folder)] == ["about.json", "expected.safetensors", "graph.bin", "graph.xml"]
    assert "refused" not in json.loads(kept(folder)[0].read_text("utf-8"))


def test_a_large_model_is_tried_by_a_small_one_of_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose weights are rounded is right before they are: itself, or where it is large, its code."""
    model, _ = causal_models.build("llama")
    place = decoder.GraphPlace(tmp_path, "x", "int8")
    monkeypatch.setattr(decoder, "TRIED", 0)
    decoder.make(copy.deepcopy(model), place, "int8", tmp_path)
    found = decoder.find(place)
    assert found is not None
    assert found.quantization == "int8"
