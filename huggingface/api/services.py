"""What the routes work with: the registry, the manager, and facts about this server, kept on the Flask app.

One `Services` an app; two apps in one process share nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import cast

from flask import current_app

from ..manager import ModelManager
from ..records import LoadOptions
from ..registry import ModelRegistry

EXTENSION = "local-llm"


@dataclass(frozen=True, slots=True)
class Services:
    """The services of one app. `started` is a reading of `time.monotonic`, in seconds."""

    registry: ModelRegistry
    manager: ModelManager
    options: LoadOptions
    started: float = field(default_factory=time.monotonic)


def services() -> Services:
    """The services of the app that serves the present request."""
    return cast(Services, current_app.extensions[EXTENSION])
