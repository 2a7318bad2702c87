"""GGUF files: whether one is complete, the size of its model, and its config, tokenizer and weights.

`check` and the sizes read only the file's header and need no torch; the `read_` functions import transformers when
called, by any thread. The weights are unpacked: the result is an ordinary model. Must not know the registry, the Hub or
HTTP. Failures are `LoadError`s that name the model and contain no path of this machine.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from ..errors import FilesCorrupt, FilesMissing, FilesRefused, LoadError, ModelUnsupported, explained, public
from ..host.memory import ran_out_of_memory
from ..inspection.gguf_parts import SUFFIX, PartsDisagree, join, part_names
from ..inspection.headers import GGUFHeader, HeaderDamaged, gguf_header

logger = logging.getLogger(__name__)

_LONGEST_HEAD = 256 << 20  # bytes; the largest vocabularies take a tenth of it
_POINTER = b"version https://git-lfs"  # the content of a Git LFS file that was not fetched

# Keys that transformers ignores and leaves at a default: the config's names, by kind of model and key.
_PASSED_OVER: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "gpt2": {"context_length": "n_positions"},
        "qwen3": {"attention.key_length": "head_dim"},
        "qwen3_moe": {"attention.key_length": "head_dim"},
    }
)

# How transformers and gguf report that they do not read a kind of file.
_UNKNOWN = re.compile(r"not supported|[Uu]nsupported|Cannot (?:make|build|rebuild|find)|Unknown gguf|not implemented")


# Without torch --------------------------------------------------------------------------------------------------------


def locate(model_id: str, folder: Path, gguf_file: str) -> list[Path]:
    """The path of a file in a model's folder or below; of one in several parts the paths of all, in order.

    Raises:
        FilesRefused: the name leads out of the folder, or is not a GGUF file's.
        FilesMissing: there is no such file, or a part is missing.
    """
    parts = PurePosixPath(gguf_file).parts
    inside = bool(parts) and not re.search(r"[\\:\0]", gguf_file) and parts[0] != "/" and ".." not in parts
    if not inside or not gguf_file.lower().endswith(SUFFIX):
        raise FilesRefused(f"Model '{model_id}': {gguf_file!r} is not the name of a GGUF file in its folder")
    paths = []
    for name in part_names(gguf_file):
        paths.append(folder / name)
        if not paths[-1].is_file():
            raise FilesMissing(f"Model '{model_id}': its folder holds no {name}; put the file there")
    return paths


def check(model_id: str, folder: Path, gguf_file: str) -> GGUFHeader:
    """Checks that a GGUF file is complete: its mark, its header, and that every tensor ends before the file does.

    Of a file in several parts each is checked, and that they are parts of one model. Returns the header of all.

    Raises:
        FilesMissing, FilesRefused: as `locate`.
        FilesCorrupt: the file is damaged, incomplete, a Git LFS pointer, or a part of another model.
        ModelUnsupported: the file holds tensors of an unknown type.
    """
    paths = locate(model_id, folder, gguf_file)
    names = [path.relative_to(folder).as_posix() for path in paths]
    try:
        header = join({name: _check_file(model_id, path, name) for name, path in zip(names, paths, strict=True)})
    except PartsDisagree as error:
        raise FilesCorrupt(f"Model '{model_id}': {error}") from error
    tensors = header.tensors or {}
    if unknown := sorted({tensor.type for tensor in tensors.values() if tensor.bytes is None}):
        raise ModelUnsupported(
            f"Model '{model_id}': {gguf_file} holds tensors of an unknown kind ({', '.join(unknown)})"
        )
    if not tensors:
        raise FilesCorrupt(f"Model '{model_id}': {gguf_file} is damaged or incomplete; download it again")
    if not isinstance(header.values.get("general.architecture"), str):
        raise FilesCorrupt(f"Model '{model_id}': {gguf_file} does not name its model's architecture")
    return header


def _check_file(model_id: str, path: Path, name: str) -> GGUFHeader:
    """The header of one file, which is complete as far as the types of its tensors are known."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:

            def read(start: int, length: int) -> bytes:
                file.seek(start)
                return file.read(length)

            if read(0, len(_POINTER)) == _POINTER:
                raise FilesCorrupt(
                    f"Model '{model_id}': {name} is only a Git LFS pointer, not the file itself; fetch it "
                    "(git lfs pull)"
                )
            header = gguf_header(read, maximum=min(size, _LONGEST_HEAD))
    except (HeaderDamaged, MemoryError, OverflowError) as error:
        raise FilesCorrupt(f"Model '{model_id}': {name} is damaged ({error}); download it again") from error
    except OSError as error:
        raise LoadError(f"Model '{model_id}': {name} cannot be read ({error.strerror})") from error
    if header.tensors is None or (header.end is not None and header.end > size):
        raise FilesCorrupt(f"Model '{model_id}': {name} is damaged or incomplete; download it again")
    return header


def parameters(header: GGUFHeader) -> int:
    """The number of parameters in the file. Unpacked, each takes the bytes of the dtype that the model is loaded in."""
    return sum(tensor.count for tensor in (header.tensors or {}).values())


# With transformers ----------------------------------------------------------------------------------------------------


def read_config(model_id: str, folder: Path, gguf_file: str, header: GGUFHeader) -> Any:
    """The config that the file's keys describe; `header` is the result of `check`.

    Raises:
        ModelUnsupported: transformers does not read this architecture, or the file's scaling of positions.
        FilesCorrupt: a key is missing or wrong.
    """
    import transformers

    from . import gguf_reader

    path = locate(model_id, folder, gguf_file)[0]
    gguf_reader.install()
    try:
        with gguf_reader.without_vocabulary():
            config = transformers.AutoConfig.from_pretrained(
                folder, gguf_file=part_names(gguf_file)[0], local_files_only=True
            )
        if config.get_text_config().vocab_size == 0:  # counted from the vocabulary that is left out
            config.get_text_config().vocab_size = header.values["tokenizer.ggml.tokens"]
        for key, name in _PASSED_OVER.get(config.model_type, {}).items():
            said = header.values.get(f"{header.values['general.architecture']}.{key}")
            setattr(config, name, getattr(config, name) if said is None else said)
        _note_scaling(model_id, config, header, path)
    except LoadError:
        raise
    except Exception as error:
        raise _refusal(model_id, path, header, error, "its keys") from error
    # transformers knows some models by this name, so it must not depend on the folder.
    config.name_or_path = model_id
    return config


def read_tokenizer(model_id: str, folder: Path, gguf_file: str, header: GGUFHeader) -> Any:
    """The tokenizer that the file describes.

    If the folder has its own (`folder.has_tokenizer`), use that instead: it says how texts are split, of which a GGUF
    file gives only a name.

    Raises:
        FilesMissing: the file has none.
        ModelUnsupported, FilesCorrupt: the tokenizer is unusable.
    """
    import transformers

    path = locate(model_id, folder, gguf_file)[0]
    if not header.values.get("tokenizer.ggml.tokens"):
        raise FilesMissing(
            f"Model '{model_id}': neither {gguf_file} nor its folder holds a tokenizer; put tokenizer.json there"
        )
    with explained(lambda error: _refusal(model_id, path, header, error, "its tokenizer")):
        return transformers.AutoTokenizer.from_pretrained(
            folder, gguf_file=part_names(gguf_file)[0], local_files_only=True
        )


def read_model(
    model_id: str, folder: Path, gguf_file: str, header: GGUFHeader, auto_class: Any, config: Any, **options: Any
) -> tuple[Any, Mapping[str, Any]]:
    """The model with unpacked weights, and transformers' report of missing or mismatched tensors.

    `options` are those of `from_pretrained`: `dtype` above all.

    Raises:
        ModelUnsupported, FilesCorrupt: the weights are unusable. Errors of memory are raised unchanged.
    """
    from transformers import GgufConfig

    from . import gguf_reader

    path = locate(model_id, folder, gguf_file)[0]
    gguf_reader.install()
    try:
        with gguf_reader.without_vocabulary():
            model, info = auto_class.from_pretrained(
                folder,
                gguf_file=part_names(gguf_file)[0],
                config=config,
                quantization_config=GgufConfig(dequantize=True),  # else it might fetch routines from the Hub
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        if ran_out_of_memory(error):
            raise
        raise _refusal(model_id, path, header, error, "its weights") from error
    _forget_packing(model)
    model.config.name_or_path = model_id
    return model, info


def _forget_packing(model: Any) -> None:
    """Removes the marks of quantization: transformers would go on to treat the unpacked model as quantized."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    for config in (model.config, model.config.get_text_config()):
        vars(config).pop("quantization_config", None)


def _note_scaling(model_id: str, config: Any, header: GGUFHeader, path: Path) -> None:
    """Copies the file's scaling of positions, which transformers ignores, into the config.

    Raises:
        ModelUnsupported: a config cannot express it.
    """
    architecture, text = header.values["general.architecture"], config.get_text_config()
    prefix = f"{architecture}.rope.scaling."
    said = {key.removeprefix(prefix): value for key, value in header.values.items() if key.startswith(prefix)}
    kind = said.pop("type", "none")
    tensors = header.tensors or {}
    rope = getattr(text, "rope_parameters", None) or {}
    # If layers differ in it, the scaling is that of the layers with full attention.
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type", "default") != "default":  # transformers has read it
        return
    if kind == "linear" and set(said) <= {"factor"}:
        rope.update(rope_type="linear", factor=said["factor"])
    elif kind == "yarn" and set(said) == {"factor", "original_context_length"}:
        original = said["original_context_length"]
        rope.update(rope_type="yarn", factor=said["factor"], original_max_position_embeddings=original)
    elif kind != "none" or any("rope_factors" in name for name in tensors):
        raise ModelUnsupported(f"Model '{model_id}': {path.name} scales positions in an unknown way ({kind})")
    if "rope_freqs.weight" in tensors and not _divided(text, rope, path):
        raise ModelUnsupported(f"Model '{model_id}': {path.name} scales positions by other numbers than Llama 3")


def _divided(config: Any, rope: dict[str, Any], path: Path) -> bool:
    """Divides frequencies by the rule of Llama 3; returns whether that gives the numbers in the file's tensor."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from . import gguf_reader

    wanted = torch.from_numpy(gguf_reader.numbers(path, "rope_freqs.weight"))
    width = 2 * len(wanted)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    rule = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope.update(rope_type="llama3", factor=float(wanted.max()), **rule)
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return found.shape == plain.shape and torch.allclose(plain / found, wanted, rtol=1e-3)


def _refusal(model_id: str, path: Path, header: GGUFHeader, error: Exception, part: str) -> LoadError:
    """The error for the user from transformers' or gguf's error while reading `part` of a file."""
    import transformers

    message = str(error)
    if isinstance(error, ImportError):
        return ModelUnsupported(
            f"Model '{model_id}': {path.name} needs a package that is not installed: {public(error, path.parent)}"
        )
    if isinstance(error, NotImplementedError) or _UNKNOWN.search(message):
        return ModelUnsupported(
            f"Model '{model_id}': transformers {transformers.__version__} does not read {part} from a GGUF file of the "
            f"architecture '{header.values['general.architecture']}': {public(error, path.parent)}"
        )
    logger.info("%s of %s cannot be used", part, model_id, exc_info=error)
    return FilesCorrupt(
        f"Model '{model_id}': {part} in {path.name} cannot be used; download it again ({public(error, path.parent)})"
    )
