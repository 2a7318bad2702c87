"""The tensors of generation: a request becomes token ids, `model.generate` continues them, and ids become text.

Runs on the engine's thread only. It changes neither the model nor its tokenizer, so that whoever else uses the same
weights sees them as they were loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..errors import Cancelled, GenerationFailed, InvalidRequest, LocalLLMError, OutOfMemory
from ..records import Chunk, FinishReason, GenerationRequest, Usage
from .sampling import SeededDraws

# Parameters that mean nothing without sampling; `generate` warns of them and ignores them.
_SAMPLING_ONLY = frozenset(
    {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
)


class _GivenUp(StoppingCriteria):  # type: ignore[misc]
    """Ends the work as soon as the caller has given up: by raising, because a beam search goes on past a stop."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if self._cancelled():
            raise Cancelled
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _refuse(field: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid value for field '{field}': {reason}", field)


class TransformersRunner:
    """Generates with a transformers model's own `generate`, one request at a time."""

    def __init__(
        self,
        model_id: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        contexts: tuple[int | None, int | None],
        arguments: Callable[[Mapping[str, Any]], dict[str, Any]],
    ) -> None:
        """`contexts` are how many tokens the model can read, and have in what it writes (in a decoder-only model that
        begins with the prompt); None for no limit.

        `arguments` turns parameters into arguments of `generate`, and refuses those that the model cannot honour.
        """
        self._model_id = model_id
        self._model = model
        self._tokenizer = tokenizer
        self._reads_answer = not model.config.is_encoder_decoder
        self._context, self._answer_context = contexts
        self._prepare = arguments

    def generate(
        self, request: GenerationRequest, emit: Callable[[Chunk], None], cancelled: Callable[[], bool]
    ) -> None:
        """Generate for `request`; `emit` gets one chunk for each returned sequence, the last one with the counts.

        Raises:
            InvalidRequest: the prompt or a parameter is one that this model cannot honour.
            Cancelled: `cancelled()` turned true meanwhile.
            OutOfMemory: the device had no room for it.
            GenerationFailed: the model raised.
        """
        try:
            self._generate(request, emit, cancelled)
        except LocalLLMError:
            raise
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"Not enough memory to generate with model '{self._model_id}'") from error
        except Exception as error:
            if "allocate memory" in str(error):  # what torch's CPU allocator says
                raise OutOfMemory(f"Not enough memory to generate with model '{self._model_id}'") from error
            raise GenerationFailed(f"Model '{self._model_id}' failed to generate ({type(error).__name__})") from error

    def _generate(
        self, request: GenerationRequest, emit: Callable[[Chunk], None], cancelled: Callable[[], bool]
    ) -> None:
        inputs = self.encode(request)
        prompt_tokens = inputs["input_ids"].shape[1] if inputs else 0
        parameters = self._fit(request.parameters, prompt_tokens)
        arguments = self._arguments(parameters)
        criteria = StoppingCriteriaList([_GivenUp(cancelled)])
        try:
            with torch.inference_mode(), self._draws(parameters):
                output = self._model.generate(**inputs, **arguments, stopping_criteria=criteria)
        except IndexError as error:
            if "out of range in self" not in str(error):  # a table of the model's has no such row
                raise
            raise _refuse("max_new_tokens", "asks for more tokens than the model has positions for") from error
        except ValueError as error:  # how `generate` refuses arguments that do not go together
            field = next((name for name in parameters if f"`{name}`" in str(error) or f"{name}=" in str(error)), None)
            where = f"value for field '{field}'" if field else "generation parameters"
            raise InvalidRequest(f"Invalid {where}: {error}", field) from error
        rows = [self._finish(self._new_tokens(row, prompt_tokens), parameters) for row in output.tolist()]
        usage = Usage(prompt_tokens, sum(count for _, _, count in rows))
        for index, (text, reason, _) in enumerate(rows[:-1]):
            emit(Chunk(text, index, reason))
        text, reason, _ = rows[-1]
        emit(Chunk(text, len(rows) - 1, reason, usage, parameters))

    def encode(self, request: GenerationRequest) -> dict[str, torch.Tensor]:
        """The request's `input_ids` and `attention_mask`, each (1, tokens), on the model's device; empty for no tokens.

        Raises:
            InvalidRequest: the prompt is empty or too long for the model, or its chat template refuses the messages.
        """
        if request.messages is not None:
            ids = self._encode_messages(request.messages)
        else:
            ids = self._tokenizer(request.prompt, return_attention_mask=False)["input_ids"]
        field = "prompt" if request.messages is None else "messages"
        if self._context is not None and len(ids) > self._context:
            reason = f"{len(ids)} tokens, but the context of model '{self._model_id}' holds {self._context}"
            raise _refuse(field, reason)
        if not ids:
            if self._model.generation_config.bos_token_id is None:
                raise InvalidRequest(
                    f"Invalid value for field '{field}': empty, and model '{self._model_id}' has no token to begin",
                    field,
                )
            return {}
        input_ids = torch.tensor([ids], device=self._model.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def _encode_messages(self, messages: Any) -> list[int]:
        """Token ids of a chat: by the model's template, or turns joined by the end-of-text token where it has none."""
        if self._tokenizer.chat_template is None:
            end = self._tokenizer.eos_token or self._tokenizer.sep_token or "\n"
            turns: list[str] = [message["content"] for message in messages]
            # An encoder-decoder's tokenizer ends the text itself.
            text = end.join(turns) + (end if self._reads_answer else "")
            ids: list[int] = self._tokenizer(text, return_attention_mask=False)["input_ids"]
            return ids
        # As transformers' TextGenerationPipeline: a chat that ends with the assistant's words is to be continued.
        continued = messages[-1]["role"] == "assistant"
        try:
            ids = self._tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=not continued,
                continue_final_message=continued,
                return_dict=False,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(
                f"Invalid value for field 'messages': the chat template of model '{self._model_id}' says: {error}",
                "messages",
            ) from error
        return ids

    def _fit(self, parameters: Mapping[str, Any], prompt_tokens: int) -> dict[str, Any]:
        """The parameters with the most tokens cut to what the context has room for behind the prompt.

        The last token made is never read back, so it needs no place in the context. In an encoder-decoder the decoder
        has a context of its own, which its start token shares.

        Raises:
            InvalidRequest: the least length asked for does not fit, or the prompt fills the greatest.
        """
        fitted = dict(parameters)
        before = prompt_tokens if self._reads_answer and prompt_tokens else 1
        if fitted.get("max_length", before + 1) <= before:
            raise _refuse("max_length", f"leaves no room for new tokens behind the {before} that are there")
        if self._answer_context is None:
            return fitted
        room = self._answer_context - before + 1
        for name, most in (("max_new_tokens", room), ("max_length", before + room)):
            if name in fitted:
                fitted[name] = min(fitted[name], most)
        for name, most in (("min_new_tokens", room), ("min_length", before + room)):
            if fitted.get(name, 0) > most:
                raise _refuse(
                    name, f"must be at most {most}, all that a context of {self._answer_context} tokens holds"
                )
        return fitted

    def _arguments(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `generate` that honour `parameters`."""
        foreign = "forced_bos_token_id" if self._reads_answer else "guidance_scale"
        if foreign in parameters:
            kind = "encoder-decoder" if self._reads_answer else "decoder-only"
            raise _refuse(foreign, f"is honoured by {kind} models only")
        arguments = self._prepare({name: value for name, value in parameters.items() if name != "seed"})
        if not arguments.get("do_sample"):
            arguments = {name: value for name, value in arguments.items() if name not in _SAMPLING_ONLY}
        if self._stops(parameters):
            arguments["tokenizer"] = self._tokenizer
        if self._model.generation_config.pad_token_id is None:
            pad = self._tokenizer.pad_token_id
            ends = self._ends(parameters)
            arguments["pad_token_id"] = pad if pad is not None else (min(ends) if ends else 0)
        return arguments

    def _draws(self, parameters: Mapping[str, Any]) -> AbstractContextManager[Any]:
        seed = parameters.get("seed")
        return nullcontext() if seed is None else SeededDraws(seed, self._model.device)

    def _ends(self, parameters: Mapping[str, Any]) -> frozenset[int]:
        """The token ids that end a text: the request's, else the model's."""
        ends = parameters.get("eos_token_id", self._model.generation_config.eos_token_id)
        if ends is None:
            return frozenset()
        return frozenset(ends) if isinstance(ends, list) else frozenset({ends})

    def _stops(self, parameters: Mapping[str, Any]) -> list[str]:
        """The strings that end a text: the request's, else the model's."""
        stops = parameters.get("stop_strings", self._model.generation_config.stop_strings)
        return [stops] if isinstance(stops, str) else list(stops or ())

    def _new_tokens(self, row: list[int], prompt_tokens: int) -> list[int]:
        """The ids of a returned row that were made, without the prompt or the one token that started it."""
        return row[prompt_tokens if self._reads_answer and prompt_tokens else 1 :]

    def _finish(self, ids: list[int], parameters: Mapping[str, Any]) -> tuple[str, FinishReason, int]:
        """Text, why it ended, and how many tokens were made (the end token included, padding after it not)."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        ends = self._ends(parameters)
        count = next((index + 1 for index, token in enumerate(ids) if token in ends), None)
        found = [text.index(stop) for stop in self._stops(parameters) if stop in text]
        if found:
            text = text[: min(found)]
        reason: FinishReason = "stop" if found or count is not None else "length"
        return text, reason, len(ids) if count is None else count
