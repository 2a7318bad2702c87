"""The plain data that rooms pass to each other, and the rule for what a model may be called.

Frozen dataclasses of JSON-like values: safe to share between threads, free of HTTP, torch and pydantic.
Standard library only, so that anyone may import it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .errors import InvalidModelId

# One part of a Hub id: ASCII letters, digits, `-`, `_`, `.`; neither `-` nor `.` at its ends.
_PART = r"(?=[^/]{1,96}(?:/|\Z))[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_MODEL_ID = re.compile(rf"(?:{_PART}/)?{_PART}")


def check_model_id(model_id: str) -> str:
    """Return `model_id` if the Hub would accept it as a repository id (`name` or `org/name`).

    The rule is that of `huggingface_hub.utils.validate_repo_id`, ASCII only; what it accepts cannot leave a folder
    that it is joined to: no `..`, no absolute path, no control character, no second slash.

    Raises:
        InvalidModelId: with the rule, when it would not.
    """
    rule = "'name' or 'org/name', each of 1 to 96 letters, digits, '-', '_' and '.', neither '-' nor '.' at its ends"
    if not _MODEL_ID.fullmatch(model_id):
        raise InvalidModelId(f"Invalid value for field 'model_id': not a Hugging Face model id ({rule})", "model_id")
    if "--" in model_id or ".." in model_id or model_id.endswith(".git"):
        raise InvalidModelId(
            "Invalid value for field 'model_id': '--', '..' and a final '.git' are not allowed", "model_id"
        )
    return model_id


def timestamp() -> str:
    """The present as the API writes it: ISO 8601, UTC, microseconds, no offset (`2025-06-26T21:45:00.000000`)."""
    return datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One registered model, field for field as the API shows it. `parameters` are the model's default parameters."""

    model_id: str
    name: str
    model_type: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    added_date: str = field(default_factory=timestamp)
    last_used: str | None = None
    usage_count: int = 0
    status: str = "available"

    def to_dict(self) -> dict[str, Any]:
        """The record as a JSON object, fields in the documented order."""
        return {
            "model_id": self.model_id,
            "name": self.name,
            "model_type": self.model_type,
            "description": self.description,
            "parameters": dict(self.parameters),
            "added_date": self.added_date,
            "last_used": self.last_used,
            "usage_count": self.usage_count,
            "status": self.status,
        }

    def summary(self) -> dict[str, str]:
        """The three fields that answers about a model carry as `model_info`."""
        return {"model_id": self.model_id, "name": self.name, "model_type": self.model_type}


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How models are brought into memory: from where, onto what, and what code their files may run."""

    models_dir: Path
    device: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: frozenset[str] = frozenset()


FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and made, counted by the model's own tokenizer (special tokens included)."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate from, and how: exactly one of `prompt` and `messages`, and the effective parameters."""

    parameters: Mapping[str, Any]
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of generated text; the last one of a request carries why it ended, the counts, and what was in effect.

    `index` tells which of several returned sequences the text belongs to. `parameters` are the request's, as far as the
    model has room for them.
    """

    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    parameters: Mapping[str, Any] | None = None
