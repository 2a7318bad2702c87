"""The layout: who may import whom, read from the syntax tree of every file, and what importing the app costs.

A module of `huggingface/` belongs to a folder; the tables here say which folders that may import, and where a library
may be used.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest
from conftest import PATIENCE, ROOT

# Which folders of `huggingface/` a folder may import, itself and the modules beside the folders apart. Only downward.
FOLDERS: dict[str, set[str]] = {
    "host": set(),
    "registry": set(),
    "forms": set(),
    "rendering": set(),
    "modeling": {"host"},
    "chat": {"forms"},
    "tasks": {"modeling", "host"},
    "engine": {"modeling", "forms", "host"},
    "inspection": {"registry", "tasks", "modeling"},
    "hub": {"inspection", "registry"},
    "model": {"registry", "engine", "tasks", "modeling", "host"},
    "loading": {"model", "inspection", "registry", "engine", "tasks", "modeling", "rendering", "host"},
    "manager": {"loading", "model", "hub", "inspection", "registry", "modeling", "host"},
    "api": {"manager", "hub", "inspection", "registry", "tasks", "engine", "chat", "host"},
}
# The modules beside the folders, which any folder may import; and which of these each may import.
MODULES: dict[str, set[str]] = {
    "errors": set(),
    "cancellation": {"errors"},
    "types": {"errors"},
    "progress": {"cancellation", "errors"},
    "served": {"engine", "cancellation", "types"},
}

# Where a library may be imported, as patterns of paths (`*` is any part of one); and where only inside of a function,
# when it is needed.
COMPUTES = (*(f"huggingface/{folder}/*" for folder in ("model", "loading", "engine", "tasks", "modeling")),)
LIBRARIES: dict[str, tuple[str, ...]] = {
    "flask": ("app.py", "server.py", "huggingface/__init__.py", "huggingface/api/*"),
    "flask_openapi3": ("app.py", "huggingface/__init__.py", "huggingface/api/*"),
    "werkzeug": ("huggingface/api/*",),
    "waitress": ("connections.py", "dispatcher.py"),
    "pydantic": ("config.py", "huggingface/api/*"),
    "pydantic_settings": ("config.py",),
    "torch": COMPUTES,
    "transformers": COMPUTES,
    "llguidance": ("huggingface/engine/*", "huggingface/forms/*"),
    "huggingface_hub": (),
    "safetensors": (),
    "gguf": ("huggingface/loading/gguf_reader.py", "huggingface/loading/llama_cpp/reference.py"),  # themselves late
    "openvino": (),
    "peft": (),
    "requests": ("example_usage.py",),
}
LATE: dict[str, tuple[str, ...]] = {
    "llguidance": ("huggingface/forms/*",),
    "huggingface_hub": ("huggingface/hub/*", "huggingface/inspection/*"),
    "safetensors": ("huggingface/loading/*", "huggingface/hub/*", "huggingface/inspection/*"),
    "openvino": ("huggingface/engine/openvino/*",),
    "gguf": ("starter.py",),
    "peft": ("huggingface/loading/*",),
    "transformers": ("huggingface/chat/*", "huggingface/rendering/*"),
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


def folder_of(module: str) -> str:
    """The folder of a module of `huggingface`, or its own name where it lies beside them; the package has none."""
    return [*module.split("."), ""][1]


def within(found: Import) -> bool:
    """Whether a module of `huggingface` imports another one of it."""
    return found.file.startswith("huggingface/") and found.module.split(".")[0] == "huggingface"


def matches(file: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path from the root fits one of the patterns."""
    return any(fnmatchcase(file, pattern) for pattern in patterns)


def test_a_folder_imports_only_the_folders_that_the_design_allows() -> None:
    wrong = []
    for found in all_imports():
        here, there = folder_of(module_name(found.file)), folder_of(found.module)
        if within(found) and here and here != there:
            allowed = MODULES[here] if here in MODULES else FOLDERS[here] | MODULES.keys()
            wrong += [] if there in allowed else [str(found)]
    assert not wrong


def test_every_folder_has_its_place_in_the_design() -> None:
    package = ROOT / "huggingface"
    assert {path.parent.name for path in package.glob("*/__init__.py")} == set(FOLDERS)
    assert {path.stem for path in package.glob("*.py")} == {"__init__", *MODULES}


def test_no_import_goes_round_in_a_circle() -> None:
    """Neither among modules nor among folders, wherever in a file the imports are."""
    modules, folders = TopologicalSorter[str](), TopologicalSorter[str]()
    for found in all_imports():
        here, there = module_name(found.file), found.module
        if within(found) and here != there and not there.startswith(f"{here}."):
            modules.add(here, there)
            if folder_of(here) != folder_of(there):
                folders.add(folder_of(here), folder_of(there))
    modules.prepare()
    folders.prepare()


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


# What the program imports of other libraries although its name begins with an underscore: there is no other way.
PRIVATE = {
    "openvino._offline_transformations",  # for stateful and for paged attention
    "torch._ops.OpOverload",
    "torch._ops.OpOverloadPacket",
    "torch.utils._pytree",
}


def test_what_other_libraries_keep_to_themselves_is_not_imported() -> None:
    found = set()
    for tree in sources().values():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in names if "._" in name}
    assert found == PRIVATE


def test_a_module_is_imported_by_a_computed_name_in_one_place_only() -> None:
    wrong = []
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute | ast.Name) or file == "huggingface/host/imports.py":
                continue
            if (node.attr if isinstance(node, ast.Attribute) else node.id) in ("import_module", "__import__"):
                wrong.append(f"{file}:{node.lineno}")
    assert not wrong


def test_what_loads_models_is_imported_only_when_one_is_loaded() -> None:
    heavy = {"loading", "model"}
    of_loading = [
        found
        for found in all_imports()
        if folder_of(found.module) in heavy and folder_of(module_name(found.file)) not in heavy
    ]
    assert of_loading
    assert all(found.late for found in of_loading), [str(found) for found in of_loading if not found.late]


def test_the_api_knows_of_tasks_only_their_names_and_of_the_engine_only_its_tickets() -> None:
    allowed = {"huggingface.tasks", "huggingface.engine.ticket", "huggingface.engine.parallel_sampling"}
    inner = [
        found
        for found in all_imports()
        if found.file.startswith("huggingface/api/") and folder_of(found.module) in ("tasks", "engine")
    ]
    assert inner
    assert not [str(found) for found in inner if found.module not in allowed]


def test_the_leaves_import_nothing_but_the_standard_library() -> None:
    names = ("errors", "types", "progress", "host/devices", "host/memory", "registry/records", "forms/keywords")
    names += ("manager/budget", "manager/eviction", "inspection/headers", "tasks/__init__")
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
                wrong.append(f"{file}:{changed.lineno} changes {changed.id}")
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
    "_run_exitfuncs",  # atexit
    "_shutdown",  # threading
}
# What tests take of ours all the same, by their files, and why.
OF_OURS = {
    ("test_engine_life.py", "_IDLE"),  # seconds, which no test can wait for
    ("test_conversions.py", "_NICE"),  # how far whatever else runs goes before a process that a test waits for
    ("test_conversions.py", "_CONVERTING"),  # bytes, beside which a tiny model is nothing
}
BY_NAME = ("setattr", "getattr", "hasattr", "delattr")


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The names that begin with one underscore and that a file takes from a module, or from an object but its own."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.expr | ast.stmt):
            continue
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
