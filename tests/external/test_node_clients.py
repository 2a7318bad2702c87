"""The clients for Node on a live server: `openai`, `ollama`, and huggingface.js for every task.

`make test` installs them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import written_models
from conftest import PATIENCE, Server

CLIENTS = Path(__file__).resolve().parent.parent / "clients"
CONTEXT = "the cat sat on the mat and the dog ran to the house"
# Method of huggingface.js, model, its type, `?task=`, arguments.
TASKS: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("summarization", "bart", "summarization", "", {"inputs": CONTEXT}),
    ("summarization", "bart", "summarization", "", {"inputs": CONTEXT, "parameters": {"max_length": 100}}),
    ("translation", "t5", "translation", "translation_en_to_fr", {"inputs": CONTEXT}),
    (
        "questionAnswering",
        "bert-qa",
        "question-answering",
        "",
        {"inputs": {"question": "where is the cat", "context": CONTEXT}},
    ),
    ("fillMask", "bert-mlm", "fill-mask", "", {"inputs": "the [MASK] sat"}),
    ("textClassification", "distilbert-sst2", "text-classification", "", {"inputs": "the cat"}),
    ("tokenClassification", "bert-ner", "token-classification", "", {"inputs": CONTEXT}),
    (
        "zeroShotClassification",
        "bert-nli",
        "text-classification",
        "zero-shot-classification",
        {"inputs": "the cat", "parameters": {"candidate_labels": ["cat", "dog"]}},
    ),
    (
        "zeroShotClassification",
        "bert-nli",
        "text-classification",
        "",
        {"inputs": ["the cat"], "parameters": {"candidate_labels": ["cat", "dog"]}},
    ),
    (
        "tableQuestionAnswering",
        "tapas",
        "table-question-answering",
        "",
        {"inputs": {"query": "cat", "table": {"name": ["cat", "dog"], "age": ["1", "2"]}}},
    ),
    ("featureExtraction", "bert-embed", "feature-extraction", "", {"inputs": "the cat"}),
    (
        "sentenceSimilarity",
        "bert-embed",
        "feature-extraction",
        "",
        {"inputs": {"source_sentence": "the cat", "sentences": ["a dog", "the cat"]}},
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """A live server of these tests' own: they register models under other types than others do."""
    server = Server(tmp_path_factory.mktemp("server"), models_dir)
    yield server
    server.stop()


def node(program: str, *arguments: str) -> Any:
    """What a program prints, as JSON."""
    assert (CLIENTS / "node_modules").is_dir(), "run `make test`, which installs the clients"
    environment = {**os.environ, "NO_PROXY": "*", "no_proxy": "*"}
    done = subprocess.run(
        ["node", str(CLIENTS / program), *arguments], capture_output=True, text=True, timeout=PATIENCE, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_openai_for_node(server: Server, tiny: Callable[[str], str]) -> None:
    model, embedder = tiny("llama"), tiny("bert-embed")
    server.add(model, "text-generation")
    server.add(embedder, "feature-extraction")
    told = node("openai.mjs", f"{server.url}/v1", model, embedder)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "where is the cat?"}]
    said = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12)
    assert told["said"] == told["streamed"] == told["response"] == said.choices[0].message.content
    assert told["call"]["name"] == "weather"
    assert json.loads(told["call"]["arguments"]) == {"city": "Oslo"}
    vector = client.embeddings.create(model=embedder, input="the cat").data[0].embedding
    assert told["embedding"] == pytest.approx(vector, abs=1e-6)
    assert told["error"] == {"status": 404, "code": "model_not_found", "kind": "NotFoundError"}


def test_ollama_for_node(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> None:
    model, embedder = tiny("llama"), tiny("bert-embed")
    written = written_models.build(models_dir, "tiny/written", written_models.ANSWERS, written_models.TEMPLATE)
    for name, kind in ((model, "text-generation"), (embedder, "feature-extraction"), (written, "conversational")):
        server.add(name, kind)
    told = node("ollama.mjs", server.url, model, written, embedder)
    assert {model, written, embedder} <= set(told["listed"])
    assert told["capabilities"] == ["completion"]
    body = {"model": model, "messages": [{"role": "user", "content": "where is the cat?"}], "stream": False}
    body["options"] = {"temperature": 0, "num_predict": 12}
    wanted = requests.post(f"{server.url}/api/chat", json=body, timeout=PATIENCE).json()["message"]["content"]
    assert told["said"] == told["streamed"] == told["generated"] == wanted
    assert told["done"] == "length"
    assert json.loads(told["formed"]) == {"a": 1}
    assert [(call["name"], call["arguments"]) for call in told["calls"]] == [("weather", {"city": "Oslo"}), ("now", {})]
    assert (told["answered"], told["thought"]) == ("Oslo is cold.", "It is early.")
    assert (told["vectors"], told["vector"]) == (2, 32)
    assert {model, written, embedder} <= set(told["running"])
    assert told["unloaded"] == "unload"
    assert told["unknown"] == {"status": 404, "error": "model 'nope' not found"}
    assert told["refused"]["status"] == told["copied"]["status"] == 400
    assert "options.mirostat" in told["refused"]["error"]


def test_huggingface_js_makes_text(server: Server, tiny: Callable[[str], str]) -> None:
    model = tiny("llama")
    server.add(model, "text-generation")
    address = f"{server.api}/models/{model}"

    def ask(method: str, **arguments: Any) -> Any:
        return node("huggingface.mjs", address, method, json.dumps(arguments))

    body = {"inputs": "the cat", "parameters": {"max_new_tokens": 9}}
    [wanted] = requests.post(address, json=body, timeout=PATIENCE).json()
    options = {"max_new_tokens": 9, "temperature": 0}
    made = ask("textGeneration", inputs="the cat", parameters=options)
    assert made == wanted
    echoed = ask("textGeneration", inputs="the cat", parameters={**options, "return_full_text": True})
    assert echoed["generated_text"] == "the cat" + wanted["generated_text"]
    messages = [{"role": "user", "content": "where is the cat?"}]
    answer = ask("chatCompletion", messages=messages, max_tokens=9, temperature=0)
    pieces = ask("chatCompletionStream", messages=messages, max_tokens=9, temperature=0)
    said = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces)
    assert said == answer["choices"][0]["message"]["content"]
    assert "nonsense" in ask("textGeneration", inputs="the cat", parameters={"nonsense": 1})["error"]


@pytest.mark.parametrize(("method", "name", "model_type", "task", "arguments"), TASKS, ids=[task[0] for task in TASKS])
def test_huggingface_js_does_every_task(
    method: str,
    name: str,
    model_type: str,
    task: str,
    arguments: dict[str, Any],
    server: Server,
    tiny: Callable[[str], str],
) -> None:
    """The client checks the answer's form itself, and gives what the route gives."""
    model = tiny(name)
    server.add(model, model_type)
    address = f"{server.api}/models/{model}" + (f"?task={task}" if task else "")
    told = node("huggingface.mjs", address, method, json.dumps(arguments))
    assert "error" not in told, told
    answer = requests.post(address, json=arguments, timeout=PATIENCE).json()
    if method in ("summarization", "translation", "textClassification"):
        [answer] = answer
    assert told == answer
