"""Folders that their author filled with anything: refused, or failing at their own requests; the server goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import huggingface
from app import create_app
from config import Settings


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Any]:
    """A client of an app of these tests' own, which has to outlive them all."""
    registry = tmp_path_factory.mktemp("hostile") / "models.json"
    app = create_app(Settings(_env_file=None, registry=registry, models_dir=models_dir, device="cpu"))
    yield app.test_client()
    assert app.test_client().get("/health").status_code == 200
    huggingface.close(app)


def post(client: Any, path: str, **body: Any) -> Any:
    """The answer to a request of the documented API."""
    return client.post(f"/api/huggingface{path}", json=body)


def add(client: Any, model_id: str, model_type: str | None = None, **fields: Any) -> Any:
    """The answer to the registering of a model."""
    more = {} if model_type is None else {"model_type": model_type}
    return post(client, "/models", model_id=model_id, name=model_id, **more, **fields)


@pytest.fixture
def changed(models_dir: Path, tiny: Callable[[str], str], request: pytest.FixtureRequest) -> Callable[..., str]:
    """Makes a copy of a tiny model with a JSON file changed, under an id of the test's own."""

    def make(name: str, file: str = "config.json", change: Callable[[Any], Any] | None = None, **fields: Any) -> str:
        model_id = f"hostile/{abs(hash(request.node.nodeid)) % 10**12}-{name}"
        folder = models_dir / model_id
        if not folder.exists():
            shutil.copytree(models_dir / tiny(name), folder)
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(change(content) if change else {**content, **fields}))
        return model_id

    return make


# Panics ---------------------------------------------------------------------------------------------------------------

PANICS = {
    "while reading": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "while writing": {
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"Regex": "."}, "content": "a"},
                {"type": "Strip", "content": "a", "start": 50, "stop": 50},
            ],
        }
    },
}


@pytest.mark.parametrize("part", PANICS.values(), ids=PANICS.keys())
@pytest.mark.parametrize(
    ("name", "model_type", "path", "body"),
    [
        ("gpt2", "text-generation", "/generate", {"prompt": "The cat", "max_new_tokens": 3}),
        ("gpt2", "text-generation", "/generate", {"prompt": "The cat", "max_new_tokens": 3, "num_beams": 2}),
        ("gpt2", "text-generation", "/pipeline", {"task": "text-generation", "inputs": "The cat"}),
        ("bart", "summarization", "/pipeline", {"task": "summarization", "inputs": "The cat"}),
        ("bert-mlm", "fill-mask", "/pipeline", {"task": "fill-mask", "inputs": "The [MASK]."}),
    ],
    ids=["generate", "beams", "pipeline", "summarization", "fill-mask"],
)
def test_a_panic_of_the_tokenizer_is_an_answer(
    client: Any, changed: Callable[..., str], part: dict[str, Any], name: str, model_type: str, path: str, body: Any
) -> None:
    """Each request has one, with the model's name, and the next has one too."""
    model_id = changed(name, "tokenizer.json", **part)
    changed(name, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # others bring parts of their own
    add(client, model_id, model_type)
    for _ in range(2):
        answer = post(client, path, model_id=model_id, **body)
        assert answer.status_code == 500
        assert f"Model '{model_id}' " in answer.json["error"]
    assert post(client, f"/models/{model_id}/unload").json["message"].endswith("unloaded successfully")


def test_a_panic_while_the_tokenizer_is_loaded_is_told_as_damage(client: Any, changed: Callable[..., str]) -> None:
    """The load is refused as for any other damaged file."""
    model_id = changed("gpt2", "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    add(client, model_id, "text-generation")
    answer = post(client, f"/models/{model_id}/load")
    assert (answer.status_code, "its tokenizer is damaged" in answer.json["error"]) == (422, True)


# Configs --------------------------------------------------------------------------------------------------------------

ABSURD = {
    "layers": {"num_hidden_layers": 10**9},
    "many layers": {"num_hidden_layers": 30_000},
    "a negative count": {"num_hidden_layers": -2},
    "true": {"num_hidden_layers": True},
    "a string": {"num_hidden_layers": "two"},
    "NaN": {"num_attention_heads": float("nan")},
    "a width": {"hidden_size": 10**9},
    "a vocabulary": {"vocab_size": 10**12},
    "labels": {"num_labels": 10**9},
    "a number beyond bounds": {"intermediate_size": 10**30},
    "a part's layers": {"text_config": {"num_hidden_layers": 10**9}},
    "a list's layers": {"num_layers": [2, 10**9]},
    "one architecture": {"architectures": "LlamaForCausalLM"},
    "an architecture's number": {"architectures": 5},
    "nested architectures": {"architectures": [["LlamaForCausalLM"]]},
    "a kind that is none": {"model_type": ["llama"]},
}


@pytest.mark.parametrize("said", ABSURD.values(), ids=ABSURD.keys())
def test_a_config_that_no_model_has_is_refused(client: Any, changed: Callable[..., str], said: dict[str, Any]) -> None:
    """By the estimate and by the load, within their own time; most are told when the model is registered."""
    model_id = changed("llama", **said)
    added = add(client, model_id, "text-generation")
    assert added.status_code == 200
    if said.get("num_hidden_layers") != "two":
        assert f"Model '{model_id}'" in added.json["model"]["details"]["problem"]
    for answer in (
        client.get(f"/api/huggingface/models/{model_id}/estimate"),
        post(client, f"/models/{model_id}/load"),
        post(client, "/generate", model_id=model_id, prompt="a", max_new_tokens=1),
    ):
        assert (answer.status_code, f"Model '{model_id}'" in answer.json["error"]) == (422, True), answer.json


def test_ten_thousand_architectures_are_named_in_short(client: Any, changed: Callable[..., str]) -> None:
    """A message stays readable whatever a config holds."""
    model_id = changed("llama", architectures=["Unheard"] * 10_000)
    refused = add(client, model_id, "text-generation")
    assert refused.status_code == 422
    assert "is a Unheard, Unheard, Unheard, which does none" in refused.json["error"]


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"],
)
def test_json_that_nests_without_an_end_is_damage(
    client: Any, models_dir: Path, changed: Callable[..., str], name: str
) -> None:
    """In whichever of a model's files it stands."""
    model_id = changed("llama", name)
    (models_dir / model_id / name).write_text("[" * 200_000 + "]" * 200_000)
    add(client, model_id, "text-generation")
    refused = post(client, f"/models/{model_id}/load")
    assert (refused.status_code, f"Model '{model_id}'" in refused.json["error"]) == (422, True)


# Models of other kinds ------------------------------------------------------------------------------------------------

OTHERS = {
    "CLIPModel": ("clip", "reads image"),
    "SiglipModel": ("siglip", "reads image"),
    "SamModel": ("sam", "reads image"),
    "Wav2Vec2Model": ("wav2vec2", "reads audio"),
    "LayoutLMModel": ("layoutlm", "its places on a page"),
    "LayoutLMv3ForTokenClassification": ("layoutlmv3", "its places on a page"),
    "ViltModel": ("vilt", "together with text"),
    "ViTForImageClassification": ("vit", "none of this server's text tasks"),
}


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize("model_type", ["feature-extraction", "token-classification", None])
def test_a_model_of_another_kind_is_refused_by_name(
    client: Any, changed: Callable[..., str], architecture: str, model_type: str | None
) -> None:
    """It is not registered for tasks that it cannot do, and not loaded."""
    kind, words = OTHERS[architecture]
    only = {"architectures": [architecture], "model_type": kind}
    model_id = changed("bert-embed", change=lambda _: only)
    refused = add(client, model_id, model_type)
    assert refused.status_code == 422
    assert f"Model '{model_id}' is a {architecture}" in refused.json["error"]
    if model_type == "feature-extraction" or words.startswith("none"):
        assert words in refused.json["error"]
    assert client.get(f"/api/huggingface/models/{model_id}").status_code == 404


def test_a_diffusion_pipeline_is_refused_by_name(client: Any, models_dir: Path) -> None:
    """Its folder has no config of its own, and its index tells what it is."""
    folder = models_dir / "hostile" / "diffusion"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    refused = add(client, "hostile/diffusion", "text-generation")
    assert refused.status_code == 422
    assert "is a diffusion pipeline" in refused.json["error"]
