"""Constraints on a text's form: a JSON schema, a regular expression, a choice, a grammar.

After each token llguidance (https://github.com/guidance-ai/llguidance) computes which tokens may follow, in a process
of the form's own (see `forms.process`); its masks become a logits processor here, with one form for each row. A form is
compiled on the request's own thread, so that an invalid one is refused at once. Must not know the batch, the queue or
HTTP.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLTokenizer
from transformers import LogitsProcessor

from ..errors import InvalidRequest
from ..forms import compiler
from ..types import Constraint


class Constraints:
    """Compiles constraints for one model's tokens. Any thread.

    The tokenizer may know more tokens than the model has logits for; texts never use those.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Collection[int]) -> None:
        """`vocabulary` is the number of the model's logits per token, `ends` the ids of tokens that end its texts."""
        self._hf = tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(ends)
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._compiler: compiler.Compiler | None = None

    def compile(self, constraint: Constraint, ends: Collection[int]) -> Form:
        """Compiles a constraint to the form of one text; one of the tokens `ends` may end the text once it is complete.

        Raises:
            InvalidRequest: it cannot be compiled, with the reason; or this model's tokenizer cannot be constrained.
        """
        ends = frozenset(end for end in ends if end < self._vocabulary)
        try:
            opened = self._forms().open(constraint.kind, constraint.value)
        except compiler.CannotConstrain as error:
            raise _no_tokens(str(error)) from error
        except compiler.Refused as error:
            raise _refuse(constraint.kind, str(error)) from error
        except RecursionError as error:
            raise _refuse(constraint.kind, "it is nested too deeply") from error
        return Form(opened, self._vocabulary, ends)

    def _forms(self) -> compiler.Compiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = compiler.Compiler(*self._written())
            return self._compiler

    @property
    def tokens(self) -> LLTokenizer:
        """llguidance's view of the tokenizer; created once, which takes about a second for a large vocabulary.

        Raises:
            InvalidRequest: it is not a tokenizer of the tokenizers library.
        """
        with self._lock:
            if self._tokens is None:
                written, known, ends = self._written()
                try:
                    self._tokens = LLTokenizer(written, n_vocab=known, eos_token=ends)
                except ValueError as error:  # some kinds of pre-tokenizers
                    raise _no_tokens(str(error)) from error
            return self._tokens

    def close(self) -> None:
        """Ends the processes. Safe to call twice."""
        with self._lock:
            if self._compiler is not None:
                self._compiler.close()

    def _written(self) -> tuple[str, int, list[int]]:
        """The tokenizer.json, the number of tokens that it knows, and the tokens that end a text.

        Added tokens without logits are removed, because texts would be spelled with them.
        """
        if not getattr(self._hf, "is_fast", False):
            raise _no_tokens("it has no tokenizer.json")
        backend = copy.copy(self._hf.backend_tokenizer)  # with the tokens that its config adds
        backend.no_padding()
        backend.no_truncation()
        written = backend.to_str()
        known = max(self._vocabulary, max(self._hf.get_vocab().values(), default=0) + 1)
        if known > self._vocabulary:
            content = json.loads(written)
            content["added_tokens"] = [each for each in content["added_tokens"] if each["id"] < self._vocabulary]
            written = json.dumps(content, ensure_ascii=False)
        ends = self._ends or [self._hf.eos_token_id or self._hf.pad_token_id or 0]
        return written, known, [end for end in ends if end < known] or [0]


class Form:
    """The tokens that may follow in one text. One thread at a time; `allowed`, `complete` and `error` wait for the
    process."""

    def __init__(self, opened: compiler.Open, vocabulary: int, ends: frozenset[int]) -> None:
        self.opened = opened
        self._vocabulary = vocabulary
        self._ends = ends

    def copy(self) -> Form:
        """The same form at the same place, for another text."""
        return Form(self.opened.copy(), self._vocabulary, self._ends)

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(vocabulary), true for each token that may follow."""
        state = self.opened.state()
        allowed = np.zeros(self._vocabulary, dtype=np.bool_)
        mask = np.frombuffer(state.mask, dtype=np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[: self._vocabulary].view(np.bool_)
        allowed[: len(bits)] = bits
        if self._ends and state.accepting:
            allowed[list(self._ends)] = True
        return allowed

    def take(self, token: int) -> None:
        """Advances by a token, one of those allowed; an end token changes nothing."""
        if token not in self._ends:
            self.opened.take(token)

    @property
    def complete(self) -> bool:
        """Whether the text is complete, so that nothing may follow."""
        return self.opened.state().stopped

    @property
    def error(self) -> str:
        """An error, such as a grammar that turns out to be too complex; else empty."""
        return self.opened.state().error


class Constrained(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the tokens that a form allows; each row of the batch has its own form."""

    def __init__(self, form: Form, prompt_tokens: int) -> None:
        self._forms = [form]
        self._read = prompt_tokens

    @property
    def settled(self) -> bool:
        """Whether the allowed tokens are computed, so that nothing here waits."""
        return all(form.opened.settled for form in self._forms)

    @property
    def complete(self) -> list[bool]:
        """For each row, whether it is complete with the tokens taken so far."""
        return [form.complete for form in self._forms]

    def close(self) -> None:
        """Ends the forms' process, once nothing more is generated."""
        self._forms[0].opened.close()

    def take(self, tokens: Sequence[int]) -> None:
        """Advances each row by its token."""
        for form, token in zip(self._forms, tokens, strict=True):
            form.take(token)
        self._read += 1

    def catch_up(self, rows: torch.Tensor) -> None:
        """Takes the tokens generated since; `rows` (rows, tokens) begin with the prompt."""
        while len(self._forms) < rows.shape[0]:  # several sequences of one prompt
            self._forms.append(self._forms[0].copy())
        for tokens in rows[:, self._read :].unbind(1):
            self.take(tokens.tolist())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` (rows, tokens), `scores` (rows, vocabulary).

        Raises:
            InvalidRequest: the grammar turned out to be too complex, or other parameters forbid all that it allows.
        """
        self.catch_up(input_ids)
        allowed = torch.from_numpy(np.stack([form.allowed() for form in self._forms])).to(scores.device)
        for form in self._forms:
            if reason := form.error:
                raise InvalidRequest(f"The text cannot take the requested form: {reason}")
        constrained = scores.masked_fill(~allowed, -torch.inf)
        if torch.isneginf(constrained.amax(-1)).any():
            raise InvalidRequest("The requested form allows only tokens that other parameters forbid")
        return constrained


def settle(constrained: Iterable[Constrained], seconds: float) -> None:
    """Waits until the allowed tokens of all are computed, or for `seconds`."""
    compiler.settle((form.opened for each in constrained for form in each._forms), seconds)


def constraints_of(model: Any, tokenizer: Any) -> Constraints:
    """The constraints of a model's texts; llguidance reads the tokenizer on first use."""
    own = model.generation_config.eos_token_id if model.can_generate() else None
    ends = own if isinstance(own, list) else [] if own is None else [own]
    words = getattr(model.config.get_text_config(), "vocab_size", 0)  # CANINE reads characters, and has none
    return Constraints(tokenizer, words, ends)


def _no_tokens(reason: str) -> InvalidRequest:
    return InvalidRequest(f"This model's tokenizer cannot be constrained: {reason}")


def _refuse(kind: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid value for field '{kind}': it cannot be compiled: {reason.strip()}", kind)
