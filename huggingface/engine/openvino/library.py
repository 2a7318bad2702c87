"""Imports openvino late, and without its telemetry.

Any thread may call it. Must not know models.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

logger = logging.getLogger(__name__)

# Imports belong to the process, and so does the lock for them.
_IMPORTING = threading.Lock()

# It sends usage statistics over the network on import, unless this module is missing.
_SENDER = "openvino_telemetry"


class OpenVINOMissing(Exception):
    """openvino, or a package that it needs, is missing; the message says what to install."""


def installed(name: str = "openvino") -> bool:
    """Whether a package is installed; imports nothing."""
    return name in sys.modules or importlib.util.find_spec(name) is not None


def openvino() -> Any:
    """The module `openvino`.

    Raises:
        OpenVINOMissing: it is not installed, or cannot be imported.
    """
    with _importing("openvino"):
        import openvino

        return openvino


def offline_transformations() -> Any:
    """The module with the transformations for stateful and for paged attention.

    Raises:
        OpenVINOMissing: as `openvino`, or this release has none.
    """
    with _importing("openvino"):
        from openvino import _offline_transformations

        return _offline_transformations


def versions() -> dict[str, str]:
    """The versions of the packages that make a graph; those that are not installed are left out."""
    found = {}
    for name in ("openvino", "transformers", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def _importing(package: str) -> Iterator[None]:
    with _IMPORTING:
        modules: dict[str, Any] = sys.modules
        modules.setdefault(_SENDER, None)  # tells Python that there is no such module
        try:
            yield
        except (ImportError, OSError) as error:
            logger.debug("%s cannot be imported", package, exc_info=error)
            raise OpenVINOMissing(f"the package {package} is not installed (pip install {package})") from error
