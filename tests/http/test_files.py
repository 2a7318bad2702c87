"""Where a model's files come from: the models folder first, then the Hub and its cache, each failure a clear answer."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
import tiny_models
from changed_models import sharded
from conftest import PATIENCE, Server, until
from embedding_models import build_embedding
from hub_place import Place, load, refused, sent, works

TOKEN = "hf_token_of_the_tests"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("place"), models_dir)
    with place.hub:
        yield place
        for server in place.servers:
            server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def server(place: Place) -> Server:
    """A server that may ask the Hub, without a token."""
    return place.serve()


def test_a_hub_model_is_downloaded_once_and_then_comes_from_the_cache(place: Place, server: Server) -> None:
    place.publish("org/cached")
    first = works(server, "org/cached")
    assert place.hub.downloads("org/cached").count("model.safetensors") == 1
    with place.hub.recording() as made:
        assert works(server, "org/cached") == first
    assert [request for request in made if request.file == "model.safetensors"] == []


def test_a_bare_id_is_a_hub_repository_too(place: Place, server: Server) -> None:
    place.publish("bare-model")
    (place.local / "bare-model" / "some-model").mkdir(parents=True)  # an organization's folder of the same name
    assert works(server, "bare-model")


def test_a_folder_of_the_models_folder_is_used_first_and_no_packet_is_sent(place: Place, server: Server) -> None:
    place.publish("org/both")
    for model_id in ("org/both", "alone"):
        tiny_models.build(place.built, "gpt2")
        shutil.copytree(place.built / "tiny" / "gpt2", place.local / model_id)
        with place.hub.recording() as made:
            assert works(server, model_id)
        assert made == []


@pytest.mark.parametrize("name", ["marian", "tapas", "mbart50", "t5"])
def test_every_file_of_the_tokenizer_reaches_the_cache(place: Place, server: Server, name: str) -> None:
    repository = place.publish(f"tokens/{name}", name)
    wanted = {file for file in repository.files() if not file.startswith("README")}
    types = {"marian": "translation", "tapas": "table-question-answering"}
    assert load(server, f"tokens/{name}", types.get(name, "text2text-generation")).status_code == 200
    assert {path.name for path in place.snapshot(f"tokens/{name}").iterdir()} == wanted


def test_chat_templates_in_files_of_their_own_are_used(place: Place, server: Server) -> None:
    repository = place.publish("org/templates", "llama")
    config = json.loads((repository.folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (repository.folder / "tokenizer_config.json").write_text(json.dumps(config))
    (repository.folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{{ nothing.at.all }}"
    )
    (repository.folder / "additional_chat_templates").mkdir()
    (repository.folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (repository.folder / "onnx").mkdir()
    (repository.folder / "onnx" / "tokenizer.json").write_text("{}")
    assert load(server, "org/templates", "conversational").status_code == 200
    files = {
        path.relative_to(place.snapshot("org/templates")).as_posix()
        for path in place.snapshot("org/templates").rglob("*")
    }
    assert {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"} <= files
    assert "onnx/tokenizer.json" not in files
    chat = {"model_id": "org/templates", "messages": [{"role": "user", "content": "Hello"}]}
    assert "messages" in server.call("POST", "/generate", json=chat).json()["error"]  # the broken template was asked


def test_the_modules_of_a_sentence_embedding_model_are_brought_too(
    place: Place, server: Server, models_dir: Path, tiny: Callable[[str], str]
) -> None:
    model_id = build_embedding(models_dir, tiny, "dense")
    shutil.copytree(models_dir / model_id, place.hub.root / "org/embedder")
    assert load(server, "org/embedder", "feature-extraction").status_code == 200
    body = {"model": "org/embedder", "input": "the cat"}
    answer = requests.post(f"{server.url}/v1/embeddings", json=body, timeout=PATIENCE).json()
    assert answer["pooling"] == "sentence-transformers"
    assert len(answer["data"][0]["embedding"]) == 12, "through its dense module"


def test_weights_in_several_files_are_fetched_and_a_lost_one_is_fetched_again(place: Place, server: Server) -> None:
    repository = place.publish("org/sharded")
    whole = works(server, "org/cached" if place.cached("org/cached").exists() else "bare-model")
    sharded(repository.folder)
    assert works(server, "org/sharded") == whole
    part = place.snapshot("org/sharded") / "model-00002-of-00002.safetensors"
    part.resolve().unlink()
    part.unlink()
    with place.hub.recording() as made:
        assert works(server, "org/sharded") == whole
    assert set(sent(made)) == {part.name}


def test_a_damaged_file_of_the_cache_is_fetched_again(place: Place, server: Server) -> None:
    place.publish("org/damaged-cache")
    text = works(server, "org/damaged-cache")
    blob = (place.snapshot("org/damaged-cache") / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:1000])
    assert works(server, "org/damaged-cache") == text


def test_a_repository_that_changes_is_taken_anew_at_the_next_load(place: Place, server: Server) -> None:
    repository = place.publish("org/changing")
    works(server, "org/changing")
    config = json.loads((repository.folder / "generation_config.json").read_text() or "{}")
    (repository.folder / "generation_config.json").write_text(
        json.dumps({**config, "suppress_tokens": list(range(60))})
    )
    with place.hub.recording() as made:
        works(server, "org/changing")
    assert sent(made) == ["generation_config.json"]


def test_a_small_hub_without_an_api_and_without_error_codes_is_enough(place: Place, server: Server) -> None:
    repository = place.publish("small/plain")
    repository.api = repository.codes = False
    marian = place.publish("small/marian", "marian")
    marian.api = marian.codes = False
    works(server, "small/plain")
    assert load(server, "small/marian", "translation").status_code == 200
    assert {"source.spm", "target.spm", "vocab.json"} <= {
        path.name for path in place.snapshot("small/marian").iterdir()
    }
    refused(load(server, "small/nothing"), 404, "small/nothing", "Check the id")


def test_a_small_hub_without_weights_in_safetensors_says_so(place: Place, server: Server) -> None:
    repository = place.publish("small/pickles")
    repository.api = repository.codes = False
    (repository.folder / "model.safetensors").rename(repository.folder / "pytorch_model.bin")
    refused(load(server, "small/pickles"), 403, "small/pickles", "LOCAL_LLM_ALLOW_PICKLE")
    assert "pytorch_model.bin" not in place.hub.downloads("small/pickles")
    (repository.folder / "pytorch_model.bin").unlink()
    refused(load(server, "small/pickles"), 404, "small/pickles", "no weights")


def test_an_unknown_id_is_a_404_that_says_what_to_check(place: Place, server: Server) -> None:
    refused(load(server, "nobody/nothing"), 404, "nobody/nothing", "Check the id", "HF_TOKEN")
    refused(load(server, "org/CACHED"), 404, "org/CACHED", "Check the id")  # upper and lower case are two ids


@pytest.fixture(scope="module")
def admitted(place: Place) -> Server:
    """A server with a token, and with ids whose code may run."""
    return place.serve(HF_TOKEN=TOKEN, LOCAL_LLM_TRUST_REMOTE_CODE="org/code, small/code")


def test_gated_and_private_repositories_need_a_token_that_is_sent_to_the_hub_only(
    place: Place, server: Server, admitted: Server
) -> None:
    place.publish("org/gated").gated = True
    place.publish("org/private").private = True
    refused(load(server, "org/gated"), 403, "org/gated", "accept its terms", "HF_TOKEN")
    refused(load(server, "org/private"), 404, "org/private", "HF_TOKEN")
    refused(load(admitted, "org/gated"), 403, "org/gated", "accept its terms")
    for model_id in ("org/gated", "org/private"):
        place.hub.repository(model_id).tokens = frozenset({TOKEN})
        assert works(admitted, model_id)
    tokens = {request.token for request in place.hub.asked("org/private") if not request.path.startswith("/cdn/")}
    assert TOKEN in tokens
    assert {request.token for request in place.hub.requests if request.path.startswith("/cdn/")} == {None}
    assert TOKEN not in "\n".join(admitted.lines)


@pytest.mark.parametrize("model_id", ["org/code", "small/code"])
def test_code_of_a_trusted_repository_is_fetched_with_what_it_imports(
    place: Place, server: Server, admitted: Server, model_id: str
) -> None:
    repository = place.publish(model_id)
    repository.api = repository.codes = model_id == "org/code"
    folder, kind = repository.folder, f"kind_of_{model_id.split('/')[0]}"
    (folder / "names.py").write_text(f"KIND = '{kind}'\n")
    (folder / "configuration.py").write_text(
        "from transformers import GPT2Config\nfrom .names import KIND\n"
        "class OwnConfig(GPT2Config):\n    model_type = KIND\n"
    )
    (folder / "modeling.py").write_text(
        "from transformers import GPT2LMHeadModel\nfrom .configuration import OwnConfig\n"
        "class OwnModel(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
    )
    (folder / "unrelated.py").write_text("raise RuntimeError\n")
    code = {"AutoConfig": "configuration.OwnConfig", "AutoModelForCausalLM": "modeling.OwnModel"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": code}))
    refused(load(server, model_id), 403, model_id, f"LOCAL_LLM_TRUST_REMOTE_CODE={model_id}")
    assert not [name for name in place.hub.downloads(model_id) if name.endswith(".py")]
    assert works(admitted, model_id)
    with place.hub.recording() as made:
        assert works(admitted, model_id)
    assert sent(made) == []
    assert "unrelated.py" not in place.hub.downloads(model_id)


def test_a_server_killed_in_a_download_leaves_nothing_that_is_taken_for_a_model(place: Place, server: Server) -> None:
    repository = place.publish("org/killed")
    repository.stall = frozenset({"model.safetensors"})
    victim = place.serve(HF_HUB_DOWNLOAD_TIMEOUT=str(PATIENCE))
    victim.add("org/killed", "text-generation")

    def call() -> None:
        with pytest.raises(OSError):
            load(victim, "org/killed")

    caller = threading.Thread(target=call)
    caller.start()
    until(lambda: "model.safetensors" in place.hub.downloads("org/killed"))
    victim.stop(signal.SIGKILL)
    caller.join(PATIENCE)
    repository.stall = frozenset()
    server.add("org/killed", "text-generation")
    with place.hub.recording() as made:
        assert works(server, "org/killed")
    assert sent(made) == ["model.safetensors"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_hub_that_stumbles_once_is_asked_again(place: Place, server: Server, file: str) -> None:
    model_id = f"org/stumbles-{file.split('.')[0]}"
    repository = place.publish(model_id)
    server.add(model_id, "text-generation")  # which looks at the files too
    repository.status[file] = [503]
    assert works(server, model_id)
    assert repository.status[file] == []


def test_a_hub_that_fails_on_a_file_is_a_503_and_the_next_load_fetches_only_what_is_missing(
    place: Place, server: Server
) -> None:
    repository = place.publish("org/fails")
    repository.status["model.safetensors"] = [500, 502, 503]
    refused(load(server, "org/fails"), 503, "org/fails", "503", "try again")
    with place.hub.recording() as made:
        assert works(server, "org/fails")
    assert set(sent(made)) == {"model.safetensors"}


def test_a_broken_connection_is_resumed_where_it_broke(place: Place, server: Server) -> None:
    from safetensors.numpy import load_file, save_file

    repository, chunk = place.publish("org/cut"), 10 * 1024**2
    weights = repository.folder / "model.safetensors"
    save_file({**load_file(weights), "more": np.zeros(chunk + 1000, np.uint8)}, weights, {"format": "pt"})
    repository.cut[weights.name] = chunk + 1
    assert works(server, "org/cut")
    assert [body.start for body in place.hub.bodies_of("org/cut", weights.name)] == [0, chunk + 1]


def test_a_download_that_ends_short_or_is_not_what_the_hub_says_is_never_loaded(place: Place, server: Server) -> None:
    repository = place.publish("org/wrong")
    name = "model.safetensors"
    content = (repository.folder / name).read_bytes()
    repository.replace[name] = content[:-1] + bytes([content[-1] ^ 1])  # a flipped bit: same size, another checksum
    refused(load(server, "org/wrong"), 422, "org/wrong", name, "load the model again")
    repository.replace.clear()
    repository.sizes[name] = len(content) + 7
    refused(load(server, "org/wrong"), 422, "org/wrong", "load the model again")
    repository.sizes.clear()
    assert works(server, "org/wrong")


def test_a_hub_that_falls_silent_is_given_up(place: Place, server: Server) -> None:
    place.publish("org/silent").silent = frozenset({"tokenizer.json"})
    refused(load(server, "org/silent"), 503, "org/silent", "cannot be reached")


@pytest.fixture(scope="module")
def filled(place: Place, server: Server) -> None:
    """Sees to it that these are in the cache: `full/model` whole, `full/parts` without one shard, `full/begun` half.

    And `full/updated` whole, with a newer commit that was begun and not completed.
    """
    place.publish("full/model")
    works(server, "full/model")
    sharded(place.publish("full/parts").folder)
    works(server, "full/parts")
    part = place.snapshot("full/parts") / "model-00001-of-00002.safetensors"
    part.resolve().unlink()
    part.unlink()
    begun = place.publish("full/begun")
    begun.status["model.safetensors"] = [500, 500, 500]
    assert load(server, "full/begun").status_code == 503
    updated = place.publish("full/updated")
    works(server, "full/updated")
    (updated.folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    updated.status["generation_config.json"] = [500, 500, 500]
    assert load(server, "full/updated").status_code == 503


def test_offline_a_cached_model_loads_without_a_packet_and_what_is_incomplete_is_told(
    place: Place, filled: None
) -> None:
    offline = place.serve(HF_HUB_OFFLINE="1")
    with place.hub.recording() as made:
        assert works(offline, "full/model")
        assert works(offline, "full/updated")
        for model_id in ("full/parts", "full/begun", "full/never"):
            refused(load(offline, model_id), 503, model_id, "HF_HUB_OFFLINE", "models folder")
        assert works(offline, "full/model")
    assert made == []


def test_a_hub_that_cannot_be_reached_keeps_no_cached_model_from_loading(place: Place, filled: None) -> None:
    away = place.serve(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_ETAG_TIMEOUT="2")
    assert works(away, "full/model")
    assert works(away, "full/updated")
    for model_id in ("full/parts", "full/begun", "full/never"):
        refused(load(away, model_id), 503, model_id, "cannot be reached", "models folder")


def test_a_hub_out_of_order_is_as_one_that_cannot_be_reached(place: Place, server: Server, filled: None) -> None:
    place.hub.down = 502
    try:
        assert works(server, "full/model")
        refused(load(server, "full/never"), 503, "full/never", "502", "try again")
    finally:
        place.hub.down = None


@pytest.mark.parametrize(
    "model_id",
    [
        "../gpt2",
        "/etc",
        "..",
        "org/..",
        "../../etc/passwd",
        "a/b/c",
        "org/na\x00me",
        "org/na\nme",
        "~/x",
        "C:\\x",
        "org//x",
        "a" * 97,
    ],
)
def test_an_id_that_could_leave_the_models_folder_is_refused(server: Server, model_id: str) -> None:
    body = {"model_id": model_id, "name": "x", "model_type": "text-generation"}
    answer = server.call("POST", "/models", json=body)
    assert answer.status_code == 400, answer.text
    assert "model_id" in answer.json()["error"]
    for path in ("/generate", "/pipeline"):
        answer = server.call(
            "POST", path, json={"model_id": model_id, "prompt": "x", "task": "fill-mask", "inputs": "x"}
        )
        assert answer.status_code in (400, 404), answer.text


@pytest.mark.parametrize("path", ["%2e%2e/gpt2", "%2e%2e%2fgpt2", "org/%2e%2e", "%2Fetc", "org%00", "..%5cgpt2"])
def test_a_path_that_could_leave_the_models_folder_is_refused(server: Server, path: str) -> None:
    import http.client

    host = server.url.removeprefix("http://")
    for method, route in (("GET", f"/models/{path}"), ("POST", f"/models/{path}/load"), ("DELETE", f"/models/{path}")):
        connection = http.client.HTTPConnection(host, timeout=PATIENCE)  # sends the path as it is
        connection.request(method, f"/api/huggingface{route}", headers={"Content-Type": "application/json"})
        answer = connection.getresponse()
        body = json.loads(answer.read())
        connection.close()
        assert answer.status in (400, 404, 405), body
        assert body["success"] is False


def test_the_server_of_these_tests_still_serves(place: Place, server: Server) -> None:
    place.publish("org/last")
    assert works(server, "org/last")
    assert not [line for line in server.lines if " failed [" in line]  # no failure was one that nobody foresaw
