"""The seam between those that ask and what computes: a model in memory, as requests see it.

`model.LoadedModel` is one; a replica on another machine may be another. Any thread may call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .cancellation import Cancellation
from .engine.ticket import Ticket
from .types import ChatTraits, GenerationRequest


class ServedModel(Protocol):
    """A model that is kept in memory for as long as it is leased. Values of `Any` are JSON's."""

    @property
    def pools(self) -> bool:
        """Whether it embeds texts in a way of its own."""

    @property
    def prompts(self) -> Mapping[str, str]:
        """The texts that it puts before what it embeds, by their names."""

    @property
    def chat(self) -> ChatTraits:
        """How it lays chats out."""

    @property
    def own_parameters(self) -> Mapping[str, Any]:
        """What its generation config says of drawing tokens."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""

    def encode(self, text: str, cancellation: Cancellation = ...) -> list[int]:
        """The tokens of a text, with the special ones that its tokenizer adds."""

    def count_tokens(self, text: str) -> int:
        """How many tokens a text is, without special ones."""

    def count_prompt(self, request: GenerationRequest, cancellation: Cancellation = ...) -> int:
        """How many tokens the prompt of a generation is, special ones included."""

    def generate(self, request: GenerationRequest, cancellation: Cancellation = ...) -> Ticket:
        """Queue a generation, which is given up by `cancellation`, or when its ticket is cancelled."""

    def run(
        self,
        task: str,
        inputs: Any,
        parameters: Mapping[str, Any],
        cancellation: Cancellation = ...,
        adapter: str | None = None,
    ) -> Any:
        """Run a task and return its result as JSON values."""
