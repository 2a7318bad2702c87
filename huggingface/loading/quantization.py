"""Weights in 8 or 4 bits: replaces a loaded model's layers, one by one, by layers with a quarter of the memory.

Only the weights are rounded; `narrow` multiplies by them. `int4` on CUDA is bitsandbytes'. The loader calls it, on its
thread, before the model is used. Must not know records, the registry or the engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import InvalidRequest, ModelUnsupported
from ..host.memory import drop_pages, mapped_files
from .narrow import GROUP, SMALLEST, NarrowEmbedding, NarrowLinear, pack, whole_products_pay

SCHEMES: tuple[str, ...] = ("int8", "int4")

_MAX_STEP = 15  # a group's step is at most this many times its output's smallest: 15 * 8 still is an 8-bit number
_STEPS_TRIED = (0, 1, -1)  # besides the step that just holds all of a group's weights
_BLOCK = 2**17  # weights rounded at a time, so that the results stay in the caches
_NF4_BLOCK = 64  # weights that share a step in bitsandbytes' 4 bits
_NF4_CODE = 64  # bytes of its table of values, one per layer
_NARROW = 2  # bytes of a weight of 16 bits
_WORTH = 0.1  # the least share of a model's bytes in layers that can be quantized

_DEVICES = ("cpu", "cuda")
_BITSANDBYTES = "bitsandbytes==0.50.2"

# A module's place: its parent, its name there, and itself.
_Place = tuple[nn.Module, str, nn.Module]


def check(scheme: str, device: str) -> None:
    """Refuses a scheme that this device (`cpu`, `cuda:1`, …) does not support.

    Raises:
        InvalidRequest: the scheme is unknown, or not for such a device.
        ModelUnsupported: a package is missing.
    """
    if scheme not in SCHEMES:
        raise InvalidRequest(
            f"Invalid value for field 'quantization': '{scheme}' is not one of {', '.join(SCHEMES)}", "quantization"
        )
    kind = device.partition(":")[0]
    if kind not in _DEVICES:
        raise InvalidRequest(f"quantization is for the devices {', '.join(_DEVICES)}, not for '{kind}'", "quantization")
    if kind == "cuda" and scheme == "int4" and find_spec("bitsandbytes") is None:
        raise ModelUnsupported(
            f"quantization 'int4' on cuda needs a package that is not installed: pip install {_BITSANDBYTES}"
        )


def quantize(model: nn.Module, scheme: str, device: str, dtype: torch.dtype | None = None) -> None:
    """Replaces a model's layers by quantized ones on `device`, one after the other, so that memory never holds both.

    Every `nn.Linear` and `Conv1D` is one, and so is a table of embeddings that shares an output layer's weights. Such a
    table, any output layer, and a layer whose inputs are no multiple of the group size have 8 bits in `int4` too. The
    rest of the model stays as it is and where it is. With `dtype`, each layer's weights have that dtype before they are
    rounded, and so have the layer's results.

    Raises:
        InvalidRequest, ModelUnsupported: see `check`; or almost none of the model's weights are in such layers.
    """
    check(scheme, device)
    groups = list(_groups(model))
    if sum(_weight(places[0][2]).nbytes for places in groups) < _WORTH * tensor_bytes(model):
        raise ModelUnsupported(
            f"quantization is not available for this kind of model ({type(model).__name__}): almost none of its "
            "weights are in layers that can be quantized"
        )
    whole = device == "cpu" and whole_products_pay()
    head, mapped = _head(model), mapped_files()
    with torch.no_grad():
        while groups:  # nothing else may hold a replaced layer
            places = groups.pop()
            module = places[0][2]
            source: torch.Tensor = module.weight.data  # type: ignore[assignment]
            if dtype is not None:
                for _, _, each in places:
                    each.to(dtype)
            bits = 4 if scheme == "int4" and len(places) == 1 and module is not head else 8
            bits = 4 if bits == 4 and _fits_groups(_inputs(module)) else 8
            if bits == 4 and device != "cpu":
                made: list[nn.Module] = [_nf4(module, device)]
            else:
                made = _quantized(places, bits, device, whole=whole, dtype=_weight(module).dtype)
            for (parent, name, _), new in zip(places, made, strict=True):
                setattr(parent, name, new)
            if any(start <= source.data_ptr() < end for start, end in mapped):
                drop_pages(source.data_ptr(), source.nbytes)


def store_narrow(model: nn.Module) -> None:
    """Replaces a model's layers whose weights have 16 bits by layers that have them too, and compute in float32.

    The layers are those of `quantize`, and the table of tokens. The rest of the model stays as it is.
    """
    for places in _narrow(model):
        if _weight(places[0][2]).itemsize == _NARROW:
            made = _quantized(places, 16, "cpu", whole=False, dtype=torch.float32)
            for (parent, name, _), new in zip(places, made, strict=True):
                setattr(parent, name, new)


def stored_bytes(model: nn.Module) -> int:
    """What `tensor_bytes` will return of a float32 model after `store_narrow`, if its weights have 16 bits in files."""
    saved = torch.float32.itemsize - _NARROW
    return tensor_bytes(model) - sum(saved * _weight(places[0][2]).numel() for places in _narrow(model))


def predicted_bytes(model: nn.Module, scheme: str | None, device: str) -> int:
    """What `tensor_bytes` will return once a model is quantized; the model may be on torch's `meta` device."""
    total = tensor_bytes(model)
    if scheme is None:
        return total
    head = _head(model)
    for places in _groups(model):
        module: Any = places[0][2]
        inputs, outputs = _inputs(module), module.weight.numel() // _inputs(module)
        small = scheme == "int4" and len(places) == 1 and module is not head
        total += _weight_bytes(outputs, inputs, 4 if small else 8, device) - module.weight.nbytes
    return total


def tensor_bytes(model: nn.Module) -> int:
    """The bytes of a model's tensors, each storage once: parameters, buffers, and other tensors that modules keep."""
    storages: dict[tuple[str, int], int] = {}
    fakes = 0
    for module in model.modules():
        for tensor in _tensors(module):
            if tensor.device.type == "meta":
                continue
            if tensor.layout is not torch.strided:  # oneDNN's layout: opaque, with an address of its own
                storages["opaque", id(tensor)] = tensor.numel() * tensor.element_size()
                continue
            storage = tensor.untyped_storage()
            storages[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    seen: set[int] = set()
    for module in model.modules():
        for tensor in _tensors(module):
            if tensor.device.type == "meta" and id(tensor) not in seen:
                seen.add(id(tensor))
                fakes += tensor.nbytes
    return sum(storages.values()) + fakes


# Rounding -------------------------------------------------------------------------------------------------------------


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, inputs) -> int8 of the same shape, and the scale of each output."""
    scale = weight.abs().amax(1).float().clamp_min_(SMALLEST).div_(127)
    return torch.div(weight, scale[:, None]).round_().to(torch.int8), scale


def _rounded_by_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(outputs, inputs) -> codes of -8 to 7, steps and middles of the groups, scales of the outputs.

    A weight is about (code * step + middle) * scale. Steps and middles are whole numbers, and code * step fits in 8
    bits; of a few steps, the one nearest to the group's weights is taken.
    """
    groups = weight.float().view(weight.shape[0], -1, GROUP)
    least, maximum = groups.aminmax(dim=2, keepdim=True)
    apart, middle = maximum - least, (maximum + least) / 2
    scale = torch.maximum(apart.amax(1, keepdim=True) / (15 * _MAX_STEP), middle.abs().amax(1, keepdim=True) / 120)
    scale.clamp_min_(SMALLEST)
    parts, holding, middle = groups / scale, (apart / (15 * scale)).round_(), middle / scale
    best: list[torch.Tensor] = []
    for beside in _STEPS_TRIED:
        steps = (holding + beside).clamp_(1, _MAX_STEP)
        middles = (middle + steps / 2).round_()  # the codes' own middle is at -0.5
        codes = ((parts - middles) / steps).round_().clamp_(-8, 7)
        wrong = torch.addcmul(middles, codes, steps).sub_(parts).square_().sum(2, keepdim=True)
        found = [wrong, codes, steps, middles]
        better = wrong < best[0] if best else None
        best = (
            found if better is None else [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        )
    _, codes, steps, middles = (each.to(torch.int8) for each in best)
    return codes.view(weight.shape), steps[:, :, 0], middles[:, :, 0], scale.flatten()


def _fits_groups(inputs: int) -> bool:
    return inputs % GROUP == 0


def _weight_bytes(outputs: int, inputs: int, bits: int, device: str) -> int:
    """Bytes of a layer's weights after rounding; a layer that does not fit 4 bits has 8."""
    if bits == 8 or not _fits_groups(inputs):
        return outputs * inputs + outputs * 4
    if device != "cpu":
        return outputs * inputs // 2 + -(-outputs * inputs // _NF4_BLOCK) * 4 + _NF4_CODE
    return outputs * inputs // 2 + 2 * (outputs * inputs // GROUP) + outputs * 4


# Modules --------------------------------------------------------------------------------------------------------------


def _quantized(places: Sequence[_Place], bits: int, device: str, *, whole: bool, dtype: torch.dtype) -> list[nn.Module]:
    """The modules that replace these; they share one weight, with which the first one multiplies, or looks up."""
    first: Any = places[0][2]
    weight = first.weight.t() if isinstance(first, Conv1D) else first.weight
    blocks = weight.split(max(1, _BLOCK // weight.shape[1]))
    scale = steps = middles = None
    if bits == 16:
        codes = weight.detach().contiguous()
    elif bits == 8:
        codes, scale = (torch.cat(part).to(device) for part in zip(*map(_rounded, blocks), strict=True))
    else:
        rounded = zip(*(_rounded_by_groups(block.contiguous()) for block in blocks), strict=True)
        codes, steps, middles, scale = (torch.cat(part).to(device) for part in rounded)
        codes, steps, middles = pack(codes), steps.t().contiguous(), middles.t().contiguous()
    made: list[nn.Module] = []
    for _, _, old in places:
        bias: Any = getattr(old, "bias", None)
        bias = bias if bias is None else _moved(bias, device)
        if isinstance(old, nn.Embedding):
            made.append(NarrowEmbedding(codes, scale, old.padding_idx, dtype=dtype))
        else:
            made.append(NarrowLinear(codes, scale, steps, middles, bias, dtype=dtype, whole=whole))
    return made


def _nf4(module: Any, device: str) -> nn.Module:
    """bitsandbytes' layer of 4 bits, which rounds its weights when it moves to `device`."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-not-found]

    weight = module.weight.t().contiguous() if isinstance(module, Conv1D) else module.weight
    made: nn.Module = Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    made.weight = Params4bit(
        weight.data, requires_grad=False, quant_type="nf4", blocksize=_NF4_BLOCK, compress_statistics=False, module=made
    )
    if module.bias is not None:
        made.bias = _moved(module.bias, device)
    return made.to(device)


def _moved(bias: torch.Tensor, device: str) -> nn.Parameter:
    return nn.Parameter(bias.detach().to(device), requires_grad=False)


def _groups(model: nn.Module) -> Iterator[list[_Place]]:
    """The modules that can be quantized, grouped by shared weight, a multiplying one first.

    A weight that another kind of module uses, or whose module has hooks, is not quantized.
    """
    users: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    places: dict[int, list[_Place]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users[id(parameter)].append((module, name))
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) in (nn.Linear, Conv1D, nn.Embedding) and not (
                child._forward_hooks or child._forward_pre_hooks
            ):
                places[id(child.weight)].append((parent, name, child))
    for identity, found in places.items():
        products = [place for place in found if not isinstance(place[2], nn.Embedding)]
        others = [place for place in found if isinstance(place[2], nn.Embedding)]
        known = {id(place[2]) for place in found}
        if not products or any(id(user) not in known or name != "weight" for user, name in users[identity]):
            continue
        if others and any(isinstance(place[2], Conv1D) for place in products):
            continue  # the table would have the other order
        weight = _weight(products[0][2])
        if weight.dtype.is_floating_point and weight.numel():
            yield [*products, *others]


def _narrow(model: Any) -> list[list[_Place]]:
    """The modules that may keep weights of 16 bits, as `_groups`: those, and the table of tokens by itself."""
    words = model.get_input_embeddings()
    tables: list[list[_Place]] = [
        [(parent, name, child)]
        for parent in model.modules()
        for name, child in parent.named_children()
        if child is words and type(child) is nn.Embedding and not (child._forward_hooks or child._forward_pre_hooks)
    ]
    users = [each for module in model.modules() for each in module._parameters.values() if each is words.weight]
    return [*_groups(model), *(tables if len(tables) == len(users) == 1 else [])]


def _head(model: Any) -> nn.Module | None:
    """The output layer, whose rounding is most noticeable."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return found if isinstance(found, nn.Module) else None


def _weight(module: Any) -> torch.Tensor:
    weight: torch.Tensor = module.weight
    return weight


def _inputs(module: Any) -> int:
    return int(module.weight.shape[0 if isinstance(module, Conv1D) else 1])


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors that a module itself holds, also inside packed parameters and tensors of several parts."""
    for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        if isinstance(value, torch.Tensor):
            yield from _plain(value)


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a tensor consists of: itself, or torchao's parts, and bitsandbytes' tensors beside it."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None and type(tensor) not in (torch.Tensor, nn.Parameter):
        for name in flatten()[0]:
            yield from _plain(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)
    for value in vars(state).values() if state is not None else ():
        if isinstance(value, torch.Tensor):
            yield value
