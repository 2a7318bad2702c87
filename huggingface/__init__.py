"""The `huggingface` package: its services on a Flask app, and its routes under `/api/huggingface`.

`init_app` builds the registry and the manager and registers the blueprints; `close` ends them. Importing the package
imports neither torch nor transformers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from flask_openapi3 import OpenAPI

from .api.anthropic import routes as anthropic
from .api.documented import downloads as download_routes
from .api.documented import inference, models, requests, system
from .api.documented import memory as cache
from .api.documented import preflight as preflight_routes
from .api.documented.requests import init_request_ids
from .api.http import docs
from .api.http.bodies import init_bodies
from .api.http.errors import init_errors
from .api.http.fields import UnknownParameters, init_ignored
from .api.http.host_check import init_guard
from .api.http.json import JSONProvider, JSONRequest, check_query, without_slash
from .api.hub import endpoint  # noqa: F401 - adds its routes to those of the models, as the next one
from .api.hub import protocol as hub_protocol  # noqa: F401
from .api.ollama import routes as ollama
from .api.openai import routes as openai
from .api.requests.active import Requests
from .api.requests.services import EXTENSION, Services
from .api.requests.waiting import init_waiting
from .errors import RegistryError
from .host.memory import resident_bytes
from .inspection.preflight import Preflight
from .manager.budget import Budget, Limit
from .manager.manager import ModelManager
from .manager.preload import Warmup
from .manager.statistics import Statistics, beside
from .registry.registry import ModelRegistry
from .types import LoadOptions

logger = logging.getLogger(__name__)


def init_app(
    app: OpenAPI,
    *,
    registry: Path,
    options: LoadOptions,
    busy_timeout: float,
    threads: int,
    keep_alive: float = -1.0,
    memory_timeout: float = 5.0,
    memory_limits: Mapping[str, Limit] | None = None,
    preload: Sequence[str] = (),
    allowed_hosts: Iterable[str] = (),
    allowed_origins: Iterable[str] = (),
    unknown_parameters: UnknownParameters = "refuse",
    held_bytes: int = 256 * 1024**2,
) -> None:
    """Registers the services and the routes on `app`.

    Args:
        registry: the registry's JSON file.
        options: how models are loaded.
        busy_timeout: seconds that an unload waits for the model's requests to end.
        threads: how many serve requests; an eighth of them is kept for requests that need no model.
        keep_alive: seconds that a model stays in memory after its last use; -1 for ever.
        memory_timeout: seconds that a load waits for requests of the models that it evicts.
        memory_limits: the most memory that models may take, by device.
        preload: the models to load at the start.
        allowed_hosts: names for the server in a `Host` header, besides the local ones.
        allowed_origins: patterns of origins whose web pages may use the server, besides those of this machine.
        unknown_parameters: whether a request with an unknown parameter is refused.
        held_bytes: the most bytes of request bodies that are held at once.
    """
    records = ModelRegistry(registry)
    manager = ModelManager(
        records,
        options,
        busy_timeout=busy_timeout,
        keep_alive=keep_alive,
        memory_timeout=memory_timeout,
        budget=Budget(memory_limits, resident=resident_bytes),
        statistics=Statistics(beside(registry)),
    )
    places = threading.BoundedSemaphore(max(1, threads - max(1, threads // 8)))
    app.extensions[EXTENSION] = Services(
        records, manager, options, Requests(), places, Preflight(options), Warmup(manager, preload)
    )
    app.request_class = JSONRequest
    app.json = JSONProvider(app)
    app.url_map.merge_slashes = False
    app.wsgi_app = without_slash(app.wsgi_app)  # type: ignore[assignment,method-assign]
    init_waiting(app, threads, lambda app: init_guard(app, allowed_hosts, allowed_origins))
    init_bodies(app, held_bytes)
    app.before_request(check_query)
    init_errors(app)
    init_ignored(app, unknown_parameters)
    init_request_ids(app)
    protocols = (openai, anthropic, ollama)
    for routes in (system, preflight_routes, models, download_routes, inference, requests, cache, *protocols):
        app.register_api(routes.blueprint)
    app.register_api(openai.hub_chat)
    app.register_api(system.root)
    app.register_blueprint(docs.blueprint)


def start(app: OpenAPI, import_delay: float | None) -> None:
    """Reads the registry, so that a damaged file is reported at the start, and begins to load models.

    `import_delay` is the seconds until torch and transformers are imported in the background; None leaves the import to
    the first load.
    """
    services: Services = app.extensions[EXTENSION]
    try:
        count = len(services.registry.list())
    except RegistryError as error:
        logger.error("%s", error)  # the routes that need the registry say so too; the others work
    else:
        logger.info("%d models registered", count)
    if import_delay is not None:
        services.manager.import_libraries(import_delay)
    services.warmup.start()


def close(app: OpenAPI) -> None:
    """Cancels all work, empties the memory, and writes pending changes. Safe to call twice."""
    services: Services = app.extensions[EXTENSION]
    try:
        services.manager.close()
    finally:
        services.manager.statistics.close()
        services.registry.close()
