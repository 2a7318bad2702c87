"""What an error of OpenVINO's means: that it cannot compute a model, or that memory is lacking.

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
    """Have whatever OpenVINO or a model's code raises within mean that this cannot be done, but for lack of memory.

    Raises:
        NotBatchable: with a few words of what was raised. Cancelled, MemoryError: as they were.
    """
    try:
        yield
    except (NotBatchable, Cancelled, MemoryError):
        raise
    except Exception as error:
        logger.info("OpenVINO cannot %s a model", what, exc_info=error)
        raise NotBatchable(f"OpenVINO cannot {what} it ({_in_short(error)})") from error


def infer(request: Any) -> None:
    """Compute what was set as the request's inputs.

    Raises:
        MemoryError: there is no memory for it. RuntimeError: anything else that OpenVINO says.
    """
    try:
        request.infer()
    except RuntimeError as error:
        if "alloc" in str(error).lower():  # std::bad_alloc, or what oneDNN makes of it
            raise MemoryError from error
        raise


def _in_short(error: Exception) -> str:
    lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
    found = next((line for line in lines if line.startswith("No conversion rule")), None)
    return (found or type(error).__name__)[:200]
