"""Routes about the server itself: its state, its usage, and whether models can run here."""

from __future__ import annotations

import time
from typing import Any

from flask_openapi3 import APIBlueprint, Tag

from ...errors import DependencyMissing, NotReady
from ...host.devices import cuda_available, resolve_device
from ...host.imports import import_library
from ..requests.services import services
from ..requests.waiting import at_once
from . import schemas, system_schemas

VERSION = "0.5.1"
_TAG = Tag(name="System", description="The server itself.")
PROBES = frozenset({"/health", "/ready"})  # these are answered first, however much else the server has to do
root = APIBlueprint("root", __name__, abp_tags=[_TAG], abp_responses={**schemas.FAILURES})
blueprint = APIBlueprint(
    "system", __name__, url_prefix="/api/huggingface", abp_tags=[_TAG], abp_responses={**schemas.FAILURES}
)


@root.get("/", responses={200: system_schemas.ServerAnswer})
@at_once
def show_server() -> dict[str, Any]:
    """Show what is running."""
    present = services()
    return {
        "success": True,
        "name": "Local LLM",
        "version": VERSION,
        "uptime_seconds": round(time.monotonic() - present.started, 3),
        "device": resolve_device(present.options.device),
        "loaded_models": list(present.manager.loaded()),
        "warnings": present.registry.warnings,
        "documentation": "/docs",
    }


@root.get("/health", responses={200: system_schemas.HealthAnswer})
@at_once
def show_health() -> dict[str, Any]:
    """Answer as long as the server runs."""
    return {"success": True, "status": "ok"}


@root.get("/ready", responses={200: system_schemas.ReadyAnswer, 503: schemas.ErrorAnswer})
@at_once
def show_readiness() -> dict[str, Any]:
    """Answer 200 when the models of LOCAL_LLM_PRELOAD are in memory, and until then a 503 that names them."""
    missing = services().warmup.missing.items()
    if missing:
        texts = [f"'{name}' ({f'failed: {error}' if error else state})" for name, (state, error) in missing]
        raise NotReady(f"Not in memory yet: {'; '.join(texts)}")
    return {"success": True, "status": "ready"}


@blueprint.get("/statistics", responses={200: system_schemas.StatisticsAnswer})
@at_once
def show_statistics() -> dict[str, Any]:
    """Show how much the registered models were used, and how well they did."""
    present = services()
    return {
        "success": True,
        "statistics": {**present.registry.statistics(), "models": present.manager.statistics.shown()},
    }


@blueprint.get("/model-types", responses={200: system_schemas.ModelTypesAnswer})
@at_once
def list_model_types() -> dict[str, Any]:
    """List the types of the registered models."""
    return {"success": True, "model_types": services().registry.model_types()}


@blueprint.get("/dependencies", responses={200: system_schemas.DependenciesAnswer})
def show_dependencies() -> dict[str, Any]:
    """Show whether models can be run here. The first call imports the libraries, which takes seconds."""
    torch = _importable("torch")
    return {
        "success": True,
        "dependencies": {
            "transformers": _importable("transformers"),
            "torch": torch,
            "cuda_available": torch and cuda_available(),
        },
    }


def _importable(name: str) -> bool:
    """Whether the package can be imported: an installed package may be broken."""
    try:
        import_library(name)
    except DependencyMissing:
        return False
    return True
