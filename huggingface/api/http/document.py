"""Makes the API's document fit for client generators: short operation names, and no defaults.

A generated client sends every `default` by itself, and would override a model's registered parameters; so the document
names defaults in descriptions only. Works on a copy of flask-openapi3's document; serves any request thread. Must not
know single routes or fields.
"""

from __future__ import annotations

import json
import re
from typing import Any

from flask_openapi3 import OpenAPI

_OWN = (None, "/api/huggingface")  # prefixes of this server's own routes; names of others begin with their protocol

# Keywords that hold schemas: by name, in a list, or a single one.
_NAMED = frozenset({"properties", "patternProperties", "$defs"})
_SEVERAL = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_ONE = frozenset({"items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else"})


def api_document(app: OpenAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of `app`."""
    made: dict[str, Any] = app.api_doc
    names = _operation_ids(app)
    components = {**made["components"], "schemas": _schemas(made["components"]["schemas"])}
    if not components.get("securitySchemes"):
        components.pop("securitySchemes", None)  # with an empty one the page would offer a login
    paths = {
        path: {method: _operation(operation, names[method, path]) for method, operation in item.items()}
        for path, item in made["paths"].items()
    }
    return {**made, "paths": paths, "components": components}


def _operation_ids(app: OpenAPI) -> dict[tuple[str, str], str]:
    """Each operation's name, by method and path: the view's name, after the protocol's for other protocols."""
    names = {}
    for rule in app.url_map.iter_rules():
        blueprint, _, view = rule.endpoint.rpartition(".")
        own = not blueprint or app.blueprints[blueprint].url_prefix in _OWN
        first, *words = re.split(r"[_\W]+", view if own else f"{blueprint}_{view}")
        path = re.sub(r"<(?:[^:<>]+:)?([^<>]+)>", r"{\1}", rule.rule)
        for method in rule.methods or ():
            names[method.lower(), path] = first + "".join(word.capitalize() for word in words)
    return names


def _operation(operation: dict[str, Any], name: str) -> dict[str, Any]:
    result = {**operation, "operationId": name}
    if "parameters" in operation:
        result["parameters"] = [_parameter(parameter) for parameter in operation["parameters"]]
    return result


def _parameter(parameter: dict[str, Any]) -> dict[str, Any]:
    """A field of the query or path, whose description stands outside of its schema."""
    schema = _schema({"description": parameter.get("description", ""), **parameter["schema"]})
    return {**parameter, "description": schema["description"], "schema": schema}


def _schemas(schemas: dict[str, Any]) -> dict[str, Any]:
    return {name: _schema(schema) for name, schema in schemas.items()}


def _schema(schema: Any) -> Any:
    """A schema without defaults, at any depth. A default other than "not given" moves into the description."""
    if not isinstance(schema, dict):
        return schema  # true or false
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED:
            result[key] = _schemas(value)
        elif key in _SEVERAL:
            result[key] = [_schema(each) for each in value]
        elif key in _ONE:
            result[key] = _schema(value)
        elif key != "default":
            result[key] = value
    if schema.get("default") is not None and "const" not in schema:
        told = f"Default: {json.dumps(schema['default'])}."
        result["description"] = f"{schema.get('description', '')} {told}".strip()
    return result
