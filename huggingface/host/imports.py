"""Importing torch and transformers: late, and by one thread at a time.

Their packages fill themselves in bit by bit; a second thread that imports them meanwhile finds modules without the
names it needs. Everything in this project that imports them outside of the loader goes through here.
"""

from __future__ import annotations

import gc
import importlib
import logging
import sys
import threading
from types import ModuleType

from ..errors import DependencyMissing

logger = logging.getLogger(__name__)

_PACKAGE = __name__.partition(".")[0]

# What is imported belongs to the process, and so does the right to import it.
_IMPORTING = threading.Lock()


def import_library(name: str) -> ModuleType:
    """The module `name` (`torch`, or one of ours that needs it).

    Raises:
        DependencyMissing: torch or transformers is not installed, or is broken.
    """
    with _IMPORTING:
        if name in sys.modules:
            return sys.modules[name]
        try:
            module = importlib.import_module(name)
            # What was imported stays: later garbage collections need not look at it each time, which takes tens of
            # milliseconds. No model is in memory yet, so none is kept there by this.
            gc.collect()
            gc.freeze()
            return module
        except (ImportError, OSError) as error:  # OSError: a shared library that torch needs is missing
            if (getattr(error, "name", None) or "").startswith(f"{_PACKAGE}."):
                raise  # one of our own modules: a fault of this project, not of the installation
            logger.warning("%s cannot be imported: %s", name, error)
            raise DependencyMissing from error
