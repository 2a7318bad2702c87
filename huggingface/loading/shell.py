"""A model without its weights, for backends that compute with weights of their own.

What only the model's own modules can do (beams, hidden states) reads the weights on demand. Called on the loader's
thread. Must not know backends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..model.memory import detach
from ..types import LoadOptions
from .plan import Plan
from .pretrained import BUILDING, read_model, read_shell
from .quantization import predicted_bytes


@dataclass(frozen=True, slots=True)
class Shell:
    """A model without its weights; `read` reads it with weights, which take the bytes of `weights`."""

    model: Any
    read: Callable[[], Any]
    weights: int


def open_shell(plan: Plan, options: LoadOptions) -> Shell:
    """Reads a model without its weights.

    Raises: as `loader.load`, for faulty files.
    """
    with BUILDING:
        model = read_shell(plan, options)
    return Shell(model, partial(_read_whole, plan, options), _own_bytes(plan, model))


def _read_whole(plan: Plan, options: LoadOptions) -> Any:
    """Reads the model itself, into memory of its own."""
    with BUILDING:
        whole = read_model(plan, options, None)
    detach(whole)
    return whole


def _own_bytes(plan: Plan, model: Any) -> int:
    """Bytes of the weights that `_read_whole` reads, from the model's shell."""
    if plan.placement.quantization is not None:
        return predicted_bytes(model, plan.placement.quantization, "cpu")
    return sum(tensor.numel() * tensor.itemsize for tensor in {*model.parameters(), *model.buffers()})
