"""The package: what `pip install .` installs, and the command that it gives."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest
import requests
from conftest import PATIENCE, ROOT
from packaging.requirements import Requirement
from repository import files, requirements

from huggingface.api.documented.system import VERSION

PROGRAM = {"app.py", "config.py", "connections.py", "dispatcher.py", "server.py"}  # and huggingface/
COMMAND = "import sys, app; sys.exit(app.main())"  # as what pip makes of `local-llm = app:main`


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """The wheel that pip makes of the repository's files."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in files():
        copy = source / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(made), str(source)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    [file] = made.iterdir()
    return ZipFile(file)


@pytest.fixture(scope="module")
def installed(wheel: ZipFile, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the wheel is installed, with no settings but a free port."""
    folder = tmp_path_factory.mktemp("installed")
    wheel.extractall(folder)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LOCAL_LLM_")}
    own = {"PYTHONPATH": str(folder), "LOCAL_LLM_PORT": "0", "LOCAL_LLM_IMPORT_AT_START": "false"}
    return {**inherited, **own, "PYTHONUNBUFFERED": "1"}


def test_the_wheel_holds_the_program_and_nothing_else(wheel: ZipFile) -> None:
    kept = {path.relative_to(ROOT).as_posix() for path in files()}
    program = {name for name in kept if name in PROGRAM or name.startswith("huggingface/")}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == program


def test_the_wheel_names_the_version_what_it_needs_and_the_command(wheel: ZipFile) -> None:
    about = f"local_llm-{VERSION}.dist-info"
    metadata = message_from_bytes(wheel.read(f"{about}/METADATA"))
    assert metadata["Version"] == VERSION
    assert [Requirement(text) for text in metadata.get_all("Requires-Dist")] == requirements(ROOT / "requirements.txt")
    assert "local-llm = app:main" in wheel.read(f"{about}/entry_points.txt").decode()


def test_installed_it_serves_and_keeps_what_it_writes_in_the_folder_where_it_is_started(
    installed: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("LOCAL_LLM_THREADS=9\n")
    program = "import config; print(config.Settings().threads, config.Settings().models_dir)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=installed, capture_output=True, text=True)
    assert done.stdout.split() == ["9", str(tmp_path.resolve() / "data" / "models")], done.stderr
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=tmp_path, env=installed, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            url = next(found[0] for line in iter(process.stdout.readline, "") if (found := address(line)))
            assert requests.get(f"{url}/health", timeout=PATIENCE).json()["status"] == "ok"
            assert "<html" in requests.get(f"{url}/docs", timeout=PATIENCE).text
            body = {"model_id": "a/b", "name": "B", "model_type": "text-generation"}
            answer = requests.post(f"{url}/api/huggingface/models", json=body, timeout=PATIENCE)
            assert answer.status_code == 200, answer.text
            assert '"a/b"' in (tmp_path / "data" / "models.json").read_text("utf-8")
        finally:
            process.terminate()
    assert process.returncode == 0


def address(line: str) -> re.Match[str] | None:
    """Where the server is, in the line of its greeting that says so."""
    return re.search(r"http://[^\s/]+:\d+(?=  \(the API)", line)


def test_the_command_tells_its_version_and_takes_no_arguments_that_it_does_not_know(
    installed: dict[str, str], tmp_path: Path
) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", COMMAND, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, timeout=PATIENCE)

    assert run("--version").stdout == f"local-llm {VERSION}\n"
    wrong = run("--port", "80")
    assert (wrong.returncode, "--port" in wrong.stderr) == (2, True)
