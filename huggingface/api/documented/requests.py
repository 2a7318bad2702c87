"""Routes that list the requests that wait or run, and cancel one."""

from __future__ import annotations

from typing import Any

from flask import Flask, Response, g, request
from flask_openapi3 import APIBlueprint, Tag

from ..requests.services import services
from ..requests.waiting import at_once
from . import schemas, system_schemas

blueprint = APIBlueprint(
    "requests",
    __name__,
    url_prefix="/api/huggingface",
    abp_tags=[Tag(name="Requests", description="What waits and runs.")],
    abp_responses={**schemas.FAILURES},
)

CLIENTS_ID, OUR_ID = "X-Request-Id", "X-Local-LLM-Request-Id"


@blueprint.get("/requests", responses={200: system_schemas.RequestsAnswer})
@at_once
def list_requests() -> dict[str, Any]:
    """List the requests that wait or run, oldest first."""
    found = [flight.to_dict() for flight in services().requests.list()]
    return {"success": True, "requests": found, "count": len(found)}


@blueprint.delete("/requests/<request_id>", responses={200: schemas.MessageAnswer, 404: schemas.ErrorAnswer})
@at_once
def cancel_request(path: system_schemas.RequestPath) -> dict[str, Any]:
    """Cancel a request. Its client gets an error, and what it held is free at the next step."""
    services().requests.cancel(path.request_id)
    return {"success": True, "message": f"Request '{path.request_id}' cancelled"}


def init_request_ids(app: Flask) -> None:
    """Adds the request's id, and the client's own id for it, to responses. Two clients may choose the same id, so the
    client's is only echoed."""

    def add_headers(response: Response) -> Response:
        if (name := client_request_id()) is not None:
            response.headers[CLIENTS_ID] = name
        if (own := g.get("request_id")) is not None:
            response.headers[OUR_ID] = own
        return response

    app.after_request(add_headers)


def client_request_id() -> str | None:
    """The client's id for the present request, cut to 200 characters; None where it sent none."""
    name = request.headers.get(CLIENTS_ID)
    return None if name is None else name[:200]
