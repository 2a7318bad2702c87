"""The application: wiring only. `create_app(settings)` returns a Flask app; `python app.py`, or the installed command
`local-llm`, serves one.

Importing this module starts nothing and imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from flask_openapi3 import Info, OpenAPI

import huggingface
from config import ROOT, Settings, read_settings
from huggingface.api.documented.schemas import ErrorAnswer
from huggingface.api.documented.system import VERSION
from huggingface.api.http.errors import on_invalid_body
from huggingface.host.memory import keep_few_arenas
from huggingface.manager.budget import parse_limits
from huggingface.types import EngineOptions, LoadOptions


def create_app(settings: Settings | None = None) -> OpenAPI:
    """Returns a new app with its own services; `huggingface.close(app)` ends them."""
    settings = settings or Settings()
    app = OpenAPI(
        __name__,
        info=Info(title="Local LLM", version=VERSION, description="Hugging Face models on your own machine."),
        doc_ui=False,
        security_schemes={},
        validation_error_status=400,
        validation_error_model=ErrorAnswer,
        validation_error_callback=on_invalid_body,
        static_folder=None,
    )
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    huggingface.init_app(
        app,
        registry=settings.registry,
        options=LoadOptions(
            models_dir=settings.models_dir,
            device=settings.device,
            backend=settings.backend,
            allow_pickle=settings.allow_pickle,
            trust_remote_code=settings.trust_remote_code,
            offline=settings.offline,
            engine=EngineOptions(settings.max_batch, settings.max_queue, settings.kv_cache_bytes),
        ),
        busy_timeout=settings.busy_timeout,
        keep_alive=settings.keep_alive,
        memory_timeout=settings.memory_timeout,
        memory_limits=parse_limits(settings.memory_budget),
        preload=settings.preload,
        threads=settings.threads,
        allowed_hosts=settings.allowed_hosts,
        allowed_origins=settings.allowed_origins,
        unknown_parameters=settings.unknown_parameters,
        held_bytes=max(settings.max_held_bytes, settings.max_body_bytes),
    )
    return app


def main(arguments: list[str] | None = None) -> None:
    """Runs the command: serves until interrupted or stopped (SIGTERM)."""
    from server import serve

    parser = argparse.ArgumentParser(
        prog="local-llm",
        description="Serves Hugging Face models over HTTP. Its settings are the environment variables LOCAL_LLM_*, "
        f"or lines of {ROOT / '.env'}, such as LOCAL_LLM_PORT=5001.",
    )
    parser.add_argument("--version", action="version", version=f"local-llm {VERSION}")
    parser.parse_args(arguments)

    settings = read_settings()
    # transformers reads this when it is first imported; it warns of arguments that this server has checked already.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # oneDNN reads this when it is first used. By default it keeps its code for the last 1,024 shapes of products: tens
    # of megabytes that no unload would free. A step needs a handful.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    keep_few_arenas()
    # The engine's thread takes the interpreter's lock for each of about a thousand operations of a step. With the
    # default of 5 ms, a thread that answers requests could hold the lock for that long each time.
    sys.setswitchinterval(0.0005)
    app = create_app(settings)
    try:
        huggingface.start(app, import_delay=1.0 if settings.import_at_start else None)  # the server answers first
        serve(app, settings)
    finally:
        huggingface.close(app)


if __name__ == "__main__":
    main()
