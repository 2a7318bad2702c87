"""OpenAI's bodies that hold plain texts: completions, embeddings, and the documents to rerank.

Nothing here works on a model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .bodies import MODEL, Count, Part, Penalized, Text, Timeout, refuse

# Completions ----------------------------------------------------------------------------------------------------------

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
MOST_PROMPTS = 2048


def _texts_or_tokens(value: Any, what: str) -> Any:
    """See that a value is a text, or a list of some; which kind of list, the field's type says."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("rule", "{reason}", {"reason": "must be text, or a list of texts or tokens"})
    if isinstance(value, list):
        if not value:
            raise ValueError("must not be empty")
        if not all(isinstance(item, int) for item in value) and len(value) > MOST_PROMPTS:
            raise ValueError(f"must hold at most {MOST_PROMPTS} {what}")
    return value


class CompletionBody(Penalized):
    """Text to continue."""

    prompt: Text | list[Text] | list[TokenId] | list[TokenIds] = Field(
        description="A text, several, or the same as token ids."
    )
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="16 where nothing else sets a limit.")
    echo: bool | None = Field(None, description="Give the prompt back before the text.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives to name for each token.")
    best_of: int | None = Field(None, ge=1, le=128, description="Make so many, and answer with the likeliest `n`.")
    suffix: None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _of_one_kind(cls, value: Any) -> Any:
        return _texts_or_tokens(value, "prompts")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise refuse("best_of", "must be at least n")
            if self.stream and self.best_of > (self.n or 1):
                raise refuse("best_of", "cannot be streamed")
        if self.max_tokens == 0 and not self.echo:
            raise refuse("max_tokens", "must be at least 1, unless echo asks for the prompt")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class HubCompletionBody(CompletionBody):
    """Text to continue, by a model that the address names: what huggingface.js sends for a text generation."""

    model: str | None = Field(None, description="What the client calls the model.")  # type: ignore[assignment]
    return_full_text: bool | None = Field(None, description="The same as echo.")

    @model_validator(mode="after")
    def _echoed_once(self) -> Self:
        if self.echo is not None and self.return_full_text not in (None, self.echo):
            raise refuse("return_full_text", "says something else than echo")
        return self


# Embeddings -----------------------------------------------------------------------------------------------------------

Filled = Annotated[str, Field(min_length=1)]


class EmbeddingBody(Part):
    """Texts to make vectors of."""

    model: str = Field(description=MODEL)
    input: Filled | list[Filled] | list[TokenId] | list[TokenIds] = Field(
        description="A text, several, or the same as token ids, which are taken as they are."
    )
    dimensions: Count | None = Field(None, description="The first so many of each vector's numbers.")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: little-endian float32.")
    user: Text | None = Field(None, description="Who asks; it makes no difference.")
    truncate: bool | None = Field(None, description="Cut a text that is longer than the model reads.")
    prompt_name: Text | None = Field(None, description="Which of a sentence-transformers model's prompts to use.")
    timeout: Timeout | None = Field(None, description="Seconds after which no answer is wanted any more.")
    keep_alive: float | None = Field(
        None, ge=-1, le=10**9, description="Seconds in memory after this use; -1 is for ever."
    )
    adapter: Text | None = Field(None, min_length=1, description="Which of the model's adapters to use.")

    @field_validator("input", mode="before")
    @classmethod
    def _of_one_kind(cls, value: Any) -> Any:
        return _texts_or_tokens(value, "texts")


class Document(Part):
    """A document."""

    text: Text


class RerankBody(Part):
    """Documents to sort by how well they answer a query."""

    model: str = Field(description=MODEL)
    query: Filled
    documents: list[Text | Document] = Field(min_length=1, max_length=MOST_PROMPTS)
    top_n: Count | None = Field(None, description="Only the best so many.")
    return_documents: bool | None = Field(None, description="Give the documents back, too.")
    truncate: bool | None = Field(None, description="Cut documents that are longer than the model reads.")
    timeout: Timeout | None = Field(None, description="Seconds after which no answer is wanted any more.")
    keep_alive: float | None = Field(
        None, ge=-1, le=10**9, description="Seconds in memory after this use; -1 is for ever."
    )
    adapter: Text | None = Field(None, min_length=1, description="Which of the model's adapters to use.")
