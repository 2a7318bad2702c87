"""What the repository is made of, for the tests that hold it to its documents."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT
from packaging.requirements import Requirement


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


def requirements(path: Path) -> list[Requirement]:
    """What a requirements file names itself."""
    lines = [line.split("#")[0].strip() for line in path.read_text("utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]
