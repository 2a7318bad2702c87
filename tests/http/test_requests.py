"""What may not come in: bodies, queries, ids, hosts and origins that no route should see."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

import huggingface
from app import create_app
from config import Settings

API = "/api/huggingface"
BODIES = ["/models", "/generate", "/pipeline", "/models/tiny/gpt2/load"]


@pytest.fixture
def registered(client: Any, tiny: Callable[[str], str]) -> Any:
    """A client of an app on which one model is registered."""
    body = {"model_id": tiny("gpt2"), "name": "GPT-2", "model_type": "text-generation"}
    assert client.post(f"{API}/models", json=body).status_code == 200
    return client


def refused(response: Any, status: int, *words: str) -> None:
    """Assert the documented error body, the status, and words of the message."""
    body = response.get_json()
    assert response.status_code == status, body
    assert list(body) == ["success", "error"]
    assert body["success"] is False
    for word in words:
        assert word in body["error"], body
    assert "Traceback" not in body["error"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("data", "content_type", "status", "word"),
    [
        (b"{", "application/json", 400, "JSON"),
        (b"{'a': 1}", "application/json", 400, "JSON"),
        (b'{"a": 1} {"b": 2}', "application/json", 400, "JSON"),
        (b"[]", "application/json", 400, "object"),
        (b'"text"', "application/json", 400, "object"),
        (b'"{\\"model_id\\": \\"gpt2\\"}"', "application/json", 400, "object"),
        (b"5", "application/json", 400, "object"),
        (b"null", "application/json", 400, "object"),
        (b'{"model_id": "\xff"}', "application/json", 400, "UTF-8"),
        (b'{"model_id": "\\ud800"}', "application/json", 400, "UTF-8"),
        ('{"model_id": "é"}'.encode("utf-16"), "application/json", 400, ""),
        (b'{"model_id": "a", "model_id": "b"}', "application/json", 400, "model_id"),
        (b"[" * 100_000 + b"]" * 100_000, "application/json", 400, "deep"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "application/json", 400, "deep"),
        (b'{"model_id": ' + b"9" * 5000 + b"}", "application/json", 400, ""),
        (b'{"model_id": "x"}', "text/plain", 415, "application/json"),
        (b'{"model_id": "x"}', "application/x-www-form-urlencoded", 415, "application/json"),
        (b'{"model_id": "x"}', None, 415, "application/json"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(
    registered: Any, path: str, data: bytes, content_type: str | None, status: int, word: str
) -> None:
    """Whatever is sent as a body, the answer is a 4xx in the documented shape that says what is wrong."""
    refused(registered.post(API + path, data=data, content_type=content_type), status, word)


@pytest.mark.parametrize("path", BODIES[:3])
def test_the_first_missing_field_is_named(registered: Any, path: str) -> None:
    """An empty object, or no body at all, misses `model_id` first, in exactly the documented words."""
    for arguments in ({"json": {}}, {}, {"data": b"  ", "content_type": "application/json"}):
        response = registered.post(API + path, **arguments)
        refused(response, 400)
        assert response.get_json()["error"] == "Missing required field: model_id"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/models", {"model_id": "a", "name": "a"}, "model_type"),
        ("/models", {"model_id": "a", "model_type": "fill-mask"}, "name"),
        ("/generate", {"model_id": "tiny/gpt2"}, "prompt"),
        ("/generate", {"prompt": "x"}, "model_id"),
        ("/pipeline", {"model_id": "tiny/gpt2", "task": "text-generation"}, "inputs"),
        ("/pipeline", {"model_id": "tiny/gpt2", "inputs": "x"}, "task"),
    ],
)
def test_each_missing_field_is_named(registered: Any, path: str, body: dict[str, Any], field: str) -> None:
    """A missing field is named in exactly the documented words."""
    response = registered.post(API + path, json=body)
    refused(response, 400)
    assert response.get_json()["error"] == f"Missing required field: {field}"


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("POST", "/models", {"model_id": "a", "name": "a", "model_type": "fill-mask", "colour": 1}, "colour"),
        ("POST", "/models", {"model_id": "a", "name": "a", "model_type": "poetry"}, "model_type"),
        ("POST", "/models", {"model_id": "a", "name": 5, "model_type": "fill-mask"}, "name"),
        ("POST", "/models", {"model_id": "a", "name": "", "model_type": "fill-mask"}, "name"),
        ("POST", "/models", {"model_id": 5, "name": "a", "model_type": "fill-mask"}, "model_id"),
        ("POST", "/models", {"model_id": "a", "name": "a", "model_type": "fill-mask", "parameters": []}, "parameters"),
        (
            "POST",
            "/models",
            {"model_id": "a", "name": "a", "model_type": "text-generation", "parameters": {"temperature": -1}},
            "parameters.temperature",
        ),
        (
            "POST",
            "/models",
            {"model_id": "a", "name": "a", "model_type": "text-generation", "parameters": {"warmth": 1}},
            "parameters.warmth",
        ),
        ("PUT", "/models/tiny/gpt2", {"colour": 1}, "colour"),
        ("PUT", "/models/tiny/gpt2", {"usage_count": 7}, "usage_count"),
        ("PUT", "/models/tiny/gpt2", {"model_id": "other"}, "model_id"),
        ("PUT", "/models/tiny/gpt2", {"added_date": "2020-01-01T00:00:00.000000"}, "added_date"),
        ("PUT", "/models/tiny/gpt2", {"status": "sold"}, "status"),
        ("PUT", "/models/tiny/gpt2", {"last_used": "yesterday"}, "last_used"),
        ("PUT", "/models/tiny/gpt2", {"model_type": "poetry"}, "model_type"),
        ("PUT", "/models/tiny/gpt2", {"parameters": {"top_p": 5}}, "parameters.top_p"),
        ("POST", "/models/tiny/gpt2/load", {"force_reload": "yes"}, "force_reload"),
        ("POST", "/models/tiny/gpt2/load", {"force": True}, "force"),
        ("POST", "/pipeline", {"model_id": "tiny/gpt2", "task": "dance", "inputs": "x"}, "task"),
        (
            "POST",
            "/pipeline",
            {"model_id": "tiny/gpt2", "task": "text-generation", "inputs": "x", "warmth": 1},
            "warmth",
        ),
        ("POST", "/pipeline", {"model_id": "tiny/gpt2", "task": "text-generation", "inputs": 5}, "inputs"),
        ("POST", "/pipeline", {"model_id": "tiny/gpt2", "task": 5, "inputs": "x"}, "task"),
        ("GET", "/models?kind=x", None, "kind"),
        ("GET", "/models?type=fill-mask&page=2", None, "page"),
        ("DELETE", "/cache?id=x", None, "id"),
        ("GET", "/models?type=fill-mask&type=ner", None, "type"),
    ],
)
def test_a_wrong_field_is_named(
    registered: Any, method: str, path: str, body: dict[str, Any] | None, field: str
) -> None:
    """A field that is unknown, protected, of a wrong type or out of range is a 400 that names it."""
    refused(registered.open(API + path, method=method, json=body), 400, field)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty", "max_new_tokens"])
def test_what_is_no_number_is_refused_by_the_fields_name(registered: Any, number: str, field: str) -> None:
    """NaN and infinities, which JSON parsers let through, are a 400 that names the field."""
    data = f'{{"model_id": "tiny/gpt2", "prompt": "x", "{field}": {number}}}'
    refused(registered.post(f"{API}/generate", data=data, content_type="application/json"), 400, field)


@pytest.mark.parametrize(
    "model_id",
    [
        "../secret",
        "/etc",
        "a/b/c",
        "a//b",
        "..",
        ".",
        "-a",
        "a-",
        "a\nb",
        "a\x00b",
        "a b",
        "é",
        "",
        "a/../b",
        "x" * 300,
    ],
)
def test_an_id_that_the_hub_would_not_take_is_refused(client: Any, model_id: str) -> None:
    """Ids are Hub ids: nothing that could leave the models folder is ever registered."""
    body = {"model_id": model_id, "name": "x", "model_type": "text-generation"}
    refused(client.post(f"{API}/models", json=body), 400, "model_id")
    assert client.get(f"{API}/models").get_json()["count"] == 0


@pytest.mark.parametrize("path", ["/models/../../etc/passwd", "/models/%2e%2e%2fsecret", "/models/nobody/nothing/load"])
def test_a_path_names_registered_models_only(client: Any, path: str) -> None:
    """Whatever stands in a path, it is a registered id or a 404."""
    for method in ("GET", "PUT", "DELETE") if not path.endswith("load") else ("POST",):
        refused(client.open(API + path, method=method), 404)


def test_routing_errors_have_the_documented_body(client: Any) -> None:
    """An unknown route is a 404 and a wrong method a 405 that tells the right ones, both in JSON."""
    refused(client.get("/nowhere"), 404, "/nowhere")
    refused(client.get(f"{API}/nowhere"), 404)
    response = client.get(f"{API}/generate")
    refused(response, 405, "GET")
    assert "POST" in response.headers["Allow"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:5000", "localhost.evil.example", "127.0.0.1.evil.example"]
)
def test_a_foreign_host_name_is_refused(client: Any, host: str) -> None:
    """A page whose domain was pointed at this machine (DNS rebinding) gets nothing."""
    refused(client.get(f"{API}/models", headers={"Host": host}), 403)
    refused(client.delete(f"{API}/cache", headers={"Host": host}), 403)


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:5000", "127.0.0.1:5000", "[::1]:5000", "192.168.1.7", "a.localhost"),
        *("host.docker.internal:5000", "host.containers.internal:5000"),
    ],
)
def test_local_names_and_addresses_are_served(client: Any, host: str) -> None:
    """Numeric addresses, localhost, and what containers call it are this machine."""
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://localhost.evil.example", "http://0.0.0.0:3000", "null", "http://["]
)
def test_a_foreign_page_is_refused(registered: Any, origin: str) -> None:
    """A web page of another origin cannot use the server, whatever it sends."""
    headers = {"Origin": origin, "Host": "localhost:5000"}
    refused(registered.post(f"{API}/models/tiny/gpt2/load", headers=headers), 403)
    refused(registered.delete(f"{API}/models/tiny/gpt2", headers=headers), 403)
    assert registered.get(f"{API}/cache").get_json()["total_cached"] == 0


def test_the_servers_own_page_is_served(client: Any) -> None:
    """The page at /docs may call the server that it came from."""
    headers = {"Origin": "http://localhost:5000", "Host": "localhost:5000"}
    assert client.get(f"{API}/models", headers=headers).status_code == 200


def test_a_record_can_be_put_back(registered: Any) -> None:
    """What GET gives can be PUT again: protected fields with their present values change nothing."""
    model = registered.get(f"{API}/models/tiny/gpt2").get_json()["model"]
    model["description"] = "new"
    answer = registered.put(f"{API}/models/tiny/gpt2", json=model)
    assert answer.status_code == 200
    assert answer.get_json()["model"] == model
    assert answer.get_json()["message"] == "Model 'tiny/gpt2' updated successfully"


def test_a_disabled_model_is_not_used(registered: Any) -> None:
    """A model whose status is `disabled` is refused until it is available again."""
    assert registered.put(f"{API}/models/tiny/gpt2", json={"status": "disabled"}).status_code == 200
    refused(registered.post(f"{API}/models/tiny/gpt2/load"), 409, "disabled")
    refused(registered.post(f"{API}/generate", json={"model_id": "tiny/gpt2", "prompt": "x"}), 409, "disabled")
    assert registered.put(f"{API}/models/tiny/gpt2", json={"status": "available"}).status_code == 200
    assert registered.post(f"{API}/models/tiny/gpt2/load").status_code == 200


def test_numbers_of_any_size_come_back_as_they_were_sent(registered: Any) -> None:
    """An answer echoes what was asked, even integers beyond 64 bits, or refuses it; it never fails."""
    body = {"model_id": "tiny/gpt2", "task": "text-generation", "inputs": 2**80}
    refused(registered.post(f"{API}/pipeline", json=body), 400, "inputs")
    body = {"model_id": "tiny/gpt2", "prompt": "x", "seed": 2**80}
    refused(registered.post(f"{API}/generate", json=body), 400, "seed")


def test_a_key_given_twice_among_many_is_found_at_once(registered: Any) -> None:
    """A body of very many keys costs no more than its size."""

    def seconds(count: int) -> float:
        body = "{" + ",".join(f'"key{index}": 1' for index in range(count)) + f',"key{count - 1}": 2}}'
        begun = time.perf_counter()
        refused(registered.post(f"{API}/generate", data=body, content_type="application/json"), 400, f"key{count - 1}")
        return time.perf_counter() - begun

    assert min(seconds(60_000) for _ in range(3)) < 24 * min(seconds(7_500) for _ in range(3))


def test_a_body_where_none_is_read_is_refused(registered: Any) -> None:
    """DELETE /cache takes the model from the query; a body that names one does not clear all the others."""
    assert registered.post(f"{API}/models/tiny/gpt2/load").status_code == 200
    refused(registered.delete(f"{API}/cache", json={"model_id": "other"}), 400, "model_id")
    assert registered.get(f"{API}/cache").get_json()["total_cached"] == 1


def test_a_changed_type_reaches_a_model_in_memory(registered: Any) -> None:
    """A model that is given another type is loaded anew where the old one had no head for it."""
    assert registered.put(f"{API}/models/tiny/gpt2", json={"model_type": "feature-extraction"}).status_code == 200
    assert registered.post(f"{API}/models/tiny/gpt2/load").status_code == 200
    body = {"model_id": "tiny/gpt2", "prompt": "x", "max_new_tokens": 1}
    refused(registered.post(f"{API}/generate", json=body), 400, "feature-extraction")
    assert registered.put(f"{API}/models/tiny/gpt2", json={"model_type": "text-generation"}).status_code == 200
    assert registered.post(f"{API}/generate", json=body).status_code == 200


def test_a_type_from_another_version_is_no_failure(registered: Any, settings: Any) -> None:
    """A registry file whose model has an unknown type is served as far as that goes, and never answers 500."""
    settings.registry.write_text(settings.registry.read_text().replace('"text-generation"', '"poetry"'))
    body = {"model_id": "tiny/gpt2", "task": "text-generation", "inputs": "x", "max_new_tokens": 1}
    assert registered.post(f"{API}/pipeline", json=body).status_code == 200
    refused(registered.put(f"{API}/models/tiny/gpt2", json={"parameters": {"top_k": 3}}), 400, "model_type")


def test_a_device_that_is_not_there_is_named(models_dir: Any, tmp_path: Any, tiny: Any) -> None:
    """A setting that names a device this machine lacks is told as such, not as a damaged model."""
    app = create_app(Settings(_env_file=None, registry=tmp_path / "r.json", models_dir=models_dir, device="cuda:77"))
    client = app.test_client()
    body = {"model_id": tiny("gpt2"), "name": "x", "model_type": "text-generation"}
    assert client.post(f"{API}/models", json=body).status_code == 200
    refused(client.post(f"{API}/models/tiny/gpt2/load"), 503, "LOCAL_LLM_DEVICE", "cuda:77")
    huggingface.close(app)


def test_a_change_of_type_checks_the_parameters_that_stay(client: Any, tiny: Any) -> None:
    """Parameters that a new model of that type could not have are not carried over to it either."""
    own = {"function_to_apply": "softmax"}
    body = {"model_id": tiny("gpt2"), "name": "x", "model_type": "text-classification", "parameters": own}
    assert client.post(f"{API}/models", json=body).status_code == 200
    refused(
        client.put(f"{API}/models/tiny/gpt2", json={"model_type": "text-generation"}),
        400,
        "parameters.function_to_apply",
    )
    change = {"model_type": "text-generation", "parameters": {"top_k": 5}}
    assert client.put(f"{API}/models/tiny/gpt2", json=change).status_code == 200


def test_registered_labels_serve_requests_that_name_none(client: Any, tiny: Any) -> None:
    """What a task requires may be registered with the model; a request's own value wins."""
    labels = {"candidate_labels": ["cats", "cars"]}
    body = {"model_id": tiny("bert-nli"), "name": "x", "model_type": "zero-shot-classification", "parameters": labels}
    assert client.post(f"{API}/models", json=body).status_code == 200
    body = {"model_id": tiny("bert-nli"), "task": "zero-shot-classification", "inputs": "A cat sat."}
    results = client.post(f"{API}/pipeline", json=body).get_json()["results"]
    assert sorted(results["labels"]) == ["cars", "cats"]
    results = client.post(f"{API}/pipeline", json={**body, "candidate_labels": ["a", "b"]}).get_json()["results"]
    assert sorted(results["labels"]) == ["a", "b"]
