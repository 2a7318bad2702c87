"""Checks that a model's step gave numbers to sample from: a token sampled from NaN looks like an answer but is not one.

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
    """For each row of logits or scores, (…, vocabulary) -> (…), whether a token can be sampled from them.

    Minus infinity forbids a token. A row is unusable if it has a NaN or plus infinity, or forbids all tokens.
    """
    return scores.amax(-1).isfinite()


def no_numbers(model_id: str) -> GenerationFailed:
    """The error for a step whose logits are not numbers."""
    return GenerationFailed(f"Model '{model_id}' failed to generate (its logits are not numbers)")


def no_token() -> InvalidRequest:
    """The error for usable logits of which the parameters left no token."""
    return InvalidRequest("The parameters together forbid every token that could follow")


@contextmanager
def watched(model: PreTrainedModel, model_id: str) -> Iterator[None]:
    """Makes a model fail, while its own `generate` runs, at the first step with unusable logits in any row.

    Raises:
        GenerationFailed: there was such a step.
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
    """Runs after the other logits processors and checks that each row, or with beams at least one, has a token left."""

    def __init__(self, *, beams: bool) -> None:
        """With `beams`, some rows may have no token left."""
        self._beams = beams

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """`scores` (rows, vocabulary).

        Raises:
            InvalidRequest: no token is left.
        """
        left = are_numbers(scores)
        if not bool(left.all()) and not (self._beams and bool(left.any())):
            raise no_token()
        return scores
