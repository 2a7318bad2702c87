"""OpenAI's bodies that hold plain texts: completions, embeddings, and documents to rerank.

Must not know models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..documented.schemas import KeepAlive
from .bodies import MODEL, Count, Penalized, Timeout
from .hints import Asker
from .parts import Replayed, Text, TokenId, TokenIds, refuse
from .schemas import ResponseFormat

# Completions ----------------------------------------------------------------------------------------------------------

MAX_PROMPTS = 2048


def _texts_or_tokens(value: Any, what: str) -> Any:
    """Checks that a value is a text or a list; the field's type checks the list's items."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("rule", "{reason}", {"reason": "must be text, or a list of texts or tokens"})
    if isinstance(value, list):
        if not value:
            raise ValueError("must not be empty")
        if not all(isinstance(item, int) for item in value) and len(value) > MAX_PROMPTS:
            raise ValueError(f"must hold at most {MAX_PROMPTS} {what}")
    return value


class CompletionBody(Penalized):
    """Text to continue."""

    empties = Penalized.empties | {"suffix"}

    prompt: Text | list[Text] | list[TokenId] | list[TokenIds] = Field(
        description="A text, several, or the same as token ids."
    )
    max_tokens: int | None = Field(
        None, ge=-1, le=2**31 - 1, description="16 where nothing else sets a limit; -1 is no limit."
    )
    echo: bool | None = Field(None, description="Return the prompt before the text.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives to show for each token.")
    best_of: int | None = Field(None, ge=1, le=128, description="Generate so many texts, return the likeliest `n`.")
    suffix: None = None
    response_format: ResponseFormat | None = None

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
        maximum, name = self.limited()
        if maximum == 0 and not self.echo:
            raise refuse(name, "must be at least 1, unless echo asks for the prompt")
        if self.response_format is not None and self.response_format.type != "text":
            for field in self.form_fields():
                raise refuse(field, "cannot be given together with response_format")
        return self

    def limited(self) -> tuple[int | None, str]:
        """The limit of new tokens, and the field that sets it; below 0 is no limit."""
        return self.limit(("max_tokens",))

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


class HubCompletionBody(CompletionBody):
    """Text to continue, by a model that the address names, as huggingface.js sends it."""

    model: str | None = Field(None, description="The client's name for the model.")  # type: ignore[assignment]
    return_full_text: bool | None = Field(None, description="The same as echo.")

    @model_validator(mode="after")
    def _echoed_once(self) -> Self:
        if self.echo is not None and self.return_full_text not in (None, self.echo):
            raise refuse("return_full_text", "says something else than echo")
        return self


# Embeddings -----------------------------------------------------------------------------------------------------------

Filled = Annotated[str, Field(min_length=1)]


# Embedding services' names for where a text that is too long is cut, or that it is not.
_CUTS = {"END": True, "NONE": False, "RIGHT": True}


def _cut(value: Any) -> Any:
    """Whether a text is cut at its end; the field's type refuses any other value."""
    return _CUTS.get(value.upper(), value) if isinstance(value, str) else value


Cut = Annotated[bool, BeforeValidator(_cut, json_schema_input_type=bool | Literal["END", "NONE"])]


class EmbeddingBody(Asker):
    """Texts to compute vectors of."""

    model: str = Field(description=MODEL)
    input: Filled | list[Filled] | list[TokenId] | list[TokenIds] = Field(
        description="A text, several, or the same as token ids, which are used unchanged."
    )
    dimensions: Count | None = Field(None, description="Keep only so many numbers of each vector, from its start.")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: little-endian float32.")
    truncate: Cut | None = Field(None, description="Cut a text that is longer than the model reads.")
    prompt_name: Text | None = Field(None, description="Which of a sentence-transformers model's prompts to use.")
    input_type: Text | None = Field(
        None, description="The same under other services' name; no effect on a model without prompts."
    )
    timeout: Timeout | None = Field(None, description="Seconds after which the request is cancelled.")
    keep_alive: KeepAlive | None = Field(None, description="Seconds in memory after this use; -1 is for ever.")
    adapter: Text | None = Field(None, min_length=1, description="Which of the model's adapters to use.")

    @field_validator("input", mode="before")
    @classmethod
    def _of_one_kind(cls, value: Any) -> Any:
        return _texts_or_tokens(value, "texts")

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if self.prompt_name is not None and self.input_type not in (None, self.prompt_name):
            raise refuse("input_type", "says something else than prompt_name")
        return self


class Document(Replayed):
    """A document."""

    place = "documents"

    text: Text


class RerankBody(Asker):
    """Documents to sort by how well they answer a query."""

    model: str = Field(description=MODEL)
    query: Filled
    documents: list[Text | Document] = Field(min_length=1, max_length=MAX_PROMPTS)
    top_n: Count | None = Field(None, description="Return only so many of the best documents.")
    return_documents: bool | None = Field(None, description="Return the documents' texts too.")
    truncate: Cut | None = Field(None, description="Cut documents that are longer than the model reads.")
    timeout: Timeout | None = Field(None, description="Seconds after which the request is cancelled.")
    keep_alive: KeepAlive | None = Field(None, description="Seconds in memory after this use; -1 is for ever.")
    adapter: Text | None = Field(None, min_length=1, description="Which of the model's adapters to use.")
