"""Tests whether a graph gives torch's results, before it serves requests.

The same tokens go through the model's own `generate`, prompt by prompt, and through the graph, in chunks, beside rows
of other lengths and past any window; the logits must agree at every step. Torch's results are stored beside the graph,
so that a later load, perhaps on another machine, is tested without torch's weights. Must not know files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ...cancellation import NEVER, Cancellation
from ...errors import Cancelled
from ..borders import nearest, past, small
from ..layers import NotBatchable, probe
from ..torch.parity import Expected, compare, expect, room_for, some_prompts
from .blanks import Blanks
from .constants import NumbersFile, settle
from .failures import computed
from .graph import convert, windows
from .runner import OpenVINORunner

logger = logging.getLogger(__name__)

CLOSE = 1e-3  # the largest difference of float32's logits from torch's

_LENGTHS = (21, 5, 13)  # tokens of the prompts
_LONGEST = 1100  # the most tokens of a prompt that is made longer to go past a window


def lengths(model: PreTrainedModel) -> tuple[int, ...]:
    """The prompts' lengths in tokens: one goes past the nearest length at which the model changes, if that is near
    enough."""
    config = model.config.get_text_config()
    first = max(_LENGTHS[0], past(config)) if nearest(config) <= _LONGEST else _LENGTHS[0]
    return (first, *_LENGTHS[1:])


def check_far(model: PreTrainedModel, cancellation: Cancellation = NEVER) -> None:
    """Tests the model's code, as a graph, beyond a length at which it changes, if that is too far: on a small model.

    Raises:
        NotBatchable: the graph is wrong there, or no small model can be made.
    """
    border = nearest(model.config.get_text_config())
    if border <= _LONGEST:
        return
    try:
        tried = check_small(model, cancellation)
    except NotBatchable as error:
        raise NotBatchable(f"beyond {border} tokens: {error}") from error
    if not tried:
        raise NotBatchable(f"it changes at a length of {border} tokens, which is too far to be tried")


def check_small(model: PreTrainedModel, cancellation: Cancellation = NEVER) -> bool:
    """Tests the model's code, as a graph, on a small model of it; returns whether one can be made.

    Raises:
        NotBatchable: the graph is wrong.
    """
    try:
        tried = small(model)
        expected = torch_expects(tried, cancellation)
    except Cancelled:
        raise
    except Exception as error:
        logger.info("no small %s can be tried", type(model).__name__, exc_info=error)
        return False
    blanks, file = Blanks(), NumbersFile()
    shapes = [shape for shape in probe(tried) if shape is not None]
    with computed("convert"):
        graph = convert(tried, blanks)
        settle(graph, blanks, None, file)
        runner = OpenVINORunner(graph, windows(tried), shapes, room_for(expected))
    check(runner, expected)
    runner.close()
    return True


def torch_expects(model: PreTrainedModel, cancellation: Cancellation = NEVER) -> list[Expected]:
    """Torch's results, for `check`."""
    expected = []
    for prompt in some_prompts(model, lengths(model)):
        cancellation.check()
        expected.append(expect(model, prompt))
    return expected


def check(runner: OpenVINORunner, expected: Sequence[Expected], close: float = CLOSE) -> list[torch.Tensor]:
    """Checks that the runner's logits are the expected ones; returns them: (new tokens, vocabulary) for each prompt.

    Raises:
        NotBatchable: they differ; the message says how much.
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
