"""The registry's file: durable, shared, corrupt, unreadable, linked to, on a full disk. Real files, no stand-ins."""

from __future__ import annotations

import json
import os
import resource
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from huggingface.errors import ModelNotFound, RegistryError, StorageFull
from huggingface.registry.records import ModelRecord
from huggingface.registry.registry import ModelRegistry

GPT2 = {"model_id": "gpt2", "name": "GPT-2", "model_type": "text-generation"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "models.json"


@pytest.fixture
def registry(path: Path) -> Iterator[ModelRegistry]:
    one = ModelRegistry(path, lock_timeout=5)
    yield one
    one.close()


def record(model_id: str = "gpt2", **fields: object) -> ModelRecord:
    return ModelRecord(model_id, "A model", "text-generation", **fields)


def document(*models: object, **fields: object) -> bytes:
    return json.dumps({"models": models, "last_updated": None, "count": len(models), **fields}).encode()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Durable --------------------------------------------------------------------------------------------------------------


def test_a_change_is_on_the_disk_before_it_is_acknowledged(path, registry, monkeypatch):
    """The new file is synced, then takes the old one's name, then the folder is synced; all before the call returns."""
    registry.add(record("first"))
    calls: list[str] = []
    fsync, rename = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("sync folder" if folder else f"sync {os.fstat(descriptor).st_size} bytes")

    def watched_rename(source, target) -> None:
        rename(source, target)
        calls.append("rename")

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_rename)
    for change in (
        lambda: registry.add(record("second")),
        lambda: registry.update("second", {"name": "Changed"}),
        lambda: registry.remove("second"),
    ):
        calls.clear()
        change()
        assert calls == [f"sync {path.stat().st_size} bytes", "rename", "sync folder"]


def test_what_a_killed_writer_left_is_cleared_away(path, tmp_path, registry):
    """Only the registry's own temporary files; a user's files beside it stay."""
    for name in ("models.json.0a1b2c3d.tmp", "models.json.ffffffff.tmp", "models.json.mine.tmp", "models.json.bak"):
        (tmp_path / name).write_text("x")
    registry.add(record())
    assert names(tmp_path) == ["models.json", "models.json.bak", "models.json.lock", "models.json.mine.tmp"]


def test_a_full_disk_changes_nothing(path, tmp_path, registry):
    """A change without room is refused as such; the file, what is shown and the folder are as they were."""
    registry.add(record())
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(StorageFull, match=r"'models\.json' cannot be written: no room"):
            registry.update("gpt2", {"description": "x" * 1000})
        with pytest.raises(StorageFull):
            registry.add(record("another"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [(one.model_id, one.description) for one in registry.list()] == [("gpt2", "")]
    assert names(tmp_path) == ["models.json", "models.json.lock"]
    assert registry.update("gpt2", {"description": "x" * 1000}).description == "x" * 1000


# Shared ---------------------------------------------------------------------------------------------------------------


def test_a_change_by_another_process_is_seen_at_once(path, registry):
    """Whatever replaces or edits the file is read at the next call."""
    other = ModelRegistry(path)
    other.add(record("one"))
    assert [one.model_id for one in registry.list()] == ["one"]
    registry.update("one", {"description": "from here"})
    assert other.get("one").description == "from here"
    path.write_bytes(document(GPT2))
    assert other.list() == registry.list()
    assert registry.get("gpt2").name == "GPT-2"
    path.unlink()
    assert other.list() == registry.list() == []
    other.close()


def test_versions_of_the_same_size_and_time_are_told_apart(path, tmp_path, registry):
    """An inode number that the system uses again does not pass a new version off as the old one."""
    for number in range(10, 40):
        beside = tmp_path / "beside"
        beside.write_bytes(document({**GPT2, "description": str(number)}))
        os.utime(beside, ns=(10**18, 10**18))
        beside.replace(path)
        if number % 2:  # two versions between any two reads, so that the second may get the inode of the one last read
            assert registry.get("gpt2").description == str(number)


def test_fields_of_a_newer_version_are_kept(path, registry):
    """What this version does not know is not shown, and is still in the file after a change."""
    path.write_bytes(document({**GPT2, "licence": {"spdx": "MIT"}}, {**GPT2, "model_id": "opt", "x": 1}, schema=[2]))
    assert "licence" not in registry.get("gpt2").to_dict()
    registry.update("gpt2", {"description": "changed"})
    content = registry.remove("opt")
    assert list(content) == ["models", "last_updated", "count"]
    assert "licence" not in content["models"][0]
    written = json.loads(path.read_bytes())
    assert written["schema"] == [2]
    assert [model.get("licence") for model in written["models"]] == [{"spdx": "MIT"}]
    assert written["models"][0]["description"] == "changed"


def test_optional_fields_may_be_missing(path, registry):
    """A file written by hand needs the three required fields only, and may begin with a byte-order mark."""
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"models": [GPT2]}).encode())
    found = registry.get("gpt2")
    assert registry.get("gpt2") == found
    assert (found.description, found.parameters, found.status, found.usage_count) == ("", {}, "available", 0)
    assert registry.statistics()["last_updated"] is None
    registry.record_use("gpt2")
    assert registry.update("gpt2", {"name": "N"}).added_date == found.added_date
    assert json.loads(path.read_bytes())["models"][0]["added_date"] == found.added_date
    assert registry.get("gpt2").usage_count == 1


# Corrupt --------------------------------------------------------------------------------------------------------------

CORRUPT = {
    "empty": b"",
    "truncated": document(GPT2)[:-9],
    "not JSON": b"models: []",
    "no object": b"[]",
    "no list of models": b'{"models": {}}',
}


@pytest.mark.parametrize("data", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_corrupt_file_is_set_aside_and_never_overwritten(path, tmp_path, registry, caplog, data):
    """It is renamed untouched, the user is told where it is, and the registry goes on empty."""
    path.write_bytes(data)
    assert registry.list() == []
    (aside,) = tmp_path.glob("models.json.corrupt-*")
    assert aside.read_bytes() == data
    assert not path.exists()
    (warning,) = registry.warnings
    assert aside.name in warning
    assert str(tmp_path) not in warning
    assert warning in caplog.text
    registry.add(record("new"))
    assert [one.model_id for one in registry.list()] == ["new"]
    assert aside.read_bytes() == data


def deep(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


# A record of the file, as it stands there, and what is wrong with it.
UNREADABLE = {
    "no object": (b'"gpt2"', "is not an object"),
    "a list": (b"[[]]", "is not an object"),
    "no model_id": (b'{"name": "x", "model_type": "y"}', "has no 'model_id'"),
    "no name": (b'{"model_id": "bad", "model_type": "y"}', "has no 'name'"),
    "an id that is none": (b'{"model_id": "../bad", "name": "x", "model_type": "y"}', "not a Hugging Face model id"),
    "an id twice": (b'{"model_id": "a/first", "name": "x", "model_type": "y"}', "'a/first' is there twice"),
    "a name that is no string": (b'{"model_id": "bad", "name": 2, "model_type": "y"}', "'name' is not a string"),
    "a null": (b'{"model_id": "bad", "name": "x", "model_type": "y", "description": null}', "'description' is not"),
    "a list of parameters": (b'{"model_id": "bad", "name": "x", "model_type": "y", "parameters": []}', "'parameters'"),
    "a negative count": (b'{"model_id": "bad", "name": "x", "model_type": "y", "usage_count": -1}', "'usage_count'"),
    "a count that is none": (b'{"model_id":"bad","name":"x","model_type":"y","usage_count":true}', "'usage_count'"),
    "an adapter that is none": (b'{"model_id":"bad","name":"x","model_type":"y","adapters":{"a":1}}', "'adapters'"),
    "a number of another age": (
        b'{"model_id": "bad", "name": 1, "model_type": "y", "x": 123456789012345678901234567890}',
        "'name' is not a string",
    ),
    "NaN": (b'{"model_id": "bad", "name": "x", "model_type": "y", "parameters": {"a": NaN}}', "expected a JSON"),
    "half a character": (b'{"model_id": "bad", "name": "\\ud800", "model_type": "y"}', "surrogate"),
    "another encoding": (b'{"model_id": "bad", "name": "Mod\xe8le", "model_type": "y"}', "UTF-8"),
    "a forgotten comma": (b'{"model_id": "bad" "name": "x", "model_type": "y"}', "line 1 column"),
    "a deep nest": (b'{"model_id":"bad","name":"x","model_type":"y","n":' + deep(300) + b"}", "ecursion"),
    "a deeper nest": (b'{"model_id":"bad","name":"x","model_type":"y","n":' + deep(100_000) + b"}", "depth"),
}


def with_bad_record(bad: bytes) -> bytes:
    first, last = ({**GPT2, "model_id": model_id} for model_id in ("a/first", "a/last"))
    records = b",\n    ".join([json.dumps(first).encode(), bad, json.dumps(last).encode()])
    return b'{"models": [' + records + b'], "schema": [2]}'


@pytest.mark.parametrize(("bad", "problem"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_one_bad_record_harms_no_other_and_stays_in_its_place(path, tmp_path, registry, caplog, bad, problem):
    """The other models stay registered, the warning names the record, and every change keeps it byte for byte."""
    path.write_bytes(with_bad_record(bad))
    assert [one.model_id for one in registry.list()] == ["a/first", "a/last"]
    (warning,) = registry.warnings
    assert "models[1]" in warning
    assert problem in warning
    assert caplog.text.count(warning) == 1
    other = ModelRegistry(path)
    registry.add(record("new"))
    other.update("a/last", {"description": "changed"})
    registry.record_use("a/last")
    registry.close()
    between = path.read_bytes().split(bad)
    assert len(between) == 2
    assert b"a/first" in between[0]
    assert b"a/last" in between[1]
    registry.remove("a/last")
    assert bad in path.read_bytes()
    assert b'"schema"' in path.read_bytes()
    assert [one.model_id for one in other.list()] == [one.model_id for one in registry.list()] == ["a/first", "new"]
    assert other.warnings == registry.warnings == [warning]
    assert names(tmp_path) == ["models.json", "models.json.lock"]
    other.close()


def test_registering_a_model_again_repairs_its_record(path, registry):
    """It takes the bad record's place; until then its id is not found, and the answer says why."""
    path.write_bytes(with_bad_record(UNREADABLE["a null"][0]))
    for call in (lambda: registry.get("bad"), lambda: registry.update("bad", {"name": "x"})):
        with pytest.raises(ModelNotFound, match=r"cannot be read .*'description'.*Register it again, or delete it"):
            call()
    registry.add(record("bad"))
    assert [one["model_id"] for one in json.loads(path.read_bytes())["models"]] == ["a/first", "bad", "a/last"]
    assert registry.warnings == []
    assert registry.get("bad").name == "A model"


def test_a_bad_record_can_be_deleted(path, registry):
    """As any other, by its id; a second record of an id goes with the first."""
    path.write_bytes(with_bad_record(UNREADABLE["a null"][0]))
    registry.check_present("bad")
    assert registry.remove("bad")["count"] == 2
    assert registry.warnings == []
    with pytest.raises(ModelNotFound):
        registry.check_present("bad")
    path.write_bytes(with_bad_record(UNREADABLE["an id twice"][0]))
    registry.remove("a/first")
    assert [one.model_id for one in registry.list()] == ["a/last"]
    assert registry.warnings == []


def test_a_record_corrected_by_hand_is_registered_again(path, registry):
    """The warning goes when the file is read without it."""
    path.write_bytes(with_bad_record(UNREADABLE["a null"][0]))
    assert len(registry.warnings) == 1
    path.write_bytes(path.read_bytes().replace(b"null", b'"words"'))
    assert registry.warnings == []
    assert registry.get("bad").description == "words"


def test_each_corrupt_file_keeps_its_own_name(path, tmp_path, registry, monkeypatch):
    """A second one, even at the same time, does not take the first one's place; a change finds it as a read does."""
    monkeypatch.setattr("huggingface.registry.file.timestamp", lambda: "2025-06-26T21:45:00.000000")
    for number in range(3):
        path.write_bytes(b"broken %d" % number)
        if number == 1:
            registry.add(record())
            registry.remove("gpt2")
        assert registry.list() == []
    assert sorted(file.read_bytes() for file in tmp_path.glob("models.json.corrupt-*")) == [
        b"broken 0",
        b"broken 1",
        b"broken 2",
    ]
    assert len(registry.warnings) == 3


def test_a_corrupt_file_that_cannot_be_set_aside_is_left_as_it_is(tmp_path):
    """Every call says so, and nothing is written over it."""
    path = tmp_path / f"{'m' * 240}.json"  # so long that no name for a corrupt file can be made from it
    path.write_bytes(b"broken")
    registry = ModelRegistry(path)
    for call in (registry.list, lambda: registry.add(record()), lambda: registry.update("gpt2", {"name": "x"})):
        with pytest.raises(RegistryError, match=r"is corrupt \(not JSON: .*cannot be set aside: File name too long"):
            call()
    registry.record_use("gpt2")
    registry.close()
    assert path.read_bytes() == b"broken"


def test_a_corrupt_file_that_cannot_be_locked_is_left_as_it_is(path, registry):
    """Without the lock nobody may rename it: another process could be writing."""
    path.write_bytes(b"broken")
    Path(f"{path}.lock").mkdir()
    with pytest.raises(RegistryError, match=r"'models\.json' is corrupt .* cannot be locked: Is a directory"):
        registry.list()
    assert path.read_bytes() == b"broken"


def test_a_file_that_is_still_being_written_is_not_taken_for_corrupt(path, registry):
    """An editor that writes in place is given the time to finish."""
    data = document(GPT2)
    path.write_bytes(data[:20])

    def finish() -> None:
        for end in range(30, len(data) + 10, 10):
            time.sleep(0.01)
            path.write_bytes(data[:end])

    editor = threading.Thread(target=finish)
    editor.start()
    assert [one.model_id for one in registry.list()] == ["gpt2"]
    editor.join()
    assert registry.warnings == []


# Out of reach ---------------------------------------------------------------------------------------------------------


@contextmanager
def unprivileged() -> Iterator[None]:
    """As an ordinary user: for root no file is out of reach."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach, with a registry of one model in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        registry = ModelRegistry(folder / "models.json")
        registry.add(record())
        registry.close()
        (folder / "models.json").chmod(0o666)
        (folder / "models.json.lock").chmod(0o666)
        yield folder
        folder.chmod(0o700)


def test_a_file_that_may_not_be_read_is_an_error_and_stays(open_folder):
    """It is not taken for a corrupt one, nor for a missing one."""
    (open_folder / "models.json").chmod(0)
    registry = ModelRegistry(open_folder / "models.json")
    with unprivileged():
        for call in (registry.list, lambda: registry.add(record("new")), lambda: registry.get("gpt2")):
            with pytest.raises(
                RegistryError, match=r"^The registry file 'models\.json' cannot be read: Permission denied$"
            ):
                call()
    assert names(open_folder) == ["models.json", "models.json.lock"]
    assert [one.model_id for one in registry.list()] == ["gpt2"]
    registry.close()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_may_not_be_written_can_be_read_and_is_not_changed(open_folder, what):
    """In a folder, or in a file, made read-only, a change is refused and says why; reads go on."""
    registry = ModelRegistry(open_folder / "models.json")
    if what == "file":
        (open_folder / "models.json").chmod(0o444)
    else:
        open_folder.chmod(0o555)
    with unprivileged():
        with pytest.raises(
            RegistryError, match=r"^The registry file 'models\.json' cannot be written: Permission denied$"
        ):
            registry.update("gpt2", {"name": "Changed"})
        assert registry.get("gpt2").name == "A model"
    open_folder.chmod(0o777)
    assert names(open_folder) == ["models.json", "models.json.lock"]
    registry.close()


@pytest.mark.parametrize("kind", ["folder", "pipe", "below a file"])
def test_what_is_no_file_is_an_error(tmp_path, path, kind):
    """A folder, a pipe or a path through a file in its place is refused at once, and stays."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("{}")
        path = path / "models.json"
    registry = ModelRegistry(path)
    for call in (registry.list, lambda: registry.add(record())):
        with pytest.raises(RegistryError, match=r"models\.json"):
            call()
    registry.close()
    assert list(tmp_path.glob("*corrupt*")) == []


def test_a_symbolic_link_is_written_through(path, tmp_path):
    """The link stays a link, its target is what changes, and both names share one lock."""
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "real.json"
    path.symlink_to(target)
    registry, direct = ModelRegistry(path), ModelRegistry(target)
    registry.add(record())
    direct.add(record("second"))
    assert [one.model_id for one in registry.list()] == ["gpt2", "second"]
    assert path.is_symlink()
    target.write_bytes(b"broken")
    assert registry.list() == []
    assert path.is_symlink()
    assert names(tmp_path) == ["elsewhere", "models.json"]
    assert len(names(tmp_path / "elsewhere")) == 2
    registry.close()
    direct.close()


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_the_file_keeps_its_mode_and_its_owner(path, registry, mode):
    """A change does not open to others what was closed, nor close what was open."""
    registry.add(record())
    path.chmod(mode)
    owner = (os.geteuid(), os.getegid())
    if os.geteuid() == 0:
        owner = (65534, 65534)
        os.chown(path, *owner)
    registry.update("gpt2", {"name": "Changed"})
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, *owner)


def test_integers_of_any_size_stay_as_they_are_in_fields_that_are_not_known(path, registry):
    """A newer version's fields, of the file and of a record, through every change, a bad record beside them or not."""
    numbers = [1234567890123456789, 2**63, 2**64 + 1, -(2**70), 10**40, 2**53 + 1]
    first = {**record("a/first").to_dict(), "ids": {"all": numbers}, "size": 10**30}
    for others in ([], [{"model_id": 5}]):
        path.write_text(json.dumps({"models": [first, *others], "total": 10**25, "nested": [{"n": numbers}]}), "utf-8")
        registry.add(record("new"))
        registry.update("a/first", {"description": "changed"})
        written = json.loads(path.read_bytes())
        assert written["models"][0]["ids"] == {"all": numbers}
        assert (written["models"][0]["size"], written["total"]) == (10**30, 10**25)
        assert written["nested"] == [{"n": numbers}]
        registry.remove("new")
