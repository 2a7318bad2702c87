"""Tries the server on every text family of transformers: `python -m tests.zoo [--table T] [--only NAME ...] [--again]`.

Some families at a time run in a process of their own, with a limit of time and memory, so that none ends the run; what
has a result is not tried again, unless it is named or `--again` is given. Prints a line a family; the exit status is 1
where one is not equal and families.py does not say why. With results of all of them, the document is written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

import families
import table

_AT_ONCE = 60  # families that share a process and a server
_SECONDS = 900.0  # for one family
_BYTES = 6 * 2**30  # of a process and all that it started


def watch(out: Path, names: list[str], backends: list[str], stop: threading.Event) -> Iterator[dict[str, Any]]:
    """The results of some families as they come, until `stop`; those that a process did not come to are missing."""
    out.write_text("", "utf-8")
    command = [sys.executable, str(HERE / "worker.py"), str(out), ",".join(backends), *names]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    problem, since, begun = "its process ended", time.monotonic(), None
    try:
        with out.open(encoding="utf-8") as file:
            while True:
                ended = process.poll() is not None
                while (line := file.readline()).endswith("\n"):
                    told, since = json.loads(line), time.monotonic()
                    begun = told.get("begun")
                    if begun is None:
                        yield told
                file.seek(file.tell() - len(line.encode()))  # the rest of it is still to come
                if ended:
                    break
                if stop.is_set():
                    return
                if time.monotonic() - since > _SECONDS:
                    problem = f"did not end within {_SECONDS:.0f} s"
                    break
                if _memory(process.pid) > _BYTES:
                    problem = f"took more than {_BYTES // 2**30} GiB"
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if begun is not None or process.returncode != 0:
        name, family = (begun or names[0]).split(":")
        yield {"table": name, "family": family, "broken": problem}


def _memory(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        whole = psutil.Process(pid)
        for process in (whole, *whole.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def chosen(only: list[str], tables: list[str]) -> list[str]:
    """The names, `TABLE:FAMILY`, that the arguments speak of; all of them where they say nothing.

    Raises:
        KeyError: there is no such family.
    """
    every = [f"{name}:{family}" for name in tables or families.TABLES for family in families.TABLES[name]]
    for name in only:
        if name not in every and not any(each.endswith(f":{name}") for each in every):
            raise KeyError(name)
    return [each for each in every if not only or each in only or each.split(":")[1] in only]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="FAMILY or TABLE:FAMILY")
    parser.add_argument("--table", action="append", default=[], choices=list(families.TABLES))
    parser.add_argument("--backend", action="append", default=[], choices=table.BACKENDS, help="only this one")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes with a server each run at once")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--results", type=Path, default=ROOT / ".zoo.jsonl", help="where results are kept")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "zoo.md", help="what is written of them")
    arguments = parser.parse_args()
    try:
        names = chosen(arguments.only, arguments.table)
    except KeyError as error:
        parser.error(f"no such family: {error.args[0]}")
    results, backends = _read(arguments.results), arguments.backend or list(table.BACKENDS)
    if not (arguments.only or arguments.again):
        names = [name for name in names if not _has(results.get(name), backends)]
    lock, stop = threading.Lock(), threading.Event()

    def work(number: int) -> None:
        waiting = names[number :: arguments.jobs]
        while waiting and not stop.is_set():
            told = Path(scratch) / f"told-{number}.jsonl"
            for each in watch(told, waiting[:_AT_ONCE], backends, stop):
                name = f"{each['table']}:{each['family']}"
                if name not in waiting:  # the process broke, after the last of them
                    continue
                waiting.remove(name)
                with lock:
                    had = results.get(name, {})
                    results[name] = {key: had[key] for key in table.BACKENDS if key in had} | each
                    text = "".join(f"{json.dumps(each)}\n" for each in results.values())
                    arguments.results.write_text(text, "utf-8")
                    print(f"{name:40} {each.get('seconds', 0):6.1f} s  {_line(each)}", flush=True)

    with (
        tempfile.TemporaryDirectory(prefix="local-llm-zoo-told-") as scratch,
        ThreadPoolExecutor(arguments.jobs) as pool,
    ):
        try:
            list(pool.map(work, range(arguments.jobs)))
        finally:
            stop.set()  # where it was interrupted
    bad = [name for name in names if not _expected(results[name])]
    print(f"{len(names) - len(bad)} of {len(names)} as expected" + (f"; not: {', '.join(bad)}" if bad else ""))
    every = chosen([], [])
    if all(name in results for name in every):
        arguments.document.write_text(table.render([results[name] for name in every], families.NOTES), "utf-8")
        print(f"wrote {arguments.document}")
    return 1 if bad else 0


def _read(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {f"{told['table']}:{told['family']}": told for told in map(json.loads, lines)}


def _has(told: dict[str, Any] | None, backends: list[str]) -> bool:
    return told is not None and ("unbuildable" in told or set(backends) <= set(told))


def _line(told: dict[str, Any]) -> str:
    if "unbuildable" in told:
        return f"not tried: {told['unbuildable']}"
    verdicts = [table.verdict(told, backend) for backend in table.tried(told)]
    return f"{' | '.join(verdicts)} [{told.get('torch', {}).get('mode')}]"


def _expected(told: dict[str, Any]) -> bool:
    return "unbuildable" in told or table.good(told) or (told["table"], told["family"]) in families.NOTES


if __name__ == "__main__":
    sys.exit(main())
