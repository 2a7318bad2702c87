"""Building blocks of OpenAI's bodies: base classes, types of text, and unions that a field tells apart.

Must not know models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from ..http.fields import Fields, note_ignored

Text = Annotated[str, Field(min_length=0)]  # a bare `str` would accept text without a UTF-8 form
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class Part(Fields):
    """A body, or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)


class Replayed(Part):
    """A part that a program sends back as it received it, from this server or another: unknown fields are dropped."""

    drops = True
    place = "messages"


class Elsewhere(Part):
    """An item or a tool for another provider only; it is left out, and named by its kind."""

    model_config = ConfigDict(extra="allow")

    type: Text

    def note(self, place: str) -> None:
        """Names the part in the header, as ignored at `place`."""
        note_ignored(f"{place}.{self.type}")


_ELSEWHERE = "elsewhere"  # their key among the kinds


def refuse(field: str, reason: str) -> PydanticCustomError:
    """The error of a rule over several fields."""
    return PydanticCustomError("rule", "{reason}", {"field": field, "reason": reason})


def of_an_object(parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Checks that the schema of a function's arguments describes an object.

    Raises:
        ValueError: it does not.
    """
    if parameters is not None and parameters.get("type", "object") != "object":
        raise ValueError("must be the schema of an object")
    return parameters


def one_of(
    field: str,
    kinds: Mapping[str, type[BaseModel]],
    reason: str,
    default: str | None = None,
    others: re.Pattern[str] | None = None,
) -> Any:
    """A union of models, told apart by a field; a value of an unknown kind is refused by that field's name.

    `default` is the kind of values without the field. Kinds that match `others` become an `Elsewhere`.
    """
    if others is not None:
        kinds = {**kinds, _ELSEWHERE: Elsewhere}

    def kind_of(value: Any) -> Any:
        kind = value.get(field) if isinstance(value, dict) else getattr(value, field, None)
        if others is not None and isinstance(kind, str) and kind not in kinds and others.fullmatch(kind):
            return _ELSEWHERE
        return default if kind is None else kind

    def check(value: Any) -> Any:
        if not isinstance(value, dict | BaseModel):
            raise PydanticCustomError("rule", "{reason}", {"reason": "must be an object"})
        if isinstance(value, dict) and kind_of(value) not in list(kinds):
            raise refuse(field, reason)
        return value

    members: Any = None
    for kind, model in kinds.items():
        member: Any = Annotated[model, Tag(f"[{kind}]")]  # the brackets keep the tag out of the field's name in errors
        members = member if members is None else members | member
    if len(kinds) == 1:
        return Annotated[next(iter(kinds.values())), BeforeValidator(check)]
    return Annotated[members, Discriminator(lambda value: f"[{kind_of(value)}]"), BeforeValidator(check)]
