"""What the registry's file says: its bytes as records and back, and which values a record may hold.

The format is the document's `models_data`. Fields that a newer version wrote are carried along unseen. Pure functions
on immutable values, for any thread; no file and no lock is touched here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson

from .errors import InvalidModelId, InvalidRequest
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


# field -> (test of its JSON value, the rule in words); for the file and for callers alike, so that what is accepted
# can be read again.
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
    "engine": _or_null(_is_text, "a string"),
    "max_context": _or_null(_is_count, "a whole number above 0"),
    "slots": _or_null(_is_count, "a whole number above 0"),
    "details": _or_null(_is_object, "an object"),
}
REQUIRED_FIELDS = ("model_id", "name", "model_type")


class Corrupt(Exception):
    """The file is there and can be read, but it is no registry; the text says why."""


@dataclass(frozen=True, slots=True)
class Content:
    """What one version of the file says; never changed, so that readers need no lock while they look at it."""

    records: Mapping[str, ModelRecord] = field(default_factory=dict)
    last_updated: str | None = None
    record_extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # fields of newer versions, kept
    file_extras: Mapping[str, Any] = field(default_factory=dict)


def _parse_record(raw: Any, default_date: str) -> tuple[ModelRecord, dict[str, Any]]:
    """A record of the file, and the fields that this version does not know. Raises Corrupt."""
    if not isinstance(raw, dict):
        raise Corrupt("is not an object")
    for name in REQUIRED_FIELDS:
        if name not in raw:
            raise Corrupt(f"has no '{name}'")
    known: dict[str, Any] = {"added_date": default_date}
    extras: dict[str, Any] = {}
    for name, value in raw.items():
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


def parse(data: bytes, mtime: int) -> Content:
    """The content of the file's bytes, last changed at `mtime` (nanoseconds since 1970).

    Raises:
        Corrupt: they are not JSON, or anything in it has the wrong type, or an id is invalid or there twice.
    """
    try:
        document = orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        raise Corrupt(f"not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("models"), list):
        raise Corrupt("not an object with a list 'models'")
    last_updated = document.get("last_updated")
    if not isinstance(last_updated, str | None):
        raise Corrupt("'last_updated' is not a string or null")
    # A record written by hand may lack its date: that of the file serves, the same for whoever reads this version.
    written = datetime.fromtimestamp(mtime / 1e9, UTC).replace(tzinfo=None)
    default_date = written.isoformat(timespec="microseconds")
    records: dict[str, ModelRecord] = {}
    extras: dict[str, dict[str, Any]] = {}
    for index, raw in enumerate(document["models"]):
        try:
            record, unknown = _parse_record(raw, default_date)
            if record.model_id in records:
                raise Corrupt(f"'{record.model_id}' is there twice")
        except Corrupt as error:
            raise Corrupt(f"models[{index}]: {error}") from None
        records[record.model_id] = record
        if unknown:
            extras[record.model_id] = unknown
    others = {name: value for name, value in document.items() if name not in ("models", "last_updated", "count")}
    return Content(records, last_updated, extras, others)


def encode(content: Content) -> bytes:
    """The file's bytes: indented JSON in UTF-8.

    Raises:
        orjson.JSONEncodeError: fields carried along are nested too deep to be written.
    """
    extras = content.record_extras
    document = {
        "models": [
            {**record.to_dict(), **extras[model_id]} if model_id in extras else record.to_dict()
            for model_id, record in content.records.items()
        ],
        "last_updated": content.last_updated,
        "count": len(content.records),
        **content.file_extras,
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def stored_value(name: str, value: Any) -> Any:
    """`value` as the file would give it back, no part shared with the caller. Raises InvalidRequest."""
    if isinstance(value, Mapping):
        value = dict(value)
    try:
        json.dumps(value, allow_nan=False)  # orjson would write NaN and infinity as null
        # As deep in the document as it will stand: the encoder has a limit to depth.
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
