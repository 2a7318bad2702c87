"""Rewrites keywords of JSON Schema that llguidance does not support into equivalent ones that it supports.

Pure functions on plain values; standard library only. A keyword that cannot be rewritten stays, and is refused by name
when the schema is compiled. Source: JSON Schema 2020-12, Validation and Core.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TYPES = ("null", "boolean", "object", "array", "number", "string")
_MAX_STEPS = 32  # references that are followed in a row
_MAX_ORDERED = 4  # values of a set whose orders are all listed
_UUID = "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"
_TIME = r"T(\d+H(\d+M)?(\d+([.,]\d+)?S)?|\d+M(\d+([.,]\d+)?S)?|\d+([.,]\d+)?S)"

# Patterns with look-ahead in the middle that generators write (zod for a duration), and the same without look-ahead.
_SAME: Mapping[str, str] = {
    r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$": (
        rf"^P(\d+W|(\d+Y(\d+M)?(\d+D)?|\d+M(\d+D)?|\d+D)({_TIME})?|{_TIME})$"
    ),
}


def said_otherwise(schema: dict[str, Any], root: Any) -> Any:
    """Rewrites a schema's own keywords where possible; those of its parts stay."""
    result = dict(schema)
    more: list[Any] = []  # further schemas that must be satisfied
    _say_nullable(result)
    _say_old_bounds(result)
    _say_pattern(result, more)
    _say_property_names(result, root)
    _say_unique(result, root)
    _say_conditions(result, more)
    if "not" in result:
        if result["not"] in ({}, True):
            return False
        if not _leave_out(result) and (other := negated(result["not"])) is not None:
            del result["not"]
            more.append(other)
    if not more:
        return result
    return {**result, "allOf": [*result.get("allOf", []), *more]}


def negated(schema: Any) -> Any:
    """The schema that exactly the values which do not satisfy this one satisfy; None where none is known."""
    if isinstance(schema, bool):
        return not schema
    if not isinstance(schema, dict):
        return None
    if not schema:
        return False
    if len(schema) == 1:
        [(word, value)] = schema.items()
        if word == "not":
            return value
        if word in ("anyOf", "allOf") and isinstance(value, list):
            several = [negated(each) for each in value]
            return None if None in several else {"allOf" if word == "anyOf" else "anyOf": several}
    kinds = schema.get("type")
    if schema.keys() <= {"type"}:
        return _others([kinds] if isinstance(kinds, str) else kinds)
    if schema.keys() <= {"type", "const"} or schema.keys() <= {"type", "enum"}:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return _none_of(values)
    if schema.keys() <= {"type", "properties", "required"} and kinds in (None, "object"):
        return _object_negated(schema)
    return None


def _object_negated(schema: dict[str, Any]) -> Any:
    """Negates an object's schema: a required property is missing, or a property has a value that is not allowed."""
    required, properties = schema.get("required", []), schema.get("properties", {})
    if not isinstance(required, list) or not isinstance(properties, dict):
        return None
    ways: list[Any] = [{"type": "object", "properties": {name: False}} for name in required]
    for name, part in properties.items():
        if (other := negated(part)) is None:
            return None
        if other is not False:
            ways.append({"type": "object", "properties": {name: other}, "required": [name]})
    if schema.get("type") == "object":
        ways.append(_others(["object"]))
    return ways[0] if len(ways) == 1 else {"anyOf": ways} if ways else False


def _others(kinds: Any) -> Any:
    """All types except these; None where no keyword says it: numbers that are not integers."""
    if not isinstance(kinds, list) or ("integer" in kinds and "number" not in kinds):
        return None
    return {"type": [kind for kind in _TYPES if kind not in kinds]}


def _none_of(values: Any) -> Any:
    """Everything except these values, which may be strings, true, false and null."""
    if not isinstance(values, list) or not all(value is None or isinstance(value, bool | str) for value in values):
        return None
    left: list[Any] = []
    kinds = {"null" if value is None else "boolean" if isinstance(value, bool) else "string" for value in values}
    left.append(_others(list(kinds)))
    if "boolean" in kinds and (bools := [each for each in (True, False) if not any(each is v for v in values)]):
        left.append({"enum": bools})
    if "string" in kinds:
        patterns = [{"pattern": _other_than(value)} for value in values if isinstance(value, str)]
        left.append({"type": "string", **(patterns[0] if len(patterns) == 1 else {"allOf": patterns})})
    return left[0] if len(left) == 1 else {"anyOf": left}


def _other_than(text: str) -> str:
    """A regular expression for every text except this one."""
    rest = "[\\s\\S]+"
    for letter in reversed(text):
        own = f"\\x{ord(letter):02x}" if ord(letter) < 128 else letter
        rest = f"([^{own}][\\s\\S]*|{own}({rest})|)"
    return f"^({rest})$"


def _leave_out(schema: dict[str, Any]) -> bool:
    """Removes the values named by `not` from `enum`; whether that replaces `not`."""
    other, values = schema["not"], schema.get("enum")
    if not isinstance(values, list) or not isinstance(other, dict) or not other.keys() <= {"const", "enum"}:
        return False
    unwanted = [other["const"]] if "const" in other else other.get("enum", [])
    schema["enum"] = [value for value in values if not any(_equal(value, each) for each in unwanted)]
    del schema["not"]
    return True


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _say_nullable(schema: dict[str, Any]) -> None:
    """Rewrites `nullable`, with which OpenAPI 3.0 allows null too."""
    if schema.get("nullable") is True and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
        if isinstance(schema.get("enum"), list) and None not in schema["enum"]:
            schema["enum"] = [*schema["enum"], None]
        del schema["nullable"]


def _say_old_bounds(schema: dict[str, Any]) -> None:
    """Rewrites boolean exclusive bounds of Draft 4 and OpenAPI 3.0: true excludes the bound itself."""
    for word, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(word), bool) and schema.pop(word) and bound in schema:
            schema[word] = schema.pop(bound)


def _say_pattern(schema: dict[str, Any], more: list[Any]) -> None:
    """Rewrites look-ahead at the beginning of a pattern as separate patterns."""
    pattern = schema.get("pattern")
    if not isinstance(pattern, str) or "(?" not in pattern:
        return
    pattern = _SAME.get(pattern, pattern)
    found: list[str] = []
    while match := re.match(r"\^?\(\?[=!]", pattern):
        if not pattern.startswith("^") or (end := _closing(pattern, match.end())) is None:
            return
        inner, ahead = pattern[match.end() : end], pattern[match.end() - 1] == "="
        if (same := f"^(?:{inner})" if ahead else _nowhere(inner)) is None:
            return
        found.append(same)
        pattern = "^" + pattern[end + 1 :]
    schema["pattern"] = pattern
    more += [{"pattern": each} for each in found]


def _nowhere(inner: str) -> str | None:
    """A pattern for texts that a negative look-ahead allows: those not only of some characters, or without them."""
    if match := re.fullmatch(r"\^?\[(?!\^)((?:[^\]\\]|\\.)+)\][*]\$", inner):
        return f"[^{_class(match[1])}]"
    if match := re.fullmatch(r"\.[*](?:\[(?!\^)((?:[^\]\\]|\\.)+)\]|(\\[sdwSDW])|([\w ]))", inner):
        left = match[2] or match[3]
        return f"^[^{_class(match[1]) if match[1] else left}]*$"
    return None


def _class(inside: str) -> str:
    """The inside of a character class, with a leading minus escaped so that it stays literal after a caret."""
    return f"\\{inside}" if inside.startswith("-") else inside


def _closing(pattern: str, start: int) -> int | None:
    """The index of the bracket that closes the group whose inside begins at `start`."""
    depth, inside, place = 0, False, start
    while place < len(pattern):
        letter = pattern[place]
        if letter == "\\":
            place += 1
        elif inside:
            inside = letter != "]"
        elif letter == "[":
            inside = True
        elif letter == "(":
            depth += 1
        elif letter == ")":
            if not depth:
                return place
            depth -= 1
        place += 1
    return None


def _resolved(schema: Any, root: Any) -> Any:
    for _ in range(_MAX_STEPS):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#"):
            return schema
        schema = root
        for step in reference.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, dict) else None
    return schema


def _say_property_names(schema: dict[str, Any], root: Any) -> None:
    """Rewrites `propertyNames` as `properties`, which list the names, or as `patternProperties`."""
    if "propertyNames" not in schema:
        return
    names = _resolved(schema["propertyNames"], root)
    if isinstance(names, dict):
        names = {word: value for word, value in names.items() if word not in ("title", "description", "$schema")}
    if names is True or names in ({}, {"type": "string"}):
        del schema["propertyNames"]
        return
    if not isinstance(names, dict) or "properties" in schema or "patternProperties" in schema:
        return
    values = schema.get("additionalProperties", True)
    said = names.keys() - {"type"}
    if said == {"enum"} or said == {"const"}:
        listed = names["enum"] if "enum" in names else [names["const"]]
        schema["properties"] = {name: values for name in listed if isinstance(name, str)}
    elif said in ({"pattern"}, {"pattern", "format"}):
        schema["patternProperties"] = {names["pattern"]: values}
    elif said == {"format"} and names["format"] == "uuid":
        schema["patternProperties"] = {_UUID: values}
    elif said <= {"minLength", "maxLength"}:
        least, maximum = names.get("minLength", 0), names.get("maxLength", "")
        schema["patternProperties"] = {f"^[\\s\\S]{{{least},{maximum}}}$": values}
    else:
        return
    del schema["propertyNames"]
    schema["additionalProperties"] = False


def _say_unique(schema: dict[str, Any], root: Any) -> None:
    """Rewrites `uniqueItems` of lists of at most one item, or of few values: all orders of the values."""
    if schema.get("uniqueItems") is False or (schema.get("uniqueItems") is True and _at_most(schema) <= 1):
        del schema["uniqueItems"]
    if schema.get("uniqueItems") is not True or "prefixItems" in schema or "anyOf" in schema:
        return
    items = _resolved(schema.get("items"), root)
    values = _values(items)
    if values is None or len(values) > _MAX_ORDERED or isinstance(schema.get("items"), list):
        return
    least, maximum = schema.get("minItems", 0), min(_at_most(schema), len(values))
    for word in ("uniqueItems", "items", "minItems", "maxItems"):
        schema.pop(word, None)
    schema["anyOf"] = [
        {
            "type": "array",
            "prefixItems": [{"const": value} for value in chosen],
            "items": False,
            "minItems": len(chosen),
            "maxItems": len(chosen),
        }
        for count in range(least, maximum + 1)
        for chosen in _orders(values, count)
    ]


def _orders(values: list[Any], count: int) -> list[list[Any]]:
    if not count:
        return [[]]
    return [
        [value, *rest]
        for place, value in enumerate(values)
        for rest in _orders([*values[:place], *values[place + 1 :]], count - 1)
    ]


def _at_most(schema: dict[str, Any]) -> int:
    maximum = schema.get("maxItems")
    return maximum if isinstance(maximum, int) else _MAX_ORDERED + 1


def _values(schema: Any) -> list[Any] | None:
    """All values that satisfy a schema, where it lists them; else None."""
    if not isinstance(schema, dict):
        return None
    kinds = schema.get("type")
    if "const" in schema:
        return [schema["const"]]
    if isinstance(schema.get("enum"), list) and schema.keys() <= {"enum", "type", "title", "description"}:
        distinct: list[Any] = []
        for value in schema["enum"]:
            if not any(_equal(value, each) for each in distinct):
                distinct.append(value)
        return distinct
    few: dict[str, list[Any]] = {"boolean": [True, False], "null": [None]}
    return few.get(kinds) if isinstance(kinds, str) else None


def _say_conditions(schema: dict[str, Any], more: list[Any]) -> None:
    """Rewrites `if` and the keywords that depend on a property as a choice of two schemas."""
    for word in ("dependentRequired", "dependentSchemas", "dependencies"):
        if isinstance(schema.get(word), dict):
            for name, part in schema.pop(word).items():
                then = {"required": part} if isinstance(part, list) else part
                without = {"properties": {name: False}}
                if isinstance(then, dict):
                    then = {**then, "required": list(dict.fromkeys([name, *then.get("required", [])]))}
                more.append({"anyOf": [without, then]})
    if "if" not in schema:
        schema.pop("then", None)  # both mean nothing without `if`
        schema.pop("else", None)
        return
    condition, then, other = schema["if"], schema.get("then", True), schema.get("else", True)
    if (untrue := negated(condition)) is None:
        return
    for word in ("if", "then", "else"):
        schema.pop(word, None)
    ways = [{"allOf": [condition, then]}, {"allOf": [untrue, other]}]
    more.append({"anyOf": ways})
