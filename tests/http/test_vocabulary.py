"""A tokenizer that knows more tokens than the model has rows: such a token is refused, and harms nothing else.

On CUDA it would be a failed assertion in a kernel, after which the process could not use the device any more.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import changed_models
import pytest
import torch
import transformers
from transformers import AutoTokenizer

import huggingface
from app import create_app
from config import Settings
from huggingface.loading.openvino import load as loading
from huggingface.tasks.positions import max_positions

API = "/api/huggingface"
EXTRA = "<image_soft_token>"
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def larger(root: Path, name: str, model_id: str, **roles: str) -> str:
    """A tiny model whose tokenizer has a token beyond its table."""
    folder = changed_models.copy(root, name, model_id)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([EXTRA])
    if roles:
        tokenizer.add_special_tokens(roles)
    tokenizer.save_pretrained(folder)
    return model_id


@pytest.fixture(params=["torch", "auto"])
def api(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(loading, "CONVERTED_HERE_ASIDE", loading.CONVERTED_HERE)  # which is quicker
    settings = Settings(
        _env_file=None, registry=tmp_path / "r.json", models_dir=tmp_path, device="cpu", backend=request.param
    )
    app = create_app(settings)
    yield app.test_client
    huggingface.close(app)


def register(client: Any, model_id: str, model_type: str) -> None:
    fields = {"model_id": model_id, "name": "x", "model_type": model_type}
    assert client.post(f"{API}/models", json=fields).status_code == 200
    assert client.post(f"{API}/models/{model_id}/load", json={"wait_for_graph": True}).status_code == 200


def refused(answer: Any, field: str = "") -> None:
    assert answer.status_code == 400, answer.get_json()
    assert "no row for" in answer.get_json()["error"]
    assert field in answer.get_json()["error"]


def test_a_prompt_with_such_a_token_is_refused_and_others_in_the_batch_go_on(
    api: Callable[[], Any], tmp_path: Path
) -> None:
    model_id = larger(tmp_path, "llama", "tiny/larger")
    register(api(), model_id, "text-generation")

    def ask(prompt: str, **fields: Any) -> Any:
        return api().post(f"{API}/generate", json={"model_id": model_id, "prompt": prompt, **GREEDY, **fields})

    alone = ask("The cat").get_json()["response"]
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, text) for text in ("The cat", f"The {EXTRA}", "The cat", f"{EXTRA}", "The cat")]
        answers = [each.result(60) for each in asked]
    for answer in answers[1::2]:
        refused(answer, "'prompt'")
    assert [answer.get_json()["response"] for answer in answers[::2]] == [alone] * 3
    refused(ask(f"The {EXTRA}", num_beams=2))
    messages = [{"role": "user", "content": EXTRA}]
    refused(api().post(f"{API}/generate", json={"model_id": model_id, "messages": messages, **GREEDY}), "'messages'")
    body = {"model_id": model_id, "task": "text-generation", "inputs": f"The {EXTRA}", **GREEDY}
    refused(api().post(f"{API}/pipeline", json=body))


@pytest.mark.parametrize(
    ("name", "model_type", "task"),
    [
        ("distilbert-sst2", "sentiment-analysis", "sentiment-analysis"),
        ("bert-embed", "feature-extraction", "feature-extraction"),
        ("bart", "summarization", "summarization"),
        ("t5", "translation", "translation_en_to_de"),
    ],
)
def test_a_task_refuses_an_input_with_such_a_token_and_the_next_call_is_answered(
    name: str, model_type: str, task: str, api: Callable[[], Any], tmp_path: Path
) -> None:
    model_id = larger(tmp_path, name, f"tiny/larger-{name}")
    register(api(), model_id, model_type)

    def run(inputs: Any) -> Any:
        return api().post(f"{API}/pipeline", json={"model_id": model_id, "task": task, "inputs": inputs})

    right = run("The cat sat")
    assert right.status_code == 200, right.get_json()
    refused(run(f"The {EXTRA} sat"), "'inputs'")
    refused(run(["The cat sat", f"The {EXTRA} sat"]), "'inputs")
    assert run("The cat sat").get_json()["results"] == right.get_json()["results"]


@pytest.mark.parametrize(
    ("name", "task", "inputs", "parameters", "field"),
    [
        ("bert-mlm", "fill-mask", "The [MASK]", {"targets": ["cat", EXTRA]}, "'targets'"),
        ("bert-nli", "zero-shot-classification", "The cat", {"candidate_labels": ["a", EXTRA]}, "'candidate_labels'"),
        ("bert-qa", "question-answering", {"question": EXTRA, "context": "The cat"}, {}, "'inputs.question'"),
    ],
)
def test_a_refusal_names_the_field_that_holds_such_a_token(
    name: str, task: str, inputs: Any, parameters: Any, field: str, client: Any, models_dir: Path
) -> None:
    model_id = larger(models_dir, name, f"tiny/larger-{name}")
    register(client, model_id, task)
    body = {"model_id": model_id, "task": task, "inputs": inputs, **parameters}
    refused(client.post(f"{API}/pipeline", json=body), field)


def test_each_route_names_its_own_field_for_a_prompt_with_such_a_token(client: Any, models_dir: Path) -> None:
    """OpenAI's, Ollama's, and the documented one for a model that makes a chat of a prompt."""
    register(client, larger(models_dir, "llama", "tiny/larger-chat"), "conversational")
    register(client, larger(models_dir, "bert-embed", "tiny/larger-embed"), "feature-extraction")
    chat, embed = {"model": "tiny/larger-chat"}, {"model": "tiny/larger-embed"}
    for path, body, field in (
        (f"{API}/generate", {"model_id": "tiny/larger-chat", "prompt": EXTRA}, "prompt"),
        ("/api/generate", {**chat, "prompt": EXTRA}, "prompt"),
        ("/v1/completions", {**chat, "prompt": EXTRA}, "prompt"),
        ("/v1/responses", {**chat, "input": EXTRA}, "input"),
        ("/v1/embeddings", {**embed, "input": ["The cat", EXTRA]}, "input"),
        ("/api/embeddings", {**embed, "prompt": EXTRA}, "prompt"),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert f"'{field}': it holds a token" in answer.get_data(as_text=True), (path, answer.get_json())


def test_texts_of_every_form_are_made_without_such_a_token(api: Callable[[], Any], tmp_path: Path) -> None:
    """Objects of a schema, any objects, choices, expressions, required calls; and its own text, of other tokens."""
    model_id = larger(tmp_path, "llama", "tiny/larger")
    register(api(), model_id, "text-generation")
    schema = {"type": "object", "properties": {"a": {"enum": [EXTRA]}}, "required": ["a"]}
    for form, expected in (
        ({"json_schema": schema}, f'{{"a": "{EXTRA}"}}'),
        ({"choice": [f"a {EXTRA}"]}, f"a {EXTRA}"),
        ({"regex": "ab{3}"}, "abbb"),
        ({"json_object": True}, None),
    ):
        body = {"model_id": model_id, "prompt": "The", "max_new_tokens": 60, "do_sample": False, **form}
        answer = api().post(f"{API}/generate", json=body)
        assert answer.status_code == 200, answer.get_json()
        assert expected in (None, answer.get_json()["response"])
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    body = {"model": model_id, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 60}
    body |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    answer = api().post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.get_json()
    assert answer.get_json()["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


def test_rows_are_not_padded_with_a_token_that_the_model_has_no_row_for(tmp_path: Path) -> None:
    """Texts of several lengths in one list are answered as each alone."""
    model_id = larger(tmp_path, "distilbert-sst2", "tiny/pads", pad_token="<pad beyond the table>")
    model = changed_models.load(tmp_path, model_id, "sentiment-analysis")
    texts = ["The cat", "The cat sat on the mat and looked at the sea", "A dog"]
    together = model.run("sentiment-analysis", texts, {})
    alone = [model.run("sentiment-analysis", [text], {})[0] for text in texts]
    model.close()
    scores = torch.tensor([[each["score"] for each in answers] for answers in (together, alone)])
    assert torch.allclose(scores[0], scores[1], atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["CTRLConfig", "CodeGenConfig", "GPTJConfig", "IBertConfig", "RobertaConfig", "GPT2Config"]
)
def test_how_many_positions_a_model_has_is_known_before_it_is_run(kind: str) -> None:
    """Beyond them a CPU raises, and CUDA ends for the whole process."""
    shape = {"vocab_size": 100, "n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 64, "rotary_dim": 8, "dff": 32}
    if kind in ("IBertConfig", "RobertaConfig"):
        shape = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
        shape |= {"max_position_embeddings": 66}
    config = getattr(transformers, kind)(**shape, pad_token_id=1)
    model = transformers.AutoModel.from_config(config).eval()
    maximum = max_positions(model)
    assert maximum in (63, 64)  # RoBERTa's begin after the padding index, which takes one more
    tokens = torch.full((1, maximum), 7)
    with torch.inference_mode():
        model(input_ids=tokens)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 70), 7))
