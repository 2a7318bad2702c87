"""GGUF files in several parts: whichever part is named, the model is that of the whole file, by every backend."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from causal_models import build, build_config
from conftest import Server
from gguf_files import ARCHITECTURES, read, write_gguf
from tiny_tokenizers import TEXT

from huggingface.cancellation import NEVER
from huggingface.engine.llama_cpp import agreement
from huggingface.engine.llama_cpp.runner import LlamaRunner
from huggingface.engine.slots import SlotTable
from huggingface.engine.torch.runner import Piece
from huggingface.errors import FilesCorrupt, FilesMissing
from huggingface.inspection.gguf_parts import PartsDisagree, first_names, join, part_names, whole_name
from huggingface.inspection.headers import GGUFHeader, Tensor
from huggingface.inspection.preflight import Preflight
from huggingface.loading import gguf as gguf_files
from huggingface.loading import loader
from huggingface.loading.kept import FOLDER
from huggingface.loading.llama_cpp.reference import expected
from huggingface.loading.plan import Plan, look
from huggingface.registry.records import LoadSettings, ModelRecord
from huggingface.types import GenerationRequest, LoadOptions

MODEL = "tiny/parts"
WHOLE = "model.gguf"
PART = 11  # tensors
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def part(number: int, count: int) -> str:
    """A part's name."""
    return f"model-{number:05}-of-{count:05}.gguf"


# Names ----------------------------------------------------------------------------------------------------------------


def test_the_names_of_parts_are_those_of_llama_cpp() -> None:
    """Any part names all; what is no part's name names one file, whatever its numbers."""
    three = [f"a/b-Q4_K_M-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for name in three:
        assert part_names(name) == three
        assert whole_name(name) == "a/b-Q4_K_M.gguf"
    assert part_names("B-00002-of-00002.GGUF") == ["B-00001-of-00002.GGUF", "B-00002-of-00002.GGUF"]
    for name in (
        "model.gguf",
        part(1, 1),
        part(0, 3),
        part(4, 3),
        part(0, 0),
        "model-1-of-3.gguf",
        "-00001-of-00003.gguf",
    ):
        assert part_names(name) == [name]
    assert len(part_names(part(1, 99999))) == 99999
    names = ["z.gguf", *reversed(three), "config.json", part(2, 2), "A.GGUF"]
    assert first_names(names) == ["A.GGUF", three[0], "z.gguf"]


def header(number: Any, count: Any, total: Any, *tensors: str) -> GGUFHeader:
    """A part's header."""
    values = {"split.no": number, "split.count": count, "split.tensors.count": total}
    return GGUFHeader(values, {name: Tensor("F32", (2,), 8) for name in tensors}, 100)


@pytest.mark.parametrize("count", [2, 3, 2**31, -1, "many", 1.5])
def test_a_part_under_another_name_is_refused(count: Any) -> None:
    """llama.cpp finds parts by their names, so a file that is a part by its keys must have a part's name."""
    with pytest.raises(PartsDisagree, match="one of several parts by its keys"):
        join({"model.gguf": header(0, count, 5, "a")})


@pytest.mark.parametrize("count", [None, 0, 1])
def test_a_file_of_one_part_is_whole(count: Any) -> None:
    for name in ("model.gguf", part(1, 1)):
        whole = header(0, count, 1, "a")
        assert join({name: whole}) is whole


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (header(0, 2, 2, "a"), header(0, 2, 2, "b"), "part 2 of 2 by its name"),
        (header(1, 2, 2, "a"), header(1, 2, 2, "b"), "part 1 of 2 by its name"),
        (header(0, 3, 2, "a"), header(1, 3, 2, "b"), "part 1 of 2 by its name"),
        (header(0, 0, 2, "a"), header(1, 0, 2, "b"), "part 1 of 2 by its name"),
        (header(None, None, None, "a"), header(None, None, None, "b"), "part 1 of 2 by its name"),
        (header(0, 2**31, 2, "a"), header(1, 2, 2, "b"), "part 1 of 2 by its name"),
        (header(0, 2, 2, "a"), header(1, 2, 3, "b"), "2 tensors, and not as many"),
        (header(0, 2, 2, "a", "c"), header(1, 2, 2, "b"), "3 tensors, and not as many"),
        (header(0, 2, None, "a"), header(1, 2, None, "b"), "2 tensors, and not as many"),
        (header(0, 2, 2, "a", "b"), header(1, 2, 2, "b"), "a part before it"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(first: GGUFHeader, second: GGUFHeader, reason: str) -> None:
    with pytest.raises(PartsDisagree, match=reason):
        join({part(1, 2): first, part(2, 2): second})


def test_parts_have_the_keys_of_the_first_and_the_tensors_of_all() -> None:
    first, second = header(0, 2, 2), header(1, 2, 2, "b", "a")
    first = replace(first, values={**first.values, "general.architecture": "llama"})
    joined = join({part(1, 2): first, part(2, 2): second})
    assert (joined.values, joined.end) == (first.values, None)
    assert list(joined.tensors or ()) == ["b", "a"]
    longer = replace(second, tensors=None)  # than the Hub is asked for
    assert join({part(1, 2): first, part(2, 2): longer}).tensors is None


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A folder with a whole file, one with its parts, and the parts' names."""
    root = tmp_path_factory.mktemp("parts")
    whole, split = root / "whole", root / "split"
    model, tokenizer = build("llama")
    for folder in (whole, split):
        folder.mkdir()
    write_gguf(whole / WHOLE, model, tokenizer, "llama", quantize="Q8_0")
    paths = write_gguf(split / WHOLE, model, tokenizer, "llama", quantize="Q8_0", part=PART, keys_apart=True)
    return whole, split, [path.name for path in paths]


@pytest.fixture
def split(made: tuple[Path, Path, list[str]], tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder of one test's own with the parts of a file, and their names."""
    _, source, names = made
    folder = tmp_path / "own"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes((source / name).read_bytes())
    return folder, names


def record(gguf_file: str) -> ModelRecord:
    return ModelRecord(MODEL, "parts", "text-generation", gguf_file=gguf_file)


def planned(folder: Path, gguf_file: str) -> Plan:
    options = LoadOptions(folder.parent, device="cpu")
    return look(record(gguf_file), options, folder, LoadSettings())


def load(folder: Path, gguf_file: str, **settings: Any) -> Any:
    """Loads the model, prepared."""
    options = LoadOptions(folder.parent, device="cpu", backend="auto")
    model = loader.load(record(gguf_file), options, folder, settings=LoadSettings(**settings))
    model.prepared()
    return model


def ask(model: Any, **parameters: Any) -> str:
    ticket = model.generate(GenerationRequest({**GREEDY, **parameters}, prompt="The cat"))
    return list(ticket)[-1].whole or ""


@pytest.mark.parametrize("keys_apart", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_unpacked_model_is_that_of_the_whole_file(name: str, keys_apart: bool, tmp_path: Path) -> None:
    """Config, tokens and logits are the same to the last bit, whichever part is named, in a folder below too."""
    model, tokenizer = build(name)
    (tmp_path / "below").mkdir()
    write_gguf(tmp_path / WHOLE, model, tokenizer, ARCHITECTURES[name])
    paths = write_gguf(
        tmp_path / "below" / WHOLE, model, tokenizer, ARCHITECTURES[name], part=PART, keys_apart=keys_apart
    )
    assert len(paths) > 1
    whole, words = read(tmp_path, WHOLE)
    ids = words(TEXT[:300])["input_ids"]
    with torch.inference_mode():
        wanted = whole(torch.tensor([ids])).logits
    for path in (paths[0], paths[1]):
        parts, other = read(tmp_path, f"below/{path.name}")
        assert other(TEXT[:300])["input_ids"] == ids
        assert parts.config.to_dict() == whole.config.to_dict()
        with torch.inference_mode():
            assert torch.equal(parts(torch.tensor([ids])).logits, wanted)
    counted = [gguf_files.parameters(gguf_files.check(MODEL, tmp_path, name)) for name in (WHOLE, f"below/{path.name}")]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("quantize", [None, "Q8_0"])
def test_transformers_newer_way_of_reading_gets_all_parts_too(quantize: str | None, tmp_path: Path) -> None:
    """It reads some architectures by a reader of its own; what their config takes from tensors lies in any part."""
    extra = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2, "block_auto_adjust_ff_dim": False}
    model, tokenizer = build_config("Lfm2Config", {**extra, "intermediate_size": 64, "tie_word_embeddings": False})
    keys = {"lfm2.attention.head_count_kv": [0, 2], "lfm2.shortconv.l_cache": model.config.conv_L_cache}
    keys["lfm2.attention.layer_norm_rms_epsilon"] = model.config.norm_eps
    write_gguf(tmp_path / WHOLE, model, tokenizer, "lfm2", quantize=quantize, **keys)
    paths = write_gguf(tmp_path / WHOLE, model, tokenizer, "lfm2", quantize=quantize, part=7, keys_apart=True, **keys)
    whole, words = read(tmp_path, WHOLE)
    parts, _ = read(tmp_path, paths[1].name)
    assert parts.config.to_dict() == whole.config.to_dict()
    assert not parts.config.tie_word_embeddings
    ids = torch.tensor([words(TEXT[:100])["input_ids"]])
    with torch.inference_mode():
        wanted = whole(ids).logits
        assert torch.equal(parts(ids).logits, wanted)
        if quantize is None:
            torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_frequencies_of_llama_3_are_found_in_any_part(tmp_path: Path) -> None:
    """The tensor that says what each frequency is divided by lies in the last part."""
    config = build("llama")[0].config
    rule = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config.rope_parameters = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, **rule}
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 1, 1, 32
    model, tokenizer = transformers.AutoModelForCausalLM.from_config(config).eval(), build("llama")[1]
    plain = 1.0 / 500000.0 ** (torch.arange(0, 32, 2).float() / 32)
    config.divided, config.divisors = "rope", (plain / model.model.rotary_emb.inv_freq).numpy()
    paths = write_gguf(tmp_path / WHOLE, model, tokenizer, "llama", part=PART)
    loaded, _ = read(tmp_path, paths[0].name)
    assert loaded.config.rope_parameters["rope_type"] == "llama3"


def test_llama_cpp_computes_the_parts_as_the_whole_file(made: tuple[Path, Path, list[str]]) -> None:
    """Its logits are the same to the last bit, and so are those that it is compared with."""
    whole, split, names = made
    tokens, found = list(range(20, 80)), []
    for path in (whole / WHOLE, split / names[0]):
        runner = LlamaRunner(path, build("llama")[0].config.vocab_size, 4096)
        try:
            slot = SlotTable(runner.cache, 4096).take([], 100)
            assert slot is not None
            found.append(runner.forward([Piece(slot, tokens, 0)]))
        finally:
            runner.close()
    assert torch.equal(*found)
    rows = []
    for folder, name in ((whole, WHOLE), (split, names[1])):
        plan = planned(folder, name)
        path = gguf_files.locate(MODEL, folder, name)[0]
        rows.append(expected(plan, path, agreement.sequences(plan.config, plan.config.vocab_size), NEVER)[0])
    for one, other in zip(*rows, strict=True):
        assert torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("backend", ["llama.cpp", "torch", "openvino"])
def test_each_backend_writes_the_whole_files_texts(backend: str, made: tuple[Path, Path, list[str]]) -> None:
    """By its own rules: as it is, or unpacked; beams take weights that are unpacked for them."""
    whole, split, names = made
    texts = []
    for folder, name in ((whole, WHOLE), (split, names[1])):
        model = load(folder, name, backend=backend)
        assert model.effective["backend"] == backend
        texts.append([ask(model), ask(model, num_beams=3, max_new_tokens=8)])
        model.close()
    assert texts[0] == texts[1]
    assert all(texts[0])


@pytest.mark.parametrize("backend", ["llama.cpp", "torch"])
def test_the_estimate_is_that_of_the_whole_file(backend: str, made: tuple[Path, Path, list[str]]) -> None:
    """What is mapped is the size of all parts, of which each has a header of its own."""
    whole, split, names = made
    options = LoadOptions(whole.parent, device="cpu", backend=backend)
    one = loader.estimate(record(WHOLE), options, whole, LoadSettings())
    for name in names:
        several = loader.estimate(record(name), options, split, LoadSettings())
        more = sum((split / name).stat().st_size for name in names) - (whole / WHOLE).stat().st_size
        assert several.weights == one.weights + (more if backend == "llama.cpp" else 0)
        assert replace(several, weights=0, devices={}) == replace(one, weights=0, devices={})


def test_a_part_that_is_replaced_makes_another_file(split: tuple[Path, list[str]]) -> None:
    """What was found out of the file is found out again."""
    folder, names = split

    def findings() -> list[str]:
        return [path.name for path in (folder / FOLDER).glob("llama.cpp-*")]

    load(folder, names[0]).close()
    [first] = findings()
    load(folder, names[1]).close()
    assert findings() == [first]
    about = (folder / names[1]).stat()
    os.utime(folder / names[1], ns=(about.st_atime_ns, about.st_mtime_ns + 10**9))
    load(folder, names[0]).close()
    [second] = findings()
    assert second != first


def test_a_file_below_its_models_folder_that_is_replaced_is_estimated_again(tmp_path: Path) -> None:
    """The file's size and time count, wherever it lies."""
    (tmp_path / "below").mkdir()
    options = LoadOptions(tmp_path.parent, device="cpu", backend="torch")
    sizes = []
    for layers in (2, 3):
        config = build("llama")[0].config
        config.num_hidden_layers = layers
        model = transformers.AutoModelForCausalLM.from_config(config)
        write_gguf(tmp_path / "below" / WHOLE, model, build("llama")[1], "llama")
        sizes.append(loader.estimate(record(f"below/{WHOLE}"), options, tmp_path, LoadSettings()).weights)
    assert sizes[0] < sizes[1]


# What is wrong --------------------------------------------------------------------------------------------------------


def problem(folder: Path, name: str) -> str:
    """What preflight says is wrong with a file."""
    found = Preflight(LoadOptions(folder.parent)).look_at(folder.name, gguf_file=name)["problem"]
    assert isinstance(found, str)
    return found


def test_a_missing_part_is_named(split: tuple[Path, list[str]]) -> None:
    """By the load and by preflight, whichever part the record names; the folder is not listed as a model."""
    folder, names = split
    preflight = Preflight(LoadOptions(folder.parent))
    assert [entry["gguf_files"] for entry in preflight.available()] == [[names[0]]]
    (folder / names[1]).unlink()
    for name in names:
        with pytest.raises(FilesMissing, match=f"holds no {names[1]}"):
            gguf_files.check(MODEL, folder, name)
        assert f"there is no {names[1]} among its files" in problem(folder, name)
    assert preflight.available() == []


def test_a_part_that_is_cut_short_is_named(split: tuple[Path, list[str]]) -> None:
    folder, names = split
    whole = (folder / names[1]).read_bytes()
    for content in (whole[:-100], whole[:30], b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"):
        (folder / names[1]).write_bytes(content)
        with pytest.raises(FilesCorrupt, match=names[1]):
            gguf_files.check(MODEL, folder, names[0])
        assert names[1] in problem(folder, names[0])
    assert Preflight(LoadOptions(folder.parent)).available() == []


def test_a_part_of_another_model_is_refused(split: tuple[Path, list[str]], tmp_path: Path) -> None:
    """One with another number of tensors or parts; one part under two names."""
    folder, names = split
    model, tokenizer = build("qwen3")
    other = [tmp_path / "other" / name for name in names]
    other[0].parent.mkdir()
    assert len(write_gguf(tmp_path / "other" / WHOLE, model, tokenizer, "qwen3", part=10)) == len(names) == 3
    whole = (folder / names[2]).read_bytes()
    for content, reason in (
        (other[2].read_bytes(), "not as many as its keys say"),
        ((folder / names[1]).read_bytes(), "part 3 of 3 by its name, and not by its keys"),
        (whole.replace(b"split.count", b"split.cases"), "part 3 of 3 by its name, and not by its keys"),
    ):
        (folder / names[2]).write_bytes(content)
        with pytest.raises(FilesCorrupt, match=reason):
            gguf_files.check(MODEL, folder, names[0])
        assert reason in problem(folder, names[0])


@pytest.mark.parametrize("count", [0, 1, 2, 65535])
def test_a_count_that_is_not_the_names_is_refused(count: int, split: tuple[Path, list[str]]) -> None:
    """Whatever the keys say, no more files are read than the name says."""
    folder, names = split
    content = bytearray((folder / names[0]).read_bytes())
    place = content.index(b"split.count") + len(b"split.count") + 4
    struct.pack_into("<H", content, place, count)
    (folder / names[0]).write_bytes(bytes(content))
    with pytest.raises(FilesCorrupt, match="part 1 of 3 by its name, and not by its keys"):
        gguf_files.check(MODEL, folder, names[0])
    assert "and not by its keys" in problem(folder, names[0])


def test_a_part_that_has_lost_its_name_is_told_the_name_that_it_needs(split: tuple[Path, list[str]]) -> None:
    folder, names = split
    (folder / names[0]).rename(folder / WHOLE)
    with pytest.raises(FilesCorrupt, match="parts are called NAME-00001-of-00003"):
        gguf_files.check(MODEL, folder, WHOLE)
    assert "parts are called" in problem(folder, WHOLE)


def test_a_name_that_promises_ever_so_many_parts_costs_nothing(split: tuple[Path, list[str]]) -> None:
    folder, names = split
    (folder / names[0]).rename(folder / part(1, 99999))
    with pytest.raises(FilesMissing, match="holds no model-00002-of-99999"):
        gguf_files.check(MODEL, folder, part(1, 99999))
    assert "model-00002-of-99999" in problem(folder, part(1, 99999))


# Through the server ---------------------------------------------------------------------------------------------------


def test_a_file_in_parts_is_served_and_counted(
    start_server: Callable[..., Server], made: tuple[Path, Path, list[str]]
) -> None:
    """Registered by its second part: the files and bytes of all are told, and the estimate is what the load takes."""
    _, split, names = made
    size = sum((split / name).stat().st_size for name in names)
    server = start_server(LOCAL_LLM_MODELS_DIR=str(split.parent), LOCAL_LLM_BACKEND="auto")
    body = {"model_id": "split", "name": "split", "model_type": "text-generation", "gguf_file": names[1]}
    details = server.call("POST", "/models", json=body).json()["model"]["details"]
    assert (details["problem"], details["files"]) == (None, {"count": len(names), "names": names})
    assert (details["weights_bytes"], details["quantized"]) == (size, "gguf")
    told = server.call("GET", "/models/split/estimate").json()
    assert told["backend"] == "llama.cpp"
    assert told["weights_bytes"] >= size
    asked = {"model_id": "split", "prompt": "The cat", **GREEDY}
    assert server.call("POST", "/generate", json=asked).json()["success"]
    [cached] = server.call("GET", "/cache").json()["cached_models"].values()
    assert cached["settings"]["backend"] == "llama.cpp"
    assert 0.9 <= told["bytes"] / cached["bytes"] <= 1.1
