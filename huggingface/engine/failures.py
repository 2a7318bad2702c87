"""Turns errors of torch or of a model into the project's errors, for all code that computes.

Called on the engine's thread. Must not know requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import EngineFailed, GenerationFailed, InvalidRequest, LocalLLMError, OutOfMemory, no_panics
from ..host.memory import ran_out_of_memory


@contextmanager
def typed(model_id: str) -> Iterator[None]:
    """Turns any error in the block into one of the project's errors.

    Raises:
        OutOfMemory: the device had no room.
        EngineFailed: the device itself failed, and will keep failing.
        InvalidRequest: beams sample from more than 2^24 tokens, the limit of `torch.multinomial`.
        GenerationFailed: any other error of the model. LocalLLMErrors pass unchanged.
    """
    try:
        with no_panics():
            yield
    except LocalLLMError:
        raise
    except Exception as error:
        if ran_out_of_memory(error):
            raise OutOfMemory(f"Not enough memory to generate with model '{model_id}'") from error
        if isinstance(error, torch.AcceleratorError):  # CUDA reports it once, and refuses everything afterwards
            raise EngineFailed(model_id) from error
        if "number of categories cannot exceed 2^24" in str(error):
            raise InvalidRequest(
                "'num_beams' times the vocabulary is more than the 2^24 tokens that torch can sample from", "num_beams"
            ) from error
        raise GenerationFailed(f"Model '{model_id}' failed to generate ({type(error).__name__})") from error
