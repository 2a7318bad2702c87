"""How a graph gets its weights: one at a time from the model's files, in float32 or rounded."""

from __future__ import annotations

import copy
import json
import logging
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
import pytest
import torch
from conftest import PATIENCE, ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from huggingface.engine.openvino import agreement, graph
from huggingface.engine.openvino.blanks import Blanks, NotBlank
from huggingface.engine.openvino.constants import NumbersFile, settle
from huggingface.loading import loader
from huggingface.loading.openvino import decoder
from huggingface.loading.plan import look
from huggingface.loading.pretrained import read_blank
from huggingface.registry.records import LoadSettings, ModelRecord
from huggingface.types import LoadOptions

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


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_rounded_as_by_nncf(name: str, scheme: str) -> None:
    """Every whole number, scale and zero point is that of nncf without data, which rounds the whole graph at once."""
    logging.getLogger("nncf").setLevel(logging.ERROR)
    model, _ = causal_models.build(name)
    blanks, exact, rounded = Blanks(), NumbersFile(), NumbersFile()
    ours = graph.convert(model, blanks)
    theirs = ours.clone()
    settle(theirs, blanks, None, exact)
    settle(ours, blanks, scheme, rounded)
    if scheme == "int8":
        theirs = nncf.compress_weights(theirs, mode=nncf.CompressWeightsMode.INT8_ASYM)
    else:
        adjusted = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        theirs = nncf.compress_weights(
            theirs, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64, ratio=1.0, advanced_parameters=adjusted
        )
    assert weights(ours) == weights(theirs)


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
