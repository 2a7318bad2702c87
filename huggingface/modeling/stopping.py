"""What `generate` calls after each token: it ends cancelled work, and shows how far the work is.

Must not know tasks or requests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..cancellation import Cancellation


class EachToken(StoppingCriteria):  # type: ignore[misc]
    """Ends cancelled work at once: by raising, because a beam search continues after a stop."""

    def __init__(self, cancellation: Cancellation, seen: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """`seen` gets the tokens so far, (rows, tokens); it may return which rows end, (rows,), bool, or raise."""
        self._cancellation = cancellation
        self._seen = seen

    def __call__(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        self._cancellation.check()
        ends = self._seen(input_ids)
        if ends is None:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return ends.to(input_ids.device)


def each_token(
    cancellation: Cancellation, seen: Callable[[torch.Tensor], torch.Tensor | None] = lambda _: None
) -> StoppingCriteriaList:
    """`EachToken` as an argument of `generate`."""
    return StoppingCriteriaList([EachToken(cancellation, seen)])
