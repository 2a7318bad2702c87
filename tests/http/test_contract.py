"""The API document's sections on models, system and errors against a live server: every field, status, message, shape.

`test_contract_inference.py` has section 2; `test_clients.py` runs the document's clients and workflows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
from conftest import PATIENCE, Server
from documented import INFO, RECORD, TIME, TYPES, add_gpt2, bad, emptied, good

pytestmark = pytest.mark.each_backend


@pytest.fixture
def api(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> Server:
    """The live server, with nothing registered and nothing in memory."""
    return emptied(server, models_dir, tiny)


# 1. Models ------------------------------------------------------------------------------------------------------------


def test_the_list_shows_each_model_in_full_and_how_many_there_are(api: Server) -> None:
    add_gpt2(api, parameters={"max_new_tokens": 50, "temperature": 0.8})
    body = good(api.call("GET", "/models"))
    assert list(body) == ["success", "models", "count"]
    assert body["count"] == 1
    [model] = body["models"]
    assert list(model) == [*RECORD, "details"]  # the last is beyond the document
    assert model.pop("details")["architecture"] == "GPT2LMHeadModel"
    assert TIME.fullmatch(model.pop("added_date"))
    assert model == {
        "model_id": "gpt2",
        "name": "GPT-2",
        "model_type": "text-generation",
        "description": "OpenAI GPT-2 language model",
        "parameters": {"max_new_tokens": 50, "temperature": 0.8},
        "last_used": None,
        "usage_count": 0,
        "status": "available",
    }


def test_the_list_of_nothing_is_empty(api: Server) -> None:
    assert good(api.call("GET", "/models")) == {"success": True, "models": [], "count": 0}


def test_the_list_can_be_narrowed_to_one_type(api: Server) -> None:
    add_gpt2(api)
    api.add("microsoft/DialoGPT-medium", "conversational")
    for model_type, ids in (
        ("text-generation", ["gpt2"]),
        ("conversational", ["microsoft/DialoGPT-medium"]),
        ("translation", []),
    ):
        body = good(api.call("GET", f"/models?type={model_type}"))
        assert [model["model_id"] for model in body["models"]] == ids
        assert body["count"] == len(ids)


def test_a_model_is_added_with_every_field(api: Server) -> None:
    fields = {
        "model_id": "microsoft/DialoGPT-medium",
        "name": "DialoGPT Medium",
        "model_type": "conversational",
        "description": "A conversational AI model trained on Reddit conversations",
        "parameters": {"max_new_tokens": 100, "temperature": 0.7, "do_sample": True, "top_p": 0.9},
    }
    body = good(api.call("POST", "/models", json=fields))
    assert list(body) == ["success", "model", "message"]
    assert body["message"] == "Model 'microsoft/DialoGPT-medium' added successfully"
    assert list(body["model"]) == [*RECORD, "details"]
    assert {name: body["model"][name] for name in fields} == fields
    assert list(body["model"]["parameters"]) == list(fields["parameters"])


def test_description_and_parameters_of_a_new_model_may_be_left_out(api: Server) -> None:
    fields = {"model_id": "gpt2", "name": "GPT-2", "model_type": "text-generation"}
    model = good(api.call("POST", "/models", json=fields))["model"]
    assert TIME.fullmatch(model.pop("added_date"))
    del model["details"]
    unset = {"description": "", "parameters": {}, "last_used": None, "usage_count": 0, "status": "available"}
    assert model == {**fields, **unset}


@pytest.mark.parametrize("field", INFO)
def test_a_new_model_without_a_required_field_is_refused_by_its_name(api: Server, field: str) -> None:
    """The type may be left out only where the model's files tell it, and there are none of this one."""
    fields = {"model_id": "nowhere", "name": "GPT-2", "model_type": "text-generation"}
    del fields[field]
    assert bad(api.call("POST", "/models", json=fields), 400) == f"Missing required field: {field}"
    assert good(api.call("GET", "/models"))["count"] == 0


def test_a_model_type_that_does_not_exist_is_refused_with_those_that_do(api: Server) -> None:
    fields = {"model_id": "gpt2", "name": "GPT-2", "model_type": "telepathy"}
    message = bad(api.call("POST", "/models", json=fields), 400)
    assert "'model_type'" in message
    assert all(model_type in message for model_type in TYPES)


def test_a_model_is_registered_once(api: Server) -> None:
    add_gpt2(api)
    again = {"model_id": "gpt2", "name": "Another", "model_type": "fill-mask"}
    assert bad(api.call("POST", "/models", json=again), 409) == "Model 'gpt2' already exists"
    assert good(api.call("GET", "/models/gpt2"))["model"]["name"] == "GPT-2"


def test_one_model_can_be_shown(api: Server) -> None:
    add_gpt2(api, parameters={"temperature": 0.8})
    body = good(api.call("GET", "/models/gpt2"))
    assert list(body) == ["success", "model"]
    assert [body["model"]] == good(api.call("GET", "/models"))["models"]


def test_an_update_changes_what_it_names_and_leaves_the_rest(api: Server) -> None:
    add_gpt2(api, parameters={"temperature": 0.8, "min_p": 0.1})
    before = good(api.call("GET", "/models/gpt2"))["model"]
    changes = {"description": "Updated", "parameters": {"max_new_tokens": 75, "temperature": 0.9, "top_k": 50}}
    body = good(api.call("PUT", "/models/gpt2", json=changes))
    assert list(body) == ["success", "model", "message"]
    assert body["message"] == "Model 'gpt2' updated successfully"
    assert body["model"] == {**before, **changes}
    assert good(api.call("GET", "/models/gpt2"))["model"] == body["model"]


@pytest.mark.parametrize(
    ("field", "value"), [("model_id", "gpt3"), ("added_date", "2000-01-01T00:00:00.000000"), ("usage_count", 9)]
)
def test_a_protected_field_cannot_be_updated(api: Server, field: str, value: Any) -> None:
    add_gpt2(api)
    before = good(api.call("GET", "/models/gpt2"))["model"]
    message = bad(api.call("PUT", "/models/gpt2", json={field: value, "name": "New"}), 400)
    assert message == f"Field '{field}' is protected and cannot be updated"
    assert good(api.call("GET", "/models/gpt2"))["model"] == before


def test_a_record_that_was_read_can_be_sent_back_as_an_update(api: Server) -> None:
    add_gpt2(api)
    record = good(api.call("GET", "/models/gpt2"))["model"]
    assert good(api.call("PUT", "/models/gpt2", json={**record, "name": "New"}))["model"] == {**record, "name": "New"}


def test_a_removed_model_is_gone_and_the_answer_shows_what_is_left(api: Server) -> None:
    add_gpt2(api)
    api.add("microsoft/DialoGPT-medium", "conversational")
    body = good(api.call("DELETE", "/models/gpt2"))
    assert list(body) == ["success", "message", "models_data"]
    assert body["message"] == "Model 'gpt2' removed successfully"
    data = body["models_data"]
    assert list(data) == ["models", "last_updated", "count"]
    assert data["models"] == good(api.call("GET", "/models"))["models"]
    assert TIME.fullmatch(data["last_updated"])
    assert data["count"] == 1
    assert bad(api.call("GET", "/models/gpt2"), 404) == "Model 'gpt2' not found"


def test_a_load_says_what_was_loaded_and_where(api: Server, backend: str) -> None:
    add_gpt2(api)
    assert good(api.call("POST", "/models/gpt2/load")) == {
        "success": True,
        "message": "Model 'gpt2' loaded successfully",
        "model_info": {"model_id": "gpt2", "name": "GPT-2", "model_type": "text-generation"},
        "device": "cpu",
        "settings": {  # beyond the document
            "device": "cpu",
            "device_map": None,
            "dtype": "float32",
            "weights_dtype": None,
            "quantization": None,
            "attn_implementation": "sdpa",
            "compile": False,
            "backend": backend,
            "engine": backend,  # its old name
            "kv_cache_dtype": "float32",
            "max_context": None,
            "slots": 64,
        },
        "backend_reason": "torch was asked for" if backend == "torch" else None,  # beyond the document
        "engine_reason": "torch was asked for" if backend == "torch" else None,  # its old name
    }


def test_a_loaded_model_is_loaded_again_only_by_force(api: Server) -> None:
    add_gpt2(api)

    def loaded_at(**arguments: Any) -> str:
        good(api.call("POST", "/models/gpt2/load", **arguments))
        return good(api.call("GET", "/cache"))["cached_models"]["gpt2"]["loaded_at"]

    first = loaded_at()
    assert loaded_at(json={}) == first
    assert loaded_at(json={"force_reload": False}) == first
    assert loaded_at(json={"force_reload": True}) > first


@pytest.mark.parametrize("model_id", ["microsoft/DialoGPT-medium", quote("microsoft/DialoGPT-medium", safe="")])
def test_a_slash_of_an_id_may_be_raw_or_encoded_in_every_path(api: Server, model_id: str) -> None:
    api.add("microsoft/DialoGPT-medium", "conversational")
    assert good(api.call("GET", f"/models/{model_id}"))["model"]["model_id"] == "microsoft/DialoGPT-medium"
    assert good(api.call("PUT", f"/models/{model_id}", json={"name": "Chat"}))["model"]["name"] == "Chat"
    assert good(api.call("POST", f"/models/{model_id}/load"))["model_info"]["name"] == "Chat"
    cleared = good(api.call("DELETE", f"/cache?model_id={model_id}"))
    assert cleared["message"] == "Cache cleared for model 'microsoft/DialoGPT-medium'"
    assert good(api.call("DELETE", f"/models/{model_id}"))["models_data"]["count"] == 0


# 3. System and cache --------------------------------------------------------------------------------------------------


def test_the_cache_shows_what_is_in_memory(api: Server) -> None:
    empty = good(api.call("GET", "/cache"))
    assert {name: empty[name] for name in ("cached_models", "cached_pipelines", "total_cached")} == {
        "cached_models": {},
        "cached_pipelines": [],
        "total_cached": 0,
    }
    add_gpt2(api)
    request = {"model_id": "gpt2", "task": "text-generation", "inputs": "Hello", "max_new_tokens": 2}
    good(api.call("POST", "/pipeline", json=request))
    body = good(api.call("GET", "/cache"))
    assert list(body)[:4] == ["success", "cached_models", "cached_pipelines", "total_cached"]
    model = body["cached_models"]["gpt2"]
    assert list(model)[:3] == ["loaded_at", "device", "model_type"]  # the rest is beyond the document
    assert TIME.fullmatch(model["loaded_at"])
    assert (model["device"], model["model_type"], model["engine"]["state"]) == ("cpu", "text-generation", "running")
    assert list(body["cached_models"]) == ["gpt2"]
    assert body["cached_pipelines"] == ["gpt2_text-generation"]
    assert body["total_cached"] == 1


def test_the_cache_is_cleared_for_one_model_or_for_all(api: Server) -> None:
    ids = ["gpt2", "microsoft/DialoGPT-medium", "tiny/t5"]
    for model_id in ids:
        api.add(model_id, "text2text-generation" if model_id == "tiny/t5" else "text-generation")
        good(api.call("POST", f"/models/{model_id}/load"))
    good(api.call("DELETE", "/cache?model_id=gpt2"))
    assert set(good(api.call("GET", "/cache"))["cached_models"]) == {*ids[1:]}
    assert good(api.call("DELETE", "/cache")) == {"success": True, "message": "All caches cleared"}
    assert good(api.call("GET", "/cache"))["total_cached"] == 0
    assert good(api.call("GET", "/models"))["count"] == 3


def test_the_statistics_sum_up_the_registry(api: Server) -> None:
    add_gpt2(api)
    api.add("tiny/gpt2", "text-generation")
    api.add("microsoft/DialoGPT-medium", "conversational")
    for model_id in ("gpt2", "gpt2", "tiny/gpt2"):
        good(api.call("POST", "/generate", json={"model_id": model_id, "prompt": "Hello", "max_new_tokens": 2}))
    body = good(api.call("GET", "/statistics"))
    assert list(body) == ["success", "statistics"]
    found = body["statistics"]
    assert list(found) == ["total_models", "total_usage", "model_types", "last_updated", "most_used", "models"]
    assert {"gpt2", "tiny/gpt2"} <= set(found.pop("models"))  # beyond the document
    assert TIME.fullmatch(found.pop("last_updated"))
    assert found == {
        "total_models": 3,
        "total_usage": 3,
        "model_types": {"text-generation": 2, "conversational": 1},
        "most_used": {"model_id": "gpt2", "name": "GPT-2", "usage_count": 2},
    }


def test_the_model_types_are_listed_once_each_and_sorted(api: Server) -> None:
    for model_id, model_type in (
        ("b", "text2text-generation"),
        ("a", "text-generation"),
        ("c", "conversational"),
        ("d", "text-generation"),
    ):
        api.add(model_id, model_type)
    types = ["conversational", "text-generation", "text2text-generation"]
    assert good(api.call("GET", "/model-types")) == {"success": True, "model_types": types}


def test_all_documented_model_types_can_be_registered(api: Server) -> None:
    for index, model_type in enumerate(TYPES):
        api.add(f"org/model-{index}", model_type)
    assert good(api.call("GET", "/model-types"))["model_types"] == sorted(TYPES)


def test_the_dependencies_are_told(api: Server) -> None:
    body = good(api.call("GET", "/dependencies"))
    assert list(body) == ["success", "dependencies"]
    assert list(body["dependencies"]) == ["transformers", "torch", "cuda_available"]
    assert body["dependencies"]["transformers"] is True
    assert body["dependencies"]["torch"] is True
    assert isinstance(body["dependencies"]["cuda_available"], bool)


def test_the_root_says_what_is_running(api: Server) -> None:
    add_gpt2(api)
    good(api.call("POST", "/models/gpt2/load"))
    body = good(requests.get(f"{api.url}/", timeout=PATIENCE))
    assert body["name"] == "Local LLM"
    assert body["device"] == "cpu"
    assert body["loaded_models"] == ["gpt2"]


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/models/invalid-model", None),
        ("PUT", "/models/invalid-model", {"name": "New"}),
        ("DELETE", "/models/invalid-model", None),
        ("POST", "/models/invalid-model/load", {}),
        ("POST", "/generate", {"model_id": "invalid-model", "prompt": "Hello"}),
        ("POST", "/pipeline", {"model_id": "invalid-model", "task": "fill-mask", "inputs": "Hello"}),
        ("DELETE", "/cache?model_id=invalid-model", None),
    ],
)
def test_a_model_that_is_not_registered_is_not_found(api: Server, method: str, path: str, body: Any) -> None:
    assert bad(api.call(method, path, json=body), 404) == "Model 'invalid-model' not found"


def test_a_failure_outside_the_routes_has_the_documented_shape_too(api: Server) -> None:
    assert "/api/huggingface/nothing" in bad(api.call("GET", "/nothing"), 404)
    refused = api.call("PATCH", "/models")
    assert "PATCH" in bad(refused, 405)
    assert {"GET", "POST"} <= set(refused.headers["Allow"].split(", "))
    json_type = {"Content-Type": "application/json"}
    assert "JSON" in bad(api.call("POST", "/generate", data="{'single': 'quotes'}", headers=json_type), 400)
    assert "object" in bad(api.call("POST", "/generate", data="[1]", headers=json_type), 400)
    text = {"Content-Type": "text/plain"}
    assert "application/json" in bad(api.call("POST", "/generate", data="{}", headers=text), 415)


def test_without_transformers_the_registry_works_and_models_are_refused_with_what_to_install(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    for name in ("transformers", "torch"):
        (tmp_path / "broken" / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')\n")
    server = start_server(PYTHONPATH=str(tmp_path / "broken"))
    add_gpt2(server)
    assert good(server.call("GET", "/models"))["count"] == 1
    assert good(server.call("GET", "/dependencies"))["dependencies"] == {
        "transformers": False,
        "torch": False,
        "cuda_available": False,
    }
    for path, body in (
        ("/models/gpt2/load", {}),
        ("/generate", {"model_id": "gpt2", "prompt": "Hello"}),
        ("/pipeline", {"model_id": "gpt2", "task": "text-generation", "inputs": "Hello"}),
    ):
        message = "Transformers library not available. Please install: pip install transformers torch"
        assert bad(server.call("POST", path, json=body), 400) == message
