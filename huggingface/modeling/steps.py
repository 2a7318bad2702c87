"""Whether a step of a model gave numbers to choose a token by: what is chosen by none looks like an answer and is none.

Any thread. Must not know sequences, requests or tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from ..errors import GenerationFailed, InvalidRequest


def are_numbers(scores: torch.Tensor) -> torch.Tensor:
    """For each row of logits or scores, (…, vocabulary) -> (…), whether a token can be chosen by them.

    Minus infinity is how a token is forbidden. A NaN, or infinity, is no number, and neither are all tokens forbidden.
    """
    return scores.amax(-1).isfinite()


def no_numbers(model_id: str) -> GenerationFailed:
    """The failure of a step whose logits are no numbers."""
    return GenerationFailed(f"Model '{model_id}' failed to generate (its logits are not numbers)")


def no_token() -> InvalidRequest:
    """The refusal where numbers were there, and what changes them left none."""
    return InvalidRequest("The parameters together forbid every token that could follow")


@contextmanager
def watched(model: PreTrainedModel, model_id: str) -> Iterator[None]:
    """While its own `generate` runs, have a model fail at the first step without numbers, in whatever row.

    Raises:
        GenerationFailed: there was one.
    """

    def look(_: Any, __: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)  # (rows, tokens, vocabulary)
        if logits is not None and not bool(are_numbers(logits[:, -1]).all()):
            raise no_numbers(model_id)

    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


class SomeToken(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing, and stands behind the processors that do: some token has to be left for each row, or of all
    beams for one."""

    def __init__(self, *, beams: bool) -> None:
        """With `beams` some of the rows may come to an end that nothing may follow."""
        self._beams = beams

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """`scores` (rows, vocabulary).

        Raises:
            InvalidRequest: there is none.
        """
        left = are_numbers(scores)
        if not bool(left.all()) and not (self._beams and bool(left.any())):
            raise no_token()
        return scores
