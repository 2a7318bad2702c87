"""The API described to machines and to people: `/openapi.json` is valid and whole, `/docs` needs no internet."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel

from huggingface.api.parameters.effective import GENERATE_DEFAULTS

METHODS = {"GET", "POST", "PUT", "DELETE", "PATCH"}
UNDESCRIBED = {"/openapi.json", "/docs", "/docs/static/{filename}"}  # the description itself


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose keys stands in it twice."""
    names = [name for name, _ in pairs]
    assert len(set(names)) == len(names), names
    return dict(pairs)


@pytest.fixture
def document(client: Any) -> dict[str, Any]:
    """The document as served."""
    response = client.get("/openapi.json")
    assert response.status_code == 200
    return json.loads(response.text, object_pairs_hook=once)


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself, where it is a reference."""
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def body_of(document: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    """The schema of a route's request body."""
    content = document["paths"][path][method]["requestBody"]["content"]
    return resolve(document, content["application/json"]["schema"])


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(document).validate()


def test_no_two_models_of_the_document_share_a_name() -> None:
    """The document knows them by their names: one would be described as the other."""
    kinds: list[type[BaseModel]] = [BaseModel]
    for kind in kinds:
        kinds += [each for each in kind.__subclasses__() if each not in kinds]
    names = [kind.__name__ for kind in kinds if kind.__module__.startswith("huggingface.")]
    assert not sorted(name for name, count in Counter(names).items() if count > 1)


def test_the_document_describes_every_route_and_no_other(app: Any, document: dict[str, Any]) -> None:
    routes = set()
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:[^:<>]+:)?([^<>]+)>", r"{\1}", rule.rule)
        routes |= {(path, method) for method in rule.methods & METHODS if path not in UNDESCRIBED}
    described = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    assert described == routes


def own_errors(path: str) -> bool:
    """Whether a path speaks a protocol with a shape of its own for errors: `{"error"}`."""
    return "/v1/" in path or (path.startswith("/api/") and not path.startswith("/api/huggingface"))


REFUSED = {"/api/create", "/api/copy", "/api/push", "/api/blobs/{digest}"}  # they only say what to use instead


def test_every_route_says_in_a_sentence_what_it_does_and_describes_its_success(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert operation["summary"], (method, path)
            assert ("200" in operation["responses"]) is not (path in REFUSED)
            if path in REFUSED:
                continue
            content = operation["responses"]["200"]["content"]["application/json"]["schema"]
            told = resolve(document, content)["properties"]
            if (method, path) == ("post", "/api/huggingface/models/{model_id}"):
                continue  # of each task another
            assert ("success" in told) is not own_errors(path), (method, path)
            assert told, (method, path)


def schemas(node: Any) -> Iterator[dict[str, Any]]:
    """Every object of the document but those that hold fields or schemas by their names."""
    if isinstance(node, list):
        for each in node:
            yield from schemas(each)
    if isinstance(node, dict):
        yield node
        for key, value in node.items():
            named = key in ("properties", "schemas", "$defs") and isinstance(value, dict)
            yield from schemas(list(value.values()) if named else value)


def test_no_schema_has_a_default(document: dict[str, Any]) -> None:
    """A generated client would send it, over what the model is registered with."""
    assert [schema for schema in schemas(document) if "default" in schema] == []


def test_defaults_are_told_in_descriptions(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["GenerateBody"]["properties"]
    for name, value in GENERATE_DEFAULTS.items():
        assert f"Default, where the model has none registered: {json.dumps(value)}." in fields[name]["description"]
    load = document["components"]["schemas"]["LoadBody"]["properties"]
    assert "Default: false." in load["force_reload"]["description"]
    [details] = document["paths"]["/api/huggingface/models/available"]["get"]["parameters"]
    assert 'Default: "false".' in details["description"]


def test_an_answer_always_has_its_success(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        if "success" in schema.get("properties", {}):
            assert "success" in schema["required"], name


def test_operations_have_short_names_of_their_own(app: Any, document: dict[str, Any]) -> None:
    """That of the view; another protocol's begin with the protocol's."""
    names = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            name = operation["operationId"]
            assert name not in names, f"{name}: {method} {path} and {names[name]}; rename one of the two views"
            assert re.fullmatch(r"[a-z]+([A-Z][a-z0-9]*)*", name), (name, method, path)
            names[name] = (method, path)
    assert names["generate"] == ("post", "/api/huggingface/generate")
    assert names["listModels"] == ("get", "/api/huggingface/models")
    assert names["openaiListModels"] == ("get", "/v1/models")
    views = {rule.endpoint.rpartition(".")[2].replace("_", "").lower() for rule in app.url_map.iter_rules()}
    assert [name for name in names if not any(name.lower().endswith(view) for view in views)] == []


LINES = {"/api/chat", "/api/generate", "/api/pull"}
STREAMS = {
    "/api/huggingface/models/{model_id}",
    "/api/huggingface/models/{model_id}/load",
    "/api/huggingface/models/{model_id}/download",
    "/api/huggingface/models/{model_id}/v1/chat/completions",
    "/api/huggingface/models/{model_id}/v1/completions",
    "/api/huggingface/generate",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
}


def test_what_is_streamed_is_described_as_events_too(document: dict[str, Any]) -> None:
    """And wherever a body takes `stream`, what comes then is."""
    told: dict[str, set[str]] = {"text/event-stream": set(), "application/x-ndjson": set()}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            content = operation["responses"].get("200", {"content": {}})["content"]
            for kind in told.keys() & content.keys():
                assert method == "post"
                events = content[kind]["schema"]
                assert events["type"] == "string"
                assert events["description"]
                assert "stream" in body_of(document, method, path)["properties"]
                told[kind].add(path)
            counts = (
                path == "/v1/messages/count_tokens"
            )  # it takes a whole conversation's body, and makes nothing of it
            if not told.keys() & content.keys() and "requestBody" in operation and not counts:
                assert "stream" not in body_of(document, method, path)["properties"], path
    assert told["text/event-stream"] >= STREAMS
    assert told["application/x-ndjson"] == LINES


def test_every_error_is_described_in_the_one_documented_shape(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            failures = {status: answer for status, answer in operation["responses"].items() if status >= "400"}
            assert "400" in failures, (method, path)
            for answer in failures.values():
                schema = resolve(document, answer["content"]["application/json"]["schema"])
                if path.startswith("/v1/messages"):
                    assert set(schema["properties"]) == {"type", "error", "request_id"}
                    continue
                if own_errors(path):
                    assert set(schema["properties"]) == {"error"}
                    continue
                assert set(schema["properties"]) == {"success", "error"}
                assert schema["properties"]["success"]["const"] is False


@pytest.mark.parametrize(
    ("method", "path", "required", "optional"),
    [
        ("post", "/api/huggingface/models", {"model_id", "name"}, {"model_type", "description", "parameters"}),
        (
            "put",
            "/api/huggingface/models/{model_id}",
            set(),
            {"name", "model_type", "description", "parameters", "status"},
        ),
        ("post", "/api/huggingface/models/{model_id}/load", set(), {"force_reload"}),
        (
            "post",
            "/api/huggingface/generate",
            {"model_id"},
            {
                "prompt",
                "messages",
                "max_new_tokens",
                "temperature",
                "do_sample",
                "top_p",
                "top_k",
                "repetition_penalty",
            },
        ),
        ("post", "/api/huggingface/pipeline", {"model_id", "task", "inputs"}, set()),
    ],
)
def test_every_field_of_a_body_is_there_with_a_description(
    document: dict[str, Any], method: str, path: str, required: set[str], optional: set[str]
) -> None:
    schema = body_of(document, method, path)
    assert set(schema.get("required", ())) == required
    assert required | optional <= set(schema["properties"])
    for name, field in schema["properties"].items():
        assert resolve(document, field).get("description"), name


def test_a_body_that_may_be_left_out_is_not_described_as_required(document: dict[str, Any]) -> None:
    load = document["paths"]["/api/huggingface/models/{model_id}/load"]["post"]
    assert not load["requestBody"].get("required", False)


def test_the_documented_filters_are_described(document: dict[str, Any]) -> None:
    for method, path, name in (
        ("get", "/api/huggingface/models", "type"),
        ("delete", "/api/huggingface/cache", "model_id"),
    ):
        [query] = [field for field in document["paths"][path][method]["parameters"] if field["in"] == "query"]
        assert query["name"] == name
        assert query["description"]
        assert query["required"] is False


class _References(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href") and value]


def test_the_page_needs_nothing_from_another_host(client: Any) -> None:
    response = client.get("/docs")
    assert response.status_code == 200
    assert response.mimetype == "text/html"
    page = _References()
    page.feed(response.text)
    assert len(page.found) >= 3
    assert "://" not in response.text
    for reference in page.found:
        assert not urlsplit(reference).netloc, reference
        with client.get(urljoin("/docs", reference)) as loaded:
            assert loaded.status_code == 200, reference
            assert len(loaded.data) > 200, reference
            if loaded.mimetype == "text/css":  # it loads more by itself
                loads = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", loaded.text)
                assert all(part.startswith("data:") for parts in loads for part in parts if part), reference


def test_the_page_shows_this_servers_document(client: Any) -> None:
    [address] = re.findall(r'url: "([^"]+)"', client.get("/docs").text)
    assert client.get(address).json["info"]["title"] == "Local LLM"


def test_a_model_in_memory_is_shown_field_for_field_as_described(
    client: Any, tiny: Any, document: dict[str, Any]
) -> None:
    """What `/cache`, a load and an estimate answer with are the fields that the document names, and no others."""
    model_id, api = tiny("gpt2"), "/api/huggingface"
    client.post(f"{api}/models", json={"model_id": model_id, "name": "x", "model_type": "text-generation"})
    schemas = document["components"]["schemas"]
    loaded = client.post(f"{api}/models/{model_id}/load").json
    assert set(loaded["settings"]) == set(schemas["EffectiveSettings"]["properties"])
    [shown] = client.get(f"{api}/cache").json["cached_models"].values()
    assert set(shown) == set(schemas["CachedModel"]["properties"])
    estimate = client.get(f"{api}/models/{model_id}/estimate").json
    assert set(estimate) == set(schemas["EstimateAnswer"]["properties"])
