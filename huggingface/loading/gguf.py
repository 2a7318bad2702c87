"""GGUF files: whether one is whole, how large its model becomes, and its config, tokenizer and weights.

`check` and the sizes read no further than the file's head and need no torch; the `read_` functions import transformers
when they are called, by any thread. The weights are unpacked: what is loaded is a plain model like any other. Must not
know the registry, the Hub or HTTP. Failures are `LoadError`s that name the model and hold no path of this machine.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from ..errors import FilesCorrupt, FilesMissing, FilesRefused, LoadError, ModelUnsupported, no_panics, public
from ..host.memory import ran_out_of_memory
from ..inspection.headers import GGUFHeader, HeaderDamaged, gguf_header

logger = logging.getLogger(__name__)

_SUFFIX = ".gguf"
_LONGEST_HEAD = 256 << 20  # bytes; the largest vocabularies there are take a tenth of it
_POINTER = b"version https://git-lfs"  # what stands in the place of a file that was not fetched

# What transformers passes over in a file and leaves at a default: the config's names, by kind of model and key.
_PASSED_OVER: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "gpt2": {"context_length": "n_positions"},
        "qwen3": {"attention.key_length": "head_dim"},
        "qwen3_moe": {"attention.key_length": "head_dim"},
    }
)

# How transformers and gguf say that a file is of a kind they do not read.
_UNKNOWN = re.compile(r"not supported|[Uu]nsupported|Cannot (?:make|build|rebuild|find)|Unknown gguf|not implemented")


# Without torch --------------------------------------------------------------------------------------------------------


def locate(model_id: str, folder: Path, gguf_file: str) -> Path:
    """The file of that name in a model's folder or below.

    Raises:
        FilesRefused: the name leads out of the folder, or is not a GGUF file's. FilesMissing: there is none.
    """
    parts = PurePosixPath(gguf_file).parts
    inside = bool(parts) and not re.search(r"[\\:\0]", gguf_file) and parts[0] != "/" and ".." not in parts
    if not inside or not gguf_file.lower().endswith(_SUFFIX):
        raise FilesRefused(f"Model '{model_id}': {gguf_file!r} is not the name of a GGUF file in its folder")
    path = folder / gguf_file
    if not path.is_file():
        raise FilesMissing(f"Model '{model_id}': its folder holds no {gguf_file}; put the file there")
    return path


def check(model_id: str, folder: Path, gguf_file: str) -> GGUFHeader:
    """See that a GGUF file is whole: its mark, its head, and that every tensor ends before the file does.

    Raises:
        FilesMissing, FilesRefused: as `locate`. FilesCorrupt: it is damaged, incomplete, or a Git LFS pointer.
        ModelUnsupported: it is a part of several, or holds tensors of a type that is not known.
    """
    path = locate(model_id, folder, gguf_file)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:

            def read(start: int, length: int) -> bytes:
                file.seek(start)
                return file.read(length)

            if read(0, len(_POINTER)) == _POINTER:
                raise FilesCorrupt(
                    f"Model '{model_id}': {gguf_file} is only a Git LFS pointer, not the file itself; fetch it "
                    "(git lfs pull)"
                )
            header = gguf_header(read, most=min(size, _LONGEST_HEAD))
    except (HeaderDamaged, MemoryError, OverflowError) as error:
        raise FilesCorrupt(f"Model '{model_id}': {gguf_file} is damaged ({error}); download it again") from error
    except OSError as error:
        raise LoadError(f"Model '{model_id}': {gguf_file} cannot be read ({error.strerror})") from error
    if header.tensors is None:
        raise FilesCorrupt(f"Model '{model_id}': {gguf_file} is damaged or incomplete; download it again")
    if header.values.get("split.count") not in (None, 0, 1):
        raise ModelUnsupported(
            f"Model '{model_id}': {gguf_file} is one of several parts, which transformers does not read; merge them "
            "into one file (llama-gguf-split --merge)"
        )
    if unknown := sorted({tensor.type for tensor in header.tensors.values() if tensor.bytes is None}):
        raise ModelUnsupported(
            f"Model '{model_id}': {gguf_file} holds tensors of an unknown kind ({', '.join(unknown)})"
        )
    if not header.tensors or header.end is None or header.end > size:
        raise FilesCorrupt(f"Model '{model_id}': {gguf_file} is damaged or incomplete; download it again")
    if not isinstance(header.values.get("general.architecture"), str):
        raise FilesCorrupt(f"Model '{model_id}': {gguf_file} does not say of which architecture its model is")
    return header


def parameters(header: GGUFHeader) -> int:
    """How many parameters the file holds. Unpacked, each takes the bytes of the type that the model is loaded in."""
    return sum(tensor.count for tensor in (header.tensors or {}).values())


# With transformers ----------------------------------------------------------------------------------------------------


def read_config(model_id: str, folder: Path, gguf_file: str, header: GGUFHeader) -> Any:
    """The config that the file's keys describe; `header` is what `check` has returned.

    Raises:
        ModelUnsupported: transformers does not read files of this architecture, or not what it says of positions.
        FilesCorrupt: a key is missing or wrong.
    """
    import transformers

    path = locate(model_id, folder, gguf_file)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, gguf_file=gguf_file, local_files_only=True)
        for key, name in _PASSED_OVER.get(config.model_type, {}).items():
            said = header.values.get(f"{header.values['general.architecture']}.{key}")
            setattr(config, name, getattr(config, name) if said is None else said)
        _note_scaling(model_id, config, header, path)
    except LoadError:
        raise
    except Exception as error:
        raise _refusal(model_id, path, header, error, "its keys") from error
    # transformers knows some models by this name, and it shall not matter to it where the files lie.
    config.name_or_path = model_id
    return config


def read_tokenizer(model_id: str, folder: Path, gguf_file: str, header: GGUFHeader) -> Any:
    """The tokenizer that the file describes.

    Where the folder has one of its own (`folder.has_tokenizer`), that is to be read instead: it says how texts are cut,
    of which a GGUF file gives no more than a name.

    Raises:
        FilesMissing: the file has none. ModelUnsupported, FilesCorrupt: it cannot be used.
    """
    import transformers

    path = locate(model_id, folder, gguf_file)
    if not header.values.get("tokenizer.ggml.tokens"):
        raise FilesMissing(
            f"Model '{model_id}': neither {gguf_file} nor its folder holds a tokenizer; put tokenizer.json there"
        )
    try:
        with no_panics():
            return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, local_files_only=True)
    except Exception as error:
        raise _refusal(model_id, path, header, error, "its tokenizer") from error


def read_model(
    model_id: str, folder: Path, gguf_file: str, header: GGUFHeader, auto_class: Any, config: Any, **options: Any
) -> tuple[Any, Mapping[str, Any]]:
    """The model, its weights unpacked, and transformers' own account of which tensors were missing or did not fit.

    `options` are those of `from_pretrained`: `dtype` above all.

    Raises:
        ModelUnsupported, FilesCorrupt: the weights cannot be used. What lacks memory is raised as it is.
    """
    from transformers import GgufConfig

    path = locate(model_id, folder, gguf_file)
    try:
        model, info = auto_class.from_pretrained(
            folder,
            gguf_file=gguf_file,
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
    """Have the model be the plain one that it is: transformers goes on to call it quantized, and treats it so."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    for config in (model.config, model.config.get_text_config()):
        vars(config).pop("quantization_config", None)


def _note_scaling(model_id: str, config: Any, header: GGUFHeader, path: Path) -> None:
    """Put into the config what the file says of how positions are scaled, which transformers passes over.

    Raises:
        ModelUnsupported: it cannot be said in a config's words.
    """
    architecture, text = header.values["general.architecture"], config.get_text_config()
    prefix = f"{architecture}.rope.scaling."
    said = {key.removeprefix(prefix): value for key, value in header.values.items() if key.startswith(prefix)}
    kind = said.pop("type", "none")
    tensors = header.tensors or {}
    rope = getattr(text, "rope_parameters", None) or {}
    # Of a model whose layers differ in it, scaling is that of the layers which see everything.
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type", "default") != "default":  # transformers has read it
        return
    if kind == "linear" and set(said) <= {"factor"}:
        rope.update(rope_type="linear", factor=said["factor"])
    elif kind == "yarn" and set(said) == {"factor", "original_context_length"}:
        original = said["original_context_length"]
        rope.update(rope_type="yarn", factor=said["factor"], original_max_position_embeddings=original)
    elif kind != "none" or any("rope_factors" in name for name in tensors):
        raise ModelUnsupported(
            f"Model '{model_id}': {path.name} scales positions in a way that is not known here ({kind})"
        )
    if "rope_freqs.weight" in tensors and not _divided(text, rope, path):
        raise ModelUnsupported(
            f"Model '{model_id}': {path.name} scales positions by numbers that are not those of Llama 3"
        )


def _divided(config: Any, rope: dict[str, Any], path: Path) -> bool:
    """Have frequencies divided by the rule of Llama 3; whether that gives the numbers in the file's tensor."""
    import torch
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    wanted = load_gguf_state_dict(GgufHeader.from_file(str(path)))["rope_freqs.weight"][...].float()
    width = 2 * len(wanted)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    rule = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope.update(rope_type="llama3", factor=float(wanted.max()), **rule)
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return found.shape == plain.shape and torch.allclose(plain / found, wanted, rtol=1e-3)


def _refusal(model_id: str, path: Path, header: GGUFHeader, error: Exception, part: str) -> LoadError:
    """What an error of transformers or gguf in reading `part` of a file means to the user."""
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
