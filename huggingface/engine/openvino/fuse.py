"""Merges products of the same rows with several weights into one: attention's queries, keys and values, for instance.

Each number is the same sum as before. But a small product leaves cores waiting at its end, and where weights are
rounded, its rows are rounded for each product again. Must not know models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from .blanks import Blanks
from .library import openvino

# Operations between a product and the values of an attention that leave each number as it is, or shift or scale it.
_KEEPING = frozenset(
    {"Add", "Broadcast", "Concat", "Convert", "Multiply", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)


def merge_products(graph: Any, blanks: Blanks, apart: Collection[str] = ()) -> int:
    """Merges the products in a graph that read the same rows, in place; returns the number of merged groups.

    Their weights are constants, (outputs, inputs), and so are their biases, if any. The merged weights are blanks. The
    products named `apart` stay as they are.
    """
    groups = defaultdict(list)
    for node in graph.get_ordered_ops():
        if _is_product(node) and node.get_friendly_name() not in apart:
            source = node.input_value(0)
            groups[source.get_node().get_friendly_name(), source.get_index()].append(node)
    merged = 0
    for products in groups.values():
        biases = [_bias(product) for product in products]
        if len(products) > 1 and len({bias is None for bias in biases}) == 1:
            _merge(products, biases, blanks)
            merged += 1
    if merged:
        graph.validate_nodes_and_infer_types()
    return merged


def value_products(graph: Any) -> set[str]:
    """The names of the products that give an attention its values, and nothing else."""
    return {
        product.get_friendly_name()
        for node in graph.get_ops()
        if node.get_type_name() == "ScaledDotProductAttention"
        for product in _products(node.input_value(2).get_node())
    }


def _products(node: Any) -> Iterator[Any]:
    """The products whose numbers a node has, however it orders them."""
    kind = node.get_type_name()
    if kind == "MatMul":
        yield node
    elif kind in _KEEPING:
        several = kind in ("Add", "Concat", "Multiply")
        for value in node.input_values() if several else [node.input_value(0)]:
            yield from _products(value.get_node())


def _is_product(node: Any) -> bool:
    """Whether the node is rows times float32 weights."""
    if node.get_type_name() != "MatMul" or not _is_weights(node.input_value(1), 2):
        return False
    attributes = node.get_attributes()
    return bool(attributes["transpose_b"] and not attributes["transpose_a"])


def _is_weights(value: Any, rank: int) -> bool:
    return bool(
        value.get_node().get_type_name() == "Constant"
        and value.get_element_type().get_type_name() == "f32"
        and value.get_partial_shape().rank.get_length() == rank
    )


def _bias(product: Any) -> tuple[Any, Any] | None:
    """The sum of a product and a bias, and the bias, if only that sum reads the product."""
    readers = list(product.output(0).get_target_inputs())
    if len(readers) != 1 or readers[0].get_node().get_type_name() != "Add":
        return None
    total = readers[0].get_node()
    other = total.input_value(1 - readers[0].get_index())
    outputs = product.input_value(1).get_shape()[0]
    if other.get_node().get_type_name() != "Constant" or other.get_element_type().get_type_name() != "f32":
        return None
    # One number per output; all dimensions before it are 1.
    shape = list(other.get_shape())
    return (total, other) if shape and shape[-1] == outputs == int(np.prod(shape)) else None


def _merge(products: Sequence[Any], biases: Sequence[tuple[Any, Any] | None], blanks: Blanks) -> None:
    from openvino import opset13 as ops

    weights = [product.input_value(1).get_node().get_data() for product in products]
    together = _constant(blanks.add([part for each in weights for part in blanks.parts(each)]))
    whole = ops.matmul(products[0].input_value(0), together, transpose_a=False, transpose_b=True)
    whole.set_friendly_name(f"{products[0].get_friendly_name()}/merged")
    results = list(products)
    if biases[0] is not None:
        results = [bias[0] for bias in biases if bias is not None]
        added = np.concatenate([bias[1].get_node().get_data().reshape(-1) for bias in biases if bias is not None])
        whole = ops.add(whole, _constant(added))
    sizes = np.array([part.shape[0] for part in weights], dtype=np.int64)
    parts = ops.variadic_split(whole, ops.constant(np.int64(-1)), ops.constant(sizes))
    for number, result in enumerate(results):
        for reader in list(result.output(0).get_target_inputs()):
            reader.replace_source_output(parts.output(number))


def _constant(numbers: Any) -> Any:
    """A constant that shares this memory."""
    return openvino().op.Constant(numbers, shared_memory=True)
