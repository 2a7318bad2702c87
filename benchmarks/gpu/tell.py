"""What a section finds: checks that hold or do not, and figures. Each is written at once, so that a section that is cut
short has told what it knew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any


def note(text: str) -> None:
    """Show progress to a person."""
    print(text, file=sys.stderr, flush=True)


class Tell:
    """One section's findings, as lines of JSON in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(self, name: str, ok: bool, /, **numbers: Any) -> None:
        """Something that has to hold, and the numbers that show it."""
        note(f"    {'ok  ' if ok else 'FAIL'} {name}" + (f"  {_short(numbers)}" if numbers else ""))
        self._write({"check": name, "ok": bool(ok), **numbers})

    def figure(self, name: str, /, **numbers: Any) -> None:
        """Something that was measured."""
        note(f"         {name}  {_short(numbers)}")
        self._write({"figure": name, **numbers})

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a section: one that fails is a check that does not hold, and the rest of the section goes on."""
        began = perf_counter()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it was, it is what was found
            self.check(name, False, error=f"{type(error).__name__}: {error}"[:500])
        else:
            note(f"         ({name}: {perf_counter() - began:.1f} s)")

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """What a section told; a last line that was cut short is left out."""
    found = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
    return found


def _short(numbers: dict[str, Any]) -> str:
    parts = []
    for name, value in numbers.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{name}={shown[:160]}")
    return " ".join(parts)
