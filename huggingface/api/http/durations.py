"""Parses durations: seconds, or text such as `5m` or `1h30m`, as Go's `time.ParseDuration` does.

Pure functions for any thread. A negative duration, or one of more than thirty years, means for ever: -1.
Source: https://pkg.go.dev/time#ParseDuration, which Ollama reads `keep_alive` with.
"""

from __future__ import annotations

import math
import re
from typing import Any

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)"
_DURATION = re.compile(rf"[+-]?(0|({_PART})+)")
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{0,20})?")

FOR_EVER = -1.0
_LONGEST = 1e9


def seconds(value: Any) -> Any:
    """Parses a text as seconds; returns any other value unchanged.

    Raises:
        ValueError: the text is not a duration.
    """
    if not isinstance(value, str):
        return value
    if len(value) > 100 or not _DURATION.fullmatch(value):
        raise ValueError("must be seconds, or a duration such as '5m' or '1h30m'")
    total = math.fsum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, value))
    return FOR_EVER if total > _LONGEST or (value.startswith("-") and total > 0) else total


def seconds_of(value: float | str) -> float:
    """Parses a duration as Ollama does, where a number may be text too; returns seconds, -1 for ever.

    Raises:
        ValueError: the text is not a duration.
    """
    text = value.strip() if isinstance(value, str) else ""
    found = float(text) if _NUMBER.fullmatch(text) else float(seconds(text or value))
    return FOR_EVER if found < 0 or found > _LONGEST else found
