"""The runner on a CPU: when OpenVINO computes a model, what is kept of it, and what else the model can then do.

That what it computes is right, whoever else is in the batch, `test_engine.py` shows of both runners.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import causal_models
import pytest
import torch
from changed_models import edit
from conftest import PATIENCE, ROOT, Server, until
from loaded_parts import Parts, noted_parts
from lora_models import save_adapter
from safetensors.torch import load_file, save_file
from tiny_tokenizers import TEXT
from transformers import AutoModelForCausalLM

import huggingface
from app import create_app
from config import Settings
from huggingface.engine.layers import NotBatchable, probe
from huggingface.engine.openvino import agreement, graph, library
from huggingface.engine.openvino import lazy_weights as reserve
from huggingface.engine.openvino.blanks import Blanks
from huggingface.engine.openvino.constants import NumbersFile, settle
from huggingface.engine.openvino.lazy_weights import Reserve, make_shell
from huggingface.engine.openvino.runner import OpenVINORunner
from huggingface.engine.torch.parity import room_for
from huggingface.errors import Cancelled, ConversionFailed, InvalidRequest, OutOfMemory
from huggingface.loading import loader
from huggingface.loading.kept import FOLDER
from huggingface.loading.openvino import decoder as generator
from huggingface.loading.openvino import load as loading
from huggingface.loading.openvino import subprocess as process
from huggingface.loading.openvino.graph_store import GraphPlace
from huggingface.model.loaded import LoadedModel
from huggingface.model.memory import Memory, Unlimited
from huggingface.progress import Progress
from huggingface.registry.records import LoadSettings, ModelRecord
from huggingface.types import EngineOptions, GenerationRequest, LoadOptions

WORDS = TEXT.split()
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
API = "/api/huggingface"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with models that large weights make differ, as they lie on a disk."""
    root = tmp_path_factory.mktemp("openvino")
    for name in ("llama", "gpt2", "gemma2-eager", "mamba"):
        model, tokenizer = causal_models.build(name)
        model.save_pretrained(root / "tiny" / name)
        tokenizer.save_pretrained(root / "tiny" / name)
    return root


@pytest.fixture
def place(root: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Puts a model into a models folder of the test's own, without anything that is kept of it."""

    def put(name: str) -> Path:
        target = tmp_path / "models" / "tiny" / name
        shutil.copytree(root / "tiny" / name, target, ignore=shutil.ignore_patterns(FOLDER))
        return target

    return put


@pytest.fixture(scope="module")
def app(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An app as it is by default: OpenVINO where that can be had."""
    registry = tmp_path_factory.mktemp("registry") / "models.json"
    app = create_app(Settings(_env_file=None, registry=registry, models_dir=root, device="cpu", backend="auto"))
    for name in ("llama", "gpt2", "gemma2-eager", "mamba"):
        body = {"model_id": f"tiny/{name}", "name": name, "model_type": "text-generation"}
        assert app.test_client().post(f"{API}/models", json=body).json["success"]
    yield app
    huggingface.close(app)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tiny models whose load nobody waits for converted in this process too."""
    monkeypatch.setattr(loading, "CONVERTED_HERE_ASIDE", loading.CONVERTED_HERE)


@pytest.fixture
def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have even a tiny model converted in a process of its own."""
    monkeypatch.setattr(loading, "CONVERTED_HERE", 0)


class Tight(Unlimited):
    """Memory that has room for so many bytes, KV cache apart."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held: dict[str, int] = {}

    def record(self, part: str, sizes: Mapping[str, int]) -> None:
        self.held[part] = sum(sizes.values())

    def allocate(self, part: str, device: str, size: int) -> bool:
        if part != "kv cache":
            if sum(self.held.values()) + size > self.room:
                return False
            self.held[part] = self.held.get(part, 0) + size
        return True


def load(folder: Path, progress: Progress | None = None, memory: Memory | None = None, **settings: Any) -> LoadedModel:
    """A model of that folder as the server has it, once its graph is made or known not to be."""
    record = ModelRecord(f"tiny/{folder.name}", folder.name, "text-generation")
    options = LoadOptions(folder.parent.parent, "cpu", backend="auto", engine=EngineOptions(max_batch=8))
    wanted, progress = LoadSettings(**settings), progress or Progress()
    loaded = loader.load(record, options, folder, settings=wanted, progress=progress, memory=memory)
    if loaded.setup.pending is not None:
        assert loaded.effective["backend"] == "torch"
        try:
            spare = loader.convert(record, options, folder, wanted, progress, backend="openvino")
        except ConversionFailed as error:
            loaded.backend_reason = str(error)
        else:
            loaded.close()
            loaded = loader.load(
                record, options, folder, settings=wanted, progress=progress, memory=memory, spare=spare
            )
    loaded.prepared()
    return loaded


def text(loaded: LoadedModel, prompt: str = "The cat", **parameters: Any) -> str:
    """The text of an answer."""
    return list(loaded.generate(GenerationRequest({**GREEDY, **parameters}, prompt=prompt)))[-1].whole or ""


def kept(folder: Path) -> list[Path]:
    """What is kept of a model, the lock apart."""
    found = sorted((folder / FOLDER).iterdir()) if (folder / FOLDER).is_dir() else []
    return [path for path in found if path.name != ".lock"]


# Which runner ---------------------------------------------------------------------------------------------------------


def test_a_cpu_has_openvino_where_that_gives_torchs_numbers(app: Any, root: Path) -> None:
    """By default it computes what it can, and the answers are torch's; what it cannot, torch does, and it says why."""
    client = app.test_client()
    for name in ("llama", "gemma2-eager", "mamba"):
        answer = client.post(f"{API}/models/tiny/{name}/load", json={"wait_for_graph": True})
        assert answer.status_code == 200, answer.json
        engine = "openvino" if name == "llama" else "torch"
        assert answer.json["settings"]["backend"] == engine
        there = client.get(f"{API}/cache").json["cached_models"][f"tiny/{name}"]
        assert there["settings"]["backend"] == engine
        assert (there["backend_reason"] is None) == (engine == "openvino")
    reasons = client.get(f"{API}/cache").json["cached_models"]
    assert "code of its own" in reasons["tiny/gemma2-eager"]["backend_reason"]
    model, tokenizer = causal_models.build("llama")
    inputs = tokenizer("The cat", return_tensors="pt")
    made = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    wanted = tokenizer.decode(made, skip_special_tokens=True)
    body = {"model_id": "tiny/llama", "prompt": "The cat", **GREEDY}
    answer = client.post(f"{API}/generate", json=body)
    assert answer.json["response"] == wanted, answer.json


def test_openvino_by_name_is_had_or_refused(app: Any) -> None:
    """Asked for by its name it is never replaced by something else."""
    client = app.test_client()
    for name, settings, reason in (
        ("gemma2-eager", {}, "code of its own"),
        ("mamba", {}, "linear_attention"),
        ("llama", {"dtype": "bfloat16"}, "dtype"),
        ("llama", {"attn_implementation": "eager"}, "attn_implementation"),
        ("llama", {"device_map": "auto"}, "CPU"),
    ):
        answer = client.post(f"{API}/models/tiny/{name}/load", json={"backend": "openvino", **settings})
        assert answer.status_code == 400, answer.json
        assert "'backend'" in answer.json["error"], answer.json
        assert reason in answer.json["error"], answer.json
    refused = client.post(f"{API}/models/tiny/llama/load", json={"backend": "tensorflow"})
    assert refused.status_code == 400
    assert "backend" in refused.json["error"]


def test_the_backend_may_be_given_under_its_old_name(app: Any) -> None:
    """In every request that takes it; answers show both names."""
    client = app.test_client()
    path = f"{API}/models/tiny/llama"
    changed = client.put(path, json={"engine": "torch"}).json["model"]
    assert (changed["backend"], changed["engine"]) == ("torch", "torch")
    assert client.get(path).json["model"] == changed
    for name in ("engine", "backend"):
        loaded = client.post(f"{path}/load", json={name: "openvino", "force_reload": True}).json
        assert (loaded["settings"]["backend"], loaded["settings"]["engine"]) == ("openvino", "openvino")
        assert (loaded["backend_reason"], loaded["engine_reason"]) == (None, None)
        estimate = client.get(f"{path}/estimate?{name}=torch").json
        assert (estimate["backend"], estimate["engine"]) == ("torch", "torch")
        refused = client.post(f"{path}/load", json={name: "tensorflow"})
        assert refused.status_code == 400
        assert f"'{name}'" in refused.json["error"]
    both = client.post(f"{path}/load", json={"backend": "torch", "engine": "openvino"})
    assert both.status_code == 400
    assert both.json["error"] == "Invalid value for field 'engine': is not that of 'backend', which means the same"
    same = client.post(f"{path}/load", json={"backend": "torch", "engine": "torch"})
    assert same.status_code == 200
    assert client.put(path, json={"engine": None}).status_code == 200
    assert "backend" not in client.get(path).json["model"]


def test_an_engine_that_cannot_be_had_leaves_the_model_as_it_is(app: Any) -> None:
    """A load that is refused takes nothing out of memory, be it for what it asks for besides or for what is noted."""
    client = app.test_client()
    for name, settings in (("llama", {"dtype": "bfloat16"}), ("gemma2-eager", {})):
        settled = {"backend": "auto", "wait_for_graph": True}
        assert client.post(f"{API}/models/tiny/{name}/load", json=settled).status_code == 200
        before = client.get(f"{API}/cache").json["cached_models"][f"tiny/{name}"]
        answer = client.post(f"{API}/models/tiny/{name}/load", json={"backend": "openvino", **settings})
        assert answer.status_code == 400, answer.json
        there = client.get(f"{API}/cache").json["cached_models"][f"tiny/{name}"]
        assert (there["loaded_at"], there["settings"]) == (before["loaded_at"], before["settings"])


def test_torch_by_name_is_had(app: Any) -> None:
    """The reference is there for whoever wants it, in a load or in the record."""
    client = app.test_client()
    answer = client.post(f"{API}/models/tiny/llama/load", json={"backend": "torch", "force_reload": True})
    assert answer.json["settings"]["backend"] == "torch"
    there = client.get(f"{API}/cache").json["cached_models"]["tiny/llama"]
    assert there["backend_reason"] == "torch was asked for"
    assert client.put(f"{API}/models/tiny/llama", json={"backend": "openvino"}).status_code == 200
    assert client.post(f"{API}/models/tiny/llama/unload").status_code == 200
    answer = client.post(f"{API}/models/tiny/llama/load")
    assert answer.json["settings"]["backend"] == "openvino"
    assert client.put(f"{API}/models/tiny/llama", json={"backend": None}).status_code == 200


def test_without_the_package_torch_computes(place: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` goes on without OpenVINO and says so; by its name it is refused with what to install."""
    folder = place("llama")
    monkeypatch.setattr(library, "installed", lambda name="openvino": False)
    loaded = load(folder)
    assert loaded.effective["backend"] == "torch"
    assert loaded.backend_reason == "not installed: openvino"
    loaded.close()
    with pytest.raises(Exception, match="pip install openvino"):
        load(folder, backend="openvino")


def test_adapters_are_left_to_torch(place: Callable[[str], Path], tmp_path: Path) -> None:
    """A graph knows nothing of adapters: with them torch computes, and OpenVINO by its name is refused."""
    folder = place("llama")
    model, _ = causal_models.build("llama")
    adapter = save_adapter(model, tmp_path / "adapter", 1, target_modules=["q_proj"])
    record = ModelRecord("tiny/llama", "llama", "text-generation", adapters={"one": "org/adapter"})
    options = LoadOptions(folder.parent.parent, "cpu", backend="auto")
    loaded = loader.load(record, options, folder, adapters={"one": adapter})
    assert loaded.effective["backend"] == "torch"
    assert loaded.backend_reason == "it has adapters"
    loaded.close()
    told = loader.estimate(record, options, folder)
    assert (told.backend, told.conversion) == ("torch", 0)
    with pytest.raises(InvalidRequest, match="adapters"):
        loader.load(record, options, folder, settings=LoadSettings(backend="openvino"), adapters={"one": adapter})


def test_rotary_embeddings_that_change_are_left_to_torch() -> None:
    """A trace has one case of what changes with the length of the text: that would be found out too late."""
    model, _ = causal_models.build("llama")
    for kind in ("dynamic", "longrope"):
        model.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
        with pytest.raises(NotBatchable, match=kind):
            graph.check_kinds(model)


# What is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("another_process")
def test_the_graph_is_made_once(place: Callable[[str], Path]) -> None:
    """The first load converts and says so; the next one reads what is kept, and gives the same."""
    folder, first, second = place("llama"), Progress(), Progress()
    record = ModelRecord("tiny/llama", "llama", "text-generation")
    options = LoadOptions(folder.parent.parent, "cpu", backend="auto")
    assert loader.estimate(record, options, folder).conversion > 0
    loaded = load(folder, first)
    assert loaded.effective["backend"] == "openvino"
    assert loader.estimate(record, options, folder).conversion == 0
    whole = text(loaded)
    loaded.close()
    [there] = kept(folder)
    assert {path.name for path in there.iterdir()} == {"graph.xml", "graph.bin", "about.json", "expected.safetensors"}
    before = {path: path.stat().st_mtime_ns for path in there.iterdir()}
    loaded = load(folder, second)
    assert text(loaded) == whole
    loaded.close()
    assert {path: path.stat().st_mtime_ns for path in there.iterdir()} == before
    assert "convert" in phases(first)
    assert "convert" not in phases(second)


def phases(progress: Progress) -> list[str]:
    """The phases that a piece of work went through."""
    return [moment.phase for moment in progress.since(-1)[1]]


def test_other_weights_get_a_graph_of_their_own(place: Callable[[str], Path]) -> None:
    """The graph belongs to the very weights: changed ones are converted anew, and the old graph goes."""
    folder = place("llama")
    loaded = load(folder)
    before = text(loaded)
    loaded.close()
    [old] = kept(folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(3)
    name = "model.embed_tokens.weight"
    weights[name] = torch.randn_like(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load(folder)
    assert text(loaded) != before
    loaded.close()
    [new] = kept(folder)
    assert new.name != old.name


def cut(there: Path) -> None:
    os.truncate(there / "graph.bin", 100)


def scribble(there: Path) -> None:
    (there / "about.json").write_text("{")


def lose(there: Path) -> None:
    (there / "graph.xml").unlink()


def forget(there: Path) -> None:
    edit(there, "about.json", sizes=None)


@pytest.mark.parametrize("damage", [cut, scribble, lose, forget])
def test_a_damaged_graph_is_made_anew(damage: Callable[[Path], None], place: Callable[[str], Path]) -> None:
    """What is kept may be cut short by a full disk or a person: it is noticed, and costs a conversion."""
    folder = place("gpt2")
    loaded = load(folder)
    whole = text(loaded)
    loaded.close()
    damage(kept(folder)[0])
    loaded = load(folder)
    assert (loaded.effective["backend"], text(loaded)) == ("openvino", whole)
    loaded.close()


def test_a_graph_that_gives_other_numbers_is_not_used(place: Callable[[str], Path]) -> None:
    """Each load compares with what torch gave: `auto` gives a graph that computes otherwise here up."""
    folder = place("llama")
    loaded = load(folder)
    whole = text(loaded)
    loaded.close()
    [there] = kept(folder)
    expected = load_file(there / "expected.safetensors")
    expected["1.logits"][0, 0] += 0.01
    save_file(expected, there / "expected.safetensors")
    sizes = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    memory = Tight(int(1.3 * sizes))
    loaded = load(folder, memory=memory)
    assert loaded.effective["backend"] == "torch"
    assert "from torch's" in (loaded.backend_reason or "")
    assert text(loaded) == whole
    assert loaded.sizes.weights == pytest.approx(sizes, rel=0.05)
    assert loaded.sizes.copies == 0
    assert memory.held == {"weights": loaded.sizes.weights, "own weights": 0}, "the graph's are not there any more"
    loaded.close()
    assert [path.name for path in there.iterdir()] == ["about.json"], "it is noted, and not tried at every load"
    with pytest.raises(InvalidRequest, match="'backend'"):
        load(folder, backend="openvino")


def test_where_nothing_can_be_kept_the_graph_goes_with_the_model(place: Callable[[str], Path]) -> None:
    """A folder that cannot be written to costs a conversion at each load, and nothing else."""
    folder = place("llama")
    (folder / FOLDER).write_text("a file stands where the folder would be")
    loaded = load(folder)
    assert loaded.effective["backend"] == "openvino"
    own = loaded.setup.folder
    assert own is not None
    assert (own / "graph.bin").is_file()
    assert text(loaded)
    loaded.close()
    assert not own.exists()


def test_without_room_on_the_disk_torch_computes(
    place: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room is looked for before anything is written; nothing is left behind where there is none."""
    folder = place("llama")
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="are free on the disk"):
        generator.make(causal_models.build("llama")[0], GraphPlace(folder, "x", None), None, tmp_path)
    assert not kept(folder)
    assert not list(tmp_path.glob("graph*"))


def test_what_was_not_completed_is_never_read_and_goes_in_time(place: Callable[[str], Path]) -> None:
    """A conversion that is killed leaves a folder of another name, which a later one removes a day later."""
    folder = place("llama")
    spot = GraphPlace(folder, "x", None)
    stopped = folder / FOLDER / f".{Path(spot.key).name}.0123abcd.tmp"
    stopped.mkdir(parents=True)
    (stopped / "about.json").write_text("{}")
    assert generator.find(spot) is None
    spot.refuse("a reason")
    assert stopped.exists()
    os.utime(stopped, (time.time() - 2 * 24 * 3600,) * 2)
    spot.refuse("another")
    assert not stopped.exists()
    with pytest.raises(NotBatchable, match="another"):
        generator.find(spot)


# The process that converts --------------------------------------------------------------------------------------------


def wanted(folder: Path, tmp_path: Path) -> process.Wanted:
    record = ModelRecord(f"tiny/{folder.name}", folder.name, "text-generation")
    options = LoadOptions(folder.parent.parent, "cpu", backend="auto")
    return process.Wanted(record, options, folder, LoadSettings(), tmp_path)


@pytest.mark.usefixtures("another_process")
def test_a_conversion_that_crashes_harms_nobody(
    place: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code that ends its process ends no other: torch computes, and it is not tried again."""
    folder = place("llama")
    monkeypatch.setattr(process.sys, "executable", crashing(tmp_path, "kill -SEGV $$"))
    with pytest.raises(ConversionFailed, match="-11") as failed:
        process.convert(wanted(folder, tmp_path), Progress())
    assert failed.value.final
    monkeypatch.setattr(process.sys, "executable", crashing(tmp_path, "kill -KILL $$"))
    with pytest.raises(ConversionFailed, match="-9") as failed:
        process.convert(wanted(folder, tmp_path), Progress())
    assert not failed.value.final, "whoever killed it, lack of memory perhaps, may not do so again"
    loaded = load(folder)
    assert loaded.effective["backend"] == "torch"
    assert "-9" in (loaded.backend_reason or "")
    loaded.close()


@pytest.mark.usefixtures("another_process")
def test_without_memory_for_a_conversion_openvino_is_refused(
    place: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process needs memory of its own: where that is not free it is not begun, and tried again another time."""
    folder = place("llama")
    monkeypatch.setattr(loading, "available_bytes", lambda: 10**6)
    with pytest.raises(InvalidRequest, match="1000000 are free"):
        load(folder, backend="openvino")
    assert not kept(folder)


def crashing(folder: Path, command: str) -> str:
    """A program that does what is wanted of the interpreter in its own way."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{command}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.usefixtures("another_process")
def test_whoever_cancels_ends_the_conversion(
    place: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled load does not convert on: its process is gone at once."""
    folder, progress = place("llama"), Progress()
    monkeypatch.setattr(process.sys, "executable", crashing(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 100000"))

    def cancel() -> None:
        until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().endswith("\n"))
        progress.cancel()

    threading.Thread(target=cancel).start()
    with pytest.raises(Cancelled):
        process.convert(wanted(folder, tmp_path), progress)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_conversion_ends_with_the_server(place: Callable[[str], Path], tmp_path: Path) -> None:
    """A server that is killed leaves no process behind that goes on for nobody: it ends while it imports torch."""
    folder = place("llama")
    code = (
        "import sys, pickle; from huggingface.loading.openvino import subprocess as process\n"
        "from huggingface.progress import Progress\n"
        "process.convert(pickle.load(open(sys.argv[1], 'rb')), Progress())"
    )
    request = tmp_path / "wanted"
    request.write_bytes(pickle.dumps(wanted(folder, tmp_path)))
    parent = subprocess.Popen([sys.executable, "-c", code, str(request)], cwd=ROOT)
    try:
        child = until(lambda: children(parent.pid))[0]
        until(lambda: "libtorch" in Path(f"/proc/{child}/maps").read_text())
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait(20)
    until(lambda: b") Z" in stat(child))  # it does not go on for nobody
    assert not kept(folder)


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def stat(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return b") Z"


def test_nothing_is_sent_to_anybody() -> None:
    """openvino and nncf report their use to their makers where they find the package that sends it."""
    code = """
import socket, sys
def refuse(*_):
    raise AssertionError("a packet")
socket.socket.connect = socket.getaddrinfo = refuse
from huggingface.engine.openvino import library
library.openvino(); library.offline_transformations()
import openvino.tools.ovc
assert sys.modules["openvino_telemetry"] is None
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


# Compressed weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_compressed_weights_take_less_and_mean_the_same(scheme: str, place: Callable[[str], Path]) -> None:
    """The estimate is what is then counted; an answer does not depend on who else is in the batch."""
    folder = place("llama")
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[20, 30, 40]])).logits[0]
    whole = load(folder, backend="torch")
    size = whole.sizes.weights
    whole.close()
    record = ModelRecord("tiny/llama", "llama", "text-generation")
    options = LoadOptions(folder.parent.parent, "cpu", backend="openvino")
    estimate = loader.estimate(record, options, folder, LoadSettings(quantization=scheme))
    loaded = load(folder, quantization=scheme, backend="openvino")
    assert loaded.effective["backend"] == "openvino"
    assert loaded.effective["quantization"] == scheme
    sizes = loaded.sizes
    assert sizes.weights < size * (0.35 if scheme == "int8" else 0.3)
    assert (estimate.backend, estimate.quantization) == ("openvino", scheme)
    assert estimate.weights == pytest.approx(sizes.weights, rel=0.1)
    alone = [text(loaded, prompt) for prompt in WORDS[:6]]
    tickets = [loaded.generate(GenerationRequest(GREEDY, prompt=prompt)) for prompt in WORDS[:6]]
    assert [list(ticket)[-1].whole for ticket in tickets] == alone
    request = GenerationRequest({"max_new_tokens": 1}, tokens=[20, 30, 40], logprobs=5)
    [token] = [token for chunk in loaded.generate(request) for token in chunk.tokens][:1]
    likely = torch.log_softmax(logits[-1], -1)
    assert abs(token.logprob - float(likely[token.id])) < (0.5 if scheme == "int8" else 4)
    loaded.close()


# The model itself -----------------------------------------------------------------------------------------------------


class Full(Unlimited):
    """Memory in which there is none for a model's own weights while it is `full`."""

    full = False

    def allocate(self, part: str, device: str, size: int) -> bool:
        return not (self.full and part == "own weights" and size > 0) and super().allocate(part, device, size)


@dataclass
class Served:
    """A model, its tokenizer, and the model as OpenVINO computes it: by which parts, in which memory."""

    model: Any
    tokenizer: Any
    loaded: LoadedModel
    parts: Parts
    memory: Full

    def rest(self) -> int:
        """Releases its own weights; returns the bytes of copies that remain."""
        self.loaded.engine.call(self.parts.runner.release_idle)
        return self.loaded.sizes.copies


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    model, tokenizer = causal_models.build("llama")
    memory = Full()
    with noted_parts() as noted:
        loaded = causal_models.serve("llama", model, tokenizer, "openvino", memory, max_batch=4)
    yield Served(model, tokenizer, loaded, noted[loaded.model_id], memory)
    loaded.close()


def test_what_only_the_model_itself_can_do_it_does(served: Served) -> None:
    """Beams and hidden states come of the model's own weights, which are there as long as they are needed."""
    model, tokenizer, loaded = served.model, served.tokenizer, served.loaded
    copies = served.rest()
    inputs = tokenizer("The cat", return_tensors="pt")
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8}
    wanted_text = tokenizer.decode(model.generate(**inputs, **beams)[0, inputs["input_ids"].shape[1] :])
    before = text(loaded)
    assert loaded.sizes.copies == copies
    assert all(tensor.device.type == "meta" for tensor in served.parts.model.parameters())
    assert text(loaded, **beams) == wanted_text
    assert not any(tensor.device.type == "meta" for tensor in served.parts.model.parameters())
    own = sum(tensor.nbytes for tensor in model.parameters())
    assert loaded.sizes.copies == copies + own, "they are counted while they are there"
    features = loaded.run("feature-extraction", "The cat", {})
    with torch.inference_mode():
        hidden = model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(torch.tensor(features), hidden, rtol=0, atol=1e-5)
    assert text(loaded) == before
    assert served.rest() == copies
    assert all(tensor.device.type == "meta" for tensor in served.parts.model.parameters())
    assert text(loaded, **beams) == wanted_text


def test_own_weights_that_find_no_room_are_a_typed_refusal(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they do not fit beside the graph, who needs them is told; the others go on."""
    loaded = served.loaded
    served.rest()
    monkeypatch.setattr(served.memory, "full", True)
    with pytest.raises(OutOfMemory, match="backend torch"):
        text(loaded, num_beams=2)
    with pytest.raises(OutOfMemory, match="backend torch"):
        loaded.run("feature-extraction", "The cat", {})
    assert text(loaded)


def test_a_shell_is_its_model_again_and_again() -> None:
    """Weights come and go, with layers that are replaced by quantized ones too, and every number is the model's."""
    model, _ = causal_models.build("llama")
    inputs = torch.tensor([[20, 30, 40]])
    taken: list[int] = []

    def take(size: int) -> bool:
        taken.append(size)
        return True

    def read() -> Any:
        whole = copy.deepcopy(model)
        whole.model.layers[0].mlp = torch.nn.Sequential(whole.model.layers[0].mlp)
        return whole

    shell = make_shell(copy.deepcopy(model))
    assert str(shell.device) == "cpu"
    assert type(shell).__name__ == type(model).__name__
    reserve = Reserve(shell, read, take, 7)
    layer = shell.model.layers[0].mlp
    for _ in range(3):
        reserve.fetch()
        with torch.inference_mode():
            assert torch.equal(shell(inputs).logits, model(inputs).logits)
        reserve.unload()
        assert shell.model.layers[0].mlp is layer
        assert {tensor.device.type for tensor in shell.parameters()} == {"meta"}
    assert taken == [7, -7] * 3


def test_own_weights_rest_after_a_while(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that goes on lets them go once nobody has used them for a time."""
    loaded = served.loaded
    copies = served.rest()
    text(loaded, num_beams=2)
    assert text(loaded)
    assert loaded.sizes.copies > copies
    monkeypatch.setattr(reserve, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 1000))
    assert text(loaded)
    assert loaded.sizes.copies == copies


# The check ------------------------------------------------------------------------------------------------------------


def test_a_window_is_gone_past() -> None:
    """One of the prompts that are tried is longer than the smallest window, as far as that can be afforded."""
    windowed, _ = causal_models.build("mistral-window")
    windowed.config.sliding_window = 300
    assert agreement.lengths(windowed)[0] > 300
    windowed.config.sliding_window = 10**6
    assert agreement.lengths(windowed)[0] < 100
    assert graph.windows(windowed) == {0: 10**6, 1: 10**6}


def test_a_wrong_window_is_found_out(tmp_path: Path) -> None:
    """Were the window not given to the operation, the check would see it."""
    model, _ = causal_models.build("mistral-window")
    spot = GraphPlace(tmp_path, "x", None)
    generator.make(model, spot, None, tmp_path)
    made = generator.find(spot)
    assert made is not None
    reserve = Reserve(make_shell(copy.deepcopy(model)), lambda: model)
    made.runner(1024, reserve).close()
    with pytest.raises(NotBatchable, match="from torch's"):
        replace(made, windows={}).runner(1024, reserve)


# What is made of a graph ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "products"), [("llama", 9), ("opt", 9), ("gpt2", 9), ("phi3", 9)])
def test_products_of_the_same_rows_are_one_and_every_number_stays(
    name: str, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values, with biases or without; gates too. What was one already, stays."""
    model, _ = causal_models.build(name)
    expected = agreement.torch_expects(model)
    shapes = [shape for shape in probe(model) if shape is not None]
    logits = []
    for merged in (True, False):
        if not merged:
            monkeypatch.setattr(graph, "merge_products", lambda *_: 0)
        blanks, numbers = Blanks(), NumbersFile()
        made = graph.convert(model, blanks)
        settle(made, blanks, None, numbers)
        count = sum(node.get_type_name() == "MatMul" for node in made.get_ops())
        assert (count == products) is (merged or name in ("gpt2", "phi3"))
        runner = OpenVINORunner(made, {}, shapes, room_for(expected))
        logits.append(agreement.check(runner, expected))
        runner.close()
    for one, other in zip(*logits, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5)  # a bias may be added first or last


def test_a_graph_needs_nothing_of_the_model_it_was_made_of(tmp_path: Path) -> None:
    """Whoever converts has the model's memory back as soon as there is a graph."""
    model, _ = causal_models.build("llama")
    spot = GraphPlace(tmp_path, "x", "int8")
    generator.make(model, spot, "int8", tmp_path)
    assert not any(tensor.numel() for tensor in model.parameters())
    assert generator.find(spot) is not None


def test_what_was_promised_and_never_used_is_not_missed_at_an_unload(place: Callable[[str], Path]) -> None:
    """The KV cache takes memory as it is written to, and a table that is looked up lies in its file."""
    with noted_parts() as parts:
        loaded = load(place("llama"))
    text(loaded)
    cache = parts[loaded.model_id].runner.cache
    before = loaded.expected_back
    assert loaded.sizes.weights < before < loaded.sizes.weights + loaded.sizes.kv_cache
    prompt = "The cat sat on the mat. " * 12
    text(loaded, prompt)
    assert before < loaded.expected_back <= loaded.sizes.total
    assert cache.allocated_bytes - cache.unwritten_bytes >= loaded.count_tokens(prompt) * cache.token_bytes
    loaded.close()


# On a live server -----------------------------------------------------------------------------------------------------


def test_a_load_tells_that_it_converts(place: Callable[[str], Path], start_server: Callable[..., Server]) -> None:
    """The events of a load name the conversion; the next server reads what the first has kept."""
    folder = place("gpt2")
    for told in (True, False):
        server = start_server(LOCAL_LLM_MODELS_DIR=str(folder.parent.parent), LOCAL_LLM_BACKEND="openvino")
        server.add("tiny/gpt2", "text-generation")
        estimate = server.call("GET", "/models/tiny/gpt2/estimate").json()
        answer = server.call("POST", "/models/tiny/gpt2/load", json={"stream": True}, stream=True)
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith(b"data: {")]
        assert ("convert" in {event["progress"]["phase"] for event in events if "progress" in event}) is told
        there = server.call("GET", "/cache").json()["cached_models"]["tiny/gpt2"]
        assert there["settings"]["backend"] == estimate["backend"] == "openvino"
        assert estimate["weights_bytes"] == pytest.approx(there["weights_bytes"], rel=0.1)
        assert estimate["bytes"] == pytest.approx(
            there["bytes"] - there["kv_cache_bytes"] + estimate["kv_cache_bytes"], rel=0.1
        )
        server.stop()
