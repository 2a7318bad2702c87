"""What every part of OpenAI's bodies is made of: its strictness, its texts, and one of several kinds told by a field.

Nothing here works on a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from ..http.fields import Fields, note_ignored

Text = Annotated[str, Field(min_length=0)]  # a bare `str` would let through text that has no UTF-8 form
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class Part(Fields):
    """Some of a body."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)


class Replayed(Part):
    """What a program sends back as it got it, from here or elsewhere: unknown fields are dropped."""

    drops = True
    place = "messages"


class Elsewhere(Part):
    """An item or a tool that only means something at another provider; it is left out, and named by its kind."""

    model_config = ConfigDict(extra="allow")

    type: Text

    def note(self, place: str) -> None:
        """Name it in the header, as of that place."""
        note_ignored(f"{place}.{self.type}")


_ELSEWHERE = "elsewhere"  # what they are called among the kinds


def refuse(field: str, reason: str) -> PydanticCustomError:
    """An error of a rule over several fields."""
    return PydanticCustomError("rule", "{reason}", {"field": field, "reason": reason})


def of_an_object(parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """See that the schema of a function's arguments is one of an object.

    Raises:
        ValueError: it is not.
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
    """One of several models, told apart by a field; one that is none of them is refused by that field's name.

    `default` is the kind of those that lack the field. Kinds that match `others` are an `Elsewhere`.
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
        member: Any = Annotated[model, Tag(f"[{kind}]")]  # the brackets keep it out of what a complaint calls the field
        members = member if members is None else members | member
    if len(kinds) == 1:
        return Annotated[next(iter(kinds.values())), BeforeValidator(check)]
    return Annotated[members, Discriminator(lambda value: f"[{kind_of(value)}]"), BeforeValidator(check)]
