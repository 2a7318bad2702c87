"""One registered model as plain data, its load settings, and the rule for model ids.

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
    """Returns `model_id` if the Hub would accept it as a repository id (`name` or `org/name`).

    The rule is `huggingface_hub.utils.validate_repo_id`'s, for ASCII only. An accepted id joined to a folder stays
    inside it: no `..`, no absolute path, no control character, no second slash.

    Raises:
        InvalidModelId: the id breaks the rule; the message states the rule.
    """
    rule = "'name' or 'org/name', each of 1 to 96 letters, digits, '-', '_' and '.', neither '-' nor '.' at its ends"
    if not _MODEL_ID.fullmatch(model_id):
        raise InvalidModelId(f"Invalid value for field 'model_id': not a Hugging Face model id ({rule})", "model_id")
    if "--" in model_id or ".." in model_id or model_id.endswith(".git"):
        raise InvalidModelId(
            "Invalid value for field 'model_id': '--', '..' and a final '.git' are not allowed", "model_id"
        )
    return model_id


# A dtype: 16 bits in memory where the files have them, float32 in all that is computed.
STORED = "stored"


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How one model is loaded; None leaves a setting to the server.

    `device` is `auto`, `cpu`, `cuda`, `cuda:1` or `mps`; `device_map` is accelerate's: a name, or a device for each
    module; `dtype` is `auto`, `STORED` or a torch dtype's name; `quantization` is a scheme of
    `loading/quantization.py`.
    `backend` computes the model: a name of `BACKENDS`, or `auto`. `kv_cache_dtype` is the name of the torch dtype of
    keys and values, `max_context` the most tokens of one sequence, `slots` the most sequences in one batch.
    """

    device: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    dtype: str | None = None
    quantization: str | None = None
    attn_implementation: str | None = None
    compile: bool | None = None
    backend: str | None = None
    kv_cache_dtype: str | None = None
    max_context: int | None = None
    slots: int | None = None

    def over(self, other: LoadSettings) -> LoadSettings:
        """These settings, with those of `other` where these are None."""
        given = {name: value for name in LOAD_SETTINGS if (value := getattr(self, name)) is not None}
        return replace(other, **given)


LOAD_SETTINGS = tuple(each.name for each in fields(LoadSettings))


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One registered model with the API's fields. `parameters` are the model's default parameters.

    The API shows the fields after `status` only where they are set. `revision` is a branch, tag or commit of the
    repository. `gguf_file` is the file with the weights in the GGUF format, or one of its parts. `adapters` maps the
    name by which a request chooses a LoRA adapter to the adapter's model id. `keep_alive` is how many seconds the model
    stays in memory after its last use, -1 for ever. `details` is preflight's report.
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
    kv_cache_dtype: str | None = None
    max_context: int | None = None
    slots: int | None = None
    details: Mapping[str, Any] | None = None

    @property
    def settings(self) -> LoadSettings:
        """The record's load settings."""
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
        """The three fields that answers carry as `model_info`."""
        return {"model_id": self.model_id, "name": self.name, "model_type": self.model_type}


# Fields that a record's JSON leaves out where they are not set.
OPTIONAL_FIELDS = tuple(each.name for each in fields(ModelRecord) if each.default is None and each.name != "last_used")
