"""The texts of single tokens, and how likely the model found them.

Any thread. Must not know sequences, sampling or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from llguidance import LLTokenizer

from ..errors import GenerationFailed, InvalidRequest
from ..modeling.steps import are_numbers
from ..types import Token
from .detokenizer import plain_tokens, text_behind


class TokenTexts:
    """The tokens of one model with their texts."""

    def __init__(self, tokenizer: Any, exact: Callable[[], LLTokenizer]) -> None:
        """`exact` returns llguidance's view of the tokenizer, which knows each token's bytes; it may raise
        `InvalidRequest` where there is none."""
        self._tokenizer = tokenizer
        self._exact = exact
        self._special = frozenset(tokenizer.all_special_ids)

    def token(
        self, token: int, logprob: float | None = None, top: tuple[Token, ...] = (), *, opens: bool = False
    ) -> Token:
        """A token by its id; one that `opens` a text lacks the space with which a text does not begin."""
        raw = self._bytes(token)
        if opens and raw.endswith(alone := self._decode([token]).encode("utf-8", "replace")):
            raw = alone
        return Token(token, raw.decode("utf-8", "replace"), raw, logprob, token in self._special, top)

    def shows(self, ids: Sequence[int]) -> bool:
        """Whether any token is not a special one."""
        return any(token not in self._special for token in ids)

    def tokens(self, ids: list[int], logits: torch.Tensor, alternatives: int, *, opens: bool = False) -> list[Token]:
        """Tokens and their log-probabilities: `ids[n]` belongs to `logits[n]`, (tokens, vocabulary).

        Each has its `alternatives` likeliest tokens as `top`. With `opens`, the first token that shows something opens
        a text.

        Raises:
            GenerationFailed: the logits are not numbers.
        """
        if not bool(are_numbers(logits).all()):
            raise GenerationFailed("The model's logits are not numbers")
        logprobs = logits.float().log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
        values, places = logprobs.topk(min(alternatives, logprobs.shape[1]), dim=-1)
        tops = zip(places.tolist(), values.tolist(), strict=True)
        result = []
        for token, logprob, top in zip(ids, chosen, tops, strict=True):
            others = tuple(self.token(*pair, opens=opens) for pair in zip(*top, strict=True))
            result.append(self.token(token, logprob, others, opens=opens))
            opens = opens and token in self._special
        return result

    def _bytes(self, token: int) -> bytes:
        try:
            return bytes(self._exact().decode_bytes([token]))
        except InvalidRequest:
            return text_behind(self._decode, self._plain, [token]).encode("utf-8", "replace")

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    @cached_property
    def _plain(self) -> list[int]:
        return plain_tokens(self._tokenizer)
