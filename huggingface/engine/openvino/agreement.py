"""Whether a graph gives what torch gives: tried before it serves anybody.

The same tokens go through the model's own `generate`, prompt by prompt, and through the graph in chunks, in ragged
company and past any window; the logits must agree at every step. What torch gave is kept beside the graph, so that a
later load, on another machine perhaps, is tried as well without torch's weights. Must not know files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ...cancellation import NEVER, Cancellation
from ...errors import Cancelled
from ..borders import nearest, past, small
from ..layers import NotBatchable, probe
from ..torch.parity import Expected, compare, expect, room_for, some_prompts
from .failures import computed
from .graph import convert, windows
from .runner import OpenVINORunner

# How far float32's logits may lie from torch's, and those of compressed weights from what they were when compressed, as
# a share of their spread: these are rounded on their way, and a processor may round otherwise.
CLOSE = 1e-3
CLOSE_COMPRESSED = 0.05

_LENGTHS = (21, 5, 13)  # tokens of the prompts
_LONGEST = 1100  # tokens that a prompt is made longer at most, to go past a window


def lengths(model: PreTrainedModel) -> tuple[int, ...]:
    """How many tokens the prompts have: one goes past the nearest length at which the model changes, if near enough."""
    config = model.config.get_text_config()
    first = max(_LENGTHS[0], past(config)) if nearest(config) <= _LONGEST else _LENGTHS[0]
    return (first, *_LENGTHS[1:])


def check_small(model: PreTrainedModel, cancellation: Cancellation = NEVER) -> None:
    """See that a graph of the model's code is right beyond a length at which it changes, where that is too far to be
    read: on a small model of it.

    Raises:
        NotBatchable: it is not, or no such model can be made.
    """
    border = nearest(model.config.get_text_config())
    if border <= _LONGEST:
        return
    try:
        tried = small(model)
        expected = torch_expects(tried, cancellation)
    except Cancelled:
        raise
    except Exception as error:
        raise NotBatchable(f"it changes at a length of {border} tokens, which is too far to be tried") from error
    try:
        shapes = [shape for shape in probe(tried) if shape is not None]
        with computed("convert"):
            runner = OpenVINORunner(convert(tried), windows(tried), shapes, room_for(expected))
        check(runner, expected)
        runner.close()
    except NotBatchable as error:
        raise NotBatchable(f"beyond {border} tokens: {error}") from error


def torch_expects(model: PreTrainedModel, cancellation: Cancellation = NEVER) -> list[Expected]:
    """What torch gives, for `check`."""
    expected = []
    for prompt in some_prompts(model, lengths(model)):
        cancellation.check()
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
