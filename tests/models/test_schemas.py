"""Schemas as generators and people write them: each is said such that answers fit it, or refused by name."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema
import pydantic
import pytest
from causal_models import build, serve
from tiny_tokenizers import TEXT, byte_level

from huggingface.forms.compiler import Compiler, Refused
from huggingface.forms.json_schema import closed
from huggingface.forms.keywords import negated
from huggingface.types import Constraint, GenerationRequest

SNOWFLAKE = 1234567890123456789
OLD_DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
PASSWORD = r"^(?=.*[A-Z])(?=.*[0-9])[A-Za-z0-9]{4,8}$"
ZODS_DURATION = r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$"


class Color(Enum):
    """Values of several types."""

    RED = "r"
    ONE = 1


class Node(pydantic.BaseModel):
    """A model that holds itself."""

    value: bool
    next: Node | None = None


class Cat(pydantic.BaseModel):
    """One of two kinds."""

    kind: Literal["cat"]
    lives: Annotated[int, pydantic.Field(ge=0, le=9)]


class Dog(pydantic.BaseModel):
    """The other."""

    kind: Literal["dog"]
    good: bool


class Pets(pydantic.BaseModel):
    """Told apart by a field."""

    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]


TYPES: list[Any] = [
    *(
        Decimal,
        UUID,
        date,
        datetime,
        Color,
        Node,
        Pets,
        bytes,
        float,
        None,
        tuple[int, bool],
        list[Literal["a", 1, None]],
    ),
    *(set[Literal["a", "b", "c"]], set[bool], frozenset[Color], dict[UUID, bool], dict[Color, bool], dict[int, bool]),
    Annotated[Decimal, pydantic.Field(max_digits=5, decimal_places=2)],
    Annotated[int, pydantic.Field(ge=-(2**63), le=2**63 - 1)],
    Annotated[int, pydantic.Field(ge=0, le=2**64 - 1)],
]


class Stall(pydantic.BaseModel):
    """Sets beside a list that may repeat."""

    fruits: set[str]
    prices: Annotated[frozenset[int], pydantic.Field(min_length=3)]
    seen: list[bool]


class Point(pydantic.BaseModel, frozen=True):
    """What ends with one of few values."""

    x: int
    side: Literal["left", "right"]


SETS: list[Any] = [
    *(set[str], set[int], frozenset[str], frozenset[float], set[Decimal], set[UUID], set[date], set[Any]),
    *(list[set[int]], dict[str, set[int]], set[str] | None, set[int | str], set[tuple[int, bool]], set[Point]),
    *(list[Stall], set[frozenset[bool]], set[Literal["a", "ab", "abc", "b", 1, 10, True, None]]),
    Annotated[set[Literal["a", "ab", "abc", "b", 1, 10, True, None]], pydantic.Field(min_length=8)],
    Annotated[set[int], pydantic.Field(min_length=3, max_length=5)],
    set[Annotated[int, pydantic.Field(ge=8, le=12)]],
    Annotated[set[Annotated[str, pydantic.Field(max_length=1)]], pydantic.Field(min_length=4)],
    set[Annotated[str, pydantic.Field(pattern="^[ab]{1,2}$")]],
]
A = {"properties": {"k": {"const": "a"}}, "required": ["k"]}
SCHEMAS: list[Any] = [
    {"anyOf": [{"type": "number"}, {"type": "string", "pattern": OLD_DECIMAL}]},
    {"type": "string", "pattern": OLD_DECIMAL},
    {"type": "string", "pattern": PASSWORD},
    {"type": "string", "pattern": ZODS_DURATION},
    {"type": "object", "properties": {"a": {"not": {}}, "b": {"type": "null"}}},
    {"type": "object", "properties": {"a": {"not": {"const": "x", "type": "string"}}}, "required": ["a"]},
    {"type": "string", "enum": ["a", "b"], "not": {"const": "a"}},
    {"type": "boolean", "not": {"enum": [True]}},
    {
        "type": "object",
        "properties": {"k": {"enum": ["a", "b"]}},
        "required": ["k"],
        "if": A,
        "then": {"required": ["x"]},
    },
    {
        "type": "object",
        "properties": {"k": {"enum": ["a", "b"]}, "x": {"type": "null"}, "y": {"type": "boolean"}},
        "required": ["k"],
        "if": A,
        "then": {"required": ["x"]},
        "else": {"required": ["y"]},
    },
    {"type": "object", "properties": {"a": {}, "b": {"type": "null"}}, "dependentRequired": {"a": ["b"]}},
    {"type": "object", "propertyNames": {"pattern": "^[a-c]{1,3}$"}, "additionalProperties": {"type": "null"}},
    {"type": "object", "propertyNames": {"maxLength": 3}, "additionalProperties": {"type": "null"}, "maxProperties": 2},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 1, "uniqueItems": True},
    {"properties": {"k": {"type": "null"}}, "required": ["k"], "type": "object", "anyOf": [{"properties": {"x": {}}}]},
    {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 7},
    {"type": "integer", "exclusiveMinimum": 2**53 + 1, "exclusiveMaximum": 2**53 + 7},
    {"enum": [2**60, -(2**60), 0.1, 123.5, 1e22]},
]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    """One for a tokenizer of bytes and some words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level(folder, ["<end>"], lambda _: None)
    made = Compiler((folder / "tokenizer.json").read_text("utf-8"), 512, [0])
    made.vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]  # type: ignore[attr-defined]
    yield made
    made.close()


def write(compiler: Compiler, schema: Any, seed: int) -> Any:
    """A value drawn at random among those that the schema's form allows, with a liking for ends."""
    draw = random.Random(seed)
    texts = {number: text.replace("Ġ", " ") for text, number in compiler.vocabulary.items()}  # type: ignore[attr-defined]
    form, text = compiler.open("json_schema", schema), ""
    for _ in range(2000):
        state = form.state()
        assert not state.error, text
        allowed = [
            n for n, t in texts.items() if state.mask and state.mask[n >> 3] >> (n & 7) & 1 and n and t.isascii()
        ]
        if state.stopped or (state.accepting and (not allowed or draw.random() < 0.5)):
            form.close()
            return json.loads(text)
        ends = [n for n in allowed if texts[n] in ('"', "}", "]", '",')]
        token = draw.choice(ends if ends and draw.random() < 0.5 else allowed)
        text += texts[token]
        form.take(token)
    raise AssertionError(text)


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_what_is_said_otherwise_is_what_is_meant(compiler: Compiler, schema: Any) -> None:
    for seed in range(6):
        jsonschema.Draft202012Validator(schema).validate(write(compiler, schema, seed))


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_pydantics_types_are_written_as_pydantic_reads_them(compiler: Compiler, kind: Any) -> None:
    adapter = pydantic.TypeAdapter(kind)
    for mode in ("validation", "serialization"):
        schema = adapter.json_schema(mode=mode)  # type: ignore[arg-type]
        for seed in range(3):
            jsonschema.Draft202012Validator(schema).validate(write(compiler, schema, seed))


@pytest.mark.parametrize("kind", SETS, ids=str)
def test_a_set_never_has_the_same_item_twice(compiler: Compiler, kind: Any) -> None:
    """Whatever its items are, wherever it stands, and also where all of few values are in it already."""
    schema = pydantic.TypeAdapter(kind).json_schema()
    for seed in range(8):
        jsonschema.Draft202012Validator(schema).validate(write(compiler, schema, seed))


UNIQUE: Any = {"type": "array", "uniqueItems": True, "minItems": 2, "maxItems": 4}


@pytest.mark.parametrize(
    "schema",
    [
        UNIQUE,
        {**UNIQUE, "items": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}},
        {**UNIQUE, "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {**UNIQUE, "minItems": 0, "items": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}},
        },
        {"patternProperties": {"^[ab]$": UNIQUE}, "additionalProperties": False, "type": "object"},
        {"type": "array", "prefixItems": [{"type": "null"}, {**UNIQUE, "items": {"enum": [0, 0.5, 1, 1.5, 2]}}]},
        {"allOf": [{"type": "array", "items": {"type": "integer"}}, {"uniqueItems": True, "minItems": 3}]},
    ],
    ids=str,
)
def test_items_differ_wherever_a_schema_says_so(compiler: Compiler, schema: Any) -> None:
    for seed in range(8):
        jsonschema.Draft202012Validator(schema).validate(write(compiler, schema, seed))


def test_a_model_that_draws_wildly_writes_sets() -> None:
    """Two rows of one prompt, each with its own items."""
    model, tokenizer = build("llama")
    loaded = serve("llama", model, tokenizer, "torch")
    text = {"type": "string", "pattern": "^[a-c]$"}
    properties = {"few": {**UNIQUE, "items": text, "maxItems": 3}, "more": {**UNIQUE, "items": {"enum": [*range(12)]}}}
    schema = {"type": "object", "properties": properties, "required": ["few", "more"]}
    form = Constraint("json_schema", schema)
    parameters = {"do_sample": True, "temperature": 50.0, "max_new_tokens": 100, "num_return_sequences": 2}
    try:
        for seed in range(2):
            asked = GenerationRequest({**parameters, "seed": seed}, TEXT[:40], constraint=form)
            chunks = list(loaded.generate(asked))
            texts = [chunk.whole for chunk in chunks if chunk.whole]
            assert len(texts) == 2
            for each in texts:
                jsonschema.Draft202012Validator(schema).validate(json.loads(each))
    finally:
        loaded.close()


def test_other_lists_beside_a_set_may_repeat(compiler: Compiler) -> None:
    """A list is held to it only where the schema says so."""
    repeated = {"type": "array", "items": {"const": 1}, "minItems": 3}
    properties = {"list": repeated, "set": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}
    schema = {"type": "object", "properties": properties, "required": ["list", "set"]}
    assert write(compiler, schema, 1)["list"][:3] == [1, 1, 1]


def test_a_set_of_more_items_than_there_are_ends_with_the_reason(compiler: Compiler) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2, 3, 4, 5]}, "uniqueItems": True, "minItems": 6}
    form, vocabulary = compiler.open("json_schema", schema), compiler.vocabulary  # type: ignore[attr-defined]
    while not form.state().error:
        form.take(next(n for n in vocabulary.values() if form.state().mask[n >> 3] >> (n & 7) & 1))
    assert "uniqueItems" in form.state().error


def test_unique_items_that_cannot_be_followed_are_refused_by_name(compiler: Compiler) -> None:
    """Behind an address of its own, and where others do the opposite."""
    items = {"$id": "https://example.org/item", "type": "string"}
    with pytest.raises(Refused, match="uniqueItems"):
        compiler.open("json_schema", {"type": "array", "items": items, "uniqueItems": True})
    with pytest.raises(Refused, match="not"):
        compiler.open("json_schema", {"type": "array", "not": {"uniqueItems": True}})


def test_of_a_union_those_branches_count_that_can_be_compiled(compiler: Compiler) -> None:
    """And where none can be, the reason is told."""
    odd = {"type": "string", "pattern": "a(?!b)c"}
    schema = {
        "type": "array",
        "items": {"$ref": "#/$defs/a"},
        "minItems": 2,
        "$defs": {"a": {"anyOf": [odd, {"const": 1}]}},
    }
    assert set(write(compiler, schema, 1)) == {1}
    with pytest.raises(Refused, match="look-ahead"):
        compiler.open("json_schema", {"anyOf": [odd, odd]})


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"const": SNOWFLAKE}, str(SNOWFLAKE)),
        ({"type": "object", "properties": {"id": {"type": "integer", "enum": [1, SNOWFLAKE]}}}, str(SNOWFLAKE)),
        ({"const": [{"a": 2**53 + 1}]}, str(2**53 + 1)),
        ({"enum": [2**64]}, str(2**64)),
        ({"const": 123456789.12345679}, "123456789.12345679"),
        ({"type": "integer", "minimum": SNOWFLAKE, "maximum": SNOWFLAKE}, str(SNOWFLAKE)),
        ({"type": "integer", "minimum": 2**64}, str(2**64)),
        ({"type": "integer", "maximum": -(2**64)}, str(2**64)),
    ],
)
def test_a_number_that_would_be_written_as_another_is_refused_by_name(
    compiler: Compiler, schema: Any, said: str
) -> None:
    """Forms know numbers as floats of 64 bits; as texts they are exact."""
    with pytest.raises(Refused, match=said):
        compiler.open("json_schema", schema)


@pytest.mark.parametrize("word", ["contains", "not", "if", "propertyNames", "unevaluatedProperties"])
def test_what_cannot_be_said_otherwise_is_refused_by_its_name(compiler: Compiler, word: str) -> None:
    odd: Any = {"pattern": "^a{3}$", "minLength": 2}
    schema = {"not": odd, "if": odd, "contains": odd, "propertyNames": odd}.get(word, False)
    with pytest.raises(Refused, match=word):
        compiler.open("json_schema", {word: schema, "then": False, "items": {"type": "string"}})


VALUES: list[Any] = [
    *(None, True, False, 0, 1, 1.5, "", "a", "ab", "b", 'x"]^', [], [1], {}, {"a": 1}, {"a": "a"}, {"a": "b", "b": 1}),
    *({"k": "a"}, {"k": "a", "x": 1}, {"k": "b"}, {"k": "b", "y": 2}),
]


@pytest.mark.parametrize(
    "schema",
    [
        *({}, {"type": "string"}, {"type": ["string", "null"]}, {"type": "number"}, {"const": "ab"}, {"const": ""}),
        *(
            {"enum": ["a", "ab", None]},
            {"const": True},
            {"enum": [True, False]},
            {"const": 'x"]^'},
            {"required": ["a"]},
        ),
        *(A, {**A, "type": "object"}, {"properties": {"a": {}}}, {"properties": {"a": True}, "required": ["a", "b"]}),
        *({"anyOf": [{"type": "string"}, {"const": None}]}, {"allOf": [{"type": "string"}, {"const": "a"}]}),
        {"not": {"type": "string"}},
    ],
    ids=str,
)
def test_the_opposite_of_a_schema_is_satisfied_by_everything_else(schema: Any) -> None:
    for value in VALUES:
        fits = jsonschema.Draft202012Validator(schema).is_valid(value)
        assert jsonschema.Draft202012Validator(negated(schema)).is_valid(value) != fits, value


def test_older_words_for_bounds_and_nulls_are_understood() -> None:
    """Draft 4's and OpenAPI 3.0's."""
    assert closed({"minimum": 1, "exclusiveMinimum": True}) == {"exclusiveMinimum": 1}
    assert closed({"maximum": 1, "exclusiveMaximum": False}) == {"maximum": 1}
    assert closed({"type": "string", "nullable": True}) == {"type": ["string", "null"]}
