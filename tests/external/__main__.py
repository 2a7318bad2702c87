"""Runs other people's programs against a live server: `python -m tests.external [--list] [--out FILE] [NAME ...]`.

One server on a free port serves tiny models; each script runs in its environment under a time limit, and those after
a failure run all the same. Prints a line a feature and a table at the end; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import environments
import served
from programs import SCRIPTS, Program, programs

_LINE = re.compile(r"^(ok|failed|known) ([\w ,.+/()=-]+?)(?:: (.*))?$", re.MULTILINE)
# No program needs a host besides the server, and none sends reports about its use.
_QUIET = {
    "HF_ENDPOINT": "http://127.0.0.1:9",  # its offline mode refuses servers of this machine as well
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "OTEL_SDK_DISABLED": "true",
    "NO_PROXY": "*",
    "no_proxy": "*",
    "PYTHONWARNINGS": "ignore",
    "PYTHONUNBUFFERED": "1",
    "NO_COLOR": "1",
    "CI": "1",
}
_KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT")


def run(program: Program, environment: environments.Environment, settings: dict[str, str]) -> dict[str, Any]:
    """Run one script in a folder of its own; its lines as `features`, and what went wrong as `problem`."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"local-llm-{program.name}-") as home:
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        variables = {**kept, **_QUIET, **settings, "HOME": home, "PYTHONPATH": str(SCRIPTS)}
        variables["PATH"] = os.pathsep.join(
            [str(environment.folder / "bin"), str(environment.folder / "node_modules" / ".bin"), kept.get("PATH", "")]
        )
        command = [str(environment.interpreter), str(program.script)]
        if program.script.suffix == ".mjs":
            copied = environment.folder / program.script.name  # beside the modules, where Node looks for them
            for script in (program.script, SCRIPTS / "_features.mjs"):
                shutil.copy(script, environment.folder / script.name)
            command = ["node", str(copied)]
        output = Path(home) / "output.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=home,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            problem = _wait(process, program.seconds)
        text = output.read_text("utf-8", "replace")
    features = {name: {"state": state, "reason": reason or ""} for state, name, reason in _LINE.findall(text)}
    if not problem and process.returncode and not any(each["state"] == "failed" for each in features.values()):
        problem = f"ended with status {process.returncode}"
    if not problem and not features:
        problem = "told of no feature"
    return {
        "features": features,
        "problem": problem,
        "seconds": round(time.monotonic() - begun, 1),
        "output": text[-20_000:] if problem or any(each["state"] != "ok" for each in features.values()) else "",
    }


def _wait(process: subprocess.Popen[bytes], seconds: int) -> str:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"did not end within {seconds} s"
    finally:
        _end(process)
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what the script has started and left running: its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def tried(program: Program, environment: environments.Environment, settings: dict[str, str]) -> dict[str, Any]:
    """The result of a program; an environment that cannot be made is one too."""
    try:
        if environment.make():
            print(f"  made the environment {environment.name}", flush=True)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return {"features": {}, "problem": str(error), "seconds": 0.0, "output": ""}
    return run(program, environment, settings)


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line a program: how many features worked, and which did not."""
    lines = []
    for name, result in results.items():
        count = Counter(each["state"] for each in result["features"].values())
        missed = [feature for feature, each in result["features"].items() if each["state"] != "ok"]
        told = "; ".join(
            filter(None, [", ".join(missed), result["problem"].splitlines()[0] if result["problem"] else ""])
        )
        lines.append(f"{name:26} {count['ok']:3} of {sum(count.values()):<3} {result['seconds']:6.1f} s  {told}")
    return "\n".join(lines)


def failed(result: dict[str, Any]) -> bool:
    """Whether a program met something besides what its script knows of."""
    return bool(result["problem"]) or any(each["state"] == "failed" for each in result["features"].values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.external", description=__doc__)
    parser.add_argument("names", nargs="*", help="programs to run; all of them, if none is named")
    parser.add_argument("--list", action="store_true", help="list the programs with their packages, and end")
    parser.add_argument("--out", type=Path, help="write the results as JSON to this file")
    arguments = parser.parse_args()
    every = programs()
    if unknown := [name for name in arguments.names if name not in every]:
        parser.error(f"no such program: {', '.join(unknown)}; --list shows them")
    if arguments.list:
        for program in every.values():
            print(f"{program.name:26} {' '.join((*program.python, *program.node)) or '-'}")
        return 0
    made = environments.environments(every.values())
    results: dict[str, dict[str, Any]] = {}
    with served.server() as settings:
        for name in arguments.names or every:
            print(name, flush=True)
            results[name] = tried(every[name], made[every[name].environment], settings)
            for feature, each in results[name]["features"].items():
                print(f"  {each['state']} {feature}{': ' if each['reason'] else ''}{each['reason']}", flush=True)
            if results[name]["problem"]:
                print(f"  {results[name]['problem']}\n{results[name]['output'][-3000:]}", flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(table(results))
    bad = [name for name, result in results.items() if failed(result)]
    print(
        f"{len(results) - len(bad)} of {len(results)} programs as expected"
        + (f"; not: {', '.join(bad)}" if bad else "")
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
