"""Turns load settings into a device, a dtype and a kind of attention on this machine.

Imports torch, so it is imported with the loader. Pure, except that it asks torch for the devices. Every setting that
cannot be honoured is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DeviceMissing, InvalidRequest
from ..host.devices import resolve_device
from ..registry.records import STORED, LoadSettings
from ..types import BACKENDS, LoadOptions
from .quantization import check

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# accelerate's names for its ways to spread a model.
_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# On a CPU, flex_attention ended the whole process in a test, and flash attention is for GPUs.
_ON_CPU = ("eager", "sdpa")
# Kinds that transformers has its own code for; any other name would be fetched from the Hub and run.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a model is placed. `device` is where its inputs go; `dtype` is None for the weights' own.

    `kv_dtype` is the type of keys and values, None for `dtype`. `stored`: weights of 16 bits stay as they are in their
    files, and are computed with in `dtype`, which is float32.
    """

    device: str
    dtype: torch.dtype | None
    device_map: str | Mapping[str, Any] | None
    quantization: str | None
    attention: str | None
    compiles: bool
    backend: str
    kv_dtype: torch.dtype | None
    max_context: int | None
    slots: int | None
    stored: bool = False


def place(settings: LoadSettings, options: LoadOptions) -> Placement:
    """Resolves the settings for this machine.

    On a CPU `auto` is float32: many rows at once then give the same as one alone, to the last token, and it is the
    fastest with this server's products. Elsewhere `auto` is the weights' own dtype.

    Raises:
        InvalidRequest: a value cannot be honoured; the message names its field.
        DeviceMissing: there is no such device.
    """
    if settings.device is not None and settings.device_map is not None:
        raise InvalidRequest("Give device or device_map, not both", "device_map")
    device = resolve_device(settings.device or options.device)
    _check_device(device, asked=settings.device is not None)
    if settings.device_map is not None:
        _check_map(settings.device_map)
    if settings.quantization is not None:
        check(settings.quantization, device)
        if settings.device_map is not None:
            raise InvalidRequest("quantization does not work with a device_map", "quantization")
    attention = settings.attn_implementation
    if attention is not None and attention not in _ATTENTION:
        raise InvalidRequest(
            f"Invalid value for field 'attn_implementation': '{attention}' is not one of {', '.join(_ATTENTION)}",
            "attn_implementation",
        )
    if attention is not None and device == "cpu" and attention not in _ON_CPU:
        raise InvalidRequest(
            f"Invalid value for field 'attn_implementation': '{attention}' does not work on a CPU; "
            f"use {' or '.join(_ON_CPU)}",
            "attn_implementation",
        )
    named = settings.dtype or "auto"
    stored = named == STORED
    if stored and (device != "cpu" or settings.device_map is not None or settings.quantization or settings.compile):
        raise InvalidRequest(f"dtype '{STORED}' is for a CPU, without quantization and compile", "dtype")
    if stored or (named == "auto" and device == "cpu"):
        dtype: torch.dtype | None = torch.float32
    else:
        dtype = None if named == "auto" else _known_dtype("dtype", named, "auto")
    return Placement(
        device,
        dtype,
        settings.device_map,
        settings.quantization,
        attention,
        bool(settings.compile),
        _backend(settings, options),
        None if settings.kv_cache_dtype is None else _known_dtype("kv_cache_dtype", settings.kv_cache_dtype),
        settings.max_context,
        settings.slots,
        stored,
    )


def _known_dtype(field: str, name: str, *others: str) -> torch.dtype:
    if name not in _DTYPES:
        names = ", ".join((*others, *_DTYPES))
        raise InvalidRequest(f"Invalid value for field '{field}': '{name}' is not one of {names}", field)
    return _DTYPES[name]


def _backend(settings: LoadSettings, options: LoadOptions) -> str:
    name = settings.backend or options.backend
    if name not in ("auto", *BACKENDS):
        raise InvalidRequest(
            f"Invalid value for field 'backend': '{name}' is not one of auto, {', '.join(BACKENDS)}", "backend"
        )
    return name


def _check_device(device: str, *, asked: bool) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        where = "the field 'device'" if asked else "the server's setting LOCAL_LLM_DEVICE"
        message = f"Device '{device}' is not available; choose another one in {where}"
        raise (InvalidRequest(message, "device") if asked else DeviceMissing(message)) from error


def _check_map(device_map: str | Mapping[str, Any]) -> None:
    if isinstance(device_map, str):
        if device_map not in _MAPS:
            raise InvalidRequest(
                f"Invalid value for field 'device_map': '{device_map}' is not one of {', '.join(_MAPS)}", "device_map"
            )
        return
    if not device_map:
        raise InvalidRequest("Invalid value for field 'device_map': it names no module", "device_map")
    for module, device in device_map.items():
        if device == "disk":
            continue
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
            raise InvalidRequest(
                f"Invalid value for field 'device_map': device '{device}' of '{module}' is not available",
                "device_map",
            ) from error
