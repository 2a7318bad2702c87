"""Several generations for one request: begun as one ticket, each with a seed of its own, refused in the client's words.

What OpenAI's and Hugging Face's protocols have in common. Must not know either's bodies.
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

# Generations of one request that are in the queue or run at once.
_AT_ONCE = 32


def begin(model: ServedModel, flight: InFlight, requests: Sequence[GenerationRequest]) -> JointTicket:
    """Queue generations, read as one: the chunks' `index` is the place in `requests`.

    Raises: as `LoadedModel.generate`.
    """
    ticket = JointTicket([partial(model.generate, request, flight.gone) for request in requests], _AT_ONCE)
    flight.attach(ticket)
    return ticket


def seeded(parameters: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The parameters of the `number`-th answer to one prompt: with a seed, each has another one."""
    if "seed" not in parameters:
        return dict(parameters)
    return {**parameters, "seed": parameters["seed"] + number}


def likelihood(chunk: Chunk) -> float:
    """The mean log-probability of a text's tokens."""
    values = [token.logprob or 0.0 for token in chunk.tokens]
    return sum(values) / max(len(values), 1)


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Have refusals name the fields as the client's body does; `names` are these, by the engine's.

    Raises:
        InvalidRequest: in place of one that names the engine's field.
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
