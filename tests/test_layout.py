"""The layout: who may import whom, read from the syntax tree of every file, and what importing the app costs.

A module of `huggingface/` belongs to a room; the tables here say which rooms it may import, and who may use a library.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath

import pytest
from conftest import PATIENCE, ROOT

# Which rooms a room may import, itself apart. A room is a folder of `huggingface/` or one of its files.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "steps": {"errors"},
    "demand": {"budget", "errors"},
    "memory": set(),
    "rotary": set(),
    "devices": {"memory"},
    "budget": {"devices"},
    "eviction": set(),
    "statistics": {"registry", "errors"},
    "headers": set(),
    "adapter_files": {"files", "headers", "errors"},
    "preflight": {"adapter_files", "files", "hub", "headers", "rotary", "tasks", "records", "errors"},
    "downloads": {"adapter_files", "headers", "files", "hub", "progress", "records", "errors"},
    "warmup": {"manager", "errors"},
    "libraries": {"errors"},
    "progress": {"errors"},
    "records": {"errors"},
    "registry": {"records", "errors"},
    "files": {"records", "errors"},
    "hub": {"headers", "files", "progress", "records", "errors"},
    "tasks": {"demand", "memory", "rotary", "steps", "records", "errors"},
    "engine": {"demand", "memory", "rotary", "steps", "devices", "forms", "records", "errors"},
    "chat": {"forms", "records"},
    "forms": set(),
    "loader": {
        *("adapter_files", "headers", "files", "budget", "demand", "devices", "memory", "rotary", "tasks", "engine"),
        *("progress", "records", "errors"),
    },
    "manager": {
        *("registry", "loader", "downloads", "budget", "eviction", "statistics", "devices", "libraries"),
        *("progress", "records", "errors"),
    },
    "api": {
        *("manager", "warmup", "downloads", "preflight", "registry", "devices", "libraries", "tasks", "engine", "chat"),
        *("progress", "records", "errors"),
    },
    "": {"api", "manager", "warmup", "preflight", "budget", "memory", "statistics", "registry", "records", "errors"},
}
PARTS = {
    "adapters": "loader",
    "converted": "loader",
    "default_dtype": "loader",
    "plan": "loader",
    "reading": "loader",
    "rendering": "loader",
    "estimating": "loader",
    "loaded": "loader",
    "placement": "loader",
    "quantization": "loader",
    "gguf_files": "loader",
    "claims": "manager",
    "conversions": "manager",
    "places": "manager",
    "room": "manager",
    "registry_content": "registry",
    "registry_file": "registry",
}

# Who may import a library, as patterns of paths; and who only inside of a function, when it is needed.
TORCH = (
    "huggingface/loader.py",
    "huggingface/loaded.py",
    "huggingface/adapters.py",
    "huggingface/converted/*.py",
    "huggingface/default_dtype.py",
    "huggingface/plan.py",
    "huggingface/reading.py",
    "huggingface/estimating.py",
    "huggingface/gguf_files.py",
    "huggingface/placement.py",
    "huggingface/quantization.py",
    "huggingface/steps.py",
    "huggingface/demand.py",
    "huggingface/tasks/[!_]*.py",
    "huggingface/engine/openvino/*.py",
    *(
        f"huggingface/engine/{name}.py"
        for name in (
            "adapted",
            "batch",
            "borders",
            "cache",
            "constraints",
            "failures",
            "layers",
            "parity",
            "prepare",
            "products",
            "rotary",
            "runner",
            "sampling",
            "solo",
            "tokens",
            "twin",
        )
    ),
)
LIBRARIES: dict[str, tuple[str, ...]] = {
    "flask": ("app.py", "server.py", "huggingface/__init__.py", "huggingface/api/*.py"),
    "flask_openapi3": ("app.py", "huggingface/__init__.py", "huggingface/api/*.py"),
    "werkzeug": ("huggingface/api/*.py",),
    "waitress": ("connections.py",),
    "pydantic": (
        "config.py",
        *(
            f"huggingface/api/{name}.py"
            for name in (
                *("schemas", "cache_schemas", "download_schemas", "hub_schemas", "inference_schemas", "model_schemas"),
                *("preflight_schemas", "system_schemas", "parameters", "fields", "errors"),
            )
        ),
        *(
            f"huggingface/api/openai/{name}.py"
            for name in (
                *("bodies", "schemas", "text_schemas", "response_schemas", "answers"),
                *("hints", "neighbours", "parts", "thinking"),
            )
        ),
        *(f"huggingface/api/ollama/{name}.py" for name in ("options", "schemas", "answers")),
        *(f"huggingface/api/anthropic/{name}.py" for name in ("schemas", "models", "answers")),
    ),
    "pydantic_settings": ("config.py",),
    "torch": TORCH,
    "transformers": TORCH,
    "llguidance": (
        *(f"huggingface/engine/{name}.py" for name in ("constraints", "tokens")),
        *(f"huggingface/forms/{name}.py" for name in ("notation", "process", "unique")),
    ),
    "huggingface_hub": (),
    "safetensors": (),
    "gguf": (),
    "nncf": (),
    "openvino": (),
    "peft": (),
    "requests": ("example_usage.py",),
}
LATE: dict[str, tuple[str, ...]] = {
    "llguidance": ("huggingface/forms/gbnf.py",),
    "huggingface_hub": ("huggingface/hub/*.py", "huggingface/preflight/source.py"),
    "safetensors": (
        "huggingface/converted/*.py",
        "huggingface/files.py",
        "huggingface/hub/*.py",
        "starter.py",
    ),
    "nncf": ("huggingface/engine/openvino/library.py",),
    "openvino": ("huggingface/engine/openvino/*.py",),
    "gguf": ("starter.py",),
    "peft": ("huggingface/adapters.py",),
    "transformers": ("huggingface/chat/regions.py", "huggingface/rendering/*.py"),
}


@dataclass(frozen=True)
class Import:
    """One import: in which file and line, of what, and whether only inside of a function or for the types."""

    file: str
    line: int
    module: str
    late: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


@cache
def sources() -> dict[str, ast.Module]:
    """The syntax tree of every file of the program, by its path from the root."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "huggingface").rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in paths}


def module_name(file: str) -> str:
    """The dotted name that `file` has when it is imported."""
    parts = PurePosixPath(file).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: str, tree: ast.Module) -> Iterator[Import]:
    """Every import of a file, relative ones made absolute."""
    package = module_name(file).split(".")
    if not file.endswith("__init__.py"):
        package.pop()

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, late)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found = (ROOT / inner.replace(".", "/")).is_dir() or (ROOT / f"{inner.replace('.', '/')}.py").is_file()
                yield Import(file, node.lineno, inner if found else origin, late)
        inside = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        inside = inside or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(tree, False)


@cache
def all_imports() -> list[Import]:
    """Every import of the program."""
    return [found for file, tree in sources().items() for found in imports_of(file, tree)]


def room_of(module: str) -> str:
    """The room of a module of `huggingface`; the package itself is the room without a name."""
    name = [*module.split("."), ""][1]
    return PARTS.get(name, name)


def matches(file: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path from the root fits one of the patterns."""
    return any(fnmatchcase(file, pattern) for pattern in patterns)


def test_a_room_imports_only_the_rooms_that_the_design_allows() -> None:
    wrong = []
    for found in all_imports():
        if found.file.startswith("huggingface/") and found.module.split(".")[0] == "huggingface":
            here, there = room_of(module_name(found.file)), room_of(found.module)
            assert here in ROOMS, f"{found.file} is in no room: say in this test what it may import"
            if here != there and there not in ROOMS[here]:
                wrong.append(str(found))
    assert not wrong


def test_nothing_in_the_package_imports_the_programs_around_it() -> None:
    programs = {path.stem for path in ROOT.glob("*.py")}
    inside = [found for found in all_imports() if found.file.startswith("huggingface/")]
    assert not [str(found) for found in inside if found.module.split(".")[0] in programs]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    wrong = []
    for found in all_imports():
        if found.module.split(".")[0] != library or matches(found.file, LIBRARIES[library]):
            continue
        if not (found.late and matches(found.file, LATE.get(library, ()))):
            wrong.append(str(found))
    assert not wrong


def test_a_module_is_imported_by_a_computed_name_in_one_place_only() -> None:
    wrong = []
    for file, tree in sources().items():
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in ("import_module", "__import__") and file != "huggingface/libraries.py":
                wrong.append(f"{file}:{node.lineno}")
    assert not wrong


def test_the_manager_imports_the_loader_only_when_a_model_is_loaded() -> None:
    of_loader = [
        found
        for found in all_imports()
        if room_of(found.module) == "loader" and room_of(module_name(found.file)) != "loader"
    ]
    assert of_loader
    assert all(found.late for found in of_loader), [str(found) for found in of_loader if not found.late]


def test_the_api_knows_of_tasks_only_their_names_and_of_the_engine_only_its_tickets() -> None:
    allowed = {"huggingface.tasks", "huggingface.engine.ticket", "huggingface.engine.joint"}
    inner = [
        found
        for found in all_imports()
        if found.file.startswith("huggingface/api/") and room_of(found.module) in ("tasks", "engine")
    ]
    assert inner
    assert not [str(found) for found in inner if found.module not in allowed]


def test_the_leaves_import_nothing_but_the_standard_library() -> None:
    names = (
        "errors",
        "records",
        "devices",
        "memory",
        "forms/keywords",
        "progress",
        "budget",
        "eviction",
        "headers",
        "tasks/__init__",
    )
    leaves = {f"huggingface/{name}.py" for name in names}
    found = [found for found in all_imports() if found.file in leaves]
    assert {item.file for item in found} == leaves
    known = {*sys.stdlib_module_names, "huggingface"}
    assert not [str(item) for item in found if item.module.split(".")[0] not in known]


CHANGING = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear"}


def test_no_module_keeps_state_that_changes() -> None:
    wrong = []
    for file, tree in sources().items():
        targets = [
            node.targets if isinstance(node, ast.Assign) else [node.target]
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
        ]
        names = {
            name.id for group in targets for target in group for name in ast.walk(target) if isinstance(name, ast.Name)
        }
        for node in ast.walk(tree):
            changed: ast.AST | None = None
            if isinstance(node, ast.Global):
                wrong.append(f"{file}:{node.lineno} global {', '.join(node.names)}")
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                changed = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
                changed = node.func.value
            if isinstance(changed, ast.Name) and changed.id in names:
                wrong.append(f"{file}:{node.lineno} changes {changed.id}")
    assert not wrong


def test_importing_the_app_imports_none_of_the_heavy_libraries() -> None:
    heavy = ("torch", "transformers", "huggingface_hub", "tokenizers", "safetensors", "numpy", "pandas", "requests")
    program = f"import sys, app; print(*(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_file_says_what_it_owns() -> None:
    without = [file for file, tree in sources().items() if not ast.get_docstring(tree)]
    assert not without


# What tests use of other libraries that begins with an underscore.
OF_OTHERS = {
    "_C",  # torch
    "_cached_compile_jinja_template",  # transformers
    "_exit",  # os
    "_extra_content",  # transformers
    "_from_config",  # transformers
    "_len_torch_function_stack",  # torch
    "_model_mapping",  # transformers
    "_modules",  # torch
    "_reorder_linear_weight",  # torch
    "_replace",  # named tuples
    "_request_id",  # anthropic
}
# What tests take of ours all the same, by their files, and why.
OF_OURS = {
    ("test_waiting.py", "_places"),  # a place is taken without a request that has it
    ("test_engine_life.py", "_IDLE"),  # seconds, which no test can wait for
    ("test_conversions.py", "_NICE"),  # how far whatever else runs goes before a process that a test waits for
    ("test_conversions.py", "_CONVERTING"),  # bytes, beside which a tiny model is nothing
}
BY_NAME = ("setattr", "getattr", "hasattr", "delattr")


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The names that begin with one underscore and that a file takes from a module, or from an object but its own."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            texts = [each.value for each in node.args if isinstance(each, ast.Constant)]
            names = [text.rpartition(".")[2] for text in texts if isinstance(text, str)]
        yield from ((node.lineno, name) for name in names if name.startswith("_") and not name.startswith("__"))


def test_tests_take_the_front_door() -> None:
    """They reach into nothing: what a test needs is seen from outside, given to a constructor, or public."""
    files = [path for path in (ROOT / "tests").rglob("*.py") if "node_modules" not in path.parts]
    found = [(path.name, *each) for path in files for each in private_names(ast.parse(path.read_text("utf-8")))]
    ours = [each for each in found if each[2] not in OF_OTHERS]
    assert not [f"{file}:{line} {name}" for file, line, name in ours if (file, name) not in OF_OURS]
    assert {name for _, _, name in found if name in OF_OTHERS} == OF_OTHERS, "a name is listed that no test takes"
    assert {(file, name) for file, _, name in ours} == OF_OURS, "a name is listed that no test takes"


def test_no_file_is_a_drawer_for_what_has_no_home() -> None:
    drawers = {"utils", "helpers", "common", "misc"}
    assert not [path for path in (ROOT / "huggingface").rglob("*.py") if Path(path).stem in drawers]
