"""Processes that write to a registry from several threads, and tell which changes were acknowledged.

`python registry_writer.py FILE NAME THREADS WRITES`: for each line that comes in, a new process in which every thread
makes WRITES changes to models of its own and counts a use of the shared model after each. Each change is a JSON line
when it begins and another one when it is acknowledged, written whole with one system call, so that a kill cannot tear
one. Processes are forked, since starting one takes longer than the writing. The test that kills them runs the same
`write` beside them.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface.registry.records import ModelRecord
from huggingface.registry.registry import ModelRegistry

SHARED_MODEL = "shared"


def say(**line: object) -> None:
    """One line to the parent, at once."""
    os.write(1, json.dumps(line).encode() + b"\n")


def write(path: Path, name: str, threads: int, writes: int, say: Callable[..., None]) -> None:
    """Write from `threads` threads at once, and leave the registry in order; `say` is told of every change."""
    registry = ModelRegistry(path, lock_timeout=60.0, usage_delay=0.05)
    workers = [threading.Thread(target=work, args=(registry, f"{name}-{n}", writes, say)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    registry.close()


def work(registry: ModelRegistry, owner: str, writes: int, say: Callable[..., None]) -> None:
    """Add, update, and now and then remove models that nobody else touches."""
    model_id, made = "", 0
    for step in range(writes):
        kind = ("add", "update", "update", "add", "remove")[step % 5]
        if kind == "add":
            made += 1
            model_id = f"{owner}-{made}"
        change = {"owner": owner, "kind": kind, "model_id": model_id, "description": f"step {step}"}
        say(state="begun", **change)
        if kind == "add":
            registry.add(ModelRecord(model_id, "A model", "text-generation", change["description"]))
        elif kind == "update":
            registry.update(model_id, {"description": change["description"]})
        else:
            registry.remove(model_id)
        say(state="acknowledged", **change)
        registry.record_use(SHARED_MODEL)


def main(path: str, name: str, threads: int, writes: int) -> None:
    """A new writing process for each line, one at a time."""
    while sys.stdin.readline():
        child = os.fork()
        if child == 0:
            say(state="started", pid=os.getpid())
            write(Path(path), name, threads, writes, say)
            os._exit(0)
        os.waitpid(child, 0)
        say(state="ended")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
