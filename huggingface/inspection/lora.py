"""What the files of a LoRA adapter tell, before it is put on a model: whether it can be, and how much memory it takes.

Reads its config and the head of its weights, and no number. Pure functions; any thread may call them. Imports neither
torch nor peft, and must not know models, the network or requests.
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

# What a LoRA config may ask for besides factors beside products, with the words for why it is not to be had here.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "modules_to_save": "it replaces whole modules",
        "trainable_token_indices": "it changes single tokens' vectors",
        "layer_replication": "it repeats the model's layers",
        "target_parameters": "it adapts parameters that are not those of a product",
        "megatron_config": "it is for Megatron's layers",
        "alora_invocation_tokens": "it is at work from a token on only",
        "use_qalora": "it is for quantized groups of inputs",
        "use_bdlora": "its factors are in blocks",
        "arrow_config": "it chooses among other adapters",
        "kasa_config": "it changes the base's weights",
        "velora_config": "it is a way of training",
        "monteclora_config": "its factors are drawn by chance",
    }
)
# How factors began matters only where the base's weights were changed with them. These leave the base as it was.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")

_PREFIX = "base_model.model."
_HALVES = ("F16", "BF16")  # peft makes float32 of these


def check(what: str, folder: Path) -> dict[str, Any]:
    """The content of an adapter's config, after a look at it and at the weights beside it; without peft or torch.

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
    """Say why an adapter without weights that could be read cannot be used.

    Raises:
        FilesRefused: it has others. FilesMissing: it has none.
    """
    if PICKLES in names:
        raise FilesRefused(
            f"{what} has pickled weights only ({PICKLES}), which can run any code; save it as safetensors"
        )
    raise FilesMissing(f"{what}: its folder holds no {WEIGHTS}; put the complete adapter there")


def check_config(what: str, config: Mapping[str, Any]) -> None:
    """Refuse an adapter by what its config asks for.

    Raises:
        ModelUnsupported: it is more than factors beside products.
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
    """Refuse factors that are not of the rank that the config says, or that do not fit the base.

    `products` are the shapes of the base's weights by their names, as far as they are known.

    Raises:
        FilesCorrupt: as said above.
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
    """The tensors in the file of an adapter's weights, by name.

    Raises:
        FilesCorrupt: it is damaged. FilesMissing: it cannot be read.
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
    """Bytes that an adapter takes in memory: its factors, those of 16 bits as float32, and no copies of the base's."""
    bits = {
        name: 32 if tensor.type in _HALVES else SAFETENSORS_TYPES.get(tensor.type, ("", 32))[1]
        for name, tensor in head.items()
    }
    return sum(tensor.count * bits[name] // 8 for name, tensor in head.items() if "lora_" in name)
