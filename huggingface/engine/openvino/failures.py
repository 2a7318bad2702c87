"""Turns errors of OpenVINO: it cannot compute a model, or memory is short.

Must not know models or files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from ...errors import Cancelled
from ..layers import NotBatchable

logger = logging.getLogger(__name__)


@contextmanager
def computed(what: Literal["convert", "compute"]) -> Iterator[None]:
    """Turns any error of OpenVINO or a model's code in the block into NotBatchable, unless memory is short.

    Raises:
        NotBatchable: with the error in a few words.
        Cancelled, MemoryError: unchanged.
    """
    try:
        yield
    except (NotBatchable, Cancelled, MemoryError):
        raise
    except Exception as error:
        logger.info("OpenVINO cannot %s a model", what, exc_info=error)
        raise NotBatchable(f"OpenVINO cannot {what} it ({_in_short(error)})") from error


def infer(request: Any) -> None:
    """Computes the request's inputs.

    Raises:
        MemoryError: memory is short.
        RuntimeError: any other error of OpenVINO.
    """
    try:
        request.infer()
    except RuntimeError as error:
        if "alloc" in str(error).lower():  # std::bad_alloc, or oneDNN's version of it
            raise MemoryError from error
        raise


def _in_short(error: Exception) -> str:
    lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
    found = next((line for line in lines if line.startswith("No conversion rule")), None)
    return (found or type(error).__name__)[:200]
