"""Turns a request into token ids and resolved parameters: the state from which `generate` would start.

Called on the request's own thread, so that it refuses at once and other requests go on meanwhile. Changes neither the
model nor its tokenizer. Must not know the queue, the batch or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMode
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from ..cancellation import NEVER, Cancellation
from ..errors import ContextExceeded, InvalidRequest
from ..modeling.demand import Wanted, asked_of
from ..types import GenerationRequest
from .constraints import Constrained, Constraints
from .detokenizer import Begin
from .failures import typed
from .lengths import Asked, TextLengths, TooLong
from .sampling import Biased, Repeated, RepeatedLately

# Parameters without a meaning unless sampling is on; `generate` warns of them and ignores them.
_SAMPLING_ONLY = frozenset(
    {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
)

# Parameters that `generate` does not have; the server's own processors honour them.
_OURS = frozenset({"seed", "presence_penalty", "frequency_penalty", "logit_bias", "stop_token_ids", "ignore_eos"})
_OURS |= {"repeat_last_n"}

# Tokens where neither the request nor the model sets a limit.
_UNLIMITED = 4096

# How many of a prompt's last tokens a function for a constraint gets to see.
_END = 24

# Modes that a row of the batch can do; beams and others have the model to themselves.
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What `generate` itself makes of its arguments just before its loop: see `Preparer.resolve`."""

    input_ids: torch.Tensor
    processors: LogitsProcessorList
    config: GenerationConfig


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request in the model's terms.

    `inputs` and `arguments` are those of `generate`; `processors` are added to its own. `resolved` is for a row of the
    batch; None where the batch cannot do the request. `asked` says what `generate` does then. `end` is the text at the
    end of the prompt; `begin` says where the new text begins: see `detokenizer.TextStream`. The rest is the request's.
    """

    inputs: Mapping[str, torch.Tensor]
    prompt_tokens: int
    parameters: Mapping[str, Any]
    arguments: Mapping[str, Any]
    processors: LogitsProcessorList
    stops: tuple[str, ...]
    ends: frozenset[int]
    resolved: Resolved | None
    asked: Wanted
    end: str
    constrained: Constrained | None
    special_tokens: Sequence[str]
    logprobs: int | None
    prompt_logprobs: bool
    begin: Begin
    adapter: str | None = None


def fits_a_row(resolved: Resolved) -> bool:
    """Whether one plain row of the batch can do it."""
    config = resolved.config
    return not (
        config.get_generation_mode() not in _MODES
        or resolved.input_ids.shape[0] > 1
        or config.cache_implementation in ("quantized", "offloaded", "offloaded_static", "offloaded_hybrid")
        or config.use_cache is False
        or config.token_healing
        or any(isinstance(each, UnbatchedClassifierFreeGuidanceLogitsProcessor) for each in resolved.processors)
    )


def refuse(field: str, reason: str) -> InvalidRequest:
    """The error for a parameter that this model cannot honour."""
    return InvalidRequest(f"Invalid value for field '{field}': {reason}", field)


class Preparer:
    """Prepares requests for one model."""

    def __init__(
        self,
        model_id: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        contexts: tuple[int | None, int | None],
        room: int | None,
        constraints: Constraints,
        arguments: Callable[[Mapping[str, Any]], dict[str, Any]],
        lengths: TextLengths | None = None,
        check_adapter: Callable[[str | None], None] = lambda _: None,
        check_vocabulary: Callable[[int, str], None] = lambda *_: None,
    ) -> None:
        """Takes the parts of a model.

        Args:
            contexts: the most tokens that the model can read, and can have in what it writes (in a decoder-only model
                that includes the prompt); None for no limit.
            room: the most tokens of one sequence in the KV cache; None for no limit.
            arguments: turns parameters into arguments of `generate`, and refuses those that the model cannot honour.
            lengths: counts long texts for `tokenizer`.
            check_adapter: refuses the name of an adapter that the model does not have.
            check_vocabulary: refuses a field's highest token id if the model has no row for it.
        """
        self._model_id = model_id
        self._model = model
        self._tokenizer = tokenizer
        self._reads_answer = not model.config.is_encoder_decoder
        self._context, self._answer_context = contexts
        self._room = room
        self._lengths = TextLengths(tokenizer, self._context) if lengths is None else lengths
        self._constraints = constraints
        self._arguments_for = arguments
        self._check_adapter = check_adapter
        self.check_vocabulary = check_vocabulary

    def prepare(self, request: GenerationRequest, cancellation: Cancellation = NEVER) -> Prepared:
        """Prepares the tokens, parameters and processors of a request.

        Raises:
            InvalidRequest: the model cannot honour the prompt or a parameter.
            GenerationFailed: the model's tokenizer or settings are unusable.
            Cancelled: by `cancellation`.
        """
        with typed(self._model_id):
            return self._prepare(request, cancellation)

    def _prepare(self, request: GenerationRequest, cancellation: Cancellation) -> Prepared:
        self._check_adapter(request.adapter)
        inputs = self.encode(request, cancellation)
        prompt_tokens = inputs["input_ids"].shape[1] if inputs else 0
        end = str(self._tokenizer.decode(inputs["input_ids"][0, -_END:].tolist())) if inputs else ""
        parameters = self._fit(self._filled(request, prompt_tokens), prompt_tokens)
        arguments = self._arguments(parameters)
        processors = self._processors(parameters, prompt_tokens)
        constrained = self._constrained(request, parameters, prompt_tokens, end)
        if constrained is not None:
            processors.append(constrained)
        kept, told = request.logprobs is not None, request.prompt_logprobs
        asked = asked_of(self._model, arguments, prompt_tokens, parameters, kept=kept, told=told)
        batches = self._reads_answer and asked.rows == 1
        resolved = self.resolve(inputs, arguments, processors) if batches else None
        if resolved is None:
            self._check_alone(request, arguments)
        return Prepared(
            inputs=inputs,
            prompt_tokens=prompt_tokens,
            parameters=parameters,
            arguments=arguments,
            processors=processors,
            stops=tuple(self._stops(parameters)),
            ends=self._ends(parameters),
            resolved=resolved,
            asked=asked,
            end=end,
            constrained=constrained,
            special_tokens=request.special_tokens,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs,
            begin=self._begin(request, constrained),
            adapter=request.adapter,
        )

    def _begin(self, request: GenerationRequest, constrained: Constrained | None) -> Begin:
        """A form counts each character of its text; a continuation is decoded behind the prompt, an answer alone."""
        if constrained is not None:
            return "exact"
        continues = request.messages is None or _turn(request) == "continued"
        return "behind" if continues and self._reads_answer else "alone"

    def close(self) -> None:
        """Ends the processes that compile forms."""
        self._constraints.close()

    def _constrained(
        self, request: GenerationRequest, parameters: Mapping[str, Any], prompt_tokens: int, end: str
    ) -> Constrained | None:
        """The processor that leaves only the tokens that the request's constraint allows.

        Raises:
            InvalidRequest: the constraint cannot be compiled.
        """
        constraint = request.constraint
        if callable(constraint):
            try:
                constraint = constraint(end)
            except (ValueError, TypeError, RecursionError) as error:
                raise refuse("grammar", f"it cannot be compiled: {error}") from error
        if constraint is None:
            return None
        for name in ("min_new_tokens", "min_length"):
            if parameters.get(name):
                raise refuse(name, "cannot be used with a constraint, which decides when the text is complete")
        before = prompt_tokens if self._reads_answer and prompt_tokens else 1
        return Constrained(self._constraints.compile(constraint, self._ends(parameters)), before)

    def _check_alone(self, request: GenerationRequest, arguments: Mapping[str, Any]) -> None:
        """Refuses what a model's own `generate` cannot do.

        Raises:
            InvalidRequest: names the parameter.
        """
        own = self._model.generation_config
        beams = arguments.get("num_beams") or own.num_beams or 1
        for name, asked in (("logprobs", request.logprobs is not None), ("constraint", request.constraint is not None)):
            if asked and beams > 1:
                raise refuse("num_beams", f"cannot be used with {name}")
        if request.prompt_logprobs and not self._reads_answer:
            raise InvalidRequest("An encoder-decoder model gives no log-probabilities of its prompt", "echo")

    def resolve(
        self, inputs: Mapping[str, torch.Tensor], arguments: Mapping[str, Any], processors: LogitsProcessorList
    ) -> Resolved | None:
        """What `generate` makes of these arguments; None if that is more than one plain row.

        `generate` calls `custom_generate` in place of its loop, with all arguments checked and merged with the model's
        own settings, and with the processors. The text's side handles stop strings.
        """

        def take(
            model: Any,  # noqa: ARG001 - the signature that `generate` calls
            input_ids: torch.Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: Any,  # noqa: ARG001
            generation_config: GenerationConfig,
            **_: Any,
        ) -> Resolved:
            return Resolved(input_ids, logits_processor, generation_config)

        plain = {name: value for name, value in arguments.items() if name != "tokenizer"} | {"stop_strings": None}
        with blaming(arguments), torch.inference_mode():
            resolved: Resolved = self._model.generate(
                **inputs, **plain, logits_processor=processors, custom_generate=take
            )
        return resolved if fits_a_row(resolved) else None

    def encode(self, request: GenerationRequest, cancellation: Cancellation = NEVER) -> dict[str, torch.Tensor]:
        """The request's `input_ids` and `attention_mask`, each (1, tokens), on the model's device; empty for no tokens.

        Raises:
            InvalidRequest: the prompt is empty or too long for the model, or its chat template refuses the messages.
        """
        ids = self._ids(request, self._lengths.of_prompt, cancellation)
        field = "prompt" if request.messages is None else "messages"
        if self._context is not None and len(ids) > self._context:
            raise self._too_long(field, len(ids))
        if not ids:
            if self._model.generation_config.bos_token_id is None:
                raise InvalidRequest(
                    f"Invalid value for field '{field}': empty, and model '{self._model_id}' has no token to begin",
                    field,
                )
            return {}
        self.check_vocabulary(max(ids), field)
        input_ids = torch.tensor([ids], device=self._model.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def count(self, request: GenerationRequest, cancellation: Cancellation = NEVER) -> int:
        """Counts the prompt's tokens, whether or not the model has room for them.

        Raises:
            InvalidRequest: the chat template refuses the messages, or they are far longer than the context.
            GenerationFailed: the tokenizer is unusable.
            Cancelled: by `cancellation`.
        """
        with typed(self._model_id):
            return len(self._ids(request, self._lengths.of_text, cancellation))

    def _too_long(self, field: str, tokens: int, more: str = "") -> ContextExceeded:
        room = self._context or self._lengths.of_prompt
        reason = f"{more}{tokens} tokens, but the context of model '{self._model_id}' holds {room}"
        return ContextExceeded(f"Invalid value for field '{field}': {reason}", field, tokens, room)

    @contextmanager
    def _reading(self, text: str, field: str, maximum: int, cancellation: Cancellation) -> Iterator[None]:
        """Refuses a text of more than `maximum` tokens before the block tokenizes it whole."""
        try:
            with self._lengths.reading(text, maximum, cancellation):
                yield
        except TooLong as error:
            raise self._too_long(field, error.tokens, "more than ") from None

    def _read(self, text: str, field: str, maximum: int, cancellation: Cancellation) -> list[int]:
        """Token ids of a text."""
        with self._reading(text, field, maximum, cancellation):
            ids: list[int] = self._tokenizer(text, return_attention_mask=False)["input_ids"]
        return ids

    def _ids(self, request: GenerationRequest, maximum: int, cancellation: Cancellation) -> list[int]:
        """Token ids of the request's prompt; refuses more than `maximum`."""
        if request.messages is not None:
            return self._encode_messages(request, maximum, cancellation)
        if request.tokens is not None:
            size = self._model.config.get_text_config().vocab_size
            if not all(0 <= token < size for token in request.tokens):
                raise refuse("prompt", f"holds a token that is not in the model's vocabulary of {size}")
            return list(request.tokens)
        return self._read(str(request.prompt), "prompt", maximum, cancellation)

    def _encode_messages(self, request: GenerationRequest, maximum: int, cancellation: Cancellation) -> list[int]:
        """Token ids of a chat: by the model's template, or turns joined by the end-of-text token where it has none."""
        assert request.messages is not None  # noqa: S101 - it is a chat
        if self._tokenizer.chat_template is None:
            end = self._tokenizer.eos_token or self._tokenizer.sep_token or "\n"
            turns: list[str] = [message["content"] or "" for message in request.messages]
            # An encoder-decoder's tokenizer adds the end itself.
            text = end.join(turns) + (end if self._reads_answer else "")
            return self._read(text, "messages", maximum, cancellation)
        turn = _turn(request)
        how = {"add_generation_prompt": turn == "new", "continue_final_message": turn == "continued"}
        return self._laid_out(request, {**how, **request.template}, maximum, cancellation)

    def _laid_out(
        self, request: GenerationRequest, how: Mapping[str, Any], maximum: int, cancellation: Cancellation
    ) -> list[int]:
        """Token ids of the first layout that the model's template shows completely, else of the first that it accepts.

        Raises:
            InvalidRequest: the template accepts none, or the layout has more than `maximum` tokens.
        """
        taken: list[int] | None = None
        refusal: Exception | None = None
        for each in (request.messages, *request.fallbacks):
            messages = Asked(each or (), cancellation)
            try:
                shown = messages.long or bool(request.told)
                text = self._tokenizer.apply_chat_template(messages, tokenize=False, **how) if shown else ""
                with self._reading(text, "messages", maximum, cancellation):
                    ids: list[int] = self._tokenizer.apply_chat_template(messages, return_dict=False, **how)
                if not request.told or request.told in text:
                    return ids
            except (TemplateError, ValueError, TypeError, RecursionError) as error:
                refusal = error
            else:
                taken = taken or ids
        if taken is None:
            raise InvalidRequest(
                f"Invalid value for field 'messages': the chat template of model '{self._model_id}' says: {refusal}",
                "messages",
            ) from refusal
        return taken

    def _filled(self, request: GenerationRequest, prompt_tokens: int) -> dict[str, Any]:
        """The parameters, with a limit of tokens where the request wants as many as there is room for."""
        parameters = dict(request.parameters)
        if not request.fills or "max_new_tokens" in parameters or "max_length" in parameters:
            return parameters
        own, before = self._model.generation_config, prompt_tokens if self._reads_answer and prompt_tokens else 1
        rooms = [room - before + 1 for room in (self._answer_context, self._room) if room is not None]
        if own.max_new_tokens is not None:
            rooms.append(own.max_new_tokens)
        elif own.max_length not in (None, 20):  # transformers' own default says nothing of the model
            rooms.append(own.max_length - before)
        return {"max_new_tokens": max(1, min(rooms, default=_UNLIMITED)), **parameters}

    def _fit(self, parameters: Mapping[str, Any], prompt_tokens: int) -> dict[str, Any]:
        """The parameters, with the limit of tokens cut to the room that the context has behind the prompt.

        The last generated token is never read back, so it needs no place in the context. An encoder-decoder's decoder
        has a context of its own, which includes its start token.

        Raises:
            InvalidRequest: the requested minimum does not fit, or the prompt fills the maximum.
        """
        fitted = dict(parameters)
        before = prompt_tokens if self._reads_answer and prompt_tokens else 1
        if fitted.get("max_length", before + 1) <= before:
            raise refuse("max_length", f"leaves no room for new tokens after the {before} already there")
        if self._answer_context is None:
            return fitted
        room = self._answer_context - before + 1
        for name, maximum in (("max_new_tokens", room), ("max_length", before + room)):
            if name in fitted:
                fitted[name] = min(fitted[name], maximum)
        for name, maximum in (("min_new_tokens", room), ("min_length", before + room)):
            if fitted.get(name, 0) > maximum:
                raise refuse(name, f"must be at most {maximum}, the room in a context of {self._answer_context} tokens")
        return fitted

    def _arguments(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `generate` that honour `parameters`."""
        foreign = "forced_bos_token_id" if self._reads_answer else "guidance_scale"
        if foreign in parameters:
            kind = "encoder-decoder" if self._reads_answer else "decoder-only"
            raise refuse(foreign, f"is honoured by {kind} models only")
        arguments = self._arguments_for({name: value for name, value in parameters.items() if name not in _OURS})
        if not arguments.get("do_sample"):
            arguments = {name: value for name, value in arguments.items() if name not in _SAMPLING_ONLY}
        if _window(parameters) is not None:
            arguments["repetition_penalty"] = 1.0  # the server's own processor applies it to the window
        if self._stops(parameters):
            arguments["tokenizer"] = self._tokenizer
        if parameters.get("ignore_eos") or "stop_token_ids" in parameters:
            arguments["eos_token_id"] = self._own_ends(parameters)
        if self._model.generation_config.pad_token_id is None:
            pad = self._tokenizer.pad_token_id
            ends = self._ends(parameters)
            arguments["pad_token_id"] = pad if pad is not None else (min(ends) if ends else 0)
        return arguments

    def _processors(self, parameters: Mapping[str, Any], prompt_tokens: int) -> LogitsProcessorList:
        """The server's own processors that the parameters need."""
        processors = LogitsProcessorList()
        presence, frequency = parameters.get("presence_penalty", 0.0), parameters.get("frequency_penalty", 0.0)
        window = _window(parameters)
        repetition = parameters.get("repetition_penalty", self._model.generation_config.repetition_penalty) or 1.0
        if window and repetition != 1.0:
            processors.append(RepeatedLately(repetition, window))
        if (presence or frequency) and window != 0:
            before = prompt_tokens if self._reads_answer and prompt_tokens else 1
            processors.append(Repeated(before, presence, frequency, window))
        if bias := parameters.get("logit_bias"):
            size = self._model.config.get_text_config().vocab_size
            tokens = {int(token): float(value) for token, value in bias.items()}
            for token in tokens:
                if token >= size:
                    raise refuse("logit_bias", f"token {token} is not in the model's vocabulary of {size}")
            processors.append(Biased(tokens, self._model.device))
        return processors

    def _ends(self, parameters: Mapping[str, Any]) -> frozenset[int]:
        """The token ids that end a text: the request's, else the model's, and those that the request adds."""
        further = frozenset(parameters.get("stop_token_ids", ()))
        ends = parameters.get("eos_token_id", self._model.generation_config.eos_token_id)
        if ends is None or parameters.get("ignore_eos"):
            return further
        return further | (frozenset(ends) if isinstance(ends, list) else {ends})

    def _own_ends(self, parameters: Mapping[str, Any]) -> list[int]:
        """The end tokens as `generate` takes them, where they are not the model's own.

        Raises:
            InvalidRequest: the model has no such token, or a parameter needs an end token and there is none.
        """
        vocabulary = self._model.config.get_text_config().vocab_size
        for token in parameters.get("stop_token_ids", ()):
            if token >= vocabulary:
                raise refuse("stop_token_ids", f"token {token} is not in the model's vocabulary of {vocabulary}")
        if ends := self._ends(parameters):
            return sorted(ends)
        if "exponential_decay_length_penalty" in parameters:
            raise refuse("ignore_eos", "cannot be used with exponential_decay_length_penalty, which favours the end")
        return [vocabulary]  # for an empty list `generate` would use the model's own; no token has this id

    def _stops(self, parameters: Mapping[str, Any]) -> list[str]:
        """The strings that end a text: the request's, else the model's."""
        stops = parameters.get("stop_strings", self._model.generation_config.stop_strings)
        return [stops] if isinstance(stops, str) else list(stops or ())


def _turn(request: GenerationRequest) -> str:
    """What follows the last message."""
    if request.turn is not None or not request.messages:
        return request.turn or "new"
    # As transformers' TextGenerationPipeline: a chat that ends with the assistant's words is continued.
    return "continued" if request.messages[-1]["role"] == "assistant" else "new"


def _window(parameters: Mapping[str, Any]) -> int | None:
    """How many of the last tokens penalties apply to; None for all of them."""
    window = parameters.get("repeat_last_n", -1)
    return None if window < 0 else int(window)


@contextmanager
def blaming(parameters: Iterable[str]) -> Iterator[None]:
    """Turns `generate`'s refusal of its arguments into one that names the parameter at fault.

    Raises:
        InvalidRequest: the arguments do not go together, or ask for more tokens than there are positions.
    """
    try:
        yield
    except IndexError as error:
        if "out of range in self" not in str(error):  # one of the model's tables has no such row
            raise
        raise refuse("max_new_tokens", "asks for more tokens than the model has positions for") from error
    except ValueError as error:  # how `generate` refuses arguments that do not go together
        field = next((name for name in parameters if f"`{name}`" in str(error) or f"{name}=" in str(error)), None)
        where = f"value for field '{field}'" if field else "generation parameters"
        raise InvalidRequest(f"Invalid {where}: {error}", field) from error
