"""Importing openvino and nncf: late, and without what they send to their makers.

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

# What is imported belongs to the process, and so does the right to import it.
_IMPORTING = threading.Lock()

# Both send statistics of use over the network as soon as they are imported, unless they find no sender.
_SENDER = "openvino_telemetry"


class OpenVINOMissing(Exception):
    """openvino, or what is needed beside it, is not there; the message says what to install."""


def installed(name: str = "openvino") -> bool:
    """Whether a package is there; nothing is imported to tell."""
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


def nncf() -> Any:
    """The module `nncf`, which compresses weights.

    Raises:
        OpenVINOMissing: it is not installed, or cannot be imported.
    """
    with _importing("nncf"):
        import nncf

        return nncf


def versions() -> dict[str, str]:
    """The versions of what makes a graph, by package; those that are not installed are left out."""
    found = {}
    for name in ("openvino", "nncf", "transformers", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def _importing(package: str) -> Iterator[None]:
    with _IMPORTING:
        modules: dict[str, Any] = sys.modules
        modules.setdefault(_SENDER, None)  # how Python is told that there is no such module
        try:
            yield
        except (ImportError, OSError) as error:
            logger.debug("%s cannot be imported", package, exc_info=error)
            raise OpenVINOMissing(f"the package {package} is not installed (pip install {package})") from error
