"""The API document's clients against a live server: its curl commands, both workflows, both SDKs.

The commands are the document's own, for tiny models under the same ids; only the address differs.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Server
from documented import add_gpt2, emptied

CLIENTS = Path(__file__).resolve().parent.parent / "clients"
DOCUMENTED_ADDRESS = "http://localhost:5000"

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture
def api(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> Server:
    """The live server, with nothing registered and nothing in memory."""
    return emptied(server, models_dir, tiny)


def run(server: Server, command: str) -> dict[str, Any]:
    """Run a command line of the document; its output, which is to be the JSON body of a success."""
    words = shlex.split(command.replace("\\\n", " ").replace(DOCUMENTED_ADDRESS, server.url))
    done = subprocess.run(
        [*words, "--silent", "--show-error", "--noproxy", "*"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    body: dict[str, Any] = json.loads(done.stdout)
    assert body["success"] is True, body
    return body


ADD = """
curl -X POST "http://localhost:5000/api/huggingface/models" \\
  -H "Content-Type: application/json" \\
  -d '{
    "model_id": "gpt2",
    "name": "GPT-2",
    "model_type": "text-generation",
    "description": "OpenAI GPT-2 language model"
  }'
"""
UPDATE = """
curl -X PUT "http://localhost:5000/api/huggingface/models/gpt2" \\
  -H "Content-Type: application/json" \\
  -d '{
    "description": "Updated OpenAI GPT-2 language model",
    "parameters": {
      "max_new_tokens": 75,
      "temperature": 0.9
    }
  }'
"""
RELOAD = """
curl -X POST "http://localhost:5000/api/huggingface/models/gpt2/load" \\
  -H "Content-Type: application/json" \\
  -d '{"force_reload": true}'
"""
GENERATE = """
curl -X POST "http://localhost:5000/api/huggingface/generate" \\
  -H "Content-Type: application/json" \\
  -d '{
    "model_id": "gpt2",
    "prompt": "The future of artificial intelligence is",
    "max_new_tokens": 50,
    "temperature": 0.7
  }'
"""
PIPELINE = """
curl -X POST "http://localhost:5000/api/huggingface/pipeline" \\
  -H "Content-Type: application/json" \\
  -d '{
    "model_id": "gpt2",
    "task": "text-generation",
    "inputs": "Once upon a time",
    "max_length": 100,
    "num_return_sequences": 1
  }'
"""
GREEDY = """
curl -X POST "http://localhost:5000/api/huggingface/generate" \\
  -H "Content-Type: application/json" \\
  -d '{
    "model_id": "gpt2",
    "prompt": "Hello",
    "max_new_tokens": 20,
    "do_sample": false
  }'
"""


def get(path: str) -> str:
    return f'curl -X GET "{DOCUMENTED_ADDRESS}{path}"'


def delete(path: str) -> str:
    return f'curl -X DELETE "{DOCUMENTED_ADDRESS}{path}"'


@needs_curl
def test_every_curl_command_of_the_document_works_in_its_order(api: Server) -> None:
    root = "/api/huggingface"
    assert run(api, ADD)["message"] == "Model 'gpt2' added successfully"
    assert run(api, get(f"{root}/models?type=text-generation"))["count"] == 1
    assert run(api, get(f"{root}/models/gpt2"))["model"]["name"] == "GPT-2"
    assert run(api, UPDATE)["model"]["parameters"] == {"max_new_tokens": 75, "temperature": 0.9}
    assert run(api, RELOAD)["device"] == "cpu"
    effective = {"max_new_tokens": 50, "temperature": 0.7, "do_sample": True, "top_p": 0.9, "top_k": 50}
    assert run(api, GENERATE)["parameters"] == {**effective, "repetition_penalty": 1.1}
    [result] = run(api, PIPELINE)["results"]
    assert result["generated_text"].startswith("Once upon a time")
    assert run(api, get(f"{root}/cache"))["cached_pipelines"] == ["gpt2_text-generation"]
    assert run(api, get(f"{root}/statistics"))["statistics"]["total_usage"] == 2
    assert run(api, get(f"{root}/model-types"))["model_types"] == ["text-generation"]
    assert run(api, get(f"{root}/dependencies"))["dependencies"]["transformers"] is True
    assert run(api, delete(f"{root}/cache?model_id=gpt2"))["message"]
    assert run(api, f'curl -X POST "{DOCUMENTED_ADDRESS}{root}/models/gpt2/load"')["model_info"]["model_id"] == "gpt2"
    assert run(api, GREEDY)["response"] == run(api, GREEDY)["response"]
    assert run(api, delete(f"{root}/cache"))["message"] == "All caches cleared"
    assert run(api, get("/"))["loaded_models"] == []
    assert run(api, delete(f"{root}/models/gpt2"))["models_data"]["count"] == 0


@needs_curl
def test_the_basic_text_generation_workflow_works(api: Server) -> None:
    assert run(api, get("/api/huggingface/dependencies"))["dependencies"]["torch"] is True
    added = run(
        api,
        """
        curl -X POST "http://localhost:5000/api/huggingface/models" \\
          -H "Content-Type: application/json" \\
          -d '{
            "model_id": "gpt2",
            "name": "GPT-2",
            "model_type": "text-generation"
          }'
        """,
    )
    assert added["model"]["status"] == "available"
    generated = run(
        api,
        """
        curl -X POST "http://localhost:5000/api/huggingface/generate" \\
          -H "Content-Type: application/json" \\
          -d '{
            "model_id": "gpt2",
            "prompt": "Hello, how are you?",
            "max_new_tokens": 50
          }'
        """,
    )
    assert generated["response"]
    assert generated["parameters"]["max_new_tokens"] == 50


@needs_curl
def test_the_model_management_workflow_works(api: Server) -> None:
    add_gpt2(api)
    assert run(api, get("/api/huggingface/models"))["count"] == 1
    assert run(api, get("/api/huggingface/models/gpt2"))["model"]["parameters"] == {}
    updated = run(
        api,
        """
        curl -X PUT "http://localhost:5000/api/huggingface/models/gpt2" \\
          -H "Content-Type: application/json" \\
          -d '{
            "parameters": {
              "temperature": 0.9,
              "max_new_tokens": 100
            }
          }'
        """,
    )
    assert updated["model"]["parameters"] == {"temperature": 0.9, "max_new_tokens": 100}
    assert run(api, get("/api/huggingface/statistics"))["statistics"]["total_models"] == 1


def client(server: Server, *words: str) -> dict[str, Any]:
    """Run a client program on the server's address and the document's model; the JSON that it prints."""
    done = subprocess.run([*words, server.url, "gpt2"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def test_the_python_client_of_the_document_works(api: Server) -> None:
    answers = client(api, sys.executable, str(CLIENTS / "client.py"))
    assert answers["added"]["message"] == "Model 'gpt2' added successfully"
    assert answers["generated"]["parameters"]["max_new_tokens"] == 50
    assert answers["response"] == answers["generated"]["response"] != ""
    assert [model["model_id"] for model in answers["listed"]["models"]] == ["gpt2"]


def test_the_javascript_client_of_the_document_works(api: Server) -> None:
    node = shutil.which("node")
    assert node, "Node.js 18 or newer is needed to run the document's JavaScript client"
    answers = client(api, node, str(CLIENTS / "client.mjs"))
    assert answers["added"]["model"]["description"] == "Added by JavaScript"
    assert answers["generated"]["parameters"]["max_new_tokens"] == 30
    assert answers["response"] == answers["generated"]["response"] != ""
