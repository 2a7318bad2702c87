"""The scripts that run other people's programs: their headers, their list, and what docs/clients.md says of them.

Nothing is installed or run here: `make clients` does that.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT

sys.path.insert(0, str(ROOT / "tests" / "external"))

from environments import environments
from programs import SCRIPTS, Program, programs, read

DOCUMENT = (ROOT / "docs" / "clients.md").read_text("utf-8")
PYTHON_PIN = re.compile(r"[A-Za-z0-9_.-]+(\[[a-z0-9_,-]+\])?==[0-9][A-Za-z0-9.]*")
NODE_PIN = re.compile(r"(@[a-z0-9-]+/)?[a-z0-9._-]+@[0-9]+\.[0-9]+\.[0-9]+")


def rows() -> list[list[str]]:
    """The cells of the document's table of programs that were run, without the marks around code."""
    part = DOCUMENT.split("## Programs that were run")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("program", programs().values(), ids=lambda program: program.name)
def test_a_script_names_its_packages_with_versions(program: Program) -> None:
    assert all(PYTHON_PIN.fullmatch(package) for package in program.python), program.python
    assert all(NODE_PIN.fullmatch(package) for package in program.node), program.node
    assert 0 < program.seconds <= 300
    text = program.script.read_text("utf-8")
    assert "LOCAL_LLM_URL" in text or "_features" in text
    if program.script.suffix == ".py":
        compile(text, program.script.name, "exec")


def test_scripts_that_share_an_environment_agree_on_versions() -> None:
    for environment in environments(programs().values()).values():
        for packages, mark in ((environment.python, "=="), (environment.node, "@")):
            names = [package.rsplit(mark, 1)[0] for package in packages]
            assert len(set(names)) == len(names), packages


@pytest.mark.parametrize(
    "header",
    [
        "",
        "# /// script\n# dependencies = [\n# ///\n",
        '# /// script\n# [tool.local-llm]\n# nodes = ["a@1.0.0"]\n# ///\n',
    ],
)
def test_a_header_that_says_nothing_sensible_is_refused(tmp_path: Path, header: str) -> None:
    script = tmp_path / "one.py"
    script.write_text(header)
    with pytest.raises(ValueError, match=r"header|Invalid|Unclosed|Unterminated|TOML|array"):
        read(script)


def test_the_document_tells_of_every_script_and_of_no_other() -> None:
    assert len(rows()) >= 30
    told = {row[2] for row in rows()}
    assert told == set(programs())
    assert all((SCRIPTS / f"{name}.py").exists() or (SCRIPTS / f"{name}.mjs").exists() for name in told)


def test_the_document_tells_the_versions_that_are_run() -> None:
    every = programs()
    for name, version, script, *_ in rows():
        pins = {re.split(r"==|(?<=.)@", package)[-1] for package in (*every[script].python, *every[script].node)}
        assert not pins or version in pins, f"{name} {version}: {script} has {sorted(pins)}"


def test_the_list_names_every_program_without_installing_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.external", "--list"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(programs())


def test_a_program_that_is_not_there_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.external", "nonsense"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2
    assert "no such program: nonsense" in done.stderr
