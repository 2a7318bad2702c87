"""Draws of one request's own: a seed gives the same text whatever else the process samples meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class SeededDraws(TorchFunctionMode):
    """While entered, this thread's `torch.multinomial` draws from a generator of its own, seeded with `seed`.

    Torch's global generator and a seeded `torch.Generator` of the same device give the same stream, so the text is that
    of `torch.manual_seed(seed)` before `model.generate`, for sampling, beam sampling and several returned sequences
    alike. Torch keeps such modes per thread: other threads' draws neither move this stream nor are moved by it.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        self._generator = torch.Generator(device=device)
        self._generator.manual_seed(seed)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Pass every call on, with the generator added to the draws."""
        arguments = dict(kwargs or {})
        if func is torch.multinomial:
            arguments["generator"] = self._generator
        return func(*args, **arguments)
