"""The registry of one process: what it holds, what it refuses, how it counts, and what its file looks like."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import until

from huggingface.errors import (
    InvalidModelId,
    InvalidRequest,
    LocalLLMError,
    ModelExists,
    ModelNotFound,
    ProtectedField,
    RegistryError,
    UnknownField,
)
from huggingface.registry.records import ModelRecord
from huggingface.registry.registry import ModelRegistry


def record(model_id: str = "gpt2", model_type: str = "text-generation", **fields: object) -> ModelRecord:
    return ModelRecord(model_id, fields.pop("name", "A model"), model_type, **fields)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "models.json"


@pytest.fixture
def open_registry(path):
    """Opens registries on the test's file, and closes them at its end."""
    opened: list[ModelRegistry] = []

    def open_one(file: Path = path, **options: float) -> ModelRegistry:
        opened.append(ModelRegistry(file, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


@pytest.fixture
def registry(open_registry) -> ModelRegistry:
    return open_registry()


# The records ----------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_an_empty_registry_and_reading_makes_none(tmp_path, open_registry):
    """Nothing is registered and nothing is written until the first change."""
    registry = open_registry(tmp_path / "new" / "folder" / "models.json")
    assert registry.list() == []
    assert registry.model_types() == []
    assert registry.warnings == []
    with pytest.raises(ModelNotFound, match=r"^Model 'gpt2' not found$"):
        registry.get("gpt2")
    assert list(tmp_path.iterdir()) == []
    registry.add(record())
    assert json.loads((tmp_path / "new" / "folder" / "models.json").read_text())["count"] == 1


def test_the_file_has_the_documented_format(path, registry):
    """It is the document's `models_data`, indented, in UTF-8, its fields in the documented order."""
    added = registry.add(record(name="Modèle", parameters={"max_new_tokens": 50, "temperature": 0.8}))
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    assert list(content) == ["models", "last_updated", "count"]
    assert content["models"] == [added.to_dict()]
    assert list(content["models"][0]) == list(added.to_dict())
    assert content["count"] == 1
    assert time.strptime(content["last_updated"], "%Y-%m-%dT%H:%M:%S.%f")
    assert "Modèle" in text
    assert len(text.splitlines()) > 15


def test_models_are_listed_in_the_order_added_and_by_type(registry, open_registry):
    """All, or those of one type; another start of the server lists the same."""
    records = [record("b/two"), record("a/one", "conversational"), record("zero")]
    assert [registry.add(one) for one in records] == records
    for reader in (registry, open_registry()):
        assert reader.list() == records
        assert reader.list("text-generation") == [records[0], records[2]]
        assert reader.list("unheard-of") == []
        assert reader.get("a/one") == records[1]
        assert reader.model_types() == ["conversational", "text-generation"]


def test_an_id_is_registered_once_and_only_if_it_is_one(registry):
    """A second model of the same id and an id that is no Hub id are refused."""
    registry.add(record("org/name"))
    with pytest.raises(ModelExists, match=r"^Model 'org/name' already exists$"):
        registry.add(record("org/name", name="Another"))
    with pytest.raises(InvalidModelId):
        registry.add(record("../../etc/passwd"))
    assert [one.name for one in registry.list()] == ["A model"]


def test_an_update_replaces_whole_fields(registry, open_registry):
    """The fields given are replaced, `parameters` as a whole; all others stay."""
    before = registry.add(record(description="old", parameters={"top_k": 50, "top_p": 0.9}))
    changes = {"description": "new", "parameters": {"top_k": 5}, "status": "disabled", "name": "N", "model_type": "t"}
    after = registry.update("gpt2", {**changes, "last_used": "2025-06-26T21:45:00.000000"})
    assert after == replace(before, **changes, last_used="2025-06-26T21:45:00.000000")
    assert registry.get("gpt2") == open_registry().get("gpt2") == after
    assert registry.update("gpt2", {"last_used": None}).last_used is None
    with pytest.raises(ModelNotFound):
        registry.update("gpt3", {"name": "x"})


@pytest.mark.parametrize(
    ("field", "value"), [("model_id", "other"), ("added_date", "2020-01-01T00:00:00.000000"), ("usage_count", 7)]
)
def test_a_protected_field_cannot_be_changed(registry, field, value):
    """Only the server sets it; the message names it, and no other field of the same update is changed."""
    before = registry.add(record())
    with pytest.raises(ProtectedField, match=field):
        registry.update("gpt2", {"name": "Changed", field: value})
    assert registry.get("gpt2") == before


def test_a_record_that_was_read_can_be_put_back_and_that_writes_nothing(path, registry):
    """All fields as they stand, protected ones too, are no change: the file is not touched."""
    registry.add(record(parameters={"a": {"x": 1, "y": [1, 2]}, "b": 2}))
    registry.record_use("gpt2")
    registry.close()
    before = path.stat()
    given = registry.get("gpt2").to_dict()
    given["parameters"] = {"b": 2, "a": {"y": [1, 2], "x": 1}}
    assert registry.update("gpt2", given) == registry.get("gpt2")
    assert registry.update("gpt2", {}) == registry.get("gpt2")
    assert path.stat() == before


@pytest.mark.parametrize(("old", "new"), [(1, True), (1, 1.0), (0, False), ([1], [True])])
def test_values_of_another_json_type_are_a_change(registry, open_registry, old, new):
    """1, 1.0 and true are three values, though Python calls them equal."""
    registry.add(record(parameters={"p": old}))
    registry.update("gpt2", {"parameters": {"p": new}})
    assert repr(open_registry().get("gpt2").parameters["p"]) == repr(new)


def test_an_unknown_field_is_refused_by_name(registry):
    """The message names the field and lists those that can be changed."""
    registry.add(record())
    with pytest.raises(
        UnknownField,
        match=r"^Unknown field: colour\. Accepted here: adapters, .*description, .*model_type, ",
    ):
        registry.update("gpt2", {"colour": "red"})


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parameters", {"temperature": float("nan")}),
        ("parameters", {"temperature": float("inf")}),
        ("parameters", {"x": object()}),
        ("parameters", {"x": 2**70}),
        ("parameters", {"x": nested(251)}),
        ("parameters", {"x": nested(100_000)}),
        ("parameters", [1]),
        ("parameters", None),
        ("description", "\ud800"),
        ("name", 5),
        ("last_used", 5),
        ("status", None),
    ],
)
def test_what_the_file_could_not_give_back_is_refused(path, registry, open_registry, field, value):
    """A value that JSON cannot carry, or of the wrong type, is refused by the field's name; the file stays readable."""
    before = registry.add(record())
    with pytest.raises(InvalidRequest, match=field) as refusal:
        registry.update("gpt2", {field: value})
    assert refusal.value.field == field
    with pytest.raises(InvalidRequest, match=field):
        registry.add(replace(record("another"), **{field: value}))
    assert open_registry().list() == registry.list() == [before]


def test_what_the_caller_does_with_its_values_later_changes_nothing(registry):
    """The registry keeps its own copy of what it was given."""
    parameters = {"stop": ["a"]}
    registry.add(record(parameters=parameters))
    parameters["stop"].append("b")
    assert registry.get("gpt2").parameters == {"stop": ["a"]}


def test_removing_returns_the_new_content_of_the_file(path, registry):
    """The answer is the document's `models_data`, as the file now holds it."""
    registry.add(record("one"))
    registry.add(record("two"))
    registry.record_use("two")
    content = registry.remove("one")
    assert content == json.loads(path.read_text())
    assert [model["model_id"] for model in content["models"]] == ["two"]
    assert (content["count"], content["models"][0]["usage_count"]) == (1, 1)
    assert registry.remove("two")["models"] == []
    with pytest.raises(ModelNotFound):
        registry.remove("two")


def test_statistics_count_models_types_and_uses(registry):
    """As in the document's section 3.3."""
    registry.add(record("gpt2", name="GPT-2", usage_count=10))
    registry.add(record("opt", usage_count=3))
    registry.add(record("dialog", "conversational", usage_count=1))
    registry.record_use("dialog")
    assert registry.statistics() == {
        "total_models": 3,
        "total_usage": 15,
        "model_types": {"text-generation": 2, "conversational": 1},
        "last_updated": registry.get("dialog").last_used,
        "most_used": {"model_id": "gpt2", "name": "GPT-2", "usage_count": 10},
    }
    registry.close()
    assert registry.statistics()["last_updated"] > registry.get("dialog").last_used


def test_nothing_is_most_used_before_anything_is_used(registry):
    """`most_used` is null without models and without uses, `last_updated` before the first change."""
    assert registry.statistics() == {
        "total_models": 0,
        "total_usage": 0,
        "model_types": {},
        "last_updated": None,
        "most_used": None,
    }
    registry.add(record())
    assert registry.statistics()["most_used"] is None
    assert registry.statistics()["last_updated"] is not None


def test_of_equally_used_models_the_one_used_last_is_most_used(registry):
    """A tie goes to the latest use, then to the model added first."""
    registry.add(record("first", usage_count=2))
    registry.add(record("second", usage_count=2))
    assert registry.statistics()["most_used"]["model_id"] == "first"
    registry.add(record("third", usage_count=1))
    registry.record_use("third")
    assert registry.statistics()["most_used"]["model_id"] == "third"


def test_every_error_of_the_registry_is_one_of_the_project(path, registry):
    """And its message names the file without the folder that it is in, since a client may see it."""
    path.mkdir()
    for call in (registry.list, registry.statistics, registry.model_types, lambda: registry.add(record())):
        with pytest.raises(RegistryError, match=r"models\.json") as failure:
            call()
        assert isinstance(failure.value, LocalLLMError)
        assert str(path.parent) not in str(failure.value)
    assert list(path.iterdir()) == []


# Usage ----------------------------------------------------------------------------------------------------------------


def test_a_use_is_seen_at_once_and_written_within_the_delay(path, open_registry):
    """This process shows it at once in every answer, the file and other processes within `usage_delay`."""
    registry, other = open_registry(usage_delay=0.4), open_registry()
    registry.add(record())
    before = path.read_bytes()
    for _ in range(3):
        registry.record_use("gpt2")
    assert (registry.get("gpt2").usage_count, registry.list()[0].usage_count) == (3, 3)
    assert registry.get("gpt2").last_used > registry.get("gpt2").added_date
    assert path.read_bytes() == before
    until(lambda: other.get("gpt2").usage_count == 3)
    assert other.get("gpt2") == registry.get("gpt2")
    registry.record_use("gpt2")
    assert registry.get("gpt2").usage_count == 4
    until(lambda: other.get("gpt2").usage_count == 4)


def test_closing_writes_the_uses_and_stops_the_thread(open_registry):
    """What was counted is on the disk when `close` returns, and a closed registry can be used again."""
    registry, other = open_registry(usage_delay=60), open_registry()
    registry.add(record())
    for used in (1, 2):
        registry.record_use("gpt2")
        assert any(thread.name == "registry-usage" for thread in threading.enumerate())
        registry.close()
        registry.close()
        assert other.get("gpt2").usage_count == used
        assert not any(thread.name == "registry-usage" for thread in threading.enumerate())


def test_two_processes_counts_add_up(open_registry):
    """Counters are written as differences to what the file holds, so that neither overwrites the other's."""
    one, other = open_registry(usage_delay=60), open_registry(usage_delay=60)
    one.add(record())
    for _ in range(5):
        one.record_use("gpt2")
        other.record_use("gpt2")
        other.record_use("gpt2")
    one.update("gpt2", {"name": "A change takes the pending uses with it"})
    assert other.get("gpt2").usage_count == 15
    one.close()
    other.close()
    assert one.get("gpt2").usage_count == 15


def test_uses_of_a_removed_model_are_dropped(open_registry):
    """They count neither for a model added again under the same id, nor as an error."""
    registry, other = open_registry(usage_delay=60), open_registry()
    registry.add(record())
    registry.record_use("gpt2")
    other.remove("gpt2")
    registry.record_use("gpt2")
    registry.record_use("never-registered")
    assert registry.list() == []
    other.add(record())
    assert registry.get("gpt2").usage_count == 0
    registry.record_use("gpt2")
    registry.close()
    assert other.get("gpt2").usage_count == 1


def test_uses_that_cannot_be_written_are_kept_and_tried_again(path, open_registry, caplog):
    """A use never fails its request: with the file in the way it is counted later, and the log says so."""
    registry = open_registry(usage_delay=0.05)
    registry.add(record())
    aside = path.rename(path.with_name("away"))
    path.mkdir()
    registry.record_use("gpt2")
    until(lambda: "could not be written yet" in caplog.text)
    registry.record_use("gpt2")
    path.rmdir()
    aside.rename(path)
    until(lambda: json.loads(path.read_bytes())["models"][0]["usage_count"] == 2)


def test_a_setting_that_was_renamed_is_read_under_its_old_name_and_written_under_its_new_one(path, open_registry):
    """Where a file has both, the new one counts."""
    renamed = record("gpt2", backend="torch").to_dict()
    old = {("engine" if name == "backend" else name): value for name, value in renamed.items()}
    both = {**renamed, "model_id": "distilgpt2", "engine": "openvino"}
    path.write_text(json.dumps({"models": [old, both]}))
    registry = open_registry()
    assert [each.backend for each in registry.list()] == ["torch", "torch"]
    registry.update("gpt2", {"description": "changed"})
    for written in json.loads(path.read_bytes())["models"]:
        assert (written["backend"], written.get("engine")) == ("torch", None)


# Speed ----------------------------------------------------------------------------------------------------------------


def fastest(action, times: int = 5) -> float:
    """Seconds of the fastest of a few runs: the machine may be busy with other things."""
    durations = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        durations.append(time.perf_counter() - started)
    return min(durations)


def test_ten_thousand_models_are_listed_without_parsing_and_updated_by_one_write(path, open_registry):
    """A list costs less than reading the file, and a change hardly more than writing it."""
    models = [
        record(f"org/model-{n}", parameters={"max_new_tokens": 50, "top_p": 0.9}).to_dict() for n in range(10_000)
    ]
    content = {"models": models, "last_updated": None, "count": len(models)}
    path.write_text(json.dumps(content))
    registry = open_registry()
    assert len(registry.list()) == 10_000
    numbers = iter(range(100))

    def write() -> None:
        with path.with_name("other.json").open("w") as file:
            json.dump(content, file)
            os.fsync(file.fileno())

    parse = fastest(lambda: json.loads(path.read_bytes()))
    assert fastest(registry.list) < parse / 10
    assert fastest(lambda: registry.update("org/model-5000", {"description": str(next(numbers))}), 10) < fastest(write)
    assert fastest(lambda: registry.get("org/model-9999"), 20) < parse / 10
    assert all(one is other for one, other in zip(registry.list(), registry.list(), strict=True))
