"""Clients that are generated from `/openapi.json`, for Python and for TypeScript: made, type-checked and run.

What a model is registered with stays in effect under them: they send what their caller gives, and nothing more.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import PATIENCE, Server

CLIENTS = Path(__file__).resolve().parent.parent / "clients"
REGISTERED = {"max_new_tokens": 60, "temperature": 0.2, "repetition_penalty": 1.05}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """A live server of these tests' own."""
    server = Server(tmp_path_factory.mktemp("server"), models_dir)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def model(server: Server, tiny: Callable[[str], str]) -> str:
    """A model with parameters of its own."""
    model_id = tiny("llama")
    server.add(model_id, "text-generation", parameters=REGISTERED)
    return model_id


@pytest.fixture
def document(server: Server, tmp_path: Path) -> Path:
    """The document, as a file."""
    file = tmp_path / "openapi.json"
    file.write_bytes(requests.get(f"{server.url}/openapi.json", timeout=PATIENCE).content)
    return file


def run(*command: str | Path, folder: Path) -> str:
    """What a program prints."""
    environment = {**os.environ, "NO_PROXY": "*", "no_proxy": "*"}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_client_for_python(server: Server, model: str, document: Path, tmp_path: Path) -> None:
    (tmp_path / "generator.yml").write_text("post_hooks: []\n")  # the code is not formatted
    made = run(
        *(sys.executable, "-m", "openapi_python_client", "generate", "--path", document, "--meta", "none"),
        *("--output-path", tmp_path / "local_llm_client", "--config", tmp_path / "generator.yml", "--fail-on-warning"),
        folder=tmp_path,
    )
    assert "Warning" not in made
    shutil.copy(CLIENTS / "generated.py", tmp_path)
    strict = ("--strict", "--no-warn-redundant-casts", "--no-warn-unused-ignores", "--cache-dir", tmp_path / "mypy")
    run(sys.executable, "-m", "mypy", *strict, "generated.py", folder=tmp_path)
    told: dict[str, Any] = json.loads(run(sys.executable, "generated.py", server.url, model, folder=tmp_path))
    first, second = told["parameters"]
    assert {name: first[name] for name in REGISTERED} == REGISTERED
    assert {name: second[name] for name in REGISTERED} == {**REGISTERED, "max_new_tokens": 3}
    assert told["succeeded"] is True
    assert isinstance(told["said"], str)
    assert told["models"] == [model]
    assert "no/such" in told["failed"]


def test_a_client_for_typescript(server: Server, model: str, document: Path, tmp_path: Path) -> None:
    modules = CLIENTS / "node_modules"
    assert modules.is_dir(), "run `make test`, which installs the clients"
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(CLIENTS / "generated.ts", tmp_path)
    run("node", modules / "openapi-typescript/bin/cli.js", document, "-o", tmp_path / "schema.d.ts", folder=tmp_path)
    options = ("--strict", "--noUncheckedIndexedAccess", "--target", "es2022", "--module", "nodenext")
    run("node", modules / "typescript/bin/tsc", *options, "generated.ts", folder=tmp_path)
    told = json.loads(run("node", "generated.js", server.url, model, folder=tmp_path))
    assert told["tokens"] == [REGISTERED["max_new_tokens"], 3]
    assert told["succeeded"] is True
    assert isinstance(told["said"], str)
    assert told["models"] == told["openai"] == [model]
    assert told["device"] == "cpu"
    assert "no/such" in told["failed"]
