"""What an error of torch or of a model means to a caller, said once for all that computes.

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
    """Turn whatever is raised within into one of the project's errors.

    Raises:
        OutOfMemory: the device had no room for it. EngineFailed: the device itself failed, and does so from now on.
        InvalidRequest: beams draw among more tokens than `torch.multinomial` can, 2^24.
        GenerationFailed: anything else that the model raised. LocalLLMErrors pass as they are.
    """
    try:
        with no_panics():
            yield
    except LocalLLMError:
        raise
    except Exception as error:
        if ran_out_of_memory(error):
            raise OutOfMemory(f"Not enough memory to generate with model '{model_id}'") from error
        if isinstance(error, torch.AcceleratorError):  # CUDA says so once, and refuses everything afterwards
            raise EngineFailed(model_id) from error
        if "number of categories cannot exceed 2^24" in str(error):
            raise InvalidRequest(
                "'num_beams' times the vocabulary is more than the 2^24 tokens that torch can draw among", "num_beams"
            ) from error
        raise GenerationFailed(f"Model '{model_id}' failed to generate ({type(error).__name__})") from error
