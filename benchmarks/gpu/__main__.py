"""The command: `python -m benchmarks.gpu`, or `make gpu`. Runs the sections one after the other, and reports.

Each section has a process of its own and a time limit; the next goes on where one fails, is cut short, or takes its
process with it. Imports neither torch nor the server.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from . import wheels

# Seconds that a section may take of the usual budget; of another one as much more or less. Together they are more than
# the budget: few take their limit.
_BUDGET = 360.0
SECTIONS: Mapping[str, float] = {
    "models": 90,
    "exact": 120,
    "tasks": 60,
    "memory": 150,
    "robust": 90,
    "profile": 60,
    "speed": 150,
    "larger": 120,
}
_LEAST = 20.0  # seconds that have to be left for a section to begin
_STOPPING = 15.0  # seconds that a section has to stop its server


def main() -> int:
    """Run it; 0 where every section ended and every check held."""
    options = _options()
    wheels.use()
    from .tell import note

    began = monotonic()
    device = _device(options.device)
    work = Path(tempfile.mkdtemp(prefix="local-llm-gpu-"))
    sections: list[dict[str, Any]] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the section is stopped
    try:
        for name in options.sections:
            left = options.budget_s - (monotonic() - began)
            if left < _LEAST:
                sections.append({"section": name, "state": "left out", "found": []})
                note(f"{name}: left out, {left:.0f} s are left")
                continue
            note(f"{name}:")
            limit = min(left, SECTIONS[name] * options.budget_s / _BUDGET)
            sections.append(run_section(name, device, work, limit))
    except KeyboardInterrupt:
        note("Interrupted.")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "seconds": round(monotonic() - began, 1),
        "budget_s": options.budget_s,
        "versions": _told(sections, "versions"),
        "card": _told(sections, "card"),
        "sections": sections,
    }
    print(table(sections))
    if options.out is not None:
        path = options.out / f"gpu-{result['date'].replace(':', '')[:17]}.json" if options.out.is_dir() else options.out
        path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        print(f"\nEverything is in {path.name}")
    return 0 if succeeded(sections) else 1


def run_section(name: str, device: str, work: Path, limit: float) -> dict[str, Any]:
    """Run one section in a process of its own, and gather what it told."""
    from .tell import note, read

    told = work / f"{name}.jsonl"
    began = monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.section", name, device, str(work / "models"), str(told)],
        cwd=Path(__file__).resolve().parents[2],
        stdout=sys.stderr,
        start_new_session=True,  # what it started ends with it
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    try:
        status = process.wait(limit)
        state = "ended" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        state = f"cut short after {limit:.0f} s"
    finally:
        _stop(process)
    seconds = round(monotonic() - began, 1)
    note(f"{name}: {state}, {seconds:.1f} s")
    return {"section": name, "state": state, "seconds": seconds, "found": read(told)}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a section and all that it started: asked first, killed afterwards."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(_STOPPING)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def succeeded(sections: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every section that began ended, and every check held."""
    begun = [section for section in sections if section["state"] != "left out"]
    return bool(begun) and all(
        section["state"] == "ended" and all(found.get("ok", True) for found in section["found"]) for section in begun
    )


def table(sections: Sequence[Mapping[str, Any]]) -> str:
    """What was found, for people: each section, the checks that failed, and the figures."""
    lines = [f"{'section':<10} {'state':<26} {'seconds':>8}  checks"]
    for section in sections:
        checks = [found for found in section["found"] if "check" in found]
        held = f"{sum(found['ok'] for found in checks)} of {len(checks)} hold" if checks else ""
        lines.append(f"{section['section']:<10} {section['state']:<26} {section.get('seconds', 0):>8}  {held}")
    for section in sections:
        failed = [found for found in section["found"] if found.get("ok") is False]
        figures = [found for found in section["found"] if "figure" in found]
        if failed or figures:
            lines.append(f"\n{section['section']}")
        lines += [f"  FAILED {found['check']}: {_shown(found)}" for found in failed]
        lines += [f"  {found['figure']}: {_shown(found)}" for found in figures]
    return "\n".join(lines)


def _told(sections: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The numbers of a figure."""
    found: dict[str, Any] = next(
        (each for part in sections for each in part["found"] if each.get("figure") == name), {}
    )
    return {key: value for key, value in found.items() if key != "figure"}


def _shown(found: Mapping[str, Any]) -> str:
    """The numbers of a finding."""
    numbers = {name: value for name, value in found.items() if name not in ("check", "figure", "ok")}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items()
    )


def _device(asked: str) -> str:
    """`cuda` or `cpu`; `auto` is what torch finds, asked in a process of its own."""
    if asked != "auto":
        return asked
    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return "cpu" if subprocess.run([sys.executable, "-c", program]).returncode else "cuda"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: cuda, if there")
    parser.add_argument("--out", type=Path, help="file, or folder of files, that gets the JSON")
    parser.add_argument("--sections", type=_sections, help=f"default: {','.join(SECTIONS)}", default=list(SECTIONS))
    parser.add_argument(
        "--budget-s", type=float, default=_BUDGET, help=f"seconds for all of it (default: {_BUDGET:.0f})"
    )
    return parser.parse_args()


def _sections(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    return ["models", *(name for name in SECTIONS if name in names and name != "models")]


if __name__ == "__main__":
    sys.exit(main())
