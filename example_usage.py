"""A tour of the API with `requests`: `python example_usage.py [BASE_URL] [--model ID] [--type TYPE]`.

Needs a running server. Registers a model, shows and changes it, loads it, generates with it, shows the cache and the
statistics, and restores everything. It uses only the API, so it can be copied out of this repository.
"""
# ruff: noqa: T201 - a program that talks to its user

from __future__ import annotations

import argparse
import sys
from typing import Any
from urllib.parse import quote

import requests

STARTER = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Refused(Exception):
    """The server answered `{"success": false, "error": "…"}`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{message} (status {status})")
        self.status = status


class Client:
    """Calls to one server."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url.rstrip("/")
        self._session = requests.Session()

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, **query: str) -> dict[str, Any]:
        """Returns the JSON body of a successful answer. A first load may download the model: the timeout is long."""
        response = self._session.request(method, f"{self.base_url}{path}", json=body, params=query, timeout=1800)
        answer: dict[str, Any] = response.json()
        if not answer["success"]:
            raise Refused(response.status_code, answer["error"])
        return answer

    def api(self, method: str, path: str, body: dict[str, Any] | None = None, **query: str) -> dict[str, Any]:
        """Calls a route under `/api/huggingface`."""
        return self.call(method, f"/api/huggingface{path}", body, **query)


def look_around(client: Client) -> bool:
    """Prints what is running; returns whether models can be run there."""
    server = client.call("GET", "/")
    print(f"{server['name']} {server['version']} at {client.base_url}, models go to: {server['device']}")
    found = client.api("GET", "/dependencies")["dependencies"]
    print("Installed there:", ", ".join(f"{name}: {'yes' if there else 'no'}" for name, there in found.items()))
    return bool(found["transformers"] and found["torch"])


def register(client: Client, model_id: str, model_type: str) -> bool:
    """Registers the model; returns whether it is new to the server."""
    fields = {"model_id": model_id, "name": model_id.rsplit("/", 1)[-1], "model_type": model_type}
    try:
        print(client.api("POST", "/models", fields)["message"])
    except Refused as refused:
        if refused.status != 409:
            raise
        print(f"Registered already and used unchanged: {refused}")
        return False
    return True


def show_models(client: Client, path: str) -> dict[str, Any]:
    """Lists the models and returns the record of one."""
    models = client.api("GET", "/models")
    print(f"{models['count']} registered:", ", ".join(model["model_id"] for model in models["models"]))
    record: dict[str, Any] = client.api("GET", path)["model"]
    print(f"This one is for {record['model_type']} and was used {record['usage_count']} times")
    same_type = client.api("GET", "/models", type=record["model_type"])
    print(f"Of the type {record['model_type']}: {same_type['count']}")
    return record


def change(client: Client, path: str) -> None:
    """Changes the model's description and its default parameters."""
    parameters = {"max_new_tokens": 40, "do_sample": False}
    changed = client.api("PUT", path, {"description": "Changed by the tour", "parameters": parameters})
    print(changed["message"], "- its default parameters are now", changed["model"]["parameters"])


def generate(client: Client, model_id: str) -> None:
    """Generates text from a prompt, from a chat, and by a pipeline."""
    prompt = "What is the capital of Japan?"
    answer = client.api("POST", "/generate", {"model_id": model_id, "prompt": prompt, "max_new_tokens": 20})
    print(f"Prompt: {prompt!r}\nAnswer: {answer['response']!r}\nWith:   {answer['parameters']}")

    messages = [
        {"role": "user", "content": "What is the capital of Italy?"},
        {"role": "assistant", "content": "Rome."},
        {"role": "user", "content": "And what is the capital of Spain?"},
    ]
    answer = client.api("POST", "/generate", {"model_id": model_id, "messages": messages})
    print(f"Chat:   {messages[-1]['content']!r}\nAnswer: {answer['response']!r}")

    request = {"model_id": model_id, "task": "text-generation", "inputs": ["Once upon a time", "Far away,"]}
    answer = client.api("POST", "/pipeline", {**request, "max_new_tokens": 15, "do_sample": False})
    for [result] in answer["results"]:
        print(f"Pipeline: {result['generated_text']!r}")


def show_use(client: Client) -> None:
    """Shows the models in memory and the usage."""
    cache = client.api("GET", "/cache")
    for model_id, cached in cache["cached_models"].items():
        print(f"In memory: {model_id} on {cached['device']} since {cached['loaded_at']}")
    print("Opened pipelines:", ", ".join(cache["cached_pipelines"]))
    statistics = client.api("GET", "/statistics")["statistics"]
    print(
        f"{statistics['total_usage']} uses of {statistics['total_models']} models; most used:", statistics["most_used"]
    )
    print("Model types here:", ", ".join(client.api("GET", "/model-types")["model_types"]))


def tidy_up(client: Client, path: str, model_id: str, before: dict[str, Any] | None, loaded: bool) -> None:
    """Undoes the changes: removes the model if it was new, else restores its old fields."""
    if before is None:
        print(client.api("DELETE", path)["message"])
        return
    fields = {name: before[name] for name in ("description", "parameters")}
    print(client.api("PUT", path, fields)["message"])
    if not loaded:
        print(client.api("DELETE", "/cache", model_id=model_id)["message"])


def tour(client: Client, model_id: str, model_type: str) -> None:
    """Runs all steps of the tour."""

    def step(title: str) -> None:
        print(f"\n== {title}")

    step("What is running")
    if not look_around(client):
        raise SystemExit("Models cannot be run there: pip install transformers torch, then start the server again")
    loaded = model_id in client.api("GET", "/cache")["cached_models"]
    path = f"/models/{quote(model_id, safe='')}"  # a raw slash works too
    step("Register a model")
    new = register(client, model_id, model_type)
    before = None if new else client.api("GET", path)["model"]
    try:
        step("List and show")
        show_models(client, path)
        step("Change it")
        change(client, path)
        step("Load it")
        answer = client.api("POST", f"{path}/load")
        print(answer["message"], "on", answer["device"])
        step("Generate")
        generate(client, model_id)
        step("What is in memory, and what was used")
        show_use(client)
    finally:
        step("Tidy up")
        tidy_up(client, path, model_id, before, loaded)


def main(arguments: list[str] | None = None) -> int:
    """Runs the tour; returns the exit status."""
    parser = argparse.ArgumentParser(description="A tour of the API on a running server.")
    parser.add_argument("base_url", nargs="?", default="http://localhost:5000", help="default: %(default)s")
    parser.add_argument("--model", default=STARTER, help="a model that generates text (default: %(default)s)")
    parser.add_argument("--type", default="conversational", help="its type, where it is new (default: %(default)s)")
    options = parser.parse_args(arguments)
    client = Client(options.base_url)
    try:
        tour(client, options.model, options.type)
    except requests.ConnectionError:
        print(f"No server answers at {client.base_url}. Start one with: make run", file=sys.stderr)
    except requests.JSONDecodeError:
        print(f"The server at {client.base_url} is not Local LLM", file=sys.stderr)
    except (requests.RequestException, Refused) as error:
        print(f"The tour ended early: {error}", file=sys.stderr)
    else:
        print("\nThat was the tour. Every route, to read and try:", f"{client.base_url}/docs")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
