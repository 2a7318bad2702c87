"""Tables of the fields, OpenAI's and other servers', that have no effect on an answer here.

They are hints to a provider (the user, the tier, the cache), or their only accepted value matches this server's fixed
behaviour. Each is accepted and named in the header. Must not know models.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..http.fields import note_ignored
from .parts import Part, Text

_MARK = "x-ignored"  # in the API's document


def hint(description: str = "No effect.", **constraints: Any) -> Any:
    """A field that is accepted without effect."""
    return Field(None, description=description, json_schema_extra={_MARK: True}, **constraints)


def so_anyway() -> Any:
    """A field whose accepted values match the server's fixed behaviour."""
    return hint("No effect: the accepted values are what the server always does.")


class Hinted(Part):
    """A part of a body with fields without effect."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        before = f"{self.place}." if self.place else ""
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if name in self.model_fields_set and isinstance(extra, dict) and _MARK in extra:
                note_ignored(before + name)
        return self


class Asker(Hinted):
    """The hints of every body."""

    user: Any = hint("The user's name; no effect.")


class Hints(Asker):
    """The hints of bodies that generate text."""

    # The user, and how providers treat the request.
    safety_identifier: Any = hint()
    request_id: Any = hint()
    metadata: Any = hint()
    client_metadata: Any = hint()
    service_tier: Any = hint()
    priority: Any = hint()
    verbosity: Any = hint()
    truncation: Any = hint("No effect: a prompt that does not fit the context is refused.")
    # Storage and caches: this server stores nothing, and caches prompts by itself.
    store: Any = hint()
    prompt_cache_key: Any = hint()
    prompt_cache_retention: Any = hint()
    prompt_cache_options: Any = hint()
    cache_prompt: Any = hint()
    cache_salt: Any = hint()
    # How other servers compute and report.
    prediction: Any = hint("A predicted answer; it is not used.")
    timings_per_token: Any = hint()
    return_progress: Any = hint()
    guided_decoding_backend: Any = hint()
    skip_special_tokens: Literal[True] | None = so_anyway()
    spaces_between_special_tokens: Literal[True] | None = so_anyway()
    include_stop_str_in_output: Literal[False] | None = so_anyway()
    return_token_ids: Literal[False] | None = so_anyway()
    return_tokens_as_token_ids: Literal[False] | None = so_anyway()
    use_beam_search: Literal[False] | None = so_anyway()
    reasoning_format: Literal["auto", "deepseek"] | None = so_anyway()
    include_reasoning: Literal[True] | None = so_anyway()
    separate_reasoning: Literal[True] | None = so_anyway()
    n_probs: Literal[0] | None = so_anyway()
    # Ways of sampling that llama.cpp's clients switch off by these values, and their further settings.
    mirostat: Literal[0] | None = so_anyway()
    mirostat_mode: Literal[0] | None = so_anyway()
    dynatemp_range: Literal[0] | None = so_anyway()
    xtc_probability: Literal[0] | None = so_anyway()
    dry_multiplier: Literal[0] | None = so_anyway()
    top_a: Literal[0] | None = so_anyway()
    tfs_z: Literal[1] | None = so_anyway()
    mirostat_tau: float | None = hint()
    mirostat_eta: float | None = hint()
    dynatemp_exponent: float | None = hint()
    xtc_threshold: float | None = hint()
    dry_base: float | None = hint()
    dry_allowed_length: Any = hint()
    dry_penalty_last_n: Any = hint()
    dry_sequence_breakers: list[Text] | None = hint()
    id_slot: Any = hint()
    n_keep: Any = hint()


class ChatHints(Hints):
    """The further hints of chats."""

    best_of: Literal[1] | None = so_anyway()
    echo: Literal[False] | None = so_anyway()
    function_call: Literal["none", "auto"] | None = so_anyway()
    modalities: list[Literal["text"]] | None = so_anyway()


class ResponseHints(Hints):
    """The further hints of responses."""

    empties = frozenset({"metadata"})

    metadata: dict[str, Any] | None = Field(None, description="Returned in the response.")
    background: Literal[False] | None = so_anyway()
    max_tool_calls: Any = hint("A limit for OpenAI's own tools, which do not exist here.", ge=0)
