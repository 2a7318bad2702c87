"""Checks the files of a LoRA adapter before it is attached to a model, and computes the memory that it takes.

Reads the config and the header of the weights, not the weights themselves. Pure functions; any thread may call them.
Imports neither torch nor peft, and must not know models, the network or requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from ..errors import FilesCorrupt, FilesMissing, FilesRefused, ModelUnsupported
from . import folder as files
from .headers import SAFETENSORS_TYPES, HeaderDamaged, Tensor, safetensors_header

CONFIG, WEIGHTS, PICKLES = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Features of a LoRA config besides low-rank factors, each with the reason why it is not supported.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "modules_to_save": "it replaces whole modules",
        "trainable_token_indices": "it changes single tokens' vectors",
        "layer_replication": "it repeats the model's layers",
        "target_parameters": "it adapts parameters that are not those of a product",
        "megatron_config": "it is for Megatron's layers",
        "alora_invocation_tokens": "it applies only from a certain token on",
        "use_qalora": "it is for quantized groups of inputs",
        "use_bdlora": "its factors are in blocks",
        "arrow_config": "it chooses among other adapters",
        "kasa_config": "it changes the base's weights",
        "velora_config": "it is a way of training",
        "monteclora_config": "its factors are sampled at random",
    }
)
# Initializations of the factors that leave the base's weights unchanged; others would need a changed base.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")

_PREFIX = "base_model.model."
_HALVES = ("F16", "BF16")  # peft converts these to float32


def check(what: str, folder: Path) -> dict[str, Any]:
    """Checks an adapter's config and weights file; returns the config. Needs neither peft nor torch.

    Raises:
        FilesMissing, FilesCorrupt, FilesRefused, ModelUnsupported: as their names say; `what` begins the message.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FilesMissing(f"{what}: its folder holds no {CONFIG}; put the complete adapter there")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FilesCorrupt(f"{what}: {CONFIG} is damaged (not JSON); download it again") from error
    if not isinstance(config, dict):
        raise FilesCorrupt(f"{what}: {CONFIG} is damaged (not a JSON object); download it again")
    check_config(what, config)
    if not (folder / WEIGHTS).is_file():
        check_pickled(what, [path.name for path in folder.iterdir()])
    if not files.is_whole(folder / WEIGHTS):
        raise FilesCorrupt(f"{what}: {WEIGHTS} is damaged or incomplete; download it again")
    return config


def check_pickled(what: str, names: Iterable[str]) -> NoReturn:
    """Refuses an adapter without safetensors weights.

    Raises:
        FilesRefused: its weights are pickles. FilesMissing: it has no weights.
    """
    if PICKLES in names:
        raise FilesRefused(
            f"{what} has pickled weights only ({PICKLES}), which can run any code; save it as safetensors"
        )
    raise FilesMissing(f"{what}: its folder holds no {WEIGHTS}; put the complete adapter there")


def check_config(what: str, config: Mapping[str, Any]) -> None:
    """Refuses an adapter whose config asks for an unsupported feature.

    Raises:
        ModelUnsupported: the adapter is more than low-rank factors.
    """
    if config.get("peft_type") != "LORA":
        raise ModelUnsupported(f"{what} is of the kind {config.get('peft_type')}; only LORA can be chosen per request")
    for field, why in REFUSED.items():
        if config.get(field):
            raise ModelUnsupported(f"{what} cannot be chosen per request: {why} ({field} in {CONFIG})")
    if config.get("bias", "none") != "none":
        raise ModelUnsupported(f"{what} cannot be chosen per request: it changes the base's biases (bias in {CONFIG})")
    if (beginning := config.get("init_lora_weights", True)) not in _BEGINNINGS:
        raise ModelUnsupported(
            f"{what} is made for a base whose weights were changed when it began ('{beginning}'); convert it to plain "
            "LoRA (path_initial_model_for_weight_conversion of peft's save_pretrained)"
        )


def check_factors(
    what: str, config: Mapping[str, Any], head: Mapping[str, Tensor], products: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks the factors' rank against the config, and their shapes against the base.

    `products` are the shapes of the base's weights by their names, as far as they are known.

    Raises:
        FilesCorrupt: a rank or a shape does not match.
    """
    rank = config.get("r")
    for name, factor in head.items():
        module, found, _ = name.partition(".lora_A.")
        other = head.get(f"{module}.lora_B.{name.rpartition('.lora_A.')[2]}")
        if not found or other is None or len(factor.shape) != 2 or len(other.shape) != 2:
            continue
        if isinstance(rank, int) and not config.get("rank_pattern") and factor.shape[0] != rank:
            raise FilesCorrupt(
                f"{what} cannot be used: its factors are of rank {factor.shape[0]}, and {CONFIG} says {rank}; download "
                "it again"
            )
        place = module.removeprefix(_PREFIX)
        product = products.get(f"{place}.weight")
        shape = (other.shape[0], factor.shape[1])
        if product is not None and len(product) == 2 and min(product) > 1 and shape not in (product, product[::-1]):
            raise FilesCorrupt(
                f"{what} does not fit: {place} has {' x '.join(map(str, product))} weights, and its factors make "
                f"{' x '.join(map(str, shape))}; it belongs to another base"
            )


def read_head(what: str, folder: Path) -> dict[str, Tensor]:
    """The tensors in an adapter's weights file, by name.

    Raises:
        FilesCorrupt: the file is damaged. FilesMissing: it cannot be read.
    """

    def read(start: int, length: int) -> bytes:
        with (folder / WEIGHTS).open("rb") as file:
            file.seek(start)
            return file.read(length)

    try:
        return safetensors_header(read) or {}
    except HeaderDamaged as error:
        raise FilesCorrupt(f"{what}: {WEIGHTS} is damaged or incomplete; download it again") from error
    except OSError as error:
        raise FilesMissing(f"{what}: its folder holds no {WEIGHTS}; put the complete adapter there") from error


def factor_bytes(head: Mapping[str, Tensor]) -> int:
    """Bytes of an adapter in memory: its factors, with 16-bit ones as float32, without its copies of base weights."""
    bits = {
        name: 32 if tensor.type in _HALVES else SAFETENSORS_TYPES.get(tensor.type, ("", 32))[1]
        for name, tensor in head.items()
    }
    return sum(tensor.count * bits[name] // 8 for name, tensor in head.items() if "lora_" in name)
