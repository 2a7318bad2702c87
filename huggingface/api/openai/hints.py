"""The fields of OpenAI's bodies, and of its neighbours', that cannot change an answer here: the tables of them.

They are hints to a provider (who asks, which tier, what to cache), or ask with their one value for what is so anyway.
Each is taken and named in the header. Nothing here works on a model.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..http.fields import note_ignored
from .parts import Part, Text

_MARK = "x-ignored"  # in the API's document


def hint(description: str = "It makes no difference.", **constraints: Any) -> Any:
    """A field that is taken, and makes no difference."""
    return Field(None, description=description, json_schema_extra={_MARK: True}, **constraints)


def so_anyway() -> Any:
    """A field whose only value asks for what is so anyway."""
    return hint("It is so anyway.")


class Hinted(Part):
    """Some of a body with fields that make no difference."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        before = f"{self.place}." if self.place else ""
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if name in self.model_fields_set and isinstance(extra, dict) and _MARK in extra:
                note_ignored(before + name)
        return self


class Asker(Hinted):
    """What every body has."""

    user: Any = hint("Who asks; it makes no difference.")


class Hints(Asker):
    """What bodies have that make text."""

    # Who asks, and how providers treat it.
    safety_identifier: Any = hint()
    request_id: Any = hint()
    metadata: Any = hint()
    client_metadata: Any = hint()
    service_tier: Any = hint()
    priority: Any = hint()
    verbosity: Any = hint()
    truncation: Any = hint("What does not fit the context is refused in any case.")
    # What to keep for later: nothing is kept but what was computed of a prompt.
    store: Any = hint()
    prompt_cache_key: Any = hint()
    prompt_cache_retention: Any = hint()
    prompt_cache_options: Any = hint()
    cache_prompt: Any = hint()
    cache_salt: Any = hint()
    # How the neighbours compute and report.
    prediction: Any = hint("A guess that could save time; it is not used.")
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
    # Ways to draw that llama.cpp's clients switch off by their values, and what else these say of them.
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
    """What chats have besides."""

    best_of: Literal[1] | None = so_anyway()
    echo: Literal[False] | None = so_anyway()
    function_call: Literal["none", "auto"] | None = so_anyway()
    modalities: list[Literal["text"]] | None = so_anyway()


class ResponseHints(Hints):
    """What responses have besides."""

    empties = frozenset({"metadata"})

    metadata: dict[str, Any] | None = Field(None, description="It is sent back.")
    background: Literal[False] | None = so_anyway()
    max_tool_calls: Any = hint("Of OpenAI's own tools, of which there are none here.", ge=0)
