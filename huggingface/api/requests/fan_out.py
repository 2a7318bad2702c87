"""Runs several generations for one request as one ticket, each with its own seed; errors name the client's fields.

All protocols share it. Must not know their bodies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ...engine.parallel_sampling import JointTicket
from ...errors import InvalidRequest
from ...served import ServedModel
from ...types import Chunk, GenerationRequest
from .active import InFlight

# The most generations of one request that wait or run at once.
_AT_ONCE = 32


def begin(model: ServedModel, flight: InFlight, requests: Sequence[GenerationRequest]) -> JointTicket:
    """Queues generations as one ticket; a chunk's `index` is its generation's place in `requests`.

    Raises: as `LoadedModel.generate`.
    """
    ticket = JointTicket([partial(model.generate, request) for request in requests], _AT_ONCE, flight.cancellation)
    flight.attach(ticket)
    return ticket


def seeded(parameters: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The parameters of the answer with this `number` to one prompt: where there is a seed, each answer has its own."""
    if "seed" not in parameters:
        return dict(parameters)
    return {**parameters, "seed": parameters["seed"] + number}


def likelihood(chunk: Chunk) -> float:
    """The mean log-probability of a chunk's tokens."""
    values = [token.logprob or 0.0 for token in chunk.tokens]
    return sum(values) / max(len(values), 1)


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Renames fields in the block's errors as in the client's body; `names` maps the engine's names to the body's.

    Raises:
        InvalidRequest: in place of an error that names the engine's field.
    """
    try:
        yield
    except InvalidRequest as error:
        name = names.get(error.field or "")
        if name is None:
            raise
        renamed = type(error).__new__(type(error))
        message = re.sub(rf"\b{error.field}\b", lambda _: name, str(error))
        renamed.__dict__.update(error.__dict__)
        InvalidRequest.__init__(renamed, message, name)
        raise renamed from error
