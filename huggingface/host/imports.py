"""Imports torch and transformers late, and on one thread at a time.

Their modules are incomplete while they are imported: a second thread that imports them meanwhile would miss names.
All code outside the loader imports them through this file.
"""

from __future__ import annotations

import gc
import importlib
import logging
import sys
import threading
from types import ModuleType

from ..cancellation import before_wait
from ..errors import DependencyMissing

logger = logging.getLogger(__name__)

_PACKAGE = __name__.partition(".")[0]

# Imported modules belong to the process, so this lock does too.
_IMPORTING = threading.Lock()


def import_library(name: str) -> ModuleType:
    """Imports and returns the module `name`: `torch`, or a module of this package that needs it.

    Raises:
        DependencyMissing: torch or transformers is not installed, or is broken.
    """
    if _IMPORTING.locked():
        before_wait()
    with _IMPORTING:
        if name in sys.modules:
            return sys.modules[name]
        before_wait()  # an import takes seconds
        try:
            module = importlib.import_module(name)
            # Imported modules stay, so later garbage collections skip them, which saves tens of milliseconds each.
            # No model is in memory yet, so `freeze` keeps none alive.
            gc.collect()
            gc.freeze()
            return module
        except (ImportError, OSError) as error:  # OSError: a shared library that torch needs is missing
            if (getattr(error, "name", None) or "").startswith(f"{_PACKAGE}."):
                raise  # a module of this package: a fault of this project, not of the installation
            logger.warning("%s cannot be imported: %s", name, error)
            raise DependencyMissing from error
