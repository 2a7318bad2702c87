"""Parses the registry file's bytes into records, encodes records as bytes, and checks the values of fields.

The format is the document's `models_data`. Fields of newer versions are kept unchanged, and a record with a wrong value
is kept byte for byte. Pure functions on immutable values, for any thread; they touch no file and no lock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson

from ..errors import InvalidModelId, InvalidRequest, ModelNotFound
from .records import ModelRecord, check_model_id


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_adapters(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _or_null(accepts: Callable[[Any], bool], rule: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value is None or accepts(value), f"{rule} or null"


# field -> (test of its JSON value, the rule in words). The file and callers share it, so every accepted value can be
# read again.
FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model_id": (_is_text, "a string"),
    "name": (_is_text, "a string"),
    "model_type": (_is_text, "a string"),
    "description": (_is_text, "a string"),
    "parameters": (_is_object, "an object"),
    "added_date": (_is_text, "a string"),
    "last_used": _or_null(_is_text, "a string"),
    "usage_count": (lambda value: type(value) is int and value >= 0, "a whole number, not negative"),
    "status": (_is_text, "a string"),
    "revision": _or_null(_is_text, "a string"),
    "gguf_file": _or_null(_is_text, "a string"),
    "adapters": _or_null(_is_adapters, "an object of strings"),
    "pinned": _or_null(lambda value: isinstance(value, bool), "true or false"),
    "keep_alive": _or_null(_is_number, "a number"),
    "device": _or_null(_is_text, "a string"),
    "device_map": _or_null(lambda value: isinstance(value, str | dict), "a string or an object"),
    "dtype": _or_null(_is_text, "a string"),
    "quantization": _or_null(_is_text, "a string"),
    "attn_implementation": _or_null(_is_text, "a string"),
    "compile": _or_null(lambda value: isinstance(value, bool), "true or false"),
    "backend": _or_null(_is_text, "a string"),
    "kv_cache_dtype": _or_null(_is_text, "a string"),
    "max_context": _or_null(_is_count, "a whole number above 0"),
    "slots": _or_null(_is_count, "a whole number above 0"),
    "details": _or_null(_is_object, "an object"),
}
_OLD_NAMES = {"engine": "backend"}  # names in files of earlier versions, or written by hand
REQUIRED_FIELDS = ("model_id", "name", "model_type")


class Corrupt(Exception):
    """The file can be read but is not a registry; the text says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Unreadable:
    """A record of the file that cannot be read: its bytes, its id if it has one, and the problem."""

    data: bytes
    model_id: str | None
    problem: str


@dataclass(frozen=True, slots=True)
class RegistryContent:
    """The content of one version of the file; immutable, so that readers need no lock.

    `order` holds the ids of the records and, between them, the unreadable records in their places; it is empty where
    every record can be read.
    """

    records: Mapping[str, ModelRecord] = field(default_factory=dict)
    last_updated: str | None = None
    record_extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # fields of newer versions, kept
    file_extras: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[str | Unreadable, ...] = ()

    def unreadable(self, model_id: str) -> list[Unreadable]:
        """The unreadable records of `model_id`."""
        return [each for each in self.order if isinstance(each, Unreadable) and each.model_id == model_id]

    def absent(self, model_id: str) -> ModelNotFound:
        """The error for an id without a record that can be read."""
        unreadable = self.unreadable(model_id)
        if not unreadable:
            return ModelNotFound(model_id)
        reason = f"its record in the registry file cannot be read ({unreadable[0].problem})"
        return ModelNotFound(model_id, f": {reason}. Register it again, or delete it")

    def problems(self) -> list[str]:
        """For each unreadable record, its place in the file, its id and the reason."""
        return [
            f"models[{index}]{'' if each.model_id is None else f' ({each.model_id!r})'}: {each.problem}"
            for index, each in enumerate(self.order)
            if isinstance(each, Unreadable)
        ]

    def changed(self, records: Mapping[str, ModelRecord], last_updated: str, replaced: str | None) -> RegistryContent:
        """The content with other records. Unreadable records keep their places, except those with the id `replaced`:
        a new record of that id takes the place of the first.
        """
        order: dict[str | Unreadable, None] = {}
        for entry in self.order:
            if isinstance(entry, Unreadable) and (replaced is None or entry.model_id != replaced):
                order[entry] = None
            elif (model_id := entry if isinstance(entry, str) else replaced) in records:
                order[str(model_id)] = None
        if order:
            order.update(dict.fromkeys(records))
            records = {entry: records[entry] for entry in order if isinstance(entry, str)}
        extras = {model_id: extra for model_id, extra in self.record_extras.items() if model_id in records}
        kept_order = tuple(order) if len(order) > len(records) else ()
        return RegistryContent(records, last_updated, extras, self.file_extras, kept_order)


def _parse_record(raw: Any, default_date: str) -> tuple[ModelRecord, dict[str, Any]]:
    """Parses a record of the file; returns it and the fields that this version does not know. Raises Corrupt."""
    if not isinstance(raw, dict):
        raise Corrupt("is not an object")
    for name in REQUIRED_FIELDS:
        if name not in raw:
            raise Corrupt(f"has no '{name}'")
    known: dict[str, Any] = {"added_date": default_date}
    extras: dict[str, Any] = {}
    for written, value in raw.items():
        name = str(_OLD_NAMES.get(written, written))
        if name != written and name in raw:
            continue
        if name not in FIELDS:
            extras[name] = value
            continue
        accepts, rule = FIELDS[name]
        if not accepts(value):
            raise Corrupt(f"'{name}' is not {rule}")
        known[name] = value
    try:
        check_model_id(known["model_id"])
    except InvalidModelId:
        raise Corrupt("'model_id' is not a Hugging Face model id") from None
    return ModelRecord(**known), extras


def parse(data: bytes, mtime: int) -> RegistryContent:
    """Parses the file's bytes, last changed at `mtime` (nanoseconds since 1970).

    A record with a wrong value, an invalid id, or the id of an earlier record becomes an `Unreadable`.

    Raises:
        Corrupt: the bytes are not an object with a list `models`.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    # A record written by hand may lack its date: the file's date serves, the same for every reader of this version.
    written = datetime.fromtimestamp(mtime / 1e9, UTC).replace(tzinfo=None)
    default_date = written.isoformat(timespec="microseconds")
    try:
        document = _loads(data)
    except orjson.JSONDecodeError as error:
        return _parse_pieces(data, default_date, Corrupt(f"not JSON: {error}"))
    if not isinstance(document, dict) or not isinstance(document.get("models"), list):
        raise Corrupt("not an object with a list 'models'")
    records: dict[str, ModelRecord] = {}
    extras: dict[str, dict[str, Any]] = {}
    try:
        for raw in document["models"]:
            _take(raw, default_date, records, extras)
        orjson.dumps(document)
    except (Corrupt, orjson.JSONEncodeError) as error:
        return _parse_pieces(data, default_date, error)
    return _content(document, records, extras)


def _take(
    raw: Any, default_date: str, records: dict[str, ModelRecord], extras: dict[str, dict[str, Any]]
) -> ModelRecord:
    """Adds a record to `records`, and the fields that this version does not know to `extras`. Raises Corrupt."""
    record, unknown = _parse_record(raw, default_date)
    if record.model_id in records:
        raise Corrupt(f"'{record.model_id}' is there twice")
    records[record.model_id] = record
    if unknown:
        extras[record.model_id] = unknown
    return record


def _content(
    document: Mapping[str, Any],
    records: dict[str, ModelRecord],
    extras: dict[str, dict[str, Any]],
    order: tuple[str | Unreadable, ...] = (),
) -> RegistryContent:
    last_updated = document.get("last_updated")
    others = {name: value for name, value in document.items() if name not in ("models", "last_updated", "count")}
    return RegistryContent(records, last_updated if isinstance(last_updated, str) else None, extras, others, order)


def _parse_pieces(data: bytes, default_date: str, reason: Exception) -> RegistryContent:
    """As `parse`, one record at a time, so that an error in one record, even in its JSON, does not affect the others.

    Raises:
        Corrupt: the text cannot be split into records; it carries `reason`.
    """
    document: dict[str, Any] = {}
    items: list[bytes] | None = None
    try:
        for member in _pieces(data, b"{}"):
            name, value = _NAME.fullmatch(member).groups()  # type: ignore[union-attr]
            if orjson.loads(name) == "models":
                items = _pieces(value, b"[]")
            else:
                document |= _loads(b"{" + member + b"}")
        orjson.dumps(document)
    except (ValueError, AttributeError, orjson.JSONEncodeError):
        items = None
    if items is None:
        raise reason if isinstance(reason, Corrupt) else Corrupt(str(reason))
    records: dict[str, ModelRecord] = {}
    extras: dict[str, dict[str, Any]] = {}
    order: list[str | Unreadable] = []
    for item in items:
        raw = None
        try:
            raw = _loads(item)
            # Encoded at its depth in the document: the encoder limits depth, and refuses lone surrogates.
            orjson.dumps({"models": [raw]})
            order.append(_take(raw, default_date, records, extras).model_id)
        except orjson.JSONDecodeError as error:
            order.append(Unreadable(item, _id_of(raw, item), f"not JSON: {error}"))
        except (Corrupt, orjson.JSONEncodeError) as error:
            order.append(Unreadable(item, _id_of(raw, item), str(error)))
    kept = tuple(order) if len(order) > len(records) else ()
    return _content(document, records, extras, kept)


_NAME = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:(.*)', re.DOTALL)
_PART = re.compile(rb'"(?:[^"\\]|\\.)*"|[][{},]', re.DOTALL)
_ID = re.compile(rb'"model_id"\s*:\s*("(?:[^"\\]|\\.)*")', re.DOTALL)


def _pieces(data: bytes, brackets: bytes) -> list[bytes]:
    """Splits a JSON object or list at its commas, by counting brackets only. Raises ValueError."""
    data = data.strip()
    if data[:1] != brackets[:1] or data[-1:] != brackets[1:]:
        raise ValueError
    pieces, depth, start = [], 0, 1
    for part in _PART.finditer(data):
        mark = part[0]
        depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
        ends = depth == 0
        if ends and part.end() != len(data):
            raise ValueError
        if ends or (depth == 1 and mark == b","):
            pieces.append(data[start : part.start()].strip())
            start = part.end()
    if depth:
        raise ValueError
    return [piece for piece in pieces if piece]


_LONG = re.compile(rb"[0-9]{19}")


def _loads(data: bytes) -> Any:
    """Parses JSON and keeps large integers in unknown fields exact: orjson makes floats of more than 64 bits.

    Raises:
        orjson.JSONDecodeError: the data is not JSON.
    """
    value = orjson.loads(data)
    if not _LONG.search(data):
        return value
    try:
        exact = json.loads(data)
    except (ValueError, RecursionError):  # more digits, or deeper, than Python reads
        return value
    if isinstance(value, dict) and isinstance(value.get("models"), list):
        models = [_exactly(*pair) for pair in zip(value["models"], exact["models"], strict=True)]
        return {**_exactly(value, exact), "models": models}
    return _exactly(value, exact)


def _exactly(raw: Any, exact: Any) -> Any:
    """The object `raw` that orjson read, with its unknown fields taken from `exact`."""
    if not isinstance(raw, dict):
        return raw
    return {name: value if name in FIELDS else _writable(exact[name]) for name, value in raw.items()}


def _writable(value: Any) -> Any:
    """The value with integers of more than 64 bits as fragments, since orjson does not write them."""
    if isinstance(value, dict):
        return {name: _writable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_writable(each) for each in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return orjson.Fragment(str(value))
    return value


def _id_of(raw: Any, item: bytes) -> str | None:
    """The id of an unreadable record, None where none is found."""
    if raw is None:
        found = _ID.search(item)
        try:
            raw = {"model_id": found and orjson.loads(found[1])}
        except orjson.JSONDecodeError:
            return None
    model_id = raw.get("model_id") if isinstance(raw, dict) else None
    return model_id if isinstance(model_id, str) else None


def encode(content: RegistryContent) -> bytes:
    """Encodes the content as the file's bytes: indented JSON in UTF-8, unreadable records unchanged.

    Raises:
        orjson.JSONEncodeError: a value cannot be written.
    """
    document = {
        "models": [*_entries(content)],
        "last_updated": content.last_updated,
        "count": len(content.order or content.records),
        **content.file_extras,
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _entries(content: RegistryContent) -> Iterator[Any]:
    extras = content.record_extras
    for entry in content.order or content.records:
        if isinstance(entry, Unreadable):
            yield orjson.Fragment(entry.data)
        elif entry in extras:
            yield {**content.records[entry].to_dict(), **extras[entry]}
        else:
            yield content.records[entry].to_dict()


def stored_value(name: str, value: Any) -> Any:
    """Copies `value` as it would be read back from the file, and checks it. Raises InvalidRequest."""
    if isinstance(value, Mapping):
        value = dict(value)
    try:
        json.dumps(value, allow_nan=False)  # orjson would write NaN and infinity as null
        # Encoded at its depth in the document: the encoder limits depth.
        stored = orjson.loads(orjson.dumps({"models": [{name: value}]}))["models"][0][name]
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"Invalid value for field '{name}': it cannot be written as JSON", name) from error
    accepts, rule = FIELDS[name]
    if not accepts(stored):
        raise InvalidRequest(f"Invalid value for field '{name}': not {rule}", name)
    return stored


def same_json(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON: 1, 1.0 and true differ, the order of an object's members does not count."""
    try:
        return orjson.dumps(one, option=orjson.OPT_SORT_KEYS) == orjson.dumps(other, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:
        return False
