"""What is taken of a body that means nothing here: nulls, and fields that cannot change the answer.

Every body and every part of one is a `Fields`. A null is a field left out, and 3.0 is a whole number. A field that is
taken and makes no difference is named in the response header `X-Local-LLM-Ignored`, and once in the log. Unknown
fields are refused, except within what a program replays (messages, their parts, tools, past calls), and where the
server is set to take them. Serves any request thread. Must not know models or what any field means.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args

from flask import Flask, Response, current_app, g, has_request_context
from pydantic import AliasChoices, BaseModel, GetCoreSchemaHandler, ValidationInfo, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from ...errors import UnknownField
from .validation import nearest_name

logger = logging.getLogger(__name__)

HEADER = "X-Local-LLM-Ignored"
_SETTING = "UNKNOWN_PARAMETERS"  # in the app's config
_LOGGED = "local-llm-ignored"  # among the app's extensions: the names that the log has
_MOST_NAMES = 32  # of one request
_MOST_LOGGED = 1000

UnknownParameters = Literal["refuse", "ignore"]


def _fail_fast(schema: Any, own: type) -> None:
    """Have lists and objects within a schema of `own` end with their first wrong item."""
    if isinstance(schema, dict):
        kind = schema.get("type")
        if kind == "model" and schema["cls"] is not own and hasattr(schema["cls"], "known_names"):
            return  # another `Fields`, and so done already
        if kind in ("list", "tuple", "set", "frozenset", "dict"):
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part, own)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part, own)


class Fields(BaseModel):
    """Some of a body."""

    nulls: ClassVar[frozenset[str]] = frozenset()  # the fields in which null is a value
    empties: ClassVar[frozenset[str]] = frozenset()  # the fields that are left out where they are empty
    lasts: ClassVar[bool] = False  # whether it is kept or changes the server: unknown fields are refused in any case
    drops: ClassVar[bool] = False  # whether unknown fields are dropped, as in what a program replays
    place: ClassVar[str] = ""  # what the header calls this part of a body

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema. A list ends with its first wrong item: to complain of each of a million would take minutes."""
        schema = handler(source)
        _fail_fast(schema, cls)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _without_what_means_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.known_names()
        takes_any = cls.model_config.get("extra") == "allow"  # what further fields mean is looked at later
        context = info.context or {}
        ignores = cls.drops or not (cls.lasts or context.get("lasts") or not _ignores_unknown())
        before = context.get("prefix", "") or (f"{cls.place}." if cls.place else "")
        kept = {}
        refused = False
        for name, item in value.items():
            if name in known:
                if (item is not None or name in cls.nulls) and not (name in cls.empties and item in ("", [])):
                    kept[name] = _whole(item)
            elif takes_any:
                kept[name] = item
            elif item is not None:
                if ignores:
                    note_ignored(f"{before}{name}")
                elif not refused:
                    kept[name] = item  # which is refused, by its name; further ones would each be a complaint
                    refused = True
        for names in cls._other_names():
            first, *others = [name for name in names if name in kept] or [""]
            for name in others:
                if kept.pop(name) != kept[first]:
                    raise PydanticCustomError(
                        "rule", "{reason}", {"field": name, "reason": f"is not that of '{first}', which means the same"}
                    )
        return kept

    @classmethod
    def given(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values without nulls that are none."""
        return {name: value for name, value in values.items() if value is not None or name in cls.nulls}

    @classmethod
    def known_names(cls) -> frozenset[str]:
        """The names under which a body may give its fields."""
        names = {
            field.alias or name
            for name, field in cls.model_fields.items()
            if not isinstance(field.validation_alias, AliasChoices)
        }
        return frozenset(names.union(*cls._other_names()))

    @classmethod
    def _other_names(cls) -> list[list[str]]:
        """The names of each field that may be given under any of several."""
        return [
            [choice for choice in field.validation_alias.choices if isinstance(choice, str)]
            for field in cls.model_fields.values()
            if isinstance(field.validation_alias, AliasChoices)
        ]


def refuse_unknown(field: str, known: Iterable[str]) -> None:
    """Refuse a field that is none of those known, or name it in the header where the server is set to take it.

    Raises:
        UnknownField: with the nearest name of those known.
    """
    if _ignores_unknown():
        note_ignored(field)
        return
    names = list(known)
    raise UnknownField(field, names, nearest_name(field.rpartition(".")[2], names))


def note_ignored(*names: str) -> None:
    """Have the answer's header name fields that were taken and make no difference."""
    if has_request_context():
        g.setdefault("ignored", {}).update(dict.fromkeys(names))


def fields_named(title: str) -> frozenset[str]:
    """The names that the body of this class takes, those of an object within it as `options.seed`: pydantic's errors
    tell the class by its name."""
    kinds: list[type[Fields]] = [Fields]
    for kind in kinds:
        if kind.__name__ == title:
            return kind.known_names() | frozenset(_inner_names(kind))
        kinds.extend(kind.__subclasses__())
    return frozenset()


def _inner_names(kind: type[Fields]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Fields):
                yield from (f"{field.alias or name}.{each}" for each in inner.known_names())


def init_ignored(app: Flask, unknown: UnknownParameters) -> None:
    """Tell clients of `app` what was ignored of their requests; `unknown` says what becomes of unknown parameters."""
    app.config[_SETTING] = unknown
    app.extensions[_LOGGED] = set()

    def tell(response: Response) -> Response:
        ignored = list(g.get("ignored", ()))[:_MOST_NAMES]
        if ignored:
            response.headers[HEADER] = ", ".join(map(_printable, ignored))
            _log(app.extensions[_LOGGED], ignored)
        return response

    app.after_request(tell)


def _log(logged: set[str], ignored: list[str]) -> None:
    new = [_printable(name) for name in ignored if name not in logged]
    if new and len(logged) < _MOST_LOGGED:
        logged.update(ignored)
        logger.info("taken without effect: %s", ", ".join(new))


def _printable(name: str) -> str:
    """A name as a header can carry it."""
    return "".join(char if char.isascii() and char.isprintable() and char != "," else "?" for char in name[:80])


def _whole(value: Any) -> Any:
    """A whole number as such, however it is written: JSON has no other kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _ignores_unknown() -> bool:
    return has_request_context() and current_app.config.get(_SETTING) == "ignore"
