"""A transformers model that generates, as an OpenVINO graph with paged attention.

`convert` traces the model's own forward pass with a cache that concatenates, and turns the past into the graph's state;
such a graph can be saved and read. `paged` turns the state into blocks of the caller's KV cache. Follows OpenVINO's own
conversion of such models in `openvino.genai` and `optimum-intel`, and needs neither.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from ...modeling.rotary import changing
from ..layers import LayerKinds, NotBatchable, layer_kinds, probe
from ..torch.cache import LayerShape
from .blanks import Blanks
from .fuse import merge_products, value_products
from .library import offline_transformations, openvino

# The index of the paged attention's input that says how many tokens back it sees; 0 for all of them.
_WINDOW_INPUT = 10

# Operations that may stand between the last product and the logits: they work on each number alone.
_ELEMENTWISE = frozenset({"Add", "Convert", "Divide", "Multiply", "Subtract", "Tanh"})


class _ConcatenatingCache(Cache):  # type: ignore[misc]
    """The plainest cache: past tokens, and behind them the new ones. `layers` are pairs of (batch, heads, tokens,
    width)."""

    def __init__(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__(layers=[])
        self.pairs = list(layers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.pairs[layer_idx]
        self.pairs[layer_idx] = (torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2))
        return self.pairs[layer_idx]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0


class _Traced(torch.nn.Module):
    """The model with only tensors in its signature, as tracing needs it."""

    def __init__(self, model: PreTrainedModel, kinds: LayerKinds) -> None:
        super().__init__()
        self.model = model
        self.kinds = kinds

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        beam_idx: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        chosen = [kept.index_select(0, beam_idx) for kept in past]
        cache = _ConcatenatingCache(list(zip(chosen[::2], chosen[1::2], strict=True)))
        masks: Any = dict.fromkeys(self.kinds.names, attention_mask) if self.kinds.by_kind else attention_mask
        logits = self.model(
            input_ids=input_ids,
            attention_mask=masks,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).logits
        return (logits, *(kept for pair in cache.pairs for kept in pair))


def check_kinds(model: PreTrainedModel) -> LayerKinds:
    """The kinds of the model's layers.

    Raises:
        NotBatchable: paged attention does not support one of them, or the model changes with the length of the text, of
            which a trace holds only one case.
    """
    config = model.config.get_text_config()
    kinds = layer_kinds(config)
    if "chunked_attention" in kinds.names:
        raise NotBatchable("paged attention does not attend in chunks")
    if config._attn_implementation != "sdpa":
        raise NotBatchable("its attention is code of its own, which has no paged form")
    check_rotary(config)
    return kinds


def check_rotary(config: Any) -> None:
    """Refuses a text config whose rotary embeddings change with the length of the text.

    Raises:
        NotBatchable: they do.
    """
    if kinds := changing(config):
        raise NotBatchable(f"its rotary embeddings ({', '.join(kinds)}) change with the length of the text")


def convert(model: PreTrainedModel, blanks: Blanks, quantization: str | None = None) -> Any:
    """Converts the model to a stateful graph, float32; constants that are not merged are the model's own memory.

    Its weights may be `blanks`, and merged ones are: `constants.settle` gives them their numbers, and rounds them.
    Merged ones are those that it rounds alike.

    Raises:
        NotBatchable: the model keeps something other than keys and values in each layer, or takes no positions.
        Exception: any error of the model's code or of OpenVINO's conversion for what cannot be traced.
    """
    ov = openvino()
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder as trace  # noqa: N813 - that is all it does

    kinds = check_kinds(model)
    shapes = [shape for shape in probe(model) if shape is not None]
    layers = model.config.get_text_config().num_hidden_layers
    if len(shapes) != layers:
        raise NotBatchable("some of its layers share their keys and values, or keep none")
    names = [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns of values that are the same for every shape here
        example = _example(model, shapes)
        # Without torch's own check of the trace, which traces again: `agreement` checks more.
        traced = trace(_Traced(model, kinds).eval(), example_input=example, trace_kwargs={"check_trace": False})
        graph = ov.convert_model(traced, example_input=example)
    _name(graph.inputs, ["input_ids", "attention_mask", "position_ids", "beam_idx", *names])
    _name(graph.outputs, ["logits", *(name.replace("past_key_values", "present") for name in names)])
    shaped = {"input_ids": [-1, -1], "attention_mask": [-1, 1, -1, -1], "position_ids": [-1, -1], "beam_idx": [-1]}
    for layer, shape in enumerate(shapes):
        shaped[f"past_key_values.{layer}.key"] = [-1, shape.keys[0], -1, shape.keys[1]]
        shaped[f"past_key_values.{layer}.value"] = [-1, shape.values[0], -1, shape.values[1]]
    graph.reshape({graph.input(name): ov.PartialShape(dims) for name, dims in shaped.items()})
    offline_transformations().apply_make_stateful_transformation(
        graph, {name: name.replace("past_key_values", "present") for name in names}
    )
    _begin_empty(graph)
    graph.validate_nodes_and_infer_types()
    merge_products(graph, blanks, value_products(graph) if quantization == "int4" else ())
    return graph


def _example(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> tuple[torch.Tensor, ...]:
    """The example for tracing: two rows of four tokens that follow three others."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (2, 4), generator=generator)
    past = []
    for shape in shapes:
        past += [torch.zeros((2, heads, 3, width)) for heads, width in (shape.keys, shape.values)]
    positions = torch.arange(3, 7)[None].repeat(2, 1)
    return (ids, torch.zeros((2, 1, 4, 7)), positions, torch.arange(2), *past)


def _name(ports: Sequence[Any], names: Sequence[str]) -> None:
    for port, name in zip(ports, names, strict=True):
        port.get_tensor().set_names({name})


def _begin_empty(graph: Any) -> None:
    """Makes each state begin as (rows of the input, heads, 0, width).

    Otherwise the step after the first does not find as many rows in the state as in the input.
    """
    from openvino import opset13 as ops

    def numbers(*values: int) -> Any:
        return ops.constant(np.array(values, dtype=np.int64))

    rows = ops.gather(ops.shape_of(graph.input("input_ids"), output_type="i64"), numbers(0), ops.constant(np.int64(0)))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = node.get_output_partial_shape(0)
            heads, width = shape[1].get_length(), shape[3].get_length()
            empty = ops.broadcast(
                ops.constant(np.float32(0)), ops.concat([rows, numbers(heads), numbers(0), numbers(width)], 0)
            )
            node.set_arguments([empty.output(0)])


def paged(graph: Any, windows: Mapping[int, int]) -> None:
    """Turns a stateful graph's state into blocks of a cache, and limits its logits to the kept tokens.

    The logits are (kept, 1, vocabulary), for the tokens at the places in a new input `kept`. `windows` are how many
    tokens back a layer sees, itself included, by the layer's number; other layers see all.

    Raises:
        RuntimeError: OpenVINO's transformation finds an attention that it does not support.
        NotBatchable: an attention is unchanged, or there is no last product.
    """
    offline_transformations().paged_attention_transformation(graph)
    _set_windows(graph, windows)
    _keep_places(graph)
    graph.validate_nodes_and_infer_types()


def _set_windows(graph: Any, windows: Mapping[int, int]) -> None:
    from openvino import opset13 as ops

    seen = set()
    for node in graph.get_ops():
        if node.get_type_name() == "ScaledDotProductAttention":
            raise NotBatchable("one of its attentions has no paged form")
        if node.get_type_name() != "PagedAttentionExtension":
            continue
        layer = int(node.input_value(3).get_node().get_friendly_name().removeprefix("key_cache."))
        seen.add(layer)
        if layer in windows:
            node.input(_WINDOW_INPUT).replace_source_output(ops.constant(np.int32(windows[layer])).output(0))
    if not seen:
        raise NotBatchable("it has no attention that has a paged form")


def _keep_places(graph: Any) -> None:
    """Limits the last product, which is the largest, to the tokens whose logits are wanted."""
    ov = openvino()
    from openvino import opset13 as ops

    node = graph.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in _ELEMENTWISE:
        varying = [value for value in node.input_values() if not _is_constant(value)]
        if len(varying) != 1:
            break
        node = varying[0].get_node()
    if node.get_type_name() != "MatMul":
        raise NotBatchable(f"its logits come of a {node.get_type_name()}")
    kept = ops.parameter([-1], ov.Type.i32, name="kept")
    kept.output(0).get_tensor().set_names({"kept"})
    axis = ops.constant(np.int32(0))
    node.input(0).replace_source_output(ops.gather(node.input_value(0), kept, axis).output(0))
    graph.add_parameters([kept])


def _is_constant(value: Any) -> bool:
    """Whether a node's value is the same in every run: a constant, or one that is unpacked."""
    node = value.get_node()
    return node.get_type_name() == "Constant" or (
        node.get_type_name() in _ELEMENTWISE | {"Reshape"} and all(_is_constant(each) for each in node.input_values())
    )


def windows(model: PreTrainedModel) -> dict[int, int]:
    """How many tokens back each layer with a window sees, itself included, by its number."""
    config = model.config.get_text_config()
    kinds = check_kinds(model)
    if "sliding_attention" not in kinds.names:
        return {}
    of_layers = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {layer: config.sliding_window for layer, kind in enumerate(of_layers) if kind == "sliding_attention"}


def constant_bytes(graph: Any) -> tuple[int, int]:
    """Bytes of the graph's weights, and of the second copy of weights that are both looked up and multiplied.

    A product packs its weights into memory of its own; a table (of embeddings) is read in place.
    """
    weights = copied = 0
    for node in graph.get_ops():
        if node.get_type_name() == "Constant":
            output = node.output(0)
            size = output.get_element_type().bitwidth * int(np.prod(output.get_partial_shape().to_shape())) // 8
            users = _users(output)
            weights += size
            if "MatMul" in users and len(users) > 1:
                copied += size
    return weights, copied


def _users(output: Any) -> set[str]:
    """The kinds of operations that use a constant: products, and others; looks through operations that unpack it."""
    found = set()
    for target in output.get_target_inputs():
        node = target.get_node()
        if all(_is_constant(value) for value in node.input_values()):
            found |= _users(node.output(0))
        else:
            found.add("MatMul" if node.get_type_name() == "MatMul" else "other")
    return found
