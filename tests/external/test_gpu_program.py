"""`python -m benchmarks.gpu`, the proof on a GPU, run small on the CPU so that it cannot rot; and what it brings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import requirements

from benchmarks.gpu import __main__ as program

# What a machine with a GPU is taken to have: torch and the packages that come with it, and those of scientific Python.
THERE = {
    *("torch", "accelerate", "safetensors", "numpy", "psutil", "sentencepiece", "protobuf", "pandas", "tqdm"),
    *("scipy", "scikit-learn", "pyyaml", "requests", "packaging", "fsspec", "jinja2", "markupsafe", "typer"),
}
NOT_ON_A_GPU = {"openvino", "xllamacpp"}

# Some of what each section has to check or measure.
SECTIONS = {
    "exact": {"greedy, gpu/gemma3, float32, batch", "greedy, gpu/llama, bfloat16, batch", "streams", "beams"}
    | {"seeds: the text of torch.manual_seed before generate", "JSON of a schema", "adapters, mixed in one batch"}
    | {"prefixes are reused, and change nothing", "a model on the CPU beside it", "device_map: auto"},
    "tasks": {"classification", "features", "embeddings", "question answering", "summarization"},
    "memory": {"the estimate is what a load takes", "the model that is not used goes for the other"}
    | {"running out of memory is answered as that", "the other model answers meanwhile"}
    | {"an unload gives the bytes back", "rounds of load and unload leave memory as it was"}
    | {"int8: the estimate is what a load takes", "int4: the estimate is what a load takes"},
    "robust": {"a client that hangs up costs nothing more", "a cancel by id", "many callers at once", "SIGTERM ends it"}
    | {"texts beside a load are the same", "/health while a model loads"},
    "profile": {"a step of 4 rows, greedy", "a step of 4 rows, sampled", "its sampling alone, sampled"},
    "speed": {"4 callers, ours", "4 callers, generate", "4 callers, continuous batching"}
    | {"a prompt of 400 tokens, first token"},
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_ends_and_all_its_checks_hold(section: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--sections", section]
    # A budget that no machine is too slow for: how long it takes is not what is tested.
    command += ["--out", str(tmp_path / "told.json"), "--budget-s", "7200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert [each["section"] for each in told["sections"]] == ["models", section]
    assert {each["state"] for each in told["sections"]} == {"ended"}
    found = {line.get("check") or line["figure"]: line for each in told["sections"] for line in each["found"]}
    assert not SECTIONS[section] - set(found)
    assert all(line.get("ok", True) for line in found.values())
    assert told["versions"]["torch"] == metadata.version("torch")
    assert told["card"]["threads"] >= 1
    assert section in done.stdout


def test_a_section_that_is_cut_short_or_fails_is_told_as_that_and_leaves_no_process(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    cut = program.run_section("exact", "cpu", tmp_path, 0.1)  # long before torch is imported
    failed = program.run_section("tasks", "cpu", tmp_path, 600)  # there are no models
    assert cut["state"].startswith("cut short")
    assert failed["state"] == "failed with status 1"
    assert set(psutil.Process().children(recursive=True)) == before
    ended = {"section": "models", "state": "ended", "seconds": 1.0, "found": [{"check": "a", "ok": True}]}
    assert program.succeeded([ended])
    for other in (cut, failed, {**ended, "found": [{"check": "b", "ok": False, "why": "it is wrong"}]}):
        assert not program.succeeded([ended, other])
    assert not program.succeeded([{**ended, "state": "left out"}])
    shown = program.table([ended, failed, {**ended, "found": [{"check": "b", "ok": False, "why": "it is wrong"}]}])
    assert "failed with status 1" in shown
    assert "FAILED b: why it is wrong" in shown


def pins(path: Path) -> dict[str, str]:
    """The versions that a requirement file names."""
    return {canonicalize_name(each.name): next(iter(each.specifier)).version for each in requirements(path)}


def test_the_wheels_are_of_this_projects_versions_and_lack_nothing_that_they_need() -> None:
    own, brought = pins(ROOT / "requirements.txt"), pins(ROOT / "benchmarks" / "gpu" / "requirements.txt")
    assert {name: brought[name] for name in brought if name in own and brought[name] != own[name]} == {}
    assert set(own) - set(brought) - THERE == NOT_ON_A_GPU
    environment = {**default_environment(), "python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    lacking = set()
    for name in brought:
        assert metadata.version(name) == brought[name], name
        for text in metadata.requires(name) or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate(environment):
                needed = canonicalize_name(need.name)
                if needed in brought:
                    assert need.specifier.contains(brought[needed]), f"{name} needs {text}"
                elif needed not in THERE:
                    lacking.add(f"{name} needs {text}")
    assert not lacking


def test_fetch_puts_wheels_where_git_does_not_see_them() -> None:
    ignored = ["benchmarks/gpu/wheels/a.whl", "benchmarks/gpu/.site/3.12/flask.py", "benchmarks/gpu/.wheels-x/a.whl"]
    done = subprocess.run(["git", "check-ignore", *ignored], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ignored
    assert re.search(r'HERE / "wheels"', (ROOT / "benchmarks" / "gpu" / "fetch").read_text())
