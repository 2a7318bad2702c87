"""Turns results of models into plain JSON values: no tensors, no numpy scalars, no tuples, no NaN.

Pure, for any thread. Must not know tasks. Imports neither torch nor numpy: their values have `tolist`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import GenerationFailed


def json_value(value: Any) -> Any:
    """Copies `value` into dict, list, str, int, float, bool and None only.

    Raises:
        GenerationFailed: a number is NaN or infinite, which JSON cannot express, or a value is not data.
    """
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise GenerationFailed("The model computed a value that is not a finite number")
        return value
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, arrays and numpy scalars
        return json_value(value.tolist())
    raise GenerationFailed(f"The model gave a value that is not data: {type(value).__name__}")
