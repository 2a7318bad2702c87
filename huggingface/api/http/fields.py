"""The base class of bodies: it accepts nulls and fields without effect, and refuses or ignores unknown fields.

Every body and every part of one is a `Fields`. A null counts as a missing field, and 3.0 as a whole number. A field
that is accepted without effect is named in the response header `X-Local-LLM-Ignored`, and once in the log. Unknown
fields are refused, except in parts that a program sends back (messages, their parts, tools, past calls), and where the
server's setting accepts them. Serves any request thread. Must not know models or the meaning of any field.
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
_LOGGED = "local-llm-ignored"  # among the app's extensions: the names that were logged
_MAX_NAMES = 32  # in the header of one response
_MAX_LOGGED = 1000

UnknownParameters = Literal["refuse", "ignore"]


def _fail_fast(schema: Any, own: type) -> None:
    """Makes validation of lists and objects within a schema of `own` stop at the first wrong item."""
    if isinstance(schema, dict):
        kind = schema.get("type")
        if kind == "model" and schema["cls"] is not own and hasattr(schema["cls"], "known_names"):
            return  # another `Fields`, whose own schema is done already
        if kind in ("list", "tuple", "set", "frozenset", "dict"):
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part, own)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part, own)


class Fields(BaseModel):
    """A body, or a part of one."""

    nulls: ClassVar[frozenset[str]] = frozenset()  # fields in which null is a value
    empties: ClassVar[frozenset[str]] = frozenset()  # fields that count as missing where they are empty
    lasts: ClassVar[bool] = False  # whether the body is stored or changes the server: unknown fields are always refused
    drops: ClassVar[bool] = False  # whether unknown fields are dropped, as in parts that a program sends back
    place: ClassVar[str] = ""  # the name of this part of a body in the header

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema. A list stops at its first wrong item: errors for a million items would take minutes."""
        schema = handler(source)
        _fail_fast(schema, cls)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _without_what_means_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.known_names()
        takes_any = cls.model_config.get("extra") == "allow"  # the view checks further fields
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
                    kept[name] = item  # pydantic refuses it by its name; one unknown field is enough for the error
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
        """The values without those nulls that count as missing."""
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
        """The names of each field that has several."""
        return [
            [choice for choice in field.validation_alias.choices if isinstance(choice, str)]
            for field in cls.model_fields.values()
            if isinstance(field.validation_alias, AliasChoices)
        ]


def refuse_unknown(field: str, known: Iterable[str]) -> None:
    """Refuses an unknown field, or names it in the header where the server's setting accepts it.

    Raises:
        UnknownField: names the nearest known field.
    """
    if _ignores_unknown():
        note_ignored(field)
        return
    names = list(known)
    raise UnknownField(field, names, nearest_name(field.rpartition(".")[2], names))


def note_ignored(*names: str) -> None:
    """Adds fields that were accepted without effect to the response's header."""
    if has_request_context():
        g.setdefault("ignored", {}).update(dict.fromkeys(names))


def fields_named(title: str) -> frozenset[str]:
    """The field names of the body whose class has the name `title`, as in pydantic's errors; those of an object within
    it as `options.seed`."""
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
    """Makes `app` name ignored fields in its responses; `unknown` says whether unknown parameters are refused."""
    app.config[_SETTING] = unknown
    app.extensions[_LOGGED] = set()

    def tell(response: Response) -> Response:
        ignored = list(g.get("ignored", ()))[:_MAX_NAMES]
        if ignored:
            response.headers[HEADER] = ", ".join(map(_printable, ignored))
            _log(app.extensions[_LOGGED], ignored)
        return response

    app.after_request(tell)


def _log(logged: set[str], ignored: list[str]) -> None:
    new = [_printable(name) for name in ignored if name not in logged]
    if new and len(logged) < _MAX_LOGGED:
        logged.update(ignored)
        logger.info("accepted without effect: %s", ", ".join(new))


def _printable(name: str) -> str:
    """A name with only the characters that a header can carry."""
    return "".join(char if char.isascii() and char.isprintable() and char != "," else "?" for char in name[:80])


def _whole(value: Any) -> Any:
    """Returns an integer for a float without a fraction, since JSON does not distinguish them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _ignores_unknown() -> bool:
    return has_request_context() and current_app.config.get(_SETTING) == "ignore"
