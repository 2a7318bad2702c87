"""What single tokens stand for, and how likely the model found them.

Any thread. Must not know sequences, sampling or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llguidance import LLTokenizer

from ..errors import InvalidRequest
from ..records import Token


class TokenTexts:
    """Tokens of one model with their texts."""

    def __init__(self, tokenizer: Any, exact: Callable[[], LLTokenizer]) -> None:
        """`exact` gives llguidance's view of the tokenizer, which knows each token's bytes; it may raise
        `InvalidRequest` where there is none."""
        self._tokenizer = tokenizer
        self._exact = exact
        self._special = frozenset(tokenizer.all_special_ids)

    def token(self, token: int, logprob: float | None = None, top: tuple[Token, ...] = ()) -> Token:
        """A token by its id."""
        try:
            raw = self._exact().decode_bytes([token])
        except InvalidRequest:
            raw = str(self._tokenizer.decode([token])).encode()
        return Token(token, raw.decode("utf-8", "replace"), raw, logprob, token in self._special, top)

    def tokens(self, ids: list[int], logits: torch.Tensor, alternatives: int) -> list[Token]:
        """Tokens and their log-probabilities: `ids[n]` stands where the model gave `logits[n]`, (tokens, vocabulary).

        Each has its `alternatives` likeliest tokens as `top`.
        """
        logprobs = logits.float().log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
        values, places = logprobs.topk(min(alternatives, logprobs.shape[1]), dim=-1)
        return [
            self.token(token, logprob, tuple(self.token(*pair) for pair in zip(*top, strict=True)))
            for token, logprob, top in zip(ids, chosen, zip(places.tolist(), values.tolist(), strict=True), strict=True)
        ]
