"""What the tests of the API document share: tiny models under the document's own ids, the record's shape, body checks.

Plain functions and data; no fixture, so that test modules can import from it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
from conftest import Server

RECORD = [
    "model_id",
    "name",
    "model_type",
    "description",
    "parameters",
    "added_date",
    "last_used",
    "usage_count",
    "status",
]
INFO = ["model_id", "name", "model_type"]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}")

IDS = {"gpt2": "gpt2", "microsoft/DialoGPT-medium": "dialogpt", "facebook/bart-large-cnn": "bart"}

# Every model type: a tiny model of it, the task to ask of it, inputs, and the keys of one result.
ASK = {"question": "Who keeps the keys?", "context": "Anna Schmidt keeps the keys. She was born in Hamburg."}
TYPES: dict[str, tuple[str, str, Any, set[str]]] = {
    "text-generation": ("gpt2", "text-generation", "Once upon a time", {"generated_text"}),
    "conversational": ("dialogpt", "text-generation", "How do you do?", {"generated_text"}),
    "text2text-generation": ("t5", "text2text-generation", "The house is wonderful.", {"generated_text"}),
    "summarization": ("bart", "summarization", "The bridge must be closed for repairs.", {"summary_text"}),
    "translation": ("marian", "translation", "The house is wonderful.", {"translation_text"}),
    "question-answering": ("bert-qa", "question-answering", ASK, {"score", "start", "end", "answer"}),
    "fill-mask": ("bert-mlm", "fill-mask", "She lives near the [MASK].", {"score", "token", "token_str", "sequence"}),
    "sentiment-analysis": ("distilbert-sst2", "sentiment-analysis", "I love this movie!", {"label", "score"}),
}


def emptied(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> Server:
    """The server with nothing registered and nothing in memory, and with the document's models in its models folder."""
    for model_id, name in IDS.items():
        if not (models_dir / model_id).exists():
            shutil.copytree(models_dir / tiny(name), models_dir / model_id)
    for name, *_ in TYPES.values():
        tiny(name)
    for model in good(server.call("GET", "/models"))["models"]:
        good(server.call("DELETE", f"/models/{model['model_id']}"))
    good(server.call("DELETE", "/cache"))
    return server


def good(response: requests.Response) -> dict[str, Any]:
    """The body of a successful answer."""
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "application/json"
    body: dict[str, Any] = response.json()
    assert next(iter(body)) == "success", response.text
    assert body["success"] is True, response.text
    return body


def bad(response: requests.Response, status: int) -> str:
    """The message of a refused request, in the one documented shape."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert list(body) == ["success", "error"], response.text
    assert body["success"] is False, response.text
    message: str = body["error"]
    return message


def add_gpt2(api: Server, **fields: Any) -> None:
    """Register the model that most of the document's examples use."""
    body = {"model_id": "gpt2", "model_type": "text-generation", "name": "GPT-2"}
    body["description"] = "OpenAI GPT-2 language model"
    api.prepare(body["model_id"], body["model_type"])
    good(api.call("POST", "/models", json={**body, **fields}))
