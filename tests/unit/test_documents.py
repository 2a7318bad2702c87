"""The documents: README, the pages in `docs/`, CHANGELOG and `.env.example` tell of everything there is, and what they
show is true. Each thing stands in the page meant for it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from packaging.utils import canonicalize_name
from pydantic_core import PydanticUndefined
from repository import files, requirements
from test_layout import FOLDERS

from config import Settings
from huggingface.api.documented.system import VERSION
from huggingface.api.http.errors import STATUS
from huggingface.api.parameters.effective import GENERATE_DEFAULTS
from huggingface.api.parameters.schemas import TASK_PARAMETERS, GenerationParameters
from huggingface.registry.records import LoadSettings
from huggingface.tasks import MODEL_TYPES, TASKS

# The pages for readers, by their paths.
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
METHODS = {"GET", "POST", "PUT", "DELETE", "PATCH"}
TEXT = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)  # what is left without these is prose


def rows(page: str) -> list[list[str]]:
    """The cells of every row of a page's tables, without the marks around code."""
    lines = [line for line in PAGES[page].splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def blocks(language: str) -> list[tuple[str, str]]:
    """The code blocks of all pages in one language, each with its page."""
    block = re.compile(rf"^```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [(page, text) for page, content in PAGES.items() for text in block.findall(content)]


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", TEXT.sub("", PAGES[page]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w./-]+\.md)", PAGES["README.md"]))
    assert set(PAGES) - {"README.md"} <= linked


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT.sub("", PAGES[page])):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert there.exists(), f"{page} links to {target}, which is not there"
        if anchor:
            name = there.relative_to(ROOT).as_posix()
            assert anchor in anchors(name), f"{page} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_are_there(page: str) -> None:
    tops = {path.relative_to(ROOT).parts[0] for path in files()} | {"huggingface"}
    made = {
        f"{line.rstrip('/')}/" for line in (ROOT / ".gitignore").read_text().splitlines()
    }  # on a fresh clone absent
    for name in re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|toml|txt))`", PAGES[page]):
        if name.split("/")[0] in tops and "*" not in name and f"{name.rstrip('/')}/" not in made:
            assert (ROOT / name).exists(), f"{page} names {name}, which is not there"


def test_every_route_stands_in_the_page_of_routes(app: Any) -> None:
    told = {(method, path) for method, path, *_ in rows("docs/routes.md")}
    for rule in app.url_map.iter_rules():
        if rule.endpoint.endswith("static"):
            continue
        path = re.sub(r"<(?:[^:<>]+:)?([^<>]+)>", r"{\1}", rule.rule)
        for method in rule.methods & METHODS:
            assert (method, path) in told, f"docs/routes.md lacks {method} {path}"


def test_the_pages_tell_of_no_route_that_is_not_there(app: Any) -> None:
    there = {
        (method, re.sub(r"<(?:[^:<>]+:)?([^<>]+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in rule.methods
    }
    for page in PAGES:
        for method, path, *_ in (row for row in rows(page) if len(row) > 1):
            if method in METHODS:
                assert (method, path) in there, f"{page} tells of {method} {path}, which is not there"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_stands_in_its_page_and_in_the_example_file_with_its_default(name: str) -> None:
    variable = f"LOCAL_LLM_{name.upper()}"
    [row] = [row for row in rows("docs/settings.md") if row[0] == variable]
    assert row[1] == default_of(name)
    assert row[2]
    example = (ROOT / ".env.example").read_text("utf-8").splitlines()
    assert f"#{variable}={default_of(name)}" in example, f".env.example lacks {variable}"


def test_no_document_tells_of_a_setting_that_is_not_there() -> None:
    there = {f"LOCAL_LLM_{name.upper()}" for name in Settings.model_fields} | {"LOCAL_LLM_ENGINE"}  # an old name
    for file in (*PAGES, "CHANGELOG.md", ".env.example", "Makefile"):
        told = set(re.findall(r"LOCAL_LLM_[A-Z_]+", (ROOT / file).read_text("utf-8")))
        assert told <= there, f"{file}: {told - there}"


def test_every_load_setting_stands_in_the_page_of_loading() -> None:
    told = {row[0] for row in rows("docs/loading.md")}
    names = {field.name for field in dataclasses.fields(LoadSettings)}
    assert names <= told, names - told


def test_every_task_and_model_type_stands_in_the_page_of_tasks() -> None:
    told = {name.strip() for row in rows("docs/tasks.md") for name in row[0].split(",")}
    for task in TASKS.values():
        assert {task.name, *task.aliases} <= told, task.name
    assert "translation_xx_to_yy" in told
    for name in MODEL_TYPES:
        assert name in told or f"`{name}`" in PAGES["docs/tasks.md"], name


def test_every_parameter_stands_in_the_page_of_tasks() -> None:
    told = set(re.findall(r"`(\w+)`", PAGES["docs/tasks.md"]))
    names = set(GenerationParameters.model_fields)
    for model in TASK_PARAMETERS.values():
        names |= set(model.model_fields)
    assert names <= told, names - told


def test_the_page_of_tasks_gives_the_defaults_of_generate_as_they_are() -> None:
    told = {row[0]: row[1] for row in rows("docs/tasks.md") if len(row) == 3}
    for name, value in GENERATE_DEFAULTS.items():
        assert json.loads(told[name]) == value, name


def test_every_status_of_an_error_stands_in_the_page_of_routes() -> None:
    told = {row[0] for row in rows("docs/routes.md")}
    assert {str(status) for status in (*STATUS.values(), 405, 413, 415)} <= told


def test_the_json_that_the_pages_show_is_json() -> None:
    shown = blocks("json")
    bodies = [(page, body) for page, text in blocks("bash") for body in re.findall(r"-d '(.*?)'", text, re.DOTALL)]
    assert len(shown) + len(bodies) >= 8
    for page, text in shown + bodies:
        try:
            json.loads(text)
        except ValueError as error:
            pytest.fail(f"{page}: {error} in {text}")


def test_the_python_that_the_pages_show_is_python() -> None:
    assert len(blocks("python")) >= 5
    for page, text in blocks("python"):
        compile(text, page, "exec")


def test_every_command_of_make_stands_in_the_contributors_page() -> None:
    commands = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {"run", "test"} <= set(commands)
    for command in commands:
        assert f"`make {command}" in PAGES["CONTRIBUTING.md"], command


def test_no_page_tells_of_a_command_of_make_that_is_not_there() -> None:
    commands = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page, text in PAGES.items():
        told = set(re.findall(r"`make ([a-z]+)", text)) | set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE))
        assert told <= commands, f"{page}: {told - commands}"


def test_everything_at_the_top_of_the_tree_and_of_the_package_stands_in_the_architecture() -> None:
    [layout] = re.findall(r"^## Folders\n(.*?)^```$", PAGES["docs/architecture.md"], re.DOTALL | re.MULTILINE)
    for path in files():
        parts = path.relative_to(ROOT).parts
        if parts[0].startswith(".") or parts[-1].startswith(("README", "__init__", "requirements-")):
            continue
        name = parts[1] if parts[0] == "huggingface" else parts[0]
        assert name in layout, f"the folders in docs/architecture.md lack {path.relative_to(ROOT)}"


def test_the_architecture_tells_who_may_import_whom() -> None:
    lines = re.findall(r"^(\w+) +-> (.*)$", PAGES["docs/architecture.md"], re.MULTILINE)
    assert {name: set(others.split(", ")) for name, others in lines} == {
        name: may for name, may in FOLDERS.items() if may
    }


def test_the_changelog_tells_of_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (?:\d{4}-\d\d-\d\d|unreleased)$", changelog, re.MULTILINE)
    assert versions[0] == VERSION
    [entry] = re.findall(rf"^## \[{re.escape(VERSION)}\].*?\n(.*?)(?=^## |\Z)", changelog, re.DOTALL | re.MULTILINE)
    assert re.search(r"^- \S", entry, re.MULTILINE)


def test_the_version_is_the_same_everywhere(client: Any) -> None:
    assert client.get("/openapi.json").json["info"]["version"] == VERSION
    assert client.get("/").json["version"] == VERSION


def test_the_lock_holds_every_requirement_at_its_version_and_leaves_what_torch_pins_to_torch() -> None:
    locked = {canonicalize_name(each.name): str(each.specifier) for each in requirements(ROOT / "requirements.lock")}
    for name in ("requirements.txt", "requirements-dev.txt"):
        for each in requirements(ROOT / name):
            assert locked.get(canonicalize_name(each.name)) == str(each.specifier), f"{each}: run `make lock`"
    assert not [name for name in locked if name.startswith(("cuda", "nvidia", "triton"))]


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
