"""Texts that must be of a form: JSON of a schema, a regular expression, one of some choices, a grammar.

llguidance (https://github.com/guidance-ai/llguidance) tells after each token which ones may follow; here its masks
become a logits processor, one form for each row. A form is compiled on the request's own thread, so that one that
cannot be is refused at once. Must not know the batch, the queue or HTTP.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from transformers import LogitsProcessor

from ..errors import InvalidRequest
from ..gbnf import as_lark
from ..json_schema import TIDY, closed
from ..records import Constraint

_MOST_CHOICES = 10_000


class Constraints:
    """Compiles constraints for one model's tokens. Any thread.

    Its tokenizer may know more tokens than the model has logits for; no text is made of those.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Collection[int]) -> None:
        """`vocabulary` is how many logits the model gives for a token, `ends` the ids of tokens that end its texts."""
        self._hf = tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(ends)
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None

    def compile(self, constraint: Constraint, ends: Collection[int]) -> Form:
        """The form that a text has to have, which one of the tokens `ends` may end once it is whole.

        Raises:
            InvalidRequest: it cannot be compiled, with the reason; or this model's tokenizer cannot be constrained.
        """
        grammar = _grammar(constraint)
        ends = frozenset(end for end in ends if end < self._vocabulary)
        tokens = self.tokens
        form = Form(LLMatcher(tokens, grammar, log_level=0), tokens.vocab_size, self._vocabulary, ends)
        if reason := form.error:
            raise _refuse(constraint.kind, reason)
        return form

    @property
    def tokens(self) -> LLTokenizer:
        """llguidance's view of the tokenizer; made once, which takes about a second for a large vocabulary.

        Raises:
            InvalidRequest: it is not one of the tokenizers library.
        """
        with self._lock:
            if self._tokens is None:
                if not getattr(self._hf, "is_fast", False):
                    raise InvalidRequest("This model's tokenizer cannot be constrained: it has no tokenizer.json")
                ends = self._ends or [self._hf.eos_token_id or self._hf.pad_token_id or 0]
                try:
                    self._tokens = _tokens(self._hf, self._vocabulary, ends)
                except ValueError as error:  # some kinds of pre-tokenizers
                    raise InvalidRequest(f"This model's tokenizer cannot be constrained: {error}") from error
            return self._tokens


class Form:
    """Which tokens may follow, in one text. One thread at a time."""

    def __init__(self, matcher: LLMatcher, known: int, vocabulary: int, ends: frozenset[int]) -> None:
        """`known` is how many tokens the matcher knows, `vocabulary` for how many of them the model has logits."""
        self._matcher = matcher
        self._known = known
        self._vocabulary = vocabulary
        self._ends = ends
        self._mask = np.zeros((known + 31) // 32, dtype=np.int32)

    def copy(self) -> Form:
        """The same form at the same place, for another text."""
        return Form(self._matcher.deep_copy(), self._known, self._vocabulary, self._ends)

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(vocabulary), true for each token that may follow."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        allowed = np.unpackbits(self._mask.view(np.uint8), count=self._vocabulary, bitorder="little").view(np.bool_)
        if self._ends and self._matcher.is_accepting():
            allowed[list(self._ends)] = True
        return allowed

    def take(self, token: int) -> None:
        """Go on by a token, one of those allowed; an end token changes nothing."""
        if token not in self._ends and not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether the text is whole, and nothing may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """What is wrong, as where a grammar turns out to be too complex; else empty."""
        if not self._matcher.is_error():
            return ""
        said = str(self._matcher.get_error()).split("\n<state>")[0]  # what follows is llguidance's own state
        return "nothing fits it" if said.strip().startswith("NoExtension") else said


class Constrained(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the tokens that a form allows; each row of the batch has a form of its own."""

    def __init__(self, form: Form, prompt_tokens: int) -> None:
        self._forms = [form]
        self._read = prompt_tokens

    @property
    def complete(self) -> list[bool]:
        """For each row, whether it is whole with the tokens taken so far."""
        return [form.complete for form in self._forms]

    def take(self, tokens: Sequence[int]) -> None:
        """Go on by a token of each row."""
        for form, token in zip(self._forms, tokens, strict=True):
            form.take(token)
        self._read += 1

    def catch_up(self, rows: torch.Tensor) -> None:
        """Take the tokens that were made since; `rows` (rows, tokens) begin with the prompt."""
        while len(self._forms) < rows.shape[0]:  # several sequences of one prompt
            self._forms.append(self._forms[0].copy())
        for tokens in rows[:, self._read :].unbind(1):
            self.take(tokens.tolist())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` (rows, tokens), `scores` (rows, vocabulary).

        Raises:
            InvalidRequest: the grammar turned out to be too complex, or allows nothing that other parameters do not
                forbid.
        """
        self.catch_up(input_ids)
        allowed = torch.from_numpy(np.stack([form.allowed() for form in self._forms])).to(scores.device)
        for form in self._forms:
            if reason := form.error:
                raise InvalidRequest(f"The text cannot be given the form that is asked for: {reason}")
        constrained = scores.masked_fill(~allowed, -torch.inf)
        if torch.isneginf(constrained.amax(-1)).any():
            reason = "that other parameters forbid, or that the model has no row for"
            raise InvalidRequest(f"The form asked for allows only tokens {reason}")
        return constrained


def _tokens(tokenizer: Any, vocabulary: int, ends: list[int]) -> LLTokenizer:
    """llguidance's view of a tokenizer, without the added tokens that the model has no logits for: it would spell texts
    with them."""
    backend = copy.copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    written = backend.to_str()
    known = max(vocabulary, max(tokenizer.get_vocab().values(), default=0) + 1)
    if known > vocabulary:
        content = json.loads(written)
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocabulary]
        written = json.dumps(content, ensure_ascii=False)
    return LLTokenizer(written, n_vocab=known, eos_token=[end for end in ends if end < known] or [0])


def _grammar(constraint: Constraint) -> str:
    """llguidance's own notation.

    Raises:
        InvalidRequest: the value is not of its kind.
    """
    kind, value = constraint.kind, constraint.value
    try:
        if kind == "json_object":
            return str(LLMatcher.grammar_from_json_schema({"type": "object"}, defaults=dict(TIDY)))  # type: ignore[arg-type]
        if kind == "json_schema":
            return str(LLMatcher.grammar_from_json_schema(closed(value), defaults=dict(TIDY)))  # type: ignore[arg-type]
        if kind == "regex":
            return str(LLMatcher.grammar_from_regex(value))
        if kind == "choice":
            return str(LLMatcher.grammar_from_lark(_choices(value)))
    except RecursionError as error:
        raise _refuse(kind, "nested too deeply") from error
    except (ValueError, TypeError) as error:
        raise _refuse(kind, str(error)) from error
    try:
        return str(LLMatcher.grammar_from_lark(as_lark(value)))
    except ValueError as error:
        raise _refuse(kind, str(error)) from error


def _choices(texts: list[str]) -> str:
    if not texts or len(texts) > _MOST_CHOICES or not all(texts):
        raise ValueError(f"1 to {_MOST_CHOICES} texts are needed, none of them empty")
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))


def _refuse(kind: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid value for field '{kind}': it cannot be compiled: {reason.strip()}", kind)
