"""Environments under `.venv-clients`: a virtual environment or Node modules, for scripts that share them.

Each is made once and used again while the packages of its scripts are the same; an interrupted one is made again.
It knows packages and folders, no server and no script's content.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from programs import Program

FOLDER = Path(__file__).resolve().parents[2] / ".venv-clients"
INSTALL_SECONDS = 900


@dataclass(frozen=True)
class Environment:
    """A folder with the packages that some scripts share."""

    name: str
    python: tuple[str, ...]
    node: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def interpreter(self) -> Path:
        """Its own Python, or this one where it has packages for Node only."""
        return self.folder / "bin" / "python" if self.python else Path(sys.executable)

    def make(self) -> bool:
        """Install its packages, unless they are there; whether it had to."""
        stamp = self.folder / "packages.json"
        wanted = json.dumps({"python": self.python, "node": self.node})
        if stamp.is_file() and stamp.read_text("utf-8") == wanted:
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self.python:
            self._run(sys.executable, "-m", "venv", ".")
            pip = (str(self.interpreter), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q")
            self._run(*pip, *self.python)
        if self.node:
            (self.folder / "package.json").write_text(json.dumps({"private": True, "type": "module"}))
            self._run("npm", "install", "--no-audit", "--no-fund", "--silent", "--save-exact", *self.node)
        stamp.write_text(wanted, "utf-8")
        return True

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{self.name} does not install: {(done.stderr or done.stdout)[-2000:].strip()}")


def environments(programs: Iterable[Program]) -> dict[str, Environment]:
    """The environments of these programs, by name; pass all programs, so that a few do not shrink a shared one."""
    packages: dict[str, tuple[set[str], set[str]]] = {}
    for program in programs:
        python, node = packages.setdefault(program.environment, (set(), set()))
        python.update(program.python)
        node.update(program.node)
    return {
        name: Environment(name, tuple(sorted(python)), tuple(sorted(node))) for name, (python, node) in packages.items()
    }
