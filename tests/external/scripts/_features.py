"""What the scripts in Python share: where the server is, what its agent model says, and a line for each feature.

`@feature("stream")` runs a function at `main()`; it asserts. `known` is the reason why a feature does not work with
this program: then its failure is no surprise, and is printed as `known`. Standard library only.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

URL = os.environ["LOCAL_LLM_URL"]
V1 = f"{URL}/v1"
MODEL = os.environ["AGENT_MODEL"]
TEXT_MODEL = os.environ["TEXT_MODEL"]
EMBEDDING_MODEL = os.environ["EMBEDDING_MODEL"]
ADDRESS = f"{URL}/api/huggingface/models/{MODEL}"

HELLO = "Good morning."
TOLD = "Oslo is cold."
REPORT = {"city": "Oslo", "cold": True}
QUESTION = "How is the weather in Oslo?"
AS_JSON = f"{QUESTION} Answer as JSON."
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "cold": {"type": "boolean"}},
    "required": ["city", "cold"],
    "additionalProperties": False,
}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": PARAMETERS}}

_FEATURES: list[tuple[str, str, Callable[[], Any]]] = []


def feature(name: str, known: str = "") -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Marks a function as the check of a feature."""

    def keep(check: Callable[[], Any]) -> Callable[[], Any]:
        _FEATURES.append((name, known, check))
        return check

    return keep


def main() -> None:
    """Run every feature, print a line for each, and exit with 1 if one failed."""
    failures = 0
    only = sys.argv[1:]
    for name, known, check in _FEATURES:
        if only and name not in only:
            continue
        try:
            result = check()
            if inspect.isawaitable(result):
                asyncio.run(_awaited(result))
        except Exception as error:  # noqa: BLE001 - whatever a program raises is its result
            if known:
                print(f"known {name}: {known}", flush=True)
                continue
            failures += 1
            print(f"failed {name}: {type(error).__name__}: {' '.join(str(error).split())[:1000]}", flush=True)
            traceback.print_exc(limit=-4, file=sys.stdout)
        else:
            print(f"ok {name}", flush=True)
    sys.exit(1 if failures else 0)


async def _awaited(result: Any) -> Any:
    return await result


def same(found: Any, wanted: Any) -> None:
    """Assert that two values are equal, and say which they are."""
    if found != wanted:
        raise AssertionError(f"got {found!r}, not {wanted!r}")


def within(part: Any, whole: Any) -> None:
    """Assert that a text or a list has a part."""
    if part not in whole:
        raise AssertionError(f"no {part!r} in {whole!r}")


def command(words: Sequence[str], seconds: int = 120, **environment: str) -> str:
    """What a command line prints, both streams; it has to end well."""
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise AssertionError(f"status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout + done.stderr
