"""A request gets its model: listed while it waits or runs, and given up when its client has gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flask import g, request

from ..records import ModelRecord
from .inflight import InFlight
from .requests import client_request_id
from .services import admitted, services


@contextmanager
def lent(
    record: ModelRecord, task: str, timeout: float | None, streams: bool = False
) -> Iterator[tuple[InFlight, Any]]:
    """The present request, listed, and its model, loaded and kept in memory until the block ends.

    `timeout` is in seconds from now.
    """
    present = services()
    flight = InFlight(
        record.model_id,
        task,
        disconnected=request.environ.get("waitress.client_disconnected", lambda: False),
        client_id=client_request_id(),
        timeout=timeout,
        stream=streams,
    )
    g.request_id = flight.request_id
    with present.requests.hold(flight), admitted(), present.manager.lease(record.model_id, flight.gone) as model:
        flight.leased()
        yield flight, model
