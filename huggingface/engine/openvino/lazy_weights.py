"""A transformers model without its weights, which are loaded on demand and dropped when they are not used for a while.

The graph answers nearly everything; beams, hidden states and the like need the model's own modules. Engine's thread
only, but for the building. Must not know files: who reads is given.
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
    """The weights of one model's modules, when they are needed."""

    def __init__(
        self,
        shell: PreTrainedModel,
        read: Callable[[], PreTrainedModel],
        take: Callable[[int], bool] = lambda _: True,
        size: int = 0,
    ) -> None:
        """`shell` is what others hold, `read` reads the same model with its weights; these take `size` bytes, which
        `take` is asked for, and given back as a negative number."""
        self._shell = shell
        self._read = read
        self._take = take
        self._size = size
        self._before: list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]] | None = None
        self._used = 0.0

    @property
    def present(self) -> bool:
        """Whether the weights are there."""
        return self._before is not None

    def fetch(self) -> None:
        """Have the weights there.

        Raises:
            OutOfMemory: there is no room for them.
        """
        self._used = time.monotonic()
        if self._before is not None:
            return
        if not self._take(self._size):
            raise OutOfMemory(
                f"Not enough memory for the model's own weights ({self._size} bytes), which this request needs beside "
                "those that OpenVINO computes with; load the model with engine torch"
            )
        with ExitStack() as undo:
            undo.callback(self._take, -self._size)
            whole = self._read()
            undo.pop_all()
        self._before = []
        _assume(self._shell, whole, self._before)
        logger.info("read the own weights of a %s", type(self._shell).__name__)

    def rest(self) -> None:
        """Let go of the weights if nobody has used them for a while."""
        if self._before is not None and time.monotonic() - self._used > _KEPT:
            self.let_go()

    def stay(self) -> None:
        """Keep the weights from now on: they are the model's again, and counted by whoever counts these."""
        self._before = None
        self._take(-self._size)

    def let_go(self) -> None:
        """Let go of the weights."""
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
    """Give the shell's modules what the whole model's hold; `before` notes what they held."""
    before.append((shell, shell._parameters, shell._buffers, shell._modules))
    shell._parameters, shell._buffers = whole._parameters, whole._buffers
    children: dict[str, Any] = {}
    for name, child in whole._modules.items():
        old = shell._modules.get(name)
        if child is not None and old is not None and _kind(old) is _kind(child):
            _assume(old, child, before)
            children[name] = old
        else:  # a layer that is quantized takes the place of the plain one
            children[name] = child
    shell._modules = children


def make_shell(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights let go of: its parameters and buffers have shapes and no numbers.

    It still says that it is on a CPU, where whoever prepares its inputs is to put them.
    """
    with torch.no_grad():
        model.to("meta")
    seem_whole(model)
    return model


def seem_whole(model: PreTrainedModel) -> None:
    """Have a model without numbers, or a part of one, say that it is on a CPU."""
    own = type(model)
    model.__class__ = type(
        own.__name__, (_Hollow, own), {"__module__": own.__module__, "__qualname__": own.__qualname__}
    )


class _Hollow:
    """What a model without numbers says otherwise."""

    device = torch.device("cpu")


def _kind(module: nn.Module) -> type:
    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, _Hollow) else kind
