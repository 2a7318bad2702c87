"""A folder that is damaged, or that needs code to be run, is refused clearly, and the server lives on."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from changed_models import copy, edit, load, text

import huggingface
from app import create_app
from config import Settings
from huggingface.errors import FilesCorrupt, FilesMissing

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder of these tests' own."""
    return tmp_path_factory.mktemp("loading")


@pytest.fixture(scope="module")
def client(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of one app, which must survive all that is done to it here."""
    registry = tmp_path_factory.mktemp("registry") / "models.json"
    app = create_app(Settings(_env_file=None, registry=registry, models_dir=root, device="cpu"))
    yield app.test_client()
    huggingface.close(app)


def post_load(client: Any, model_id: str, model_type: str = "text-generation") -> Any:
    client.post("/api/huggingface/models", json={"model_id": model_id, "name": "x", "model_type": model_type})
    return client.post(f"/api/huggingface/models/{model_id}/load", json={"force_reload": True})


# Damage ---------------------------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"


def remove(*patterns: str) -> Damage:
    def damage(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return damage


def write(file: str, content: str) -> Damage:
    return lambda folder: (folder / file).write_text(content)


def change(file: str = "config.json", **changes: Any) -> Damage:
    return lambda folder: edit(folder, file, **changes)


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def index(**weight_map: str) -> Damage:
    """Put an index of these parts in the place of the one file of weights."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        content = {
            "metadata": {"total_size": 1},
            "weight_map": {f"{key}.weight": part for key, part in weight_map.items()},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def chain(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def only(*files: str) -> Damage:
    def damage(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name not in files:
                path.unlink()

    return damage


DAMAGES: dict[str, tuple[Damage, int, str]] = {
    "no-config": (remove("config.json"), 404, "no config.json"),
    "empty": (only(), 404, "no config.json"),
    "adapter": (chain(only(), write("adapter_config.json", "{}")), 404, "adapter"),
    "config-not-json": (write("config.json", '{"model_type": "gpt2"'), 422, "config.json is damaged"),
    "config-not-text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
        422,
        "config.json is damaged",
    ),
    "config-list": (write("config.json", "[1]"), 422, "config.json is damaged"),
    "config-deep": (write("config.json", "[" * 100_000), 422, "config.json is damaged"),
    "config-pointer": (write("config.json", POINTER), 422, "git lfs pull"),
    "config-values": (change(n_embd="many"), 422, "config.json"),
    "config-no-type": (change(model_type=None), 422, "model_type"),
    "config-unknown-type": (change(model_type="no_such_thing"), 422, "does not know this kind of model"),
    "no-weights": (remove("*.safetensors"), 404, "no weights"),
    "weights-truncated": (truncate, 422, "model.safetensors is damaged or incomplete"),
    "weights-empty": (write("model.safetensors", ""), 422, "model.safetensors is damaged or incomplete"),
    "weights-pointer": (write("model.safetensors", POINTER), 422, "git lfs pull"),
    "weights-elsewhere": (change(transformers_weights="../tiny/gpt2/model.safetensors"), 403, "in its folder"),
    "weights-adapter": (change(transformers_weights="adapter_model.bin"), 403, "in its folder"),
    "shard-missing": (
        index(a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors"),
        422,
        "model-00002-of-00002.safetensors of its weights is missing",
    ),
    "index-broken": (chain(index(), write("model.safetensors.index.json", "{")), 422, "index.json is damaged"),
    "index-no-map": (chain(index(), write("model.safetensors.index.json", '{"weight_map": 3}')), 422, "is damaged"),
    "index-empty": (index(), 422, "none at all"),
    "index-outside": (index(a="../../tiny/gpt2/model.safetensors"), 422, "outside"),
    "index-absolute": (index(a="/etc/passwd.safetensors"), 422, "outside"),
    "index-pickle": (index(a="pytorch_model.bin"), 422, "another kind"),
    "shapes": (change(vocab_size=600), 422, "another shape"),
    "layers": (change(n_layer=3), 422, "do not fill the model"),
    "head-not-trained": (change(architectures=["GPT2ForSequenceClassification"]), 422, "do not fill the model"),
    "generation-config": (write("generation_config.json", "{"), 422, "generation_config.json is damaged"),
    "no-tokenizer": (remove("*token*", "vocab*", "merges*"), 404, "no tokenizer"),
    "no-vocabulary": (remove("tokenizer.json", "vocab*", "merges*"), 404, "its tokenizer lacks"),
    "no-merges": (remove("tokenizer.json", "merges*"), 422, "tokenizer"),
    "no-words": (remove("tokenizer.json", "vocab*"), 422, "tokenizer"),
    "tokenizer-broken": (write("tokenizer.json", '{"version": "1.0", "model": {}}'), 422, "tokenizer"),
    "tokenizer-not-json": (chain(remove("vocab*", "merges*"), write("tokenizer.json", "{")), 422, "tokenizer"),
    "tokenizer-pointer": (write("tokenizer.json", POINTER), 422, "git lfs pull"),
    "tokenizer-config": (write("tokenizer_config.json", "nonsense"), 422, "tokenizer_config.json is damaged"),
}


def test_a_folder_that_came_to_hold_no_text_model_is_refused_at_the_load_too(root: Path, client: Any) -> None:
    """It is refused by name at registering, and at the load where it was changed afterwards."""
    for model_id in ("damaged/no-text-model-then", "damaged/no-text-model-before"):
        folder, fields = (
            copy(root, "gpt2", model_id),
            {"model_id": model_id, "name": "x", "model_type": "text-generation"},
        )
        if model_id.endswith("then"):
            assert client.post("/api/huggingface/models", json=fields).status_code == 200
        change(model_type="vit", architectures=["ViTModel"])(folder)
        path = f"/models/{model_id}/load" if model_id.endswith("then") else "/models"
        answer = client.post(f"/api/huggingface{path}", json={} if model_id.endswith("then") else fields)
        assert answer.status_code == 422, answer.text
        assert f"'{model_id}'" in answer.json["error"]
        assert str(root) not in answer.json["error"]


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_refused_with_what_to_do_and_the_server_lives_on(root: Path, client: Any, case: str) -> None:
    damage, status, words = DAMAGES[case]
    model_id = f"damaged/{case}"
    damage(copy(root, "gpt2", model_id))
    answer = post_load(client, model_id)
    assert answer.status_code == status, answer.text
    message = answer.json["error"]
    assert answer.json["success"] is False
    assert f"'{model_id}'" in message
    assert words in message
    assert "Traceback" not in message
    assert str(root) not in message
    assert not re.search(r"/(tmp|home|root|usr|work|var)\b", message)
    asked = client.post("/api/huggingface/generate", json={"model_id": model_id, "prompt": "x"})
    assert (asked.status_code, asked.json["error"]) == (status, message)
    copy(root, "gpt2", "good/model")
    assert post_load(client, "good/model").status_code == 200


def test_a_tokenizer_whose_package_is_not_installed_says_which(root: Path, client: Any) -> None:
    pytest.importorskip("transformers")
    folder = copy(root, "bert-mlm", "damaged/japanese")
    (folder / "tokenizer.json").unlink()
    edit(folder, "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer", word_tokenizer_type="mecab")
    answer = post_load(client, "damaged/japanese", "fill-mask")
    assert answer.status_code == 422, answer.text
    assert "not installed" in answer.json["error"]
    assert "fugashi" in answer.json["error"]


def test_links_lead_to_models_that_lie_elsewhere_and_a_link_to_nothing_is_told(root: Path, tmp_path: Path) -> None:
    source = copy(root, "gpt2", "good/linked")
    shutil.move(source, tmp_path / "elsewhere")
    (root / "good" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "good" / "parts").mkdir(exist_ok=True)
    for path in (tmp_path / "elsewhere").iterdir():
        (root / "good" / "parts" / path.name).symlink_to(path)
    assert text(load(root, "good/linked", "text-generation")) == text(load(root, "good/parts", "text-generation"))
    (root / "good" / "nowhere").symlink_to(tmp_path / "nothing")
    with pytest.raises(FilesMissing, match="leads nowhere"):
        load(root, "good/nowhere", "text-generation")


# Code in files --------------------------------------------------------------------------------------------------------


class Payload:
    """A pickle that creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (self.path,)


def pickled(root: Path, model_id: str, *, format_of_old: bool = False) -> Path:
    """A tiny model with its weights in a pickle only."""
    import torch
    from safetensors.torch import load_file

    folder = copy(root, "gpt2", model_id)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not format_of_old)
    return folder


def test_pickles_are_refused_unless_the_setting_allows_them(root: Path, client: Any) -> None:
    pickled(root, "pickle/new")
    pickled(root, "pickle/old", format_of_old=True)
    copy(root, "gpt2", "good/model")
    expected = text(load(root, "good/model", "text-generation"))
    for model_id in ("pickle/new", "pickle/old"):
        answer = post_load(client, model_id)
        assert answer.status_code == 403
        assert "LOCAL_LLM_ALLOW_PICKLE=true" in answer.json["error"]
        assert text(load(root, model_id, "text-generation", allow_pickle=True)) == expected


def test_a_pickle_that_would_run_code_does_not_run_it_whatever_the_setting(root: Path, client: Any) -> None:
    folder, ran = copy(root, "gpt2", "pickle/evil"), root / "evil-ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": Payload(ran)}))
    assert post_load(client, "pickle/evil").status_code == 403
    with pytest.raises(FilesCorrupt, match="pickle/evil"):
        load(root, "pickle/evil", "text-generation", allow_pickle=True)
    assert not ran.exists()


def with_code(root: Path, model_id: str, ran: Path, module: str = "marked") -> Path:
    """A model that only code of its own folder can load; the code notes each file of it that is run."""
    folder = copy(root, "gpt2", model_id)
    note = f"from pathlib import Path\nPath({str(ran)!r}).open('a').write(__name__.rsplit('.', 1)[-1] + '\\n')\n"
    (folder / f"configuration_{module}.py").write_text(
        f"{note}from transformers import GPT2Config\nclass MarkedConfig(GPT2Config):\n    model_type = '{module}'\n"
    )
    (folder / f"modeling_{module}.py").write_text(
        f"{note}from transformers import GPT2LMHeadModel\nfrom .configuration_{module} import MarkedConfig\n"
        "class MarkedForCausalLM(GPT2LMHeadModel):\n    config_class = MarkedConfig\n"
    )
    (folder / f"tokenization_{module}.py").write_text(
        f"{note}from transformers import PreTrainedTokenizerFast\n"
        "class MarkedTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    model = {
        "AutoConfig": f"configuration_{module}.MarkedConfig",
        "AutoModelForCausalLM": f"modeling_{module}.MarkedForCausalLM",
    }
    edit(folder, model_type=module, architectures=["MarkedForCausalLM"], auto_map=model)
    tokenizer = {"AutoTokenizer": [None, f"tokenization_{module}.MarkedTokenizer"]}
    edit(folder, "tokenizer_config.json", tokenizer_class="MarkedTokenizer", auto_map=tokenizer)
    return folder


def test_code_of_a_repository_runs_for_exactly_the_ids_that_the_setting_names(
    root: Path, client: Any, tmp_path: Path, start_server: Callable[..., Any]
) -> None:
    ran = tmp_path / "ran"
    with_code(root, "code/trusted", ran, "first")
    with_code(root, "code/other", ran, "second")
    tokenizer = copy(root, "gpt2", "code/tokenizer")  # a known model, and a tokenizer that only code can load
    shutil.copy(root / "code/other/tokenization_second.py", tokenizer)
    edit(tokenizer, model_type="gpt2")
    shutil.copy(root / "code/other/tokenizer_config.json", tokenizer)
    borrowed = copy(root, "gpt2", "code/borrowed")
    edit(borrowed, model_type="third", auto_map={"AutoConfig": "code/elsewhere--configuration_third.MarkedConfig"})
    ids = ("code/trusted", "code/other", "code/borrowed")
    for model_id in ids:
        answer = post_load(client, model_id)
        assert answer.status_code == 403, answer.text
        assert f"LOCAL_LLM_TRUST_REMOTE_CODE={model_id}" in answer.json["error"]
    post_load(client, "code/tokenizer")
    assert not ran.exists()

    settings = {"LOCAL_LLM_MODELS_DIR": str(root), "HF_HOME": str(tmp_path / "home")}
    server = start_server(LOCAL_LLM_TRUST_REMOTE_CODE="code/trusted,code/borrowed", **settings)
    for model_id in ids:
        server.add(model_id, "text-generation")
    answers = {model_id: server.call("POST", f"/models/{model_id}/load") for model_id in ids}
    assert {model_id: answer.status_code for model_id, answer in answers.items()} == {
        "code/trusted": 200,
        "code/other": 403,
        "code/borrowed": 403,  # its own id is trusted, the one that the code is taken from is not
    }
    assert "'code/elsewhere'" in answers["code/borrowed"].json()["error"]
    assert set(ran.read_text().split()) == {"configuration_first", "modeling_first", "tokenization_first"}
