"""llama.cpp computes GGUF files as they are, with the unpacked model's numbers; what it cannot do is found out."""

from __future__ import annotations

import ctypes
import json
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import LARGE, build, build_config
from conftest import Server
from gguf_files import ARCHITECTURES, write_gguf
from tiny_tokenizers import TEXT
from transformers import AutoModelForCausalLM, MambaConfig

from huggingface.cancellation import NEVER, Cancellation
from huggingface.engine.layers import NotBatchable
from huggingface.engine.llama_cpp import agreement, library
from huggingface.engine.llama_cpp.runner import LlamaRunner
from huggingface.engine.slots import Slot, SlotTable
from huggingface.engine.torch.runner import Piece
from huggingface.errors import Cancelled, InvalidRequest, ModelUnsupported, OutOfMemory
from huggingface.loading import loader
from huggingface.loading.kept import FOLDER
from huggingface.loading.llama_cpp.load import LlamaCpp
from huggingface.loading.llama_cpp.reference import expected
from huggingface.loading.plan import Plan, look
from huggingface.loading.pretrained import read_model, read_shell
from huggingface.registry.records import LoadSettings, ModelRecord
from huggingface.types import GenerationRequest, LoadOptions

FILE = "model.gguf"
GREEDY = {"do_sample": False, "max_new_tokens": 12}
# Kinds of tensors, and whether the values that meet them are rounded to 8 bits.
PLAIN = ("F32", "F16", "BF16")
KINDS = (*PLAIN, "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
# The families' names in `causal_models`, wide enough for blocks of 256 numbers.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.1}
FAMILIES = {
    "llama": ("LlamaConfig", WIDE),
    "gpt2": (
        "GPT2Config",
        {"hidden_size": 256, "n_embd": 256, "n_head": 4, "n_layer": 2, "n_positions": 512, "initializer_range": 0.1},
    ),
    "qwen3": ("Qwen3Config", {**WIDE, "head_dim": 64}),
    "phi3": ("Phi3Config", WIDE),
}


def planned(folder: Path, **settings: Any) -> Plan:
    """What is known of the file in a folder."""
    record = ModelRecord("tiny/gguf", "gguf", "text-generation", gguf_file=FILE)
    return look(record, LoadOptions(folder.parent, device="cpu"), folder, LoadSettings(**settings))


def load(folder: Path, **settings: Any) -> Any:
    """Loads the file in a folder, prepared."""
    record = ModelRecord("tiny/gguf", "gguf", "text-generation", gguf_file=FILE)
    options = LoadOptions(folder.parent, device="cpu", backend="auto")
    model = loader.load(record, options, folder, settings=LoadSettings(**settings))
    try:
        model.prepared()
    except BaseException:
        model.close()
        raise
    return model


def ask(model: Any, prompt: str, **parameters: Any) -> str:
    """The text of an answer."""
    ticket = model.generate(GenerationRequest({**GREEDY, **parameters}, prompt=prompt))
    return list(ticket)[-1].whole or ""


def every_row(runner: LlamaRunner, piece: Piece) -> torch.Tensor:
    """The logits after each token of a piece, (tokens, vocabulary)."""
    found: list[torch.Tensor] = []
    runner.forward([piece], lambda _, rows: found.append(rows.clone()))
    return found[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_the_unpacked_model(name: str, kind: str, tmp_path: Path) -> None:
    """After each token of a text, for each kind of weights; where they have 16 bits or more, almost exactly."""
    model, tokenizer = build_config(*FAMILIES[name])
    write_gguf(tmp_path / FILE, model, tokenizer, ARCHITECTURES[name], quantize=kind)
    ids = tokenizer(TEXT)["input_ids"][:150]
    prompts = [(ids[:147], ids[147:]), (ids[10:50], ids[50:53])]
    plan = planned(tmp_path)
    wanted, columns = expected(plan, tmp_path / FILE, prompts, NEVER)
    runner = LlamaRunner(tmp_path / FILE, model.config.vocab_size, 4096)
    try:
        table = SlotTable(runner.cache, 4096)
        for row in wanted:
            slot = table.take([], len(row.prompt) + 3)
            assert slot is not None
            found = every_row(runner, Piece(slot, [*row.prompt, *row.tokens[:-1]], 0, every=True))
            logits = found[-3:, columns]
            spread = row.logits.amax() - row.logits.amin()
            assert spread > 0.5
            close = agreement.CLOSE_WIDE if kind in PLAIN else agreement.CLOSE
            assert (logits - row.logits).abs().max() <= close * spread
            table.release(slot, keep=False)
    finally:
        runner.close()


def test_one_layer_at_a_time_gives_the_unpacked_models_numbers(tmp_path: Path) -> None:
    """The reference computes what transformers does with the whole file unpacked, to the last digits."""
    for name, architecture in ARCHITECTURES.items():
        model, tokenizer = build(name)
        write_gguf(tmp_path / FILE, model, tokenizer, architecture, quantize="Q8_0")
        plan = planned(tmp_path)
        sequences = agreement.sequences(plan.config, model.config.vocab_size)
        rows, columns = expected(plan, tmp_path / FILE, sequences, NEVER)
        whole = read_model(plan, LoadOptions(tmp_path.parent, device="cpu"), None)
        for row in rows:
            tokens = torch.tensor([[*row.prompt, *row.tokens[:-1]]])
            with torch.inference_mode():
                logits = whole(tokens).logits[0, -len(row.tokens) :, columns]
            torch.testing.assert_close(row.logits, logits, rtol=1e-4, atol=1e-4)


# What is found out at a load ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a sound file."""
    model, tokenizer = build("llama")
    write_gguf(tmp_path / FILE, model, tokenizer, "llama", quantize="Q8_0")
    return tmp_path


def kept(folder: Path) -> list[Path]:
    """What is stored beside the file."""
    return sorted(path for path in (folder / FOLDER).glob("llama.cpp-*/*") if path.is_file())


def test_auto_takes_llama_cpp_for_a_gguf_file_and_compares_it_once(folder: Path) -> None:
    """The unpacked model's numbers are kept beside the file: a later load compares with them."""
    model = load(folder)
    assert (model.effective["backend"], model.backend_reason) == ("llama.cpp", None)
    text = ask(model, "The cat")
    model.close()
    marks = [(path, path.stat().st_mtime_ns) for path in kept(folder)]
    assert [path.name for path, _ in marks] == ["about.json", "expected.safetensors"]
    again = load(folder)
    assert ask(again, "The cat") == text
    again.close()
    assert [(path, path.stat().st_mtime_ns) for path in kept(folder)] == marks


def test_a_file_with_other_numbers_than_its_keys_say_is_not_taken(tmp_path: Path) -> None:
    """transformers and llama.cpp read its keys in two ways: the unpacked model is served, and the reason is kept."""
    model, tokenizer = build("gemma2-eager")  # its scale is a key of no file
    write_gguf(tmp_path / FILE, model, tokenizer, "gemma2")
    served = load(tmp_path)
    assert served.effective["backend"] == "torch"
    assert "of their spread from the unpacked model's" in served.backend_reason
    served.close()
    with pytest.raises(InvalidRequest, match=r"llama\.cpp cannot compute model 'tiny/gguf': its logits lie"):
        load(tmp_path, backend="llama.cpp")
    [about] = kept(tmp_path)
    assert "its logits lie" in json.loads(about.read_text())["refused"]


def test_a_file_that_would_end_the_process_is_tried_in_another(tmp_path: Path) -> None:
    """llama.cpp ends the process where an assertion of its own fails; the server goes on, and the model is served."""
    model, tokenizer = build("llama")
    keys = {f"llama.attention.{key}": 4 for key in ("key_length", "value_length")}
    write_gguf(tmp_path / FILE, model, tokenizer, "llama", **keys)  # the queries have other shapes
    with pytest.raises(library.FileUnusable):
        library.try_out(tmp_path / FILE)
    shutil.rmtree(tmp_path / FOLDER, ignore_errors=True)
    write_gguf(tmp_path / FILE, model, tokenizer, "llama")
    assert ask(load(tmp_path), "The cat")


def test_a_process_that_is_ended_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that is ended by a signal counts as a file that cannot be computed."""
    monkeypatch.setattr(library.sys, "executable", shutil.which("false") or "/bin/false")
    with pytest.raises(library.FileUnusable, match="ends the process"):
        library.try_out(tmp_path / FILE)


def test_no_memory_for_a_trial_says_nothing_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that the system kills is tried again by the next load."""
    kill = folder / "kill"
    kill.write_text("#!/bin/sh\nkill -9 $$\n")
    kill.chmod(0o755)
    monkeypatch.setattr(library.sys, "executable", str(kill))
    with pytest.raises(OutOfMemory):
        load(folder)
    assert kept(folder) == []
    monkeypatch.undo()
    model = load(folder)
    assert model.effective["backend"] == "llama.cpp"
    model.close()


def test_a_load_that_is_cancelled_gives_the_library_back_what_it_took(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a load ends after the file was mapped, the file is unmapped."""
    closed: list[library.Model] = []
    close = library.Model.close

    def note(model: library.Model) -> None:
        closed.append(model)
        close(model)

    def cancelled(*_: Any, **__: Any) -> None:
        raise Cancelled("unloaded")

    monkeypatch.setattr(library.Model, "close", note)
    monkeypatch.setattr(agreement, "check", cancelled)
    with pytest.raises(Cancelled):
        load(folder)
    assert len(closed) == 1


def test_the_folders_own_settings_of_generation_hold(folder: Path) -> None:
    """As they do where the file is unpacked: which tokens end a text, above all."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    shell = read_shell(planned(folder), LoadOptions(folder.parent, device="cpu"))
    assert shell.generation_config.eos_token_id == [2, 5]


def test_a_trial_ends_with_the_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that hangs does not hold up who unloads the model."""
    hang = folder / "hang"
    hang.write_text("#!/bin/sh\nexec sleep 1000\n")
    hang.chmod(0o755)
    monkeypatch.setattr(library.sys, "executable", str(hang))
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        library.try_out(folder / FILE, cancellation.until)


def test_a_model_without_heads_is_estimated(folder: Path) -> None:
    """A recurrent model is only found out by the library: until then it has an estimate."""
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    assert not hasattr(config, "num_attention_heads")
    told = LlamaCpp().estimate(replace(planned(folder), config=config), LoadOptions(folder.parent, device="cpu"), None)
    assert told.weights > (folder / FILE).stat().st_size


def test_other_threads_build_models_with_weights_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the reference is built without weights, another thread's modules have theirs."""
    seen: list[bool] = []
    from_config = AutoModelForCausalLM.from_config

    def beside(*arguments: Any, **named: Any) -> Any:
        with ThreadPoolExecutor(1) as other:
            seen.append(other.submit(lambda: torch.nn.Linear(2, 2).weight.is_meta).result())
        return from_config(*arguments, **named)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", beside)
    plan = planned(folder)
    sequences = agreement.sequences(plan.config, plan.config.vocab_size)
    rows, _ = expected(plan, folder / FILE, sequences, NEVER)
    assert seen == [False]
    assert all(row.logits.isfinite().all() for row in rows)


def test_a_library_of_another_version_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its structures may lie otherwise: files are unpacked instead, and who asks for it by name is told."""

    class Shifted(ctypes.Structure):
        """`llama_context_params` of another version."""

        _fields_ = (("new", ctypes.c_uint64), *library.CONTEXT_FIELDS)

    described = dict(library.FUNCTIONS)
    described["llama_context_default_params"] = (Shifted, ())
    monkeypatch.setattr(library, "FUNCTIONS", described)
    library.library.cache_clear()
    try:
        with pytest.raises(library.LibraryUnusable, match="another version"):
            library.library()
        model = load(folder)
        assert model.effective["backend"] == "torch"
        model.close()
        with pytest.raises(ModelUnsupported, match="another version"):
            load(folder, backend="llama.cpp")
    finally:
        monkeypatch.undo()
        library.library.cache_clear()
    assert library.library()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"dtype": "bfloat16"}, "dtype says otherwise"), ({"quantization": "int8"}, "quantized already")],
)
def test_settings_that_it_does_not_honour_are_refused_by_name(
    settings: dict[str, Any], reason: str, folder: Path
) -> None:
    """By `auto` another backend honours them."""
    with pytest.raises(InvalidRequest, match=reason):
        load(folder, backend="llama.cpp", **settings)
    model = load(folder, **settings)
    assert model.effective["backend"] != "llama.cpp"
    model.close()


def test_keys_and_values_of_16_bits(folder: Path) -> None:
    """They take half the memory and round; only llama.cpp has them, and nothing else is served in their place."""
    exact, half = load(folder), load(folder, kv_cache_dtype="float16")
    assert (exact.effective["kv_cache_dtype"], half.effective["kv_cache_dtype"]) == ("float32", "float16")
    assert half.effective["backend"] == "llama.cpp"
    assert ask(exact, TEXT[:200]) == ask(half, TEXT[:200])
    assert half.status.kv_cache_bytes * 2 == exact.status.kv_cache_bytes > 0
    exact.close()
    half.close()
    for settings in ({"backend": "torch"}, {"backend": "openvino"}, {"quantization": "int8"}):
        with pytest.raises(InvalidRequest, match=r"kv_cache_dtype|keys and values are float32"):
            load(folder, kv_cache_dtype="float16", **settings)
    plain = load(folder, backend="torch", kv_cache_dtype="float32")
    assert plain.effective["kv_cache_dtype"] == "float32"
    plain.close()


def test_an_estimate_knows_the_type_of_keys_and_values(folder: Path) -> None:
    """Half the bytes a token."""
    options = LoadOptions(folder.parent, device="cpu")
    plans = [planned(folder, kv_cache_dtype=name) for name in (None, "float16")]
    exact, half = (LlamaCpp().estimate(plan, options, None) for plan in plans)
    assert (half.token_bytes * 2, half.kv_cache * 2) == (exact.token_bytes, exact.kv_cache)


def test_what_only_the_models_modules_can_do_unpacks_it_for_a_while(folder: Path) -> None:
    """Beams give what the unpacked model gives."""
    model, plain = load(folder), load(folder, backend="torch")
    beams = {"num_beams": 3, "max_new_tokens": 8}
    assert ask(model, "The cat", **beams) == ask(plain, "The cat", **beams)
    assert ask(model, "The cat")
    model.close()
    plain.close()


def test_the_other_backends_unpack_it_by_name(folder: Path) -> None:
    """In float32 both write the same texts, though the folder has no config but the file's."""
    texts = []
    for backend in ("torch", "openvino"):
        model = load(folder, backend=backend)
        assert model.effective["backend"] == backend
        texts.append(ask(model, "The cat"))
        model.close()
    assert texts[0] == texts[1] != ""


# Rows -----------------------------------------------------------------------------------------------------------------


FLOAT32_BYTES = 2 * 2 * 2 * 8 * 4  # of a token: keys and values of two layers with two heads of eight numbers


@pytest.fixture(params=["float32", "float16"])
def runner(folder: Path, request: pytest.FixtureRequest) -> Iterator[LlamaRunner]:
    """Computes the file's rows, with keys and values of either type."""
    half = request.param == "float16"
    token_bytes = FLOAT32_BYTES // 2 if half else FLOAT32_BYTES
    made = LlamaRunner(folder / FILE, build("llama")[0].config.vocab_size, token_bytes, half=half)
    yield made
    made.close()


def check_alike(runner: LlamaRunner, one: torch.Tensor, other: torch.Tensor, close: float = 1e-3) -> None:
    """Logits agree: but for their order of adding up, or where keys and values have 16 bits but for that rounding."""
    if runner.cache.token_bytes == FLOAT32_BYTES:
        torch.testing.assert_close(one, other, rtol=close, atol=close)
    else:
        assert (one - other).abs().max() <= agreement.CLOSE * (one.max() - one.min())


def test_a_row_goes_on_in_another_bank(runner: LlamaRunner) -> None:
    """The first tokens of a long row, in a bank of longer rows, are those of a short one, and the other way round."""
    table, tokens = SlotTable(runner.cache, 16384), list(range(20, 420))
    long = table.take([], 450)
    assert long is not None
    runner.forward([Piece(long, tokens, 0)])
    long.tokens.extend(tokens)
    short = table.take(tokens[:100], 120)
    assert short is not None
    assert short.bank is not long.bank
    assert short.tokens == tokens[:99]
    alone = table.take([], 120)
    assert alone is not None
    logits = runner.forward([Piece(short, tokens[99:100], 99), Piece(alone, tokens[:100], 0)])
    check_alike(runner, logits[0], logits[1])
    after = runner.forward([Piece(long, [7], 400)])  # the long row is whole
    other = table.take([], 450)
    assert other is not None
    check_alike(runner, after[0], runner.forward([Piece(other, [*tokens, 7], 0)])[0])


def test_windows_are_those_of_the_model_in_every_bank(tmp_path: Path) -> None:
    """Layers that see the last tokens only see the right ones, in rows that go on in another bank too."""
    extra = {"num_hidden_layers": 6, "head_dim": 256, "sliding_window": 16, "initializer_range": 0.1}
    model, tokenizer = build_config("Gemma3TextConfig", extra)
    write_gguf(tmp_path / FILE, model, tokenizer, "gemma3")
    tokens = tokenizer(TEXT)["input_ids"][:420]
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0]
    runner = LlamaRunner(tmp_path / FILE, model.config.vocab_size, 4096)
    try:
        table = SlotTable(runner.cache, 16384)
        long = table.take([], 450)
        assert long is not None
        found = every_row(runner, Piece(long, tokens[:400], 0, every=True))
        torch.testing.assert_close(found, wanted[:400], rtol=1e-2, atol=1e-2)
        long.tokens.extend(tokens[:400])
        short = table.take(tokens[:101], 120)
        assert short is not None
        assert (short.bank is long.bank, short.tokens) == (False, tokens[:100])
        rows = runner.forward([Piece(short, tokens[100:101], 100), Piece(long, tokens[400:401], 400)])
        torch.testing.assert_close(rows, wanted[[100, 400]], rtol=1e-2, atol=1e-2)
    finally:
        runner.close()


def test_rows_that_decode_have_numbers_that_follow_each_other(
    runner: LlamaRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However rows come and go: the library reads all weights once more at each gap. A row keeps what it holds."""
    table, draws = SlotTable(runner.cache, 16384), random.Random(0)
    texts = {index: [20 + draws.randrange(200) for _ in range(draws.randrange(3, 40))] for index in range(12)}
    slots: dict[int, Slot] = {}

    def begin(index: int) -> None:
        slot = table.take([], 200)
        assert slot is not None
        runner.forward([Piece(slot, texts[index], 0)])
        slot.tokens.extend(texts[index])
        slots[index] = slot

    for index in range(12):
        begin(index)
    for index in draws.sample(range(12), 9):
        table.promote(slots[index])
    for index in draws.sample(range(12), 5):
        table.release(slots.pop(index), keep=index % 2 == 0)
    decoding = {index: slot for index, slot in slots.items() if slot.decodes}
    numbers = [runner.cache.number(slot.bank.key, slot.row) for slot in decoding.values()]
    assert sorted(numbers) == list(range(len(numbers)))
    assert len(numbers) > 2
    batches: list[list[int]] = []
    compute = library.Model.compute

    def note(model: library.Model, context: Any, work: Any, threads: int = 1) -> Any:
        batches.append([sequence for _, _, sequence, _ in work])
        return compute(model, context, work, threads)

    order = draws.sample(sorted(decoding), len(decoding))
    with monkeypatch.context() as patch:
        patch.setattr(library.Model, "compute", note)
        rows = runner.forward([Piece(decoding[index], [7], len(texts[index])) for index in order])
    assert batches == [list(range(len(numbers)))]
    for index, row in zip(order, rows, strict=True):
        other = table.take([], 200)
        assert other is not None
        check_alike(runner, row, runner.forward([Piece(other, [*texts[index], 7], 0)])[0])
        table.release(other, keep=False)


@pytest.mark.parametrize("fits", [True, False])
def test_rows_are_exchanged_with_or_without_memory_for_both(fits: bool, runner: LlamaRunner) -> None:
    """What holds both for a moment is asked for and given back; without it the rows only exchange their numbers."""
    table, texts = SlotTable(runner.cache, 4096), ([*range(20, 60)], [*range(90, 100)])
    slots = []
    for text in texts:
        slot = table.take([], 100)
        assert slot is not None
        runner.forward([Piece(slot, text, 0)])
        slot.tokens.extend(text)
        slots.append(slot)
    before = [runner.forward([Piece(slot, [7], len(slot.tokens))])[0].clone() for slot in slots]
    asked: list[int] = []

    def take(_: str, size: int) -> bool:
        asked.append(size)
        return fits or size < 0

    runner.cache.take = take
    table.promote(slots[1])
    assert asked[0] >= 50 * runner.cache.token_bytes
    assert sum(asked) == (0 if fits else asked[0])
    assert runner.cache.number(slots[1].bank.key, slots[1].row) == (0 if fits else 1)
    for slot, row in zip(slots, before, strict=True):
        check_alike(runner, runner.forward([Piece(slot, [7], len(slot.tokens))])[0], row)


def test_no_memory_for_a_bank_is_no_bank(runner: LlamaRunner) -> None:
    """What was asked for is given back."""
    asked: list[int] = []

    def take(_: str, size: int) -> bool:
        asked.append(size)
        return False

    runner.cache.take = take
    assert SlotTable(runner.cache, 4096).take([], 100) is None
    assert runner.cache.allocated_bytes == 0
    assert min(asked) > 0


def test_more_rows_and_tokens_than_one_call_computes(runner: LlamaRunner) -> None:
    """Logits after every token of a long text, in several calls, are those of its parts."""
    table, tokens = SlotTable(runner.cache, 8192), [20 + number % 200 for number in range(700)]
    slot, parts = table.take([], 750), table.take([], 750)
    assert slot is not None
    assert parts is not None
    found = every_row(runner, Piece(slot, tokens, 0, every=True))
    for start in range(0, 700, 175):
        last = runner.forward([Piece(parts, tokens[start : start + 175], start)])[0]
        check_alike(runner, found[start + 174], last, 1e-2)
    assert found.shape[0] == 700


def test_wrong_numbers_are_found(runner: LlamaRunner, folder: Path) -> None:
    """A runner whose rows get each other's tokens, or whose logits are not numbers, is refused."""
    plan = planned(folder)
    vocabulary = build("llama")[0].config.vocab_size
    rows, columns = expected(plan, folder / FILE, agreement.sequences(plan.config, vocabulary), NEVER)
    agreement.check(runner, rows, columns, agreement.CLOSE, NEVER)
    forward = runner.forward

    def swapped(pieces: Any, *rest: Any) -> torch.Tensor:
        logits = forward(pieces, *rest)
        return logits.flip(0) if len(pieces) > 1 else logits

    def broken(pieces: Any, *rest: Any) -> torch.Tensor:
        return forward(pieces, *rest) * float("nan")

    for wrong in (swapped, broken):
        runner.forward = wrong  # type: ignore[method-assign]
        with pytest.raises(NotBatchable, match="of their spread"):
            agreement.check(runner, rows, columns, agreement.CLOSE, NEVER)


# Through the server ---------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_served_and_counted(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """The estimate is what the load takes, and the settings say who computes."""
    place = tmp_path / "shelf" / "tiny" / "gguf"
    place.mkdir(parents=True)
    model, tokenizer = build_config("LlamaConfig", {**LARGE, "num_hidden_layers": 4})
    write_gguf(place / FILE, model, tokenizer, "llama", quantize="Q8_0")
    server = start_server(LOCAL_LLM_MODELS_DIR=str(tmp_path / "shelf"), LOCAL_LLM_BACKEND="auto")
    server.add("tiny/gguf", "text-generation", gguf_file=FILE)
    told = server.call("GET", "/models/tiny/gguf/estimate").json()
    assert told["backend"] == "llama.cpp"
    assert told["weights_bytes"] >= (place / FILE).stat().st_size
    done = server.call("POST", "/models/tiny/gguf/load", json={}).json()
    assert done["settings"]["backend"] == "llama.cpp"
    asked = {"model_id": "tiny/gguf", "prompt": "The cat", "max_new_tokens": 8, "do_sample": False}
    assert server.call("POST", "/generate", json=asked).json()["success"]
    [cached] = server.call("GET", "/cache").json()["cached_models"].values()
    assert 0.9 <= told["bytes"] / cached["bytes"] <= 1.1
    assert server.call("POST", "/models/tiny/gguf/unload").json()["success"]
    half = server.call("GET", "/models/tiny/gguf/estimate", params={"kv_cache_dtype": "float16"}).json()
    assert half["kv_cache_bytes"] * 2 == told["kv_cache_bytes"]
    done = server.call("POST", "/models/tiny/gguf/load", json={"kv_cache_dtype": "float16"}).json()
    assert done["settings"]["kv_cache_dtype"] == "float16"
    assert server.call("POST", "/generate", json=asked).json()["success"]
    [cached] = server.call("GET", "/cache").json()["cached_models"].values()
    assert 0.9 <= half["bytes"] / cached["bytes"] <= 1.1
