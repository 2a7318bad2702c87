"""A transformers model without its weights, which are loaded on demand and dropped when they are not used for a while.

The graph answers nearly everything; beams, hidden states and the like need the model's own modules. Engine's thread
only, except the building. Must not know files: a function of the caller reads the weights.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import OutOfMemory
from ...host.memory import release_freed

logger = logging.getLogger(__name__)

_KEPT = 30.0  # seconds after their last use


class Reserve:
    """Loads torch weights on demand (beams, hidden states) and drops them after 30 s without use."""

    def __init__(
        self,
        shell: PreTrainedModel,
        read: Callable[[], PreTrainedModel],
        take: Callable[[int], bool] = lambda _: True,
        size: int = 0,
    ) -> None:
        """`shell` is the model without weights that others use; `read` reads the same model with weights.

        They take `size` bytes, for which `take` is asked, and which it gets back as a negative number.
        """
        self._shell = shell
        self._read = read
        self._take = take
        self._size = size
        self._before: list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]] | None = None
        self._used = 0.0

    @property
    def present(self) -> bool:
        """Whether the weights are in memory."""
        return self._before is not None

    def fetch(self) -> None:
        """Loads the weights, if they are not in memory.

        Raises:
            OutOfMemory: there is no room for them.
        """
        self._used = time.monotonic()
        if self._before is not None:
            return
        if not self._take(self._size):
            raise OutOfMemory(
                f"Not enough memory for the model's own weights ({self._size} bytes), which this request needs beside "
                "OpenVINO's; load the model with backend torch"
            )
        with ExitStack() as undo:
            undo.callback(self._take, -self._size)
            whole = self._read()
            undo.pop_all()
        self._before = []
        _assume(self._shell, whole, self._before)
        logger.info("read the torch weights of a %s", type(self._shell).__name__)

    def release_idle(self) -> None:
        """Drops the weights if they have not been used for a while."""
        if self._before is not None and time.monotonic() - self._used > _KEPT:
            self.unload()

    def stay(self) -> None:
        """Keeps the weights from now on: they are the model's again, and the caller counts their bytes."""
        self._before = None
        self._take(-self._size)

    def unload(self) -> None:
        """Drops the weights."""
        if self._before is None:
            return
        for module, parameters, buffers, modules in reversed(self._before):
            module._parameters, module._buffers, module._modules = parameters, buffers, modules
        self._before = None
        release_freed()
        self._take(-self._size)


def _assume(
    shell: nn.Module, whole: nn.Module, before: list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]]
) -> None:
    """Gives the shell's modules the contents of the whole model's; `before` records their own."""
    before.append((shell, shell._parameters, shell._buffers, shell._modules))
    shell._parameters, shell._buffers = whole._parameters, whole._buffers
    children: dict[str, Any] = {}
    for name, child in whole._modules.items():
        old = shell._modules.get(name)
        if child is not None and old is not None and _kind(old) is _kind(child):
            _assume(old, child, before)
            children[name] = old
        else:  # a quantized layer replaces the plain one
            children[name] = child
    shell._modules = children


def make_shell(model: PreTrainedModel) -> PreTrainedModel:
    """Drops the model's weights: its parameters and buffers keep their shapes.

    It still reports a CPU as its device, where its callers must put its inputs.
    """
    with torch.no_grad():
        model.to("meta")
    seem_whole(model)
    return model


def seem_whole(model: PreTrainedModel) -> None:
    """Makes a model without weights, or a part of one, report a CPU as its device."""
    own = type(model)
    model.__class__ = type(
        own.__name__, (_Hollow, own), {"__module__": own.__module__, "__qualname__": own.__qualname__}
    )


class _Hollow:
    """The attributes that a model without weights overrides."""

    device = torch.device("cpu")


def _kind(module: nn.Module) -> type:
    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, _Hollow) else kind
