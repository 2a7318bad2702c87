"""A request gets its model: listed while it waits or runs, and given up when its client has gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from flask import g, request

from ...errors import Cancelled, InvalidRequest, LoadError
from ...registry.records import ModelRecord
from ...served import ServedModel
from ..documented.requests import client_request_id
from .active import InFlight
from .services import admitted, services


@contextmanager
def leased_model(
    record: ModelRecord,
    task: str,
    timeout: float | None,
    streams: bool = False,
    keep_alive: float | None = None,
) -> Iterator[tuple[InFlight, ServedModel]]:
    """The present request, listed, and its model, loaded and kept in memory until the block ends.

    `timeout` is in seconds from now, `keep_alive` in seconds from the end. How it went is counted.
    """
    if keep_alive is not None and -1 < keep_alive < 0:
        raise InvalidRequest("Invalid value for field 'keep_alive': must be -1 (for ever), 0 or more", "keep_alive")
    present = services()
    flight = InFlight(
        record.model_id,
        task,
        disconnected=request.environ.get("waitress.client_disconnected", lambda: False),
        client_id=client_request_id(),
        timeout=timeout,
        stream=streams,
        used=lambda: present.registry.record_use(record.model_id),
    )
    g.request_id = flight.request_id
    started = time.monotonic()
    failure: BaseException | None = None
    try:
        manager = present.manager
        with (
            present.requests.hold(flight),
            admitted(),
            manager.lease(record.model_id, flight.gone, keep_alive) as model,
        ):
            flight.leased()
            try:
                yield flight, model
            finally:
                flight.release()
    except BaseException as error:
        failure = error
        raise
    finally:
        failure = failure or flight.failure or (Cancelled() if flight.gone() else None)
        if failure is None:
            present.manager.statistics.served(record.model_id, time.monotonic() - started, flight.made)
        elif not isinstance(failure, LoadError):  # that is counted once for all who waited
            present.manager.statistics.failed(record.model_id, type(failure).__name__)
