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
def api(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    settings = Settings(
        _env_file=None, registry=tmp_path / "r.json", models_dir=tmp_path, device="cpu", engine=request.param
    )
    app = create_app(settings)
    yield app.test_client
    huggingface.close(app)


def register(client: Any, model_id: str, model_type: str) -> None:
    fields = {"model_id": model_id, "name": "x", "model_type": model_type}
    assert client.post(f"{API}/models", json=fields).status_code == 200


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
    refused(run(f"The {EXTRA} sat"))
    refused(run(["The cat sat", f"The {EXTRA} sat"]))
    assert run("The cat sat").get_json()["results"] == right.get_json()["results"]


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
    most = max_positions(model)
    assert most in (63, 64)  # RoBERTa's begin after the padding index, which takes one more
    tokens = torch.full((1, most), 7)
    with torch.inference_mode():
        model(input_ids=tokens)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 70), 7))
