"""What is taken of a body that means nothing here: nulls, and fields that cannot change the answer.

Every body and every part of one is a `Fields`. A null is a field left out. A field that is taken and makes no
difference is named in the response header `X-Local-LLM-Ignored`, and once in the log. Unknown fields are refused,
except within what a program replays (messages, their parts, tools, past calls), and where the server is set to take
them. Serves any request thread. Must not know models or what any field means.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, get_args

from flask import Flask, Response, current_app, g, has_request_context
from pydantic import BaseModel, model_validator

logger = logging.getLogger(__name__)

HEADER = "X-Local-LLM-Ignored"
_SETTING = "UNKNOWN_PARAMETERS"  # in the app's config
_LOGGED = "local-llm-ignored"  # among the app's extensions: the names that the log has
_MOST_NAMES = 32  # in a header
_MOST_LOGGED = 1000

UnknownParameters = Literal["refuse", "ignore"]


class Fields(BaseModel):
    """Some of a body."""

    nulls: ClassVar[frozenset[str]] = frozenset()  # the fields in which null is a value
    drops: ClassVar[bool] = False  # whether unknown fields are dropped, as in what a program replays
    place: ClassVar[str] = ""  # what the header calls this part of a body

    @model_validator(mode="before")
    @classmethod
    def _without_what_means_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.known_names()
        ignores = cls.drops or _ignores_unknown()
        kept = {}
        for name, item in value.items():
            if name in known:
                if item is not None or name in cls.nulls:
                    kept[name] = item
            elif item is not None:
                if ignores:
                    note_ignored(f"{cls.place}.{name}" if cls.place else name)
                else:
                    kept[name] = item  # which is refused, by its name
        return kept

    @classmethod
    def known_names(cls) -> frozenset[str]:
        """The names under which a body may give its fields."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())


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
        ignored: dict[str, None] = g.get("ignored", {})
        if ignored:
            response.headers[HEADER] = ", ".join(map(_printable, list(ignored)[:_MOST_NAMES]))
            _log(app.extensions[_LOGGED], ignored)
        return response

    app.after_request(tell)


def _log(logged: set[str], ignored: dict[str, None]) -> None:
    new = [_printable(name) for name in ignored if name not in logged]
    if new and len(logged) < _MOST_LOGGED:
        logged.update(ignored)
        logger.info("taken without effect: %s", ", ".join(new))


def _printable(name: str) -> str:
    """A name as a header can carry it."""
    return "".join(char if char.isascii() and char.isprintable() and char != "," else "?" for char in name[:80])


def _ignores_unknown() -> bool:
    return has_request_context() and current_app.config.get(_SETTING) == "ignore"
