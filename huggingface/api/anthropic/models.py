"""The registered models in the form of Anthropic's `GET /v1/models`, which a header selects at OpenAI's address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import request
from pydantic import ValidationError

from ...errors import InvalidRequest
from ...registry.records import ModelRecord
from ..http.validation import request_error
from .schemas import ModelsPage


def shown_models(records: Sequence[ModelRecord]) -> dict[str, Any]:
    """The page of models that the present request asks for.

    Raises:
        InvalidRequest: a field of the query is wrong; names it.
    """
    try:
        page = ModelsPage.model_validate(request.args.to_dict())
    except ValidationError as error:
        raise request_error(error) from error
    start, end = 0, len(records)
    if page.after_id is not None:
        start = _place(records, "after_id", page.after_id) + 1
    if page.before_id is not None:
        end = _place(records, "before_id", page.before_id)
    found = records[start:end]
    backwards = page.before_id is not None and page.after_id is None
    shown = found[-page.limit :] if backwards else found[: page.limit]
    ids = [record.model_id for record in shown]
    return {
        "data": [shown_model(record) for record in shown],
        "has_more": len(found) > len(shown),
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }


def shown_model(record: ModelRecord) -> dict[str, Any]:
    """A model in Anthropic's form."""
    return {
        "type": "model",
        "id": record.model_id,
        "display_name": record.name,
        "created_at": f"{record.added_date}Z",
        "lifecycle": "active",
    }


def _place(records: Sequence[ModelRecord], field: str, model_id: str) -> int:
    place = next((place for place, record in enumerate(records) if record.model_id == model_id), None)
    if place is None:
        raise InvalidRequest(f"Invalid value for field '{field}': no model '{model_id}' is registered", field)
    return place
