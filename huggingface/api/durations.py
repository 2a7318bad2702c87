"""Lengths of time as clients write them: seconds, or text in Go's form (`5m`, `1h30m`, `-1`).

Pure functions. Must not know which field holds one.
"""

from __future__ import annotations

import math
import re

from .schemas import MOST_SECONDS

FOR_EVER = -1.0

_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_WHOLE = re.compile(rf"([-+]?)((?:{_PART.pattern})+)")
_NUMBER = re.compile(r"[-+]?([0-9]{1,20}(\.[0-9]{0,20})?)")


def seconds_of(value: float | str) -> float:
    """How many seconds `value` stands for; below 0, or beyond what counts as an end, is for ever (-1).

    Raises:
        ValueError: text that is no duration.
    """
    seconds = value if isinstance(value, int | float) else _parsed(value.strip())
    return FOR_EVER if seconds < 0 or seconds > MOST_SECONDS else float(seconds)


def _parsed(text: str) -> float:
    if _NUMBER.fullmatch(text):
        return float(text)
    found = _WHOLE.fullmatch(text) if len(text) <= 100 else None
    if found is None:
        raise ValueError("must be a number of seconds, or text as '5m', '1h30m' or '-1'")
    total = math.fsum(float(count) * _SECONDS[unit] for count, unit in _PART.findall(found[2]))
    return -total if found[1] == "-" else total
