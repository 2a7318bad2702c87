"""Ollama's lists of the registered models and of those in memory, and the details of one model.

The facts come from the registry, from preflight's details, and from the model's small files; nothing is loaded or
downloaded. Unknown facts are left out or empty. Serves any request thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ...chat.formats import find_reasoning
from ...inspection.card import Card
from ...manager.table import Resident
from ...registry.records import ModelRecord
from ..requests.services import services
from .names import find
from .thinking import can_think

# Sent as `expires_at` for a model without an expiry: Ollama's clients require a date, and take this one for "never".
_NEVER = "9999-12-31T23:59:59Z"

# GGUF's names of numbers, and the names of the same numbers in configs. Source: the attribute maps of transformers'
# configs; "GGUF", docs of ggml.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "embedding_length": ("hidden_size", "n_embd", "d_model", "dim"),
    "block_count": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers"),
    "feed_forward_length": ("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim", "hidden_dim"),
    "attention.head_count": ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "rope.freq_base": ("rope_theta",),
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
}

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_MAX_LISTED = 5  # items of the longest list that is shown without `verbose`


def rfc3339(timestamp: str) -> str:
    """A timestamp of the registry, which is in UTC, in RFC 3339's form."""
    return datetime.fromisoformat(timestamp).isoformat(timespec="microseconds") + "Z"


def tags() -> list[dict[str, Any]]:
    """The registered models, the latest first."""
    records = sorted(services().registry.list(), key=lambda record: record.added_date, reverse=True)
    return [
        {
            "name": record.model_id,
            "model": record.model_id,
            "modified_at": rfc3339(record.added_date),
            "size": _size(_known(record)),
            "digest": digest(record),
            "details": _details(record, _known(record)),
        }
        for record in records
    ]


def running() -> list[dict[str, Any]]:
    """The models in memory."""
    records = {record.model_id: record for record in services().registry.list()}
    return [
        _resident(model_id, records.get(model_id, resident.model.setup.record), resident)
        for model_id, resident in services().manager.residents().items()
    ]


def show(name: str, *, verbose: bool) -> dict[str, Any]:
    """All details of a model.

    Raises:
        ModelNotFound: no such model is registered.
    """
    record = find(name)
    details, card = _known(record), services().preflight.card(record)
    if not details.get("reachable"):
        details = services().preflight.look(record)
    shown = {
        "modified_at": rfc3339(record.added_date),
        "details": _details(record, details),
        "model_info": _info(details, card, verbose),
        "capabilities": _capabilities(record, details, card),
        "modelfile": f"# Registered with Local LLM\nFROM {record.model_id}\n",
        "template": next(iter(card.templates), ""),
        "parameters": _parameters(record.parameters),
    }
    if card.license:
        shown["license"] = card.license
    return shown


def digest(record: ModelRecord) -> str:
    """Identifies a model and its files, as far as they are known, by 64 hexadecimal digits."""
    details = _known(record)
    parts = [record.model_id, record.revision, record.gguf_file, details.get("commit"), details.get("weights_bytes")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _known(record: ModelRecord) -> Mapping[str, Any]:
    """Preflight's details, from the registration or later."""
    return record.details or {}


def _size(details: Mapping[str, Any]) -> int:
    """The bytes of the weights' files."""
    return int(details.get("weights_bytes") or sum((details.get("dtypes") or {}).values()))


def _details(record: ModelRecord, details: Mapping[str, Any]) -> dict[str, Any]:
    family = details.get("config_type") or ""
    names = (details.get("files") or {}).get("names") or []
    pickled = any(name.endswith((".bin", ".bin.index.json")) for name in names)
    return {
        "parent_model": "",
        "format": "gguf" if record.gguf_file else "pytorch" if pickled else "safetensors",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _human(details.get("parameters")),
        "quantization_level": _level(record, details),
    }


def _level(record: ModelRecord, details: Mapping[str, Any]) -> str:
    """The quantization or type of the weights: the load's, where the record sets one, else the files'."""
    dtype = details.get("dtype") or ""
    quantized = details.get("quantized")
    written = quantized.upper() if quantized and quantized != "gguf" else _DTYPES.get(dtype, dtype)
    return record.quantization.upper() if record.quantization else written


def _human(count: int | None) -> str:
    """A count as Ollama writes it: 1.5B, 134.52M, 90K."""
    if not count:
        return ""
    for size, unit, places in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= size:
            return f"{count / size:.{0 if count % size == 0 else places}f}{unit}"
    return str(count)


def _resident(model_id: str, record: ModelRecord, resident: Resident) -> dict[str, Any]:
    model, details = resident.model, _known(record)
    sizes = model.sizes
    contexts = [maximum for maximum in (model.setup.max_context, details.get("context_length")) if maximum]
    shown = {
        "name": model_id,
        "model": model_id,
        "size": sizes.total,
        "digest": digest(record),
        "details": _details(record, details),
        "expires_at": _NEVER if resident.expires_at is None else rfc3339(resident.expires_at),
        "size_vram": sum(size for device, size in sizes.devices.items() if device not in ("cpu", "disk")),
    }
    return {**shown, "context_length": min(contexts)} if contexts else shown


def _info(details: Mapping[str, Any], card: Card, verbose: bool) -> dict[str, Any]:
    """Ollama's `model_info`: the keys of a GGUF file, or a config's values under GGUF's keys."""
    if card.keys:
        told = {
            name: value if verbose or not isinstance(value, list) or len(value) <= _MAX_LISTED else []
            for name, value in card.keys.items()
            if name not in ("general.name", "tokenizer.chat_template")
        }
        return {**told, **_counted(details)}
    kind = details.get("config_type")
    if not kind:
        return {}
    info: dict[str, Any] = {"general.architecture": kind, **_counted(details)}
    if details.get("context_length"):
        info[f"{kind}.context_length"] = details["context_length"]
    inner = card.config.get("text_config")
    config = inner if isinstance(inner, dict) else card.config
    for key, names in _KEYS.items():
        value = next((config[name] for name in names if _is_number(config.get(name))), None)
        if value is not None:
            info[f"{kind}.{key}"] = value
    if verbose:
        info |= {f"config.{name}": value for name, value in card.config.items() if _is_plain(value)}
    return info


def _counted(details: Mapping[str, Any]) -> dict[str, Any]:
    return {"general.parameter_count": details["parameters"]} if details.get("parameters") else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _capabilities(record: ModelRecord, details: Mapping[str, Any], card: Card) -> list[str]:
    """The model's capabilities here. `tools` is among them where its own chat template uses tools."""
    tasks = set(details.get("tasks") or ())
    template = "\n".join(card.templates)
    able = {
        "completion": bool(tasks & {"text-generation", "text2text-generation"}),
        "tools": bool(details.get("tools")),
        "thinking": can_think(template, find_reasoning(template, ())),
        "embedding": record.model_type == "feature-extraction" or bool(details.get("embedding")),
    }
    return [name for name, is_so in able.items() if is_so]


def _parameters(parameters: Mapping[str, Any]) -> str:
    """The registered parameters, a line each."""
    lines = []
    for name, value in parameters.items():
        for each in value if isinstance(value, list) else [value]:
            lines.append(f"{name:<30} {json.dumps(each, ensure_ascii=False)}")
    return "\n".join(lines)
