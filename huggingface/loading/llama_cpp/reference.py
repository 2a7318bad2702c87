"""What the unpacked model of a GGUF file computes, with one layer in memory at a time.

transformers unpacks a file as a whole, which takes up to eight times its size. Here each layer's weights are unpacked
when the layer computes, by transformers' own tables, and dropped after it. Called on the thread that prepares a model.
Must not know requests or the registry.
"""

from __future__ import annotations

import copy
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from ...cancellation import Cancellation
from ...engine.layers import NotBatchable
from ...engine.torch.parity import Expected
from ..gguf_reader import install, without_vocabulary
from ..plan import Plan, auto_class
from ..pretrained import BUILDING

_ACTIVATIONS = 256 * 2**20  # bytes
_COLUMNS = 16_384  # of the vocabulary, the tokens whose logits are computed: all of them would take gigabytes


def expected(
    plan: Plan, file: Path, sequences: Sequence[tuple[list[int], list[int]]], cancellation: Cancellation
) -> tuple[list[Expected], torch.Tensor]:
    """The logits that the unpacked model gives before each new token, and the ids of the tokens that have one.

    `sequences` are prompts and the new tokens that follow them. The logits are (new tokens, ids) for each.

    Raises:
        NotBatchable: the file's tensors do not fill the model layer by layer.
        Cancelled: by `cancellation`.
    """
    install()
    with BUILDING:
        model = _build(plan)
    vocabulary = model.get_input_embeddings().num_embeddings
    columns = torch.linspace(0, vocabulary - 1, min(vocabulary, _COLUMNS)).round().long()
    whole = [prompt + new[:-1] for prompt, new in sequences]
    longest = max(map(len, whole))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in whole])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in whole])
    wanted = torch.tensor([[len(prompt) - 1 + step for step in range(len(new))] for prompt, new in sequences])
    with without_vocabulary():
        reader = gguf.GGUFReader(file)
    _Layers(model, reader, columns, wanted, cancellation)
    with torch.inference_mode():
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.float()
    return [
        Expected(prompt, None, new, rows.clone()) for (prompt, new), rows in zip(sequences, logits, strict=True)
    ], columns


def needed_bytes(model: Any) -> int:
    """A bound of the bytes that `expected` takes for a model without weights.

    A layer in float32, while it is unpacked three times, and the rows of the table and the output layer.
    """
    layers: dict[str, int] = defaultdict(int)
    for name, tensor in model.named_parameters():
        place = re.match(r".*?\.\d+\.", name)
        layers[place[0] if place else ""] += tensor.numel()
    outside = layers.pop("", 0)
    width = model.get_input_embeddings().weight.shape[-1]
    return 4 * (3 * max(layers.values(), default=outside) + 2 * _COLUMNS * int(width)) + _ACTIVATIONS


def _build(plan: Plan) -> Any:
    """The file's model, with buffers but without weights."""
    config = copy.deepcopy(plan.config)
    with torch.no_grad(), _without_weights():
        return auto_class(config, plan.head).from_config(config, dtype=torch.float32).eval()


@contextmanager
def _without_weights() -> Iterator[None]:
    """Gives the modules that this thread builds in the block parameters without numbers."""
    thread = threading.get_ident()

    def drop(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(drop)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


class _Layers:
    """Gives each layer of a model its weights while it computes."""

    def __init__(
        self,
        model: Any,
        reader: gguf.GGUFReader,
        columns: torch.Tensor,
        wanted: torch.Tensor,
        cancellation: Cancellation,
    ) -> None:
        """`columns` are the tokens that have a logit, `wanted` the places that have logits, (rows, places).

        Raises:
            NotBatchable: the file's tensors are not those of the model.
        """
        self._model = model
        self._cancellation = cancellation
        architecture = reader.fields["general.architecture"].contents()
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
        self._names = get_gguf_hf_weights_map(model, self._processor)
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        by_name = {tensor.name: tensor for tensor in reader.tensors}
        read = by_name.get("token_embd.weight")
        if read is None or head is None:
            raise NotBatchable("its file has no table of tokens")
        output = by_name.get("output.weight", read)
        self._hook(table, lambda inputs: _rows_of(table, read, inputs))
        self._hook(head, lambda inputs: _columns_of(head, output, by_name.get("output.bias"), columns, wanted, inputs))
        groups: dict[nn.Module, list[gguf.ReaderTensor]] = defaultdict(list)
        for tensor in reader.tensors:
            if tensor.name not in ("token_embd.weight", "output.weight", "output.bias") and (
                (module := self._module_of(tensor.name)) is not None
            ):
                groups[module].append(tensor)
        for module, tensors in groups.items():
            self._hook(module, partial(self._fill, module, tensors))

    def _module_of(self, name: str) -> nn.Module | None:
        """The module that reads a tensor: for a layer's tensor, the layer."""
        layer = re.match(r"blk\.(\d+)\.", name)
        if layer is None:
            place = self._names.get(name, "").rpartition(".")[0]
            return self._submodule(place) if place else None
        number = layer[1]
        for known, mapped in self._names.items():
            if known.startswith(f"blk.{number}.") and (found := re.match(rf"(.*?\.{number})\.", mapped)):
                return self._submodule(found[1])
        return None

    def _submodule(self, place: str) -> nn.Module:
        module: nn.Module = self._model.get_submodule(place)
        return module

    def _hook(self, module: nn.Module, fill: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
        """Calls `fill` with a module's inputs before it computes, and drops its weights afterwards."""
        hollow = dict(module.named_parameters())

        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            self._cancellation.check()
            return fill(inputs)

        def leave(*ignored: Any) -> None:  # noqa: ARG001 - what a hook gets
            for name, parameter in hollow.items():
                stem, _, leaf = name.rpartition(".")
                module.get_submodule(stem)._parameters[leaf] = parameter

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _fill(
        self, module: nn.Module, tensors: Sequence[gguf.ReaderTensor], inputs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Gives a module its weights, as `load_gguf_checkpoint` of transformers unpacks them."""
        made: dict[str, torch.Tensor] = {}
        for tensor in tensors:
            result = self._processor.process(
                weights=gguf.dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=self._names,
                parsed_parameters={"tensors": made},
            )
            if result.name in self._names:
                made[self._names[result.name]] = torch.from_numpy(np.array(result.weights, np.float32))
        for name, values in made.items():
            stem, _, leaf = name.rpartition(".")
            parameters = self._model.get_submodule(stem)._parameters
            if leaf not in parameters or parameters[leaf].shape != values.shape:
                raise NotBatchable(f"its file's {name} does not fit into the model")
            parameters[leaf] = nn.Parameter(values, requires_grad=False)
        if lacking := [name for name, parameter in module.named_parameters() if parameter.is_meta]:
            raise NotBatchable(f"its file has no {lacking[0]}")
        return inputs


def _rows_of(table: Any, tensor: gguf.ReaderTensor, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gives a table of embeddings only the rows that are read, which get other numbers."""
    read, places = torch.unique(inputs[0], return_inverse=True)
    table._parameters["weight"] = _unpack(tensor, read)
    return (places, *inputs[1:])


def _columns_of(
    head: Any,
    tensor: gguf.ReaderTensor,
    bias: gguf.ReaderTensor | None,
    columns: torch.Tensor,
    wanted: torch.Tensor,
    inputs: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Gives the output layer the weights of some tokens, and the wanted places only."""
    head._parameters["weight"] = _unpack(tensor, columns)
    if bias is not None:
        head._parameters["bias"] = _unpack(bias, columns)
    hidden = inputs[0]
    places = wanted.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    return (hidden.gather(1, places), *inputs[1:])


def _unpack(tensor: gguf.ReaderTensor, rows: torch.Tensor) -> nn.Parameter:
    """Some rows of a tensor, in float32."""
    values = gguf.dequantize(tensor.data[rows.numpy()], tensor.tensor_type)
    return nn.Parameter(torch.from_numpy(np.array(values, np.float32)), requires_grad=False)
