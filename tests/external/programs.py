"""The scripts, one a program, and what their headers say: packages with versions, and the environment they run in.

A header is the block that PEP 723 describes, behind `#` in Python and behind `//` in JavaScript. Packages for Node are
listed under `[tool.local-llm]`; scripts of one environment share its packages. Nothing here installs or runs anything.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent / "scripts"
_HEADER = re.compile(r"^(?P<mark>#|//) /// script\n(?P<lines>(?:(?P=mark)(?: .*)?\n)+?)(?P=mark) ///$", re.MULTILINE)


@dataclass(frozen=True)
class Program:
    """A script and its header."""

    name: str
    script: Path
    python: tuple[str, ...]
    node: tuple[str, ...]
    environment: str
    seconds: int


def read(script: Path) -> Program:
    """The program of a script. A header that is missing, or has unknown keys, is a ValueError."""
    found = _HEADER.search(script.read_text("utf-8"))
    if found is None:
        raise ValueError(f"{script.name} has no header")
    width = len(found["mark"]) + 1
    header = tomllib.loads("\n".join(line[width:] for line in found["lines"].splitlines()))
    more = header.pop("tool", {}).get("local-llm", {})
    python = tuple(header.pop("dependencies", ()))
    node = tuple(more.pop("node", ()))
    environment = more.pop("environment", script.stem)
    seconds = more.pop("seconds", 180)
    header.pop("requires-python", None)
    if header or more:
        raise ValueError(f"{script.name}: unknown keys in the header: {sorted({**header, **more})}")
    return Program(script.stem, script, python, node, environment, seconds)


def programs() -> dict[str, Program]:
    """Every program, by its name."""
    scripts = [path for path in SCRIPTS.iterdir() if path.suffix in (".py", ".mjs") and path.stem[0] != "_"]
    return {script.stem: read(script) for script in sorted(scripts)}
