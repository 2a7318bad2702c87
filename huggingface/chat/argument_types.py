"""Splits a function's schema into its arguments: their names, their types, and the value that a text stands for.

For the forms that write strings bare and everything else as JSON. Plain values only; any thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Keywords that apply to the arguments together, and not to each of them.
_TOGETHER = (
    *("allOf", "anyOf", "oneOf", "not", "if", "patternProperties", "propertyNames", "minProperties", "maxProperties"),
    *("dependentRequired", "dependentSchemas", "dependencies"),
)
_VALUES = ("const", "enum", "default", "examples")  # keywords whose values are not schemas
_PYTHONS: Mapping[str, Any] = {"True": True, "False": False, "None": None}
TEXT = frozenset({"string"})
_MAX_STEPS = 32  # references followed in a row; more are a cycle


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument: its name, its schema, and whether it is required."""

    name: str
    schema: Any
    required: bool


def arguments_of(parameters: Mapping[str, Any]) -> tuple[Sequence[Argument], Any]:
    """The named arguments, and the schema of any others (False: no others are allowed).

    Raises:
        ValueError: the schema has a keyword that applies to the arguments together.
    """
    schema = resolved(parameters, parameters)
    if not isinstance(schema, Mapping):
        return [], False
    if said := next((word for word in _TOGETHER if word in schema), None):
        raise ValueError(f"this model writes arguments one by one, which cannot be held to '{said}'")
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise ValueError("properties must be an object, and required a list")
    named = {**properties, **{name: True for name in required if name not in properties}}
    others = False if named else schema.get("additionalProperties", False)
    return [Argument(name, rooted(each, parameters), name in required) for name, each in named.items()], others


def rooted(schema: Any, root: Mapping[str, Any]) -> Any:
    """Returns a part of `root` as a schema of its own, with the definitions that its references need."""
    moved = _moved(schema)
    if not isinstance(moved, dict) or "#/$defs/whole" not in json.dumps(moved):
        return moved
    return {**moved, "$defs": {"whole": _moved(root)}}


def _moved(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_moved(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    result = {name: each if name in _VALUES else _moved(each) for name, each in schema.items()}
    if isinstance(result.get("$ref"), str) and result["$ref"].startswith("#"):
        result["$ref"] = f"#/$defs/whole{result['$ref'][1:]}"
    return result


def resolved(schema: Any, root: Any) -> Any:
    """Follows the schema's reference, if it has one."""
    for _ in range(_MAX_STEPS):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        target: Any = root
        for step in schema["$ref"].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            target = target.get(step) if isinstance(target, Mapping) else None
        rest = {name: value for name, value in schema.items() if name != "$ref"}
        schema = {**target, **rest} if isinstance(target, Mapping) else target
    return {}


def types_of(schema: Any, root: Any, depth: int = 0) -> frozenset[str] | None:
    """The JSON types that a schema allows; None for any."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or depth > _MAX_STEPS:
        return None
    said = schema.get("type")
    if isinstance(said, str):
        return frozenset({said})
    if isinstance(said, list):
        return frozenset(each for each in said if isinstance(each, str))
    if isinstance(schema.get("enum"), list):
        return frozenset(_type_of(each) for each in schema["enum"])
    if "const" in schema:
        return frozenset({_type_of(schema["const"])})
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            several = [types_of(each, root, depth + 1) for each in schema[word]]
            return None if None in several else frozenset().union(*(each for each in several if each is not None))
    if isinstance(schema.get("allOf"), list):
        some = [each for part in schema["allOf"] if (each := types_of(part, root, depth + 1)) is not None]
        return frozenset.intersection(*some) if some else None
    return None


def is_text(schema: Any, root: Any) -> bool:
    """Whether the schema allows only strings."""
    return types_of(schema, root) == TEXT


def meant(text: str, types: frozenset[str] | None) -> Any:
    """The value that `text` stands for where `types` are allowed: JSON of one of the types, or the text itself."""
    told = text.strip()
    try:
        value = _PYTHONS[told] if told in _PYTHONS else json.loads(told, parse_constant=_no_constant, strict=False)
    except (ValueError, RecursionError):
        return text
    if types is None:
        return value
    kind = _type_of(value)
    fits = kind in types or (kind == "integer" and "number" in types)
    fits = fits or (kind == "number" and "integer" in types and float(value).is_integer())
    return value if fits else text


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _type_of(value: Any) -> str:
    kinds: tuple[tuple[type, str], ...] = (
        *((bool, "boolean"), (str, "string"), (int, "integer"), (float, "number"), (list, "array"), (dict, "object")),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")
