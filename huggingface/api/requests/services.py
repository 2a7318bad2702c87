"""The services that routes use: the registry, the manager, and facts about this server, stored on the Flask app.

Each app has one `Services`; two apps in one process share nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from flask import current_app

from ...errors import ServerFull
from ...inspection.preflight import Preflight
from ...manager.manager import ModelManager
from ...manager.preload import Warmup
from ...registry.registry import ModelRegistry
from ...types import LoadOptions
from .active import Requests

EXTENSION = "local-llm"


@dataclass(frozen=True, slots=True)
class Services:
    """The services of one app. `started` is a reading of `time.monotonic`, in seconds."""

    registry: ModelRegistry
    manager: ModelManager
    options: LoadOptions
    requests: Requests
    places: threading.BoundedSemaphore  # for requests that wait for a model
    preflight: Preflight
    warmup: Warmup
    started: float = field(default_factory=time.monotonic)


def services() -> Services:
    """The services of the app that serves the present request."""
    return cast(Services, current_app.extensions[EXTENSION])


@contextmanager
def admitted() -> Iterator[None]:
    """Holds a place among the requests that wait for models until the block ends.

    Raises:
        ServerFull: no place is free. One more request could take the last thread from routes that need no model.
    """
    places = services().places
    if not places.acquire(blocking=False):
        raise ServerFull
    try:
        yield
    finally:
        places.release()
