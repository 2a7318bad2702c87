"""The API's description for programs (`/openapi.json`) and for people (`/docs`).

The page is Swagger UI from an installed package, so it works without the internet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import flask_openapi3_swagger
from flask import Blueprint, current_app, render_template, url_for
from flask_openapi3 import OpenAPI

from ..requests.waiting import at_once
from .document import api_document

_PACKAGE = Path(flask_openapi3_swagger.__file__).parent

blueprint = Blueprint(
    "docs",
    __name__,
    static_folder=str(_PACKAGE / "templates" / "swagger"),
    static_url_path="/docs/static",
    template_folder="templates",
)


@blueprint.get("/openapi.json")
def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    return api_document(cast(OpenAPI, current_app))


@blueprint.get("/docs")
@at_once
def page() -> str:
    """The interactive page."""
    return render_template("docs.html", static=url_for("docs.static", filename=""), document=url_for("docs.openapi"))
