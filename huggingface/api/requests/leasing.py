"""Leases a model for a request: lists the request while it is active, and cancels it when its client disconnects."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from flask import g, request

from ...cancellation import Cancellation
from ...errors import Cancelled, InvalidRequest, LoadError
from ...registry.records import ModelRecord
from ...served import ServedModel
from ..documented.requests import client_request_id
from .active import InFlight
from .services import admitted, services


def client_cancellation(timeout: float | None = None) -> Cancellation:
    """The `Cancellation` of the present request: its client disconnects, or its `timeout` in seconds runs out."""
    deadline = None if timeout is None else time.monotonic() + timeout
    return Cancellation(request.environ.get("waitress.client_disconnected"), deadline=deadline)


@contextmanager
def leased_model(
    record: ModelRecord,
    task: str,
    timeout: float | None,
    streams: bool = False,
    keep_alive: float | None = None,
) -> Iterator[tuple[InFlight, ServedModel]]:
    """Lists the present request and leases its model until the block ends; counts the outcome in the statistics.

    `timeout` is in seconds from now, `keep_alive` in seconds from the end.
    """
    if keep_alive is not None and -1 < keep_alive < 0:
        raise InvalidRequest("Invalid value for field 'keep_alive': must be -1 (for ever), 0 or more", "keep_alive")
    present = services()
    flight = InFlight(
        record.model_id,
        task,
        client_cancellation(timeout),
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
            manager.lease(record.model_id, flight.cancellation, keep_alive) as model,
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
        failure = failure or flight.failure or (Cancelled() if flight.cancellation.cancelled else None)
        if failure is None:
            present.manager.statistics.served(record.model_id, time.monotonic() - started, flight.made)
        elif not isinstance(failure, LoadError):  # a failed load is counted once for all requests that waited for it
            present.manager.statistics.failed(record.model_id, type(failure).__name__)
