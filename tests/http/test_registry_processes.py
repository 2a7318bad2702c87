"""One registry file under many hands: threads, processes, kills, forks, and any order of calls; all of them real."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, ROOT
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from registry_writer import write

from huggingface.errors import ModelExists, ModelNotFound, RegistryBusy
from huggingface.registry.records import ModelRecord
from huggingface.registry.registry import ModelRegistry

THREADS, WRITES = 8, 13  # in each of the 2 processes: 208 changes a round
ROUNDS = 20


class Writer:
    """A running `registry_writer.py`: one process at a time that writes, and what it has said so far."""

    def __init__(self, path: Path) -> None:
        self.lines: list[dict[str, Any]] = []
        self._heard = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "registry_writer.py", path, "killed", str(THREADS), str(WRITES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            with self._heard:
                self.lines.append(json.loads(line))
                self._heard.notify_all()

    def _wait(self, true: Callable[[], bool]) -> None:
        with self._heard:
            assert self._heard.wait_for(true, timeout=PATIENCE)

    def start(self) -> None:
        """Have a new process write; returns when it has begun to."""
        self.lines.clear()
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        self._wait(lambda: len(self.lines) > 1)

    def kill(self, after: int) -> list[dict[str, Any]]:
        """End the process with SIGKILL after so many lines; returns all that it said of its changes."""
        self._wait(lambda: len(self.lines) > after or self.lines[-1]["state"] == "ended")
        with suppress(ProcessLookupError):
            os.kill(self.lines[0]["pid"], signal.SIGKILL)
        self._wait(lambda: self.lines[-1]["state"] == "ended")
        return self.lines[1:-1]

    def close(self) -> None:
        self._process.stdin.close()
        self._listener.join()
        self._process.stdout.close()
        assert self._process.wait(timeout=PATIENCE) == 0


class Reader:
    """Reads the file without pause, as a user's script would, and as a registry does."""

    def __init__(self, path: Path) -> None:
        self.reads = 0
        self.failure: BaseException | None = None
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        registry = ModelRegistry(self._path)
        try:
            while not self._stop.is_set():
                content = json.loads(self._path.read_bytes())
                assert content["count"] == len(content["models"])
                assert registry.get("shared").usage_count >= 0
                self.reads += 1
                time.sleep(0.002)
            assert registry.warnings == []
        except BaseException as error:  # noqa: BLE001 - raised again by `stop`, in the test's thread
            self.failure = error
        finally:
            registry.close()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure


def allowed_outcomes(said: list[dict[str, Any]]) -> dict[str, set[str | None]]:
    """Model -> the descriptions it may have (None: it is not there): two where a change was begun and not answered."""
    outcomes: dict[str, set[str | None]] = {}
    answered = {(line["owner"], line["description"]) for line in said if line["state"] == "acknowledged"}
    for line in said:
        if line["state"] == "begun":
            after = None if line["kind"] == "remove" else line["description"]
            before = outcomes.get(line["model_id"], {None})
            outcomes[line["model_id"]] = (
                {after} if (line["owner"], line["description"]) in answered else before | {after}
            )
    return outcomes


def test_no_acknowledged_change_is_lost_when_a_writer_is_killed(tmp_path):
    """Two processes of eight threads write at once, one is killed at a random moment: nothing acknowledged is lost."""
    chance = random.Random()  # a new moment in every run, so that in time all are tried
    path = tmp_path / "models.json"
    killed_amid_writes = 0
    other = Writer(path)
    for number in range(ROUNDS):
        path.unlink(missing_ok=True)
        setup = ModelRegistry(path)
        setup.add(ModelRecord("shared", "Shared", "text-generation"))
        setup.close()
        reader = Reader(path)
        said: list[dict[str, Any]] = []
        writing = threading.Thread(
            target=write,
            args=(path, "survivor", THREADS, WRITES, lambda said=said, **line: said.append(line)),
            daemon=True,
        )
        other.start()
        writing.start()
        last_words = other.kill(after=chance.randrange(2 * THREADS * WRITES))
        killed_amid_writes += writing.is_alive() and len(last_words) < 2 * THREADS * WRITES
        writing.join()
        reader.stop()
        assert reader.reads > 0

        registry = ModelRegistry(path)
        found = {record.model_id: record.description for record in registry.list()}
        for model_id, allowed in {**allowed_outcomes(last_words), **allowed_outcomes(said)}.items():
            assert found.pop(model_id, None) in allowed, f"round {number}: {model_id}"
        assert set(found) == {"shared"}
        acknowledged = sum(line["state"] == "acknowledged" for line in last_words)
        assert len(said) == 2 * THREADS * WRITES
        assert THREADS * WRITES <= registry.get("shared").usage_count <= THREADS * WRITES + acknowledged
        registry.update("shared", {"description": "the first change of a new process clears the folder"})
        registry.close()
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["models.json", "models.json.lock"]
    other.close()
    assert killed_amid_writes > ROUNDS / 4


HOLDER = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_writer_that_another_process_keeps_out_gives_up_in_time_and_readers_do_not_wait(tmp_path):
    """A lock held elsewhere makes a change fail as busy after the timeout, changes nothing, and stops no read."""
    path = tmp_path / "models.json"
    registry = ModelRegistry(path, lock_timeout=3.0)
    registry.add(ModelRecord("first", "First", "text-generation"))
    before = path.read_bytes()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, f"{path}.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        started = time.monotonic()
        failures: list[Exception] = []

        def change() -> None:
            try:
                registry.update("first", {"name": "Other"})
            except RegistryBusy as error:
                failures.append(error)

        threads = [threading.Thread(target=change) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert registry.get("first").name == "First"
        assert not failures
        for thread in threads:
            thread.join()
        assert 2.9 < time.monotonic() - started < 4 * 3.0  # each has its own time, not one after the other
        assert len(failures) == 4
        assert path.read_bytes() == before
    finally:
        holder.communicate(b"")
    assert registry.update("first", {"name": "Other"}).name == "Other"
    registry.close()


FORK = """
import os, sys, threading, time
from pathlib import Path
from huggingface.registry.records import ModelRecord
from huggingface.registry.registry import ModelRegistry

registry = ModelRegistry(Path(sys.argv[1]), usage_delay=0.05)
registry.add(ModelRecord("shared", "Shared", "text-generation"))
stop = threading.Event()
def change():
    step = 0
    while not stop.is_set():
        step += 1
        registry.update("shared", {"description": str(step)})
        registry.record_use("shared")
changer = threading.Thread(target=change)
changer.start()
children = []
for number in range(20):
    time.sleep(0.003)
    child = os.fork()
    if child == 0:
        registry.add(ModelRecord(f"child-{number}", "Child", "text-generation"))
        registry.record_use(f"child-{number}")
        registry.close()
        os._exit(0)
    children.append(child)
statuses = [os.waitpid(child, 0)[1] for child in children]
stop.set()
changer.join()
registry.close()
registry = ModelRegistry(Path(sys.argv[1]))
shared = registry.get("shared")
assert statuses == [0] * 20, statuses
assert str(shared.usage_count) == shared.description, shared
assert [registry.get(f"child-{number}").usage_count for number in range(20)] == [1] * 20
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_server_shares_the_registry_without_hanging_or_counting_twice(tmp_path):
    """Children forked amid writes can read and write at once, and leave their parent's pending uses to the parent."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, tmp_path / "models.json"],
        check=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# The replaced version is dropped, and its file closed, when the new one is noted and its content is not yet.
FORK_AMID = """
import os, sys
from pathlib import Path
from huggingface.registry.records import ModelRecord
from huggingface.registry.registry import ModelRegistry

registry = ModelRegistry(Path(sys.argv[1]))
registry.add(ModelRecord("first", "First", "text-generation"))
replace, close = os.replace, os.close
children = []
def replaced(*arguments, **named):
    replace(*arguments, **named)
    os.replace, os.close = replace, closed
def closed(descriptor):
    os.close = close
    close(descriptor)
    children.append(os.fork())
    if not children[-1]:
        registry.add(ModelRecord("third", "Third", "text-generation"))
        os._exit(0)
os.replace = replaced
registry.add(ModelRecord("second", "Second", "text-generation"))
assert [os.waitpid(child, 0)[1] for child in children] == [0]
registry.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_between_a_rename_and_the_note_of_it_reads_the_file_anew(tmp_path):
    """Else it would write the content of the version before over the newest, and what was counted there be lost."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK_AMID, tmp_path / "models.json"],
        check=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    registry = ModelRegistry(tmp_path / "models.json")
    assert [record.model_id for record in registry.list()] == ["first", "second", "third"]
    registry.close()


def test_a_count_never_jumps_while_it_is_being_written(tmp_path):
    """Each use is shown exactly once at every moment: pending, being written, or written, with changes going on."""
    registry = ModelRegistry(tmp_path / "models.json", usage_delay=0.001)
    registry.add(ModelRecord("gpt2", "GPT-2", "text-generation"))
    stop = threading.Event()

    def change() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            registry.update("gpt2", {"description": str(step)})

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for used in range(1, 301):
            registry.record_use("gpt2")
            for _ in range(10):
                assert registry.get("gpt2").usage_count == used
    finally:
        stop.set()
        changer.join()
        registry.close()
    assert ModelRegistry(tmp_path / "models.json").get("gpt2").usage_count == 300


# Against a dictionary -------------------------------------------------------------------------------------------------

IDS = st.sampled_from(["a", "b", "org/c"])
WHO = st.sampled_from([0, 1])
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(max_size=5),
        "description": st.text(max_size=5),
        "status": st.sampled_from(["available", "disabled"]),
        "parameters": st.dictionaries(st.text(max_size=3), st.none() | st.booleans() | st.integers(-5, 5), max_size=2),
    },
)


class TwoRegistries(RuleBasedStateMachine):
    """Two registries on one file behave like one dictionary, but for the uses that each has not written yet."""

    folder: Path

    @initialize()
    def start(self) -> None:
        self.path = self.folder / f"{time.monotonic_ns()}.json"
        self.registries = [ModelRegistry(self.path, usage_delay=3600) for _ in range(2)]
        self.records: dict[str, dict[str, object]] = {}
        self.written: dict[str, int] = {}
        self.pending: list[dict[str, int]] = [{}, {}]

    def teardown(self) -> None:
        for registry in self.registries:
            registry.close()

    def flush(self, who: int) -> None:
        """Uses travel with the next write of their process."""
        for model_id, times in self.pending[who].items():
            self.written[model_id] += times
        self.pending[who] = {}

    @rule(who=WHO, model_id=IDS, changes=CHANGES)
    def add(self, who, model_id, changes) -> None:
        model = ModelRecord(model_id, **{"name": "n", "model_type": "t", **changes})
        if model_id in self.records:
            with pytest.raises(ModelExists):
                self.registries[who].add(model)
        else:
            self.registries[who].add(model)
            self.records[model_id] = {
                "name": "n",
                "description": "",
                "parameters": {},
                "status": "available",
                **changes,
            }
            self.written[model_id] = 0
            self.flush(who)

    @rule(who=WHO, model_id=IDS, changes=CHANGES)
    def update(self, who, model_id, changes) -> None:
        if model_id not in self.records:
            with pytest.raises(ModelNotFound):
                self.registries[who].update(model_id, changes)
        else:
            self.registries[who].update(model_id, changes)
            self.records[model_id].update(changes)
            self.flush(who)

    @rule(who=WHO, model_id=IDS)
    def remove(self, who, model_id) -> None:
        if self.records.pop(model_id, None) is None:
            with pytest.raises(ModelNotFound):
                self.registries[who].remove(model_id)
        else:
            for pending in self.pending:
                pending.pop(model_id, None)
            assert self.registries[who].remove(model_id)["count"] == len(self.records)
            self.flush(who)

    @rule(who=WHO, model_id=IDS)
    def use(self, who, model_id) -> None:
        self.registries[who].record_use(model_id)
        if model_id in self.records:
            self.pending[who][model_id] = self.pending[who].get(model_id, 0) + 1

    @rule(who=WHO)
    def reopen(self, who) -> None:
        self.registries[who].close()
        self.flush(who)
        self.registries[who] = ModelRegistry(self.path, usage_delay=3600)

    @invariant()
    def both_show_the_dictionary(self) -> None:
        for registry, pending in zip(self.registries, self.pending, strict=True):
            shown = {one.model_id: one for one in registry.list()}
            assert list(shown) == list(self.records)
            for model_id, fields in self.records.items():
                assert {name: getattr(shown[model_id], name) for name in fields} == fields
                assert shown[model_id].usage_count == self.written[model_id] + pending.get(model_id, 0)
                assert shown[model_id] == registry.get(model_id)


def test_any_sequence_of_calls_on_two_registries_agrees_with_a_dictionary(tmp_path):
    """Whatever is called, in whatever order, on either of two registries of one file."""
    machine = type("Machine", (TwoRegistries,), {"folder": tmp_path})
    run_state_machine_as_test(machine, settings=settings(max_examples=30, stateful_step_count=25, deadline=None))
