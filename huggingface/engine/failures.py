"""Turns errors of torch or of a model into the project's errors, for all code that computes.

Called on the engine's thread. Must not know requests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

import torch

from ..errors import EngineFailed, GenerationFailed, InvalidRequest, LocalLLMError, OutOfMemory, explained
from ..host.memory import ran_out_of_memory


def typed(model_id: str) -> AbstractContextManager[None]:
    """Turns any error in the block into one of the project's errors.

    Raises:
        OutOfMemory: the device had no room.
        EngineFailed: the device itself failed, and will keep failing.
        InvalidRequest: beams sample from more than 2^24 tokens, the limit of `torch.multinomial`.
        GenerationFailed: any other error of the model. LocalLLMErrors pass unchanged.
    """
    return explained(partial(_failure, model_id))


def _failure(model_id: str, error: Exception) -> LocalLLMError:
    if ran_out_of_memory(error):
        return OutOfMemory(f"Not enough memory to generate with model '{model_id}'")
    if isinstance(error, torch.AcceleratorError):  # CUDA reports it once, and refuses everything afterwards
        return EngineFailed(model_id)
    if "number of categories cannot exceed 2^24" in str(error):
        return InvalidRequest(
            "'num_beams' times the vocabulary is more than the 2^24 tokens that torch can sample from", "num_beams"
        )
    return GenerationFailed(f"Model '{model_id}' failed to generate ({type(error).__name__})")
