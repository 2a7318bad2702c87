"""Whether a graph gives what torch gives: tried before it serves anybody.

The same tokens go through the model's own `generate`, prompt by prompt, and through the graph in chunks, in ragged
company and past any window; the logits must agree at every step. What torch gave is kept beside the graph, so that a
later load, on another machine perhaps, is tried as well without torch's weights. Must not know files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from ...errors import Cancelled
from ..layers import NotBatchable
from ..parity import Expected, compare, expect, some_prompts
from .graph import windows
from .runner import OpenVINORunner

# How far float32's logits may lie from torch's, and those of compressed weights from what they were when compressed, as
# a share of their spread: these are rounded on their way, and a processor may round otherwise.
CLOSE = 1e-3
CLOSE_COMPRESSED = 0.05

_LENGTHS = (21, 5, 13)  # tokens of the prompts
_LONGEST = 1100  # tokens that a prompt is made longer at most, to go past a window


def lengths(model: PreTrainedModel) -> tuple[int, ...]:
    """How many tokens the prompts have: one goes past the smallest window, where that is not too far."""
    nearest = min(windows(model).values(), default=0)
    first = max(_LENGTHS[0], nearest + 9) if nearest <= _LONGEST else _LENGTHS[0]
    return (first, *_LENGTHS[1:])


def torch_expects(model: PreTrainedModel, given_up: Callable[[], bool] = lambda: False) -> list[Expected]:
    """What torch gives, for `check`."""
    expected = []
    for prompt in some_prompts(model, lengths(model)):
        if given_up():
            raise Cancelled
        expected.append(expect(model, prompt))
    return expected


def check(runner: OpenVINORunner, expected: Sequence[Expected], close: float = CLOSE) -> list[torch.Tensor]:
    """See that the runner's logits are those expected, and return them: (new tokens, vocabulary) for each prompt.

    Raises:
        NotBatchable: they are not, with how far they lie apart.
    """
    seen = compare(expected, runner)
    apart = 0.0
    for logits, row in zip(seen, expected, strict=True):
        spread = 1.0 if close <= CLOSE else float(row.logits.amax() - row.logits.amin())
        difference = (logits - row.logits).abs().max() / spread
        apart = max(apart, float(difference) if torch.isfinite(difference) else float("inf"))
    if not apart <= close:
        raise NotBatchable(f"its logits lie {apart:.2g} from torch's")
    return seen
