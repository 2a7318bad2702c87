"""Turns logits into tokens, each row by its own parameters and its own random numbers.

The rules are transformers' own logits processors, which `generate` itself builds for each request; here they apply to
the rows of a batch, and tokens are sampled as `generate` does. Engine's thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import LocalLLMError
from ..modeling.steps import are_numbers, no_numbers, no_token
from .constraints import Constrained
from .failures import typed

_AHEAD = 64  # tokens for which a sampler has room before they are sampled


class SeededDraws(TorchFunctionMode):
    """While entered, this thread's `torch.multinomial` uses a generator of its own, seeded with `seed`.

    Torch's global generator and a seeded `torch.Generator` of the same device give the same stream, so the text is that
    of `torch.manual_seed(seed)` before `model.generate`, for sampling, beam sampling and several returned sequences
    alike. Torch keeps such modes per thread, so other threads neither change this stream nor see it.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        self._generator = torch.Generator(device=device)
        self._generator.manual_seed(seed)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Passes every call on; calls of `torch.multinomial` get the generator."""
        arguments = dict(kwargs or {})
        if func is torch.multinomial:
            arguments["generator"] = self._generator
        return func(*args, **arguments)


class Sampler:
    """Samples one sequence's tokens: by its request's processors, and a generator of its own if it has a seed."""

    def __init__(
        self, prompt: torch.Tensor, maximum: int, processors: LogitsProcessorList, do_sample: bool, seed: int | None
    ) -> None:
        """`prompt` are its token ids, (1, tokens), on the model's device; there may be `maximum` tokens in all."""
        self._processors = _quick(processors)
        self._do_sample = do_sample
        self._generator: torch.Generator | None = None
        if seed is not None:
            self._generator = torch.Generator(device=prompt.device)
            self._generator.manual_seed(seed)
        self.constrained = next((each for each in processors if isinstance(each, Constrained)), None)
        self.plain = not do_sample and not len(processors)
        self._count, self._maximum = prompt.shape[1], maximum
        self._ids = prompt

    def sample(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples the next token, (1,), from logits (1, vocabulary), float32, as `GenerationMixin._sample`.

        Also returns whether a token could be sampled, (1,).
        """
        scores: torch.Tensor = self._processors(self._ids[:, : self._count], logits)
        if not self._do_sample:
            token = scores.argmax(-1)
        elif self._generator is not None:
            # Where no token is left, a NaN would end CUDA for the whole process.
            probabilities = scores.softmax(-1).nan_to_num_(1.0)
            token = torch.multinomial(probabilities, num_samples=1, generator=self._generator)[:, 0]
        else:
            token = _sample(scores.softmax(-1))
        if self._count < self._maximum:
            if self._count == self._ids.shape[1]:
                more = self._ids.new_empty((1, min(_AHEAD + self._count // 2, self._maximum - self._count)))
                self._ids = torch.cat((self._ids, more), dim=1)
            self._ids[:, self._count] = token
            self._count += 1
        if self.constrained is not None:
            self.constrained.take(token.tolist())
        return token, are_numbers(scores)

    @property
    def complete(self) -> bool:
        """Whether the constrained text is complete, so that nothing may follow."""
        return self.constrained is not None and all(self.constrained.complete)

    @property
    def settled(self) -> bool:
        """Whether the next token can be sampled: a form may still be computing which tokens it allows."""
        return self.constrained is None or self.constrained.settled

    def close(self) -> None:
        """Ends the constraint's form."""
        if self.constrained is not None:
            self.constrained.close()


def _sample(probabilities: torch.Tensor) -> torch.Tensor:
    """Samples a token, (1,), by its probability, of (1, vocabulary), which need not add up to 1.

    On a CPU `torch.multinomial` makes a random number for each token of the vocabulary, which takes as long as a layer
    of a small model. One number is enough where the samples need not equal those after `torch.manual_seed`.
    """
    sums = probabilities[0].cumsum(-1, dtype=torch.float64)
    place = sums[-1:] * torch.rand(1, dtype=torch.float64, device=sums.device)
    # The first sum that is greater: a token of probability 0 never has the first greater sum.
    return torch.searchsorted(sums, place, right=True).clamp_(max=int(probabilities.shape[1]) - 1)


class _UntilLength(LogitsProcessor):  # type: ignore[misc]
    """`MinLengthLogitsProcessor` and `MinNewTokensLengthLogitsProcessor`, without a comparison with each token's id."""

    def __init__(self, length: int, ends: torch.Tensor) -> None:
        self._length = length
        self._ends = ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` (1, tokens), `scores` (1, vocabulary)."""
        if input_ids.shape[1] >= self._length:
            return scores
        known = self._ends[self._ends < scores.shape[1]]  # a config may name a token that the model does not have
        return scores.index_fill(1, known, -torch.inf)


class _TopPOfFew(LogitsProcessor):  # type: ignore[misc]
    """`TopPLogitsWarper` after a `TopKLogitsWarper`: sorts the few remaining tokens instead of the vocabulary."""

    def __init__(self, warper: TopPLogitsWarper) -> None:
        self._warper = warper

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` (1, vocabulary), most of them minus infinity."""
        few = (scores[0] > -torch.inf).nonzero()[:, 0]
        kept = self._warper(input_ids, scores[:, few])
        return torch.full_like(scores, self._warper.filter_value).index_copy_(1, few, kept)


def _quick(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The same processors, with faster equivalents for the slowest."""
    quick = LogitsProcessorList()
    for processor in processors:
        kind = type(processor)
        if kind is TopPLogitsWarper and quick and type(quick[-1]) is TopKLogitsWarper:
            processor = _TopPOfFew(processor)
        elif kind is MinLengthLogitsProcessor:
            processor = _UntilLength(processor.min_length, processor.eos_token_id)
        elif kind is MinNewTokensLengthLogitsProcessor:
            least = processor.prompt_length_to_skip + processor.min_new_tokens
            processor = _UntilLength(least, processor.eos_token_id)
        quick.append(processor)
    return quick


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The first token with the highest logit of each row, or that of a NaN.

    On a CPU by numpy, on this thread alone: it is faster, and torch would wait for its other threads, which compete for
    the cores, with OpenVINO's for instance.
    """
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def sample(logits: torch.Tensor, samplers: Sequence[Sampler], model_id: str) -> list[int | LocalLLMError]:
    """A token for each row of `logits`, (rows, vocabulary), float32; an error for a row whose logits are not numbers or
    forbid every token."""
    if not samplers:
        return []
    with torch.inference_mode():
        tokens = _likeliest(logits)
        # The highest of each row, or a NaN if there is one.
        numbers = are_numbers(logits.gather(1, tokens[:, None]))
        chosen = torch.ones_like(numbers)
        failed: dict[int, LocalLLMError] = {}
        for index, (good, sampler) in enumerate(zip(numbers.tolist(), samplers, strict=True)):
            if not good:
                failed[index] = no_numbers(model_id)
            elif not sampler.plain:
                here = slice(index, index + 1)
                try:
                    with typed(model_id):
                        tokens[here], chosen[here] = sampler.sample(logits[here])
                except LocalLLMError as error:
                    failed[index] = error
        failed |= {index: no_token() for index, some in enumerate(chosen.tolist()) if not some}
        return [failed.get(index, token) for index, token in enumerate(tokens.tolist())]


class Repeated(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's `presence_penalty` and `frequency_penalty`: lower the logits of generated tokens, not of the prompt's.

    The first is subtracted once, the second for each occurrence. Source: "Frequency and presence penalties", OpenAI API
    reference.
    """

    def __init__(self, prompt_tokens: int, presence: float, frequency: float, window: int | None = None) -> None:
        """`window` is how many of the last tokens count; None for all."""
        self._prompt_tokens = prompt_tokens
        self._window = window
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` (rows, tokens) with the prompt, `scores` (rows, vocabulary)."""
        first = self._prompt_tokens
        if self._window is not None:
            first = max(first, input_ids.shape[1] - self._window)
        made = input_ids[:, first:]
        counts = torch.zeros_like(scores).scatter_add_(1, made, torch.ones_like(made, dtype=scores.dtype))
        return scores - self._presence * (counts > 0) - self._frequency * counts


class RepeatedLately(LogitsProcessor):  # type: ignore[misc]
    """transformers' `repetition_penalty` over the last tokens only, as llama.cpp's `repeat_last_n`."""

    def __init__(self, penalty: float, window: int) -> None:
        self._penalize = RepetitionPenaltyLogitsProcessor(penalty)
        self._window = window

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` (rows, tokens) with the prompt, `scores` (rows, vocabulary)."""
        penalized: torch.Tensor = self._penalize(input_ids[:, -self._window :], scores)
        return penalized


class Biased(LogitsProcessor):  # type: ignore[misc]
    """`logit_bias`: is added to the logits of the named tokens."""

    def __init__(self, bias: Mapping[int, float], device: torch.device) -> None:
        self._tokens = torch.tensor(list(bias), dtype=torch.long, device=device)
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """`scores` (rows, vocabulary)."""
        return scores.index_add(1, self._tokens, self._values.to(scores.dtype).expand(scores.shape[0], -1))
