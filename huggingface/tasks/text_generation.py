"""`text-generation`, split where transformers' pipeline calls the model, so that the batch takes many prompts at once.

Owns the parts before and after; the caller supplies what generates the tokens. Any thread may use it: it has a
tokenizer of its own, which one thread at a time uses. Must not know the engine or HTTP.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any

from ..errors import LocalLLMError, explained
from . import inputs as shapes
from .generation import check_sequences, generation_arguments
from .json_values import json_value

_STOPS_KEPT = 16  # sets of stop strings that are kept: finding the tokens of one takes a large part of a second


def checked(inputs: Any, parameters: Mapping[str, Any], model: Any, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """Checks inputs and parameters for the pipeline; `parameters` are those of `TASK_PARAMETERS`, validated.

    Raises:
        InvalidRequest: this model cannot honour them.
    """
    parameters = generation_arguments(parameters, model)
    inputs = shapes.prompts_or_chats(inputs)
    if shapes.is_chat(inputs):
        if getattr(tokenizer, "chat_template", None) is None:
            raise shapes.refuse("inputs", "is a chat, but the model has no chat template; give it a text")
        for field in ("prefix", "add_special_tokens"):
            if field in parameters:
                raise shapes.refuse(field, "cannot be used with a chat, which the model's template lays out")
    elif "continue_final_message" in parameters:
        raise shapes.refuse("continue_final_message", "can be used with a chat only")
    if parameters.get("clean_up_tokenization_spaces") and _is_byte_pair(tokenizer):
        raise shapes.refuse("clean_up_tokenization_spaces", "must be false: this model's texts have no such spaces")
    check_sequences(parameters, model, do_sample=True, num_beams=1)
    # Only under this name does the pipeline pass the tokenizer on, which stop strings need.
    if "stop_strings" in parameters:
        parameters["stop_sequence"] = parameters.pop("stop_strings")
    elif "stop_sequence" not in parameters and model.generation_config.stop_strings is not None:
        parameters["stop_sequence"] = model.generation_config.stop_strings
    if "max_length" in parameters:
        # Without `truncation`, a length would cut the prompt silently.
        parameters.setdefault("truncation", False)
    return inputs, parameters


def _is_byte_pair(tokenizer: Any) -> bool:
    """Whether transformers 5 never cleans up the tokenizer's spaces."""
    kept = not getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return kept and backend is not None and type(backend.model).__name__ == "BPE"


class TextGenerations:
    """The calls of `text-generation` on one model."""

    def __init__(
        self, model: Any, tokenizer: Any, explain: Callable[[Mapping[str, Any], Exception], LocalLLMError]
    ) -> None:
        """`model` is a decoder; neither it nor `tokenizer` is changed. `explain` turns an error of transformers into
        the error for the caller who set the parameters."""
        self._model = model
        self._shared_tokenizer = tokenizer
        self._explain = explain
        self._lock = threading.Lock()
        self._opened: Any = None
        self._criterion = lru_cache(_STOPS_KEPT)(self._make_criterion)

    def begin(self, inputs: Any, parameters: Mapping[str, Any]) -> TextGenerationCall:
        """Creates a call; nothing is computed for it yet.

        Raises:
            InvalidRequest: this model cannot honour it.
        """
        with self.explained(parameters), self._lock:
            pipeline = self._pipeline
            inputs, keywords = checked(inputs, parameters, self._model, pipeline.tokenizer)
            before, during, after = pipeline._sanitize_parameters(**keywords)
            during = {**pipeline._forward_params, **during}
            # `generate` would search the whole vocabulary for them, for each prompt again.
            stops = during.pop("stop_strings", None)
            during |= {"stop_strings": None} if during.pop("tokenizer", None) is not None else {}
            stopped = None if stops is None else self._criterion(tuple(stops))
        steps = ({**pipeline._preprocess_params, **before}, during, {**pipeline._postprocess_params, **after})
        return TextGenerationCall(self, inputs, parameters, steps, stopped)

    def prepared(self, item: Any, before: Mapping[str, Any], during: Mapping[str, Any], generate: Any) -> Any:
        """The pipeline's state of a prompt after it called the model, with `generate` in place of the model's loop."""
        pipeline = self._opened
        with self._lock:
            tokens = pipeline.preprocess(item, **before)
        return pipeline.forward(tokens, custom_generate=generate, **during)

    def answered(self, outputs: Any, after: Mapping[str, Any]) -> Any:
        """The pipeline's answer to a prompt, as JSON values."""
        with self._lock:
            return json_value(self._opened.postprocess(outputs, **after))

    def explained(self, parameters: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Turns any error in the block into one of the project's."""
        return explained(partial(self._explain, parameters))

    @property
    def _pipeline(self) -> Any:
        if self._opened is None:
            from .pipelines import open_pipeline

            self._opened = open_pipeline("text-generation", self._model, copy.deepcopy(self._shared_tokenizer))
        return self._opened

    def _make_criterion(self, stops: tuple[str, ...]) -> Callable[[Sequence[int]], bool]:
        """A function that says whether a text's newest token completes one of `stops`, as `generate` does."""
        import torch
        from transformers import StopStringCriteria

        # On a thread that ends: OpenMP keeps a team of threads for every thread that has computed so much.
        with ThreadPoolExecutor(1, thread_name_prefix="stops") as thread:
            criterion = thread.submit(StopStringCriteria, self._opened.tokenizer, list(stops)).result()
        maximum = criterion.maximum_token_len
        return lambda tokens: bool(criterion(torch.tensor([tokens[-maximum:]]), None))


class TextGenerationCall:
    """One call: `count` prompts, each of which is started, generated by the caller, and finished."""

    def __init__(
        self,
        texts: TextGenerations,
        inputs: Any,
        parameters: Mapping[str, Any],
        steps: tuple[dict[str, Any], dict[str, Any], dict[str, Any]],
        stopped: Callable[[Sequence[int]], bool] | None,
    ) -> None:
        """`steps` are the arguments of the pipeline's three steps. `stopped` says whether a text ends with these
        tokens; None if only the model's own end tokens end it."""
        self._texts, self._parameters = texts, parameters
        self._before, self._during, self._after = steps
        self.stopped = stopped
        self._single, self._items = _items(inputs)
        self.count = len(self._items)
        self._outputs: dict[int, Any] = {}
        self._answers: dict[int, Any] = {}

    def start(self, index: int, custom_generate: Callable[..., Any]) -> None:
        """Reads a prompt, and calls the model's `generate` with `custom_generate` in place of its loop.

        `custom_generate` gets the loop's arguments and returns the prompt's tokens, (rows, tokens).

        Raises:
            InvalidRequest: the model cannot honour the prompt or a parameter.
            GenerationFailed, OutOfMemory: the model failed.
        """
        with self._texts.explained(self._parameters):
            self._outputs[index] = self._texts.prepared(self._items[index], self._before, self._during, custom_generate)

    def finish(self, index: int, tokens: Sequence[int]) -> None:
        """Takes the tokens of a started prompt: its own and the new ones.

        Raises: as `start`.
        """
        import torch

        outputs = self._outputs.pop(index)
        outputs["generated_sequence"] = torch.tensor([[tokens]])
        with self._texts.explained(self._parameters):
            self._answers[index] = self._texts.answered(outputs, self._after)

    def result(self) -> Any:
        """The call's result, nested as the pipeline's own, once all prompts are finished."""
        answers = [self._answers[index] for index in range(self.count)]
        return answers[0] if self._single else answers


def _items(inputs: Any) -> tuple[bool, list[Any]]:
    """Whether checked inputs are a single one, and each of them as the pipeline's `preprocess` takes it."""
    from transformers.utils.chat_template_utils import Chat

    if isinstance(inputs, str):
        return True, [inputs]
    if isinstance(inputs[0], dict):
        return True, [Chat(inputs)]
    return False, [Chat(item) if isinstance(item, list) else item for item in inputs]
