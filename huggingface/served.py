"""The seam between requests and models: a model in memory, as requests see it.

`model.LoadedModel` implements it; a replica on another machine could too. Any thread may call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .cancellation import Cancellation
from .engine.ticket import Ticket
from .types import ChatTraits, GenerationRequest


class ServedModel(Protocol):
    """A model that stays in memory while it is leased. Values of type `Any` are JSON."""

    @property
    def pools(self) -> bool:
        """Whether the model embeds texts with a pooling of its own."""

    @property
    def prompts(self) -> Mapping[str, str]:
        """The texts that the model puts before texts it embeds, by name."""

    @property
    def chat(self) -> ChatTraits:
        """How the model lays chats out."""

    @property
    def own_parameters(self) -> Mapping[str, Any]:
        """The sampling parameters in the model's generation config."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Decodes tokens to text, special tokens included."""

    def encode(self, text: str, cancellation: Cancellation = ...) -> list[int]:
        """Tokenizes a text, with the special tokens that the tokenizer adds."""

    def count_tokens(self, text: str) -> int:
        """Counts a text's tokens, without special ones."""

    def count_prompt(self, request: GenerationRequest, cancellation: Cancellation = ...) -> int:
        """Counts the tokens of a generation's prompt, special ones included."""

    def generate(self, request: GenerationRequest, cancellation: Cancellation = ...) -> Ticket:
        """Queues a generation; `cancellation`, or a cancel of the ticket, ends it."""

    def run(
        self,
        task: str,
        inputs: Any,
        parameters: Mapping[str, Any],
        cancellation: Cancellation = ...,
        adapter: str | None = None,
    ) -> Any:
        """Runs a task and returns its result as JSON values."""
