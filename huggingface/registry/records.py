"""One registered model as plain data, how it is to be loaded, and the rule for what it may be called.

Frozen dataclasses of JSON-like values, safe to share between threads. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import InvalidModelId
from ..types import timestamp

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


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How one model is brought into memory; None leaves it to the server.

    `device` is `auto`, `cpu`, `cuda`, `cuda:1`, `mps`; `device_map` is accelerate's, a name or modules by device;
    `dtype` is `auto` or a name of torch's; `quantization` is a scheme of `quantization.py`. `backend` computes the
    model: a name of `BACKENDS`, or `auto`. `max_context` is the most tokens of one sequence, `slots` the most sequences
    in one batch.
    """

    device: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    dtype: str | None = None
    quantization: str | None = None
    attn_implementation: str | None = None
    compile: bool | None = None
    backend: str | None = None
    max_context: int | None = None
    slots: int | None = None

    def over(self, other: LoadSettings) -> LoadSettings:
        """These settings, and those of `other` where these leave something open."""
        given = {name: value for name in LOAD_SETTINGS if (value := getattr(self, name)) is not None}
        return replace(other, **given)


LOAD_SETTINGS = tuple(each.name for each in fields(LoadSettings))


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One registered model, field for field as the API shows it. `parameters` are the model's default parameters.

    What comes after `status` is shown where it is set only. `revision` is a branch, tag or commit of the repository.
    `gguf_file` is the file that holds the weights, in the GGUF format; `adapters` are LoRA adapters by the name that a
    request chooses one by, each a model id. `keep_alive` is how many seconds the model stays in memory after its last
    use, -1 for ever. `details` are what preflight found.
    """

    model_id: str
    name: str
    model_type: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    added_date: str = field(default_factory=timestamp)
    last_used: str | None = None
    usage_count: int = 0
    status: str = "available"
    revision: str | None = None
    gguf_file: str | None = None
    adapters: Mapping[str, str] | None = None
    pinned: bool | None = None
    keep_alive: float | None = None
    device: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    dtype: str | None = None
    quantization: str | None = None
    attn_implementation: str | None = None
    compile: bool | None = None
    backend: str | None = None
    max_context: int | None = None
    slots: int | None = None
    details: Mapping[str, Any] | None = None

    @property
    def settings(self) -> LoadSettings:
        """How the model is to be loaded, as far as the record says."""
        return LoadSettings(**{name: getattr(self, name) for name in LOAD_SETTINGS})

    def to_dict(self) -> dict[str, Any]:
        """The record as a JSON object: the documented fields in their order, then the others that are set."""
        record = {
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
        for name in OPTIONAL_FIELDS:
            if (value := getattr(self, name)) is not None:
                record[name] = value
        return record

    def summary(self) -> dict[str, str]:
        """The three fields that answers about a model carry as `model_info`."""
        return {"model_id": self.model_id, "name": self.name, "model_type": self.model_type}


# Fields of a record that are left out where they are not set.
OPTIONAL_FIELDS = tuple(each.name for each in fields(ModelRecord) if each.default is None and each.name != "last_used")
