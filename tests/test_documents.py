"""The documents: README, CHANGELOG and `.env.example` tell of everything there is, and what they show is true."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from pydantic_core import PydanticUndefined

from config import Settings
from huggingface.api.documented.system import VERSION
from huggingface.api.http.errors import STATUS
from huggingface.api.parameters.effective import GENERATE_DEFAULTS
from huggingface.api.parameters.schemas import TASK_PARAMETERS, GenerationParameters
from huggingface.tasks import MODEL_TYPES, TASKS

README = (ROOT / "README.md").read_text("utf-8")
METHODS = {"GET", "POST", "PUT", "DELETE", "PATCH"}


def rows() -> list[list[str]]:
    """The cells of every row of README's tables, without the marks around code."""
    lines = [line for line in README.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def blocks(language: str) -> list[str]:
    """README's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def default_of(name: str) -> str:
    """A setting's default as it would be written in the environment; paths from the root of the repository."""
    field = Settings.model_fields[name]
    assert field.default is not PydanticUndefined, f"{name} has no default"
    value: Any = field.default
    if isinstance(value, Path):
        return value.relative_to(ROOT).as_posix()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, frozenset | tuple):
        return ",".join(value if isinstance(value, tuple) else sorted(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_every_route_stands_in_the_readme(app: Any) -> None:
    told = {(method, path) for method, path, *_ in rows()}
    for rule in app.url_map.iter_rules():
        if rule.endpoint.endswith("static"):
            continue
        path = re.sub(r"<(?:[^:<>]+:)?([^<>]+)>", r"{\1}", rule.rule)
        for method in rule.methods & METHODS:
            assert (method, path) in told, f"README's table of routes lacks {method} {path}"


def test_the_readme_tells_of_no_route_that_is_not_there(app: Any) -> None:
    there = {re.sub(r"<(?:[^:<>]+:)?([^<>]+)>", r"{\1}", rule.rule) for rule in app.url_map.iter_rules()}
    for method, path, *_ in rows():
        if method in METHODS:
            assert path in there, f"README tells of {method} {path}, which is not there"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_stands_in_the_readme_and_in_the_example_file_with_its_default(name: str) -> None:
    variable = f"LOCAL_LLM_{name.upper()}"
    [row] = [row for row in rows() if row[0] == variable]
    assert row[1] == default_of(name)
    assert row[2]
    example = (ROOT / ".env.example").read_text("utf-8").splitlines()
    assert f"#{variable}={default_of(name)}" in example, f".env.example lacks {variable}"


def test_no_document_tells_of_a_setting_that_is_not_there() -> None:
    there = {f"LOCAL_LLM_{name.upper()}" for name in Settings.model_fields}
    for file in ("README.md", "CHANGELOG.md", ".env.example", "Makefile"):
        told = set(re.findall(r"LOCAL_LLM_[A-Z_]+", (ROOT / file).read_text("utf-8")))
        assert told <= there, f"{file}: {told - there}"


def test_every_task_and_model_type_stands_in_the_readme() -> None:
    told = {name.strip() for row in rows() for name in row[0].split(",")}
    for task in TASKS.values():
        assert {task.name, *task.aliases} <= told, task.name
    assert "translation_xx_to_yy" in told
    for name in MODEL_TYPES:
        assert name in told or f"`{name}`" in README, name


def test_every_parameter_stands_in_the_readme() -> None:
    told = set(re.findall(r"`(\w+)`", README))
    names = set(GenerationParameters.model_fields)
    for model in TASK_PARAMETERS.values():
        names |= set(model.model_fields)
    assert names <= told, names - told


def test_the_readme_gives_the_defaults_of_generate_as_they_are() -> None:
    told = {row[0]: row[1] for row in rows() if len(row) == 3}
    for name, value in GENERATE_DEFAULTS.items():
        assert json.loads(told[name]) == value, name


def test_every_status_of_an_error_stands_in_the_readme() -> None:
    told = {row[0] for row in rows()}
    assert {str(status) for status in (*STATUS.values(), 405, 413, 415)} <= told


def test_the_json_that_the_readme_shows_is_json() -> None:
    shown = blocks("json")
    shown += [body for block in blocks("bash") for body in re.findall(r"-d '(.*?)'", block, re.DOTALL)]
    assert len(shown) >= 8
    for text in shown:
        json.loads(text)


def test_the_python_that_the_readme_shows_is_python() -> None:
    for text in blocks("python"):
        compile(text, "README.md", "exec")


def test_every_command_of_make_stands_in_the_readme() -> None:
    commands = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {"run", "test"} <= set(commands)
    for command in commands:
        assert f"make {command}" in README, command


def test_everything_at_the_top_of_the_tree_and_of_the_package_stands_in_the_readme() -> None:
    [layout] = re.findall(r"^## The repository\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    for path in files():
        parts = path.relative_to(ROOT).parts
        if parts[0].startswith(".") or parts[-1].startswith(("README", "__init__", "requirements-")):
            continue
        name = parts[1] if parts[0] == "huggingface" else parts[0]
        assert name in layout, f"README's layout lacks {path.relative_to(ROOT)}"


def test_the_changelog_tells_of_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (?:\d{4}-\d\d-\d\d|unreleased)$", changelog, re.MULTILINE)
    assert versions[0] == VERSION
    [entry] = re.findall(rf"^## \[{re.escape(VERSION)}\].*?\n(.*?)(?=^## |\Z)", changelog, re.DOTALL | re.MULTILINE)
    assert re.search(r"^- \S", entry, re.MULTILINE)


def test_the_version_is_the_same_everywhere(client: Any) -> None:
    assert f'version = "{VERSION}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert client.get("/openapi.json").json["info"]["version"] == VERSION
    assert client.get("/").json["version"] == VERSION


def files() -> Iterator[Path]:
    """Every file that belongs to the repository: what git keeps or would; in a tree without git, all but caches."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        yield from (ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())
        return
    made = (".git", ".venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis")
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if path.is_file() and not set(parts) & set(made) and parts[:2] != ("data", "models"):
            yield path


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    homes = re.compile(r"(?<![\w.~])/(?:home|Users|root|work|mnt|media|private)/[\w.-]+|\b[A-Z]:\\Users\\\w+")
    mine = {str(ROOT), str(Path.home())} - {"/"}
    found = []
    for path in files():
        text = path.read_text("utf-8", errors="replace")
        found += [
            f"{path.relative_to(ROOT)}: {place}"
            for place in {*homes.findall(text), *(own for own in mine if own in text)}
        ]
    assert not found
