"""LoRA adapters of a model in memory: reads them from their folders, attaches them with peft, and switches them.

The model stays the base: an adapter is active only while a request uses it. Any thread may call `attach` before the
model is used; only the engine's thread switches. Must not know the registry, requests or HTTP. Whatever an adapter
changes besides two factors for a product is honoured, or refused by its name.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import FilesCorrupt, InvalidRequest, LoadError, ModelUnsupported, OutOfMemory, public
from ..host.memory import ran_out_of_memory
from ..inspection.lora import CONFIG, REFUSED, WEIGHTS, check, check_factors, read_head

logger = logging.getLogger(__name__)


class AttachedAdapters:
    """The adapters of one model, none of them active."""

    def __init__(self, model_id: str, model: Any, keys: Mapping[str, str]) -> None:
        """`keys` has the name in the model's layers for each name in requests."""
        self._model_id = model_id
        self._model = model
        self.keys: Mapping[str, str] = MappingProxyType(dict(keys))

    def check(self, name: str | None) -> None:
        """Refuses a name that no adapter of the model has. Any thread.

        Raises:
            InvalidRequest: the model has no adapter of this name; the message lists those that it has.
        """
        if name is not None and name not in self.keys:
            names = ", ".join(self.keys) or "none"
            raise InvalidRequest(
                f"Invalid value for field 'adapter': model '{self._model_id}' has no '{name}'. It has: {names}",
                "adapter",
            )

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Makes the model answer as this adapter in the block, and as the base (None) afterwards."""
        if name is None:
            yield
            return
        try:
            self.activate(self._model, name)
            yield
        finally:
            self.activate(self._model, None)

    def activate(self, model: Any, name: str | None) -> None:
        """Makes this model or its twin answer as this adapter from now on."""
        for layer in _layers(model):
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter([self.keys[name]], inference_mode=True)


def attach(model_id: str, model: Any, folders: Mapping[str, Path], tokenizer: Any = None) -> AttachedAdapters:
    """Attaches the adapters in some folders to a model, in place, by the names that requests use.

    `model` is a `PreTrainedModel` in eval mode; `tokenizer` is its own, whose tokens must be the adapters' too.

    Raises:
        FilesMissing, FilesCorrupt, FilesRefused, ModelUnsupported: an adapter is unusable; the message names it and
            says why. The model is unusable then.
        OutOfMemory: memory is short. The model is unusable then.
    """
    keys = {name: f"adapter_{number}" for number, name in enumerate(folders)}
    for name, folder in folders.items():
        what = f"Adapter '{name}' of model '{model_id}'"
        try:
            _attach(what, model, keys[name], folder, tokenizer)
        except LoadError:
            raise
        except ImportError as error:
            raise ModelUnsupported(f"{what} needs a package that is not installed: {error.name or 'peft'}") from error
        except Exception as error:
            if ran_out_of_memory(error):
                raise OutOfMemory(f"Not enough memory for {what[0].lower()}{what[1:]}") from error
            logger.info("%s cannot be attached", what, exc_info=error)
            raise FilesCorrupt(f"{what} cannot be used: {public(error, folder)}") from error
    handle = AttachedAdapters(model_id, model, keys)
    if keys:
        handle.activate(model, None)
        model.requires_grad_(False)
        model.eval()
    return handle


def _attach(what: str, model: Any, key: str, folder: Path, tokenizer: Any) -> None:
    from peft import inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict
    from peft.tuners.tuners_utils import cast_adapter_dtype

    content = check(what, folder)
    products = {name: tuple(each.shape) for name, each in model.named_parameters() if each.is_floating_point()}
    check_factors(what, content, read_head(what, folder), products)
    config = _config(what, content)
    _check_tokens(what, folder, tokenizer)
    weights = _factors(what, load_peft_weights(str(folder), device="cpu"), model)
    _teach_quantized(what, config, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of present adapters, and of the layout of a Conv1D's weights
        inject_adapter_in_model(config, model, key, low_cpu_mem_usage=True)
    if config.target_parameters:  # peft's form for a mixture's experts
        raise ModelUnsupported(f"{what} cannot be chosen per request: {REFUSED['target_parameters']}")
    _check_places(what, model)
    result: Any = set_peft_model_state_dict(model, weights, key, low_cpu_mem_usage=True)
    missing = [name for name in result.missing_keys if key in name.split(".")]
    if missing or result.unexpected_keys:
        names = ", ".join([*missing, *result.unexpected_keys][:3])
        raise FilesCorrupt(
            f"{what} does not fit: {len(missing)} tensors missing, {len(result.unexpected_keys)} that the model has no "
            f"place for, such as {names}; it is incomplete, or belongs to another base"
        )
    # As in peft's own `from_pretrained`: half-precision factors become float32.
    cast_adapter_dtype(model, adapter_name=key)


def _config(what: str, content: Mapping[str, Any]) -> Any:
    """peft's own config, from the fields that its installed version knows."""
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)}
    for name, value in content.items():
        if name not in known and value not in (None, False, [], {}):
            raise ModelUnsupported(f"{what} asks for '{name}' in {CONFIG}, which the installed peft does not know")
    config = LoraConfig(**{name: value for name, value in content.items() if name in known})
    config.inference_mode, config.init_lora_weights, config.lora_dropout = True, True, 0.0
    return config


def _teach_quantized(what: str, config: Any, model: Any) -> None:
    """Tells peft how to adapt the layers of `quantization`: beside their product, as for any layer."""
    from peft.tuners.lora import Linear

    from .narrow import NarrowLinear

    if not any(isinstance(module, NarrowLinear) for module in model.modules()):
        return
    if config.use_dora:
        raise ModelUnsupported(f"{what} cannot be used with quantization: it reads the base's weights (use_dora)")

    class Quantized(Linear):
        def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[Any, Any]:
            return base_layer.codes.device, base_layer.dtype

    config._register_custom_module({NarrowLinear: Quantized})


def _check_tokens(what: str, folder: Path, tokenizer: Any) -> None:
    """Refuses an adapter that was trained with tokens that the base lacks, or has at other ids."""
    path = folder / "tokenizer.json"
    if tokenizer is None or not path.is_file():
        return
    try:
        added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
        tokens = {str(token["content"]): token["id"] for token in added}
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise FilesCorrupt(f"{what}: its tokenizer.json is damaged; download it again") from error
    vocabulary = tokenizer.get_vocab()
    for token, number in tokens.items():
        if vocabulary.get(token) != number:
            raise ModelUnsupported(f"{what} has a tokenizer of its own: the base does not have its token '{token}'")


def _factors(what: str, weights: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The adapter's tensors, without copies of the base's own, which peft adds where it adapts embeddings.

    Raises:
        ModelUnsupported: the copies differ from the base's: loading them would change the model for all requests.
        FilesCorrupt: a value is not a number; rows of other adapters are multiplied by it too, if only times zero.
    """
    own = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    factors = {}
    for name, tensor in weights.items():
        if not bool(tensor.isfinite().all()):
            raise FilesCorrupt(f"{what}: {WEIGHTS} is damaged ({name} is not all numbers); download it again")
        if "lora_" in name:
            factors[name] = tensor
            continue
        base = own.get(name.removeprefix("base_model.model.").replace(".base_layer", ""))
        if base is None or base.shape != tensor.shape or not bool((tensor.to(base) == base).all()):
            raise ModelUnsupported(f"{what} cannot be chosen per request: it changes the base's {name}")
    return factors


def _check_places(what: str, model: Any) -> None:
    """Refuses adapters of anything but products and the table of tokens: of positions, above all."""
    from torch import nn

    words = model.get_input_embeddings()
    others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    for layer in _layers(model):
        base = layer.get_base_layer()
        if isinstance(base, others) and layer is not words:
            raise ModelUnsupported(f"{what} cannot be chosen per request: it adapts a {type(base).__name__}")


def _layers(model: Any) -> Iterator[Any]:
    """The adapted layers of a model, as far as peft has attached them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
