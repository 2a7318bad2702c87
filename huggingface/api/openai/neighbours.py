"""Fields of vLLM, llama.cpp, Ollama and LM Studio that OpenAI does not have, and this server's names for them.

One table for parameters, and one for constraints of the text. A base class of the bodies that generate text; must not
know models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ...types import Constraint
from .hints import Hinted, hint
from .parts import Part, TokenIds, refuse

# Another server's name, and this server's for the same.
SAME: Mapping[str, str] = MappingProxyType(
    {"min_tokens": "min_new_tokens", "repeat_penalty": "repetition_penalty", "typ_p": "typical_p"}
)

# llama.cpp's and Ollama's names for the limit of new tokens, where -1 means no limit.
LIMITS = ("n_predict", "num_predict")

Kind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]

# The fields that constrain the text, and their kinds of constraint.
FORMS: Mapping[str, Kind] = MappingProxyType(
    {
        "guided_json": "json_schema",
        "guided_regex": "regex",
        "guided_choice": "choice",
        "guided_grammar": "grammar",
        "json_schema": "json_schema",
        "grammar": "grammar",
    }
)

Some = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Some], Field(min_length=1)]


def schema_of(value: Any, field: str) -> Any:
    """Returns a JSON schema, which may be given as JSON text.

    Raises:
        PydanticCustomError: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise refuse(field, "must be a JSON schema") from None


class StructuredOutputs(Hinted):
    """vLLM's constraint of the text: exactly one of these fields."""

    place = "structured_outputs"

    json_: dict[str, Any] | Some | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: Some | None = None
    choice: Choices | None = None
    grammar: Some | None = None
    disable_fallback: bool | None = hint()

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self._given()) != 1:
            raise refuse("", "must have one of json, json_object, regex, choice, grammar")
        self.form()
        return self

    def _given(self) -> dict[Kind, Any]:
        kinds: dict[Kind, Any] = {"json_schema": self.json_, "json_object": self.json_object, "regex": self.regex}
        kinds |= {"choice": self.choice, "grammar": self.grammar}
        return {kind: value for kind, value in kinds.items() if value is not None}

    def form(self) -> Constraint:
        """The constraint that the field sets."""
        [(kind, value)] = self._given().items()
        if kind == "json_schema":
            value = schema_of(value, "json")
        return Constraint(kind, None if kind == "json_object" else value)


class Neighbours(Part):
    """Fields of other servers."""

    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="The same as min_new_tokens.")
    repeat_penalty: float | None = Field(None, gt=0, description="The same as repetition_penalty.")
    typ_p: float | None = Field(None, gt=0, le=1, description="The same as typical_p.")
    n_predict: int | None = Field(None, ge=-2, le=2**31 - 1, description="Most new tokens; -1 is no limit.")
    num_predict: int | None = Field(None, ge=-2, le=2**31 - 1, description="Most new tokens; -1 is no limit.")
    stop_token_ids: TokenIds | None = Field(None, description="Tokens that end the text besides the model's own.")
    ignore_eos: bool | None = Field(None, description="Continue after the end-of-text token.")
    guided_json: dict[str, Any] | Some | None = Field(None, description="JSON schema of the text.")
    guided_regex: Some | None = Field(None, description="Regular expression that the whole text matches.")
    guided_choice: Choices | None = Field(None, description="The text is one of these.")
    guided_grammar: Some | None = Field(None, description="Grammar of the text: GBNF, or llguidance's Lark.")
    json_schema: dict[str, Any] | None = Field(None, description="JSON schema of the text.")
    grammar: Some | None = Field(None, description="Grammar of the text: GBNF, or llguidance's Lark.")
    structured_outputs: StructuredOutputs | None = Field(None, description="Constraint of the text, in vLLM's form.")

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        for name, own in SAME.items():
            given, value = getattr(self, name), getattr(self, own, None)
            if given is not None and value not in (None, given):
                raise refuse(name, f"says something else than {own}")
        fields = self.form_fields()
        if len(fields) > 1:
            raise refuse(fields[1], f"cannot be given together with {fields[0]}")
        schema_of(self.guided_json, "guided_json")
        return self

    def form_fields(self) -> list[str]:
        """The given fields that constrain the text."""
        return [name for name in (*FORMS, "structured_outputs") if getattr(self, name) is not None]

    def form(self) -> tuple[Constraint, str] | None:
        """The constraint of the text, and the field that sets it; None without one."""
        for name in self.form_fields():
            value = getattr(self, name)
            if isinstance(value, StructuredOutputs):
                return value.form(), name
            return Constraint(FORMS[name], schema_of(value, name) if FORMS[name] == "json_schema" else value), name
        return None

    def renamed(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The parameters given under another server's name, and a map from this server's names to those."""
        given = {name: value for name in SAME if (value := getattr(self, name)) is not None}
        return {SAME[name]: value for name, value in given.items()}, {SAME[name]: name for name in given}

    def limit(self, names: tuple[str, ...]) -> tuple[int | None, str]:
        """The limit of new tokens by `names` or other servers' names, and the field that sets it; below 0 is no limit.

        Raises:
            PydanticCustomError: two fields set different limits.
        """
        given = {name: value for name in (*names, *LIMITS) if (value := getattr(self, name, None)) is not None}
        if not given:
            return None, names[0]
        first, maximum = next(iter(given.items()))
        for name, value in given.items():
            if value != maximum and max(value, maximum) >= 0:
                raise refuse(name, f"says something else than {first}")
        return maximum, first
