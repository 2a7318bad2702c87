"""Tests at load whether a model may be served in a batch, against the model's own `generate`.

The same tokens go through `generate` alone and through the batch runner, in chunks, beside rows of other lengths and in
several banks; the logits must agree at every step. Logits rather than tokens, because which of two equal logits wins is
chance. Called on the thread that prepares a model. Must not know requests.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel

from ...cancellation import NEVER, Cancellation
from ...errors import Cancelled, OutOfMemory
from ..borders import beyond, nearest, small
from ..layers import NotBatchable
from ..slots import SMALLEST, SlotTable, Store
from .lora import Adapters
from .runner import BatchRunner, Piece

logger = logging.getLogger(__name__)

# Tokens. The chunks of the first and the third prompt, and the steps, include each size for which `matmul` may have
# found another routine.
_PROMPTS = (80, 5, 22)
_SHORTEST = 21  # tokens of the first prompt if the model's context holds no more
_NEW = 3
_LESS = 6  # tokens that one of two long prompts lacks
_PRODUCTS = 4e10  # the most products for a longer prompt that goes past the nearest length at which the model changes
# The largest difference of logits, as a share of their spread: rounding is far below it, a wrong mask far above.
_CLOSE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class Expected:
    """What `generate` makes of a prompt, as one of the model's adapters or as the model itself.

    `logits` are those before each of the new `tokens`, (new tokens, vocabulary).
    """

    prompt: list[int]
    adapter: str | None
    tokens: list[int]
    logits: torch.Tensor


def as_tensors(expected: Sequence[Expected]) -> dict[str, torch.Tensor]:
    """What is expected, to be stored."""
    tensors = {}
    for number, row in enumerate(expected):
        tensors[f"{number}.prompt"] = torch.tensor(row.prompt)
        tensors[f"{number}.tokens"] = torch.tensor(row.tokens)
        tensors[f"{number}.logits"] = row.logits.contiguous()
    return tensors


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[Expected, ...]:
    """What was stored by `as_tensors`."""
    return tuple(
        Expected(
            tensors[f"{number}.prompt"].tolist(),
            None,
            tensors[f"{number}.tokens"].tolist(),
            tensors[f"{number}.logits"].clone(),
        )
        for number in range(len(tensors) // 3)
    )


class Rows(Protocol):
    """Computes rows: a runner."""

    @property
    def cache(self) -> Store:
        """The store of the rows."""

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """The logits that follow each row's last token, (rows, vocabulary)."""


class _Unforeseen(NotBatchable):
    """The failure may have been chance; the next load tries again."""


def batch_runner(
    model: PreTrainedModel,
    findings: MutableMapping[Hashable, Any] | None = None,
    key: Hashable = None,
    cancellation: Cancellation = NEVER,
    adapters: Adapters | None = None,
) -> BatchRunner:
    """The fastest correct runner that serves this model in a batch.

    `findings` keep the result under `key`, for the next load of the same weights with the same adapters.

    Raises:
        NotBatchable: no runner gives the model's own numbers; the message says why.
        Cancelled: by `cancellation`.
    """
    noted: MutableMapping[Hashable, Any] = {} if findings is None or key is None else findings
    known = noted.get(("parity", key))
    if isinstance(known, str):
        raise NotBatchable(known)
    if known is not None:
        by_segments, mixes = known
        runner = BatchRunner(model, by_segments=by_segments, adapters=adapters, mixes=mixes)
        runner.use_fastest_products(findings, cancellation)
        return runner
    try:
        runner = _find(model, findings, cancellation, adapters)
    except _Unforeseen:
        raise
    except NotBatchable as error:
        noted["parity", key] = str(error)
        raise
    noted["parity", key] = (runner.by_segments, runner.mixes)
    return runner


def _find(
    model: PreTrainedModel,
    findings: MutableMapping[Hashable, Any] | None,
    cancellation: Cancellation,
    adapters: Adapters | None,
) -> BatchRunner:
    border = nearest(model.config.get_text_config())
    try:
        expected = _all_expected(model, adapters, cancellation, beyond(model, _PRODUCTS))
    except Cancelled:
        raise
    except Exception as error:
        logger.info("generate failed", exc_info=error)
        raise _Unforeseen(f"its own generate fails ({type(error).__name__})") from error
    reasons = []
    kind = NotBatchable
    mixed = (True, False) if adapters is not None and adapters.keys else (True,)
    for mixes, by_segments in product(mixed, (True, False)):
        runner = None
        try:
            runner = BatchRunner(model, by_segments=by_segments, adapters=adapters, mixes=mixes)
            if runner.by_segments is by_segments:
                for rows in expected:
                    _check(rows, runner, model.dtype, cancellation)
                if border >= len(expected[0][0].prompt):
                    _check_small(model, border, by_segments=by_segments, cancellation=cancellation)
                runner.use_fastest_products(findings, cancellation)
                for rows in expected:
                    _check(rows, runner, model.dtype, cancellation)
                return runner
        except NotBatchable as error:
            reasons.append(str(error))
        except Cancelled:
            raise
        except Exception as error:
            logger.info("a forward pass in a batch failed", exc_info=error)
            reasons.append(f"its forward pass cannot be given rows of several sequences ({type(error).__name__})")
            kind = _Unforeseen
        if runner is not None:
            runner.restore_weights()
    raise kind(reasons[-1])


def _all_expected(
    model: PreTrainedModel,
    adapters: Adapters | None,
    cancellation: Cancellation = NEVER,
    longest: int = 0,
) -> list[list[Expected]]:
    """Three rows at a time that go together: the model's own, and each of its adapters with another and the model.

    With `longest`, the first prompt of each trio has at least so many tokens, and three more rows are the model's own:
    two of about that length side by side.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _PROMPTS[0] + _NEW
    prompts = some_prompts(model, (max(longest, _SHORTEST, min(_PROMPTS[0], context - _NEW)), *_PROMPTS[1:]))
    names = list(adapters.keys) if adapters is not None else []
    trios = [(None, None, None), *((None, names[at], names[at - 1]) for at in range(0, len(names), 2))]

    def expected(prompt: list[int], name: str | None) -> Expected:
        cancellation.check()
        with nullcontext() if adapters is None else adapters.active(name):
            return expect(model, prompt, name)

    rows = [[expected(prompt, name) for prompt, name in zip(prompts, trio, strict=True)] for trio in trios]
    if longest:
        first, _, last = rows[0]
        rows.append([first, expected(prompts[0][_LESS:], None), last])
    return rows


def _check_small(model: PreTrainedModel, border: int, *, by_segments: bool, cancellation: Cancellation) -> None:
    """Tests the model's code beyond a length at which it changes, on a small model of it.

    Raises:
        NotBatchable: the code is wrong there, or no small model can be made.
    """
    try:
        tried = small(model)
        expected = _all_expected(tried, None, cancellation, _PROMPTS[0])
    except Cancelled:
        raise
    except Exception as error:
        logger.info("no small %s can be tried", type(model).__name__, exc_info=error)
        raise NotBatchable(f"it changes at a length of {border} tokens, which is too far to be tried") from error
    try:
        runner = BatchRunner(tried, by_segments=by_segments)
        for rows in expected:
            _check(rows, runner, tried.dtype, cancellation)
    except NotBatchable as error:
        raise NotBatchable(f"beyond {border} tokens: {error}") from error


def _check(expected: Sequence[Expected], runner: BatchRunner, dtype: torch.dtype, cancellation: Cancellation) -> None:
    cancellation.check()
    for logits, wanted in zip(compare(expected, runner), expected, strict=True):
        _check_close(logits, wanted.logits, dtype)


def compare(expected: Sequence[Expected], runner: Rows) -> list[torch.Tensor]:
    """Computes three rows together, in chunks and in several banks.

    Returns for each the logits before its new tokens, (new tokens, vocabulary).
    """
    prompts = [each.prompt for each in expected]
    sequences = [[*each.prompt, *each.tokens] for each in expected]
    table = SlotTable(runner.cache, room_for(expected))
    # The last one needs a larger row, and so is in a bank of its own; the others are side by side.
    longest = max(SMALLEST, *(len(each.prompt) + _NEW for each in expected))
    needs = [longest, longest, 2 * longest]
    slots = [table.take([-1], need) for need in needs]
    if any(slot is None for slot in slots):
        table.forget()
        raise OutOfMemory("Not enough memory for the KV cache of a trial")
    seen: list[list[torch.Tensor]] = [[] for _ in prompts]

    def compute(work: list[tuple[int, int]]) -> None:
        """Computes the next tokens of each sequence: pairs of its index and a number of tokens."""
        pieces = []
        for index, count in work:
            slot = slots[index]
            assert slot is not None  # noqa: S101 - there is room for all
            start = len(slot.tokens)
            tokens = sequences[index][start : start + count]
            adapter, at_once = expected[index].adapter, len(prompts[index])
            pieces.append(Piece(slot, tokens, start, adapter=adapter, at_once=at_once))
        for (index, _), piece, logits in zip(work, pieces, runner.forward(pieces), strict=True):
            piece.slot.tokens.extend(piece.tokens)
            if len(piece.slot.tokens) >= len(prompts[index]):
                seen[index].append(logits.clone())

    first, second, third = (len(prompt) for prompt in prompts)
    try:
        compute([(0, 9)])
        compute([(0, 7), (1, 4), (2, 6)])
        compute([(0, first - 16), (1, second - 4), (2, third - 6)])
        for _ in range(_NEW - 1):
            for slot in slots:
                table.promote(slot)  # type: ignore[arg-type]
            order = sorted(range(len(slots)), key=lambda i: (slots[i].bank.key, slots[i].row))  # type: ignore[union-attr]
            compute([(index, 1) for index in order])
    finally:
        for slot in slots:
            if slot is not None:
                table.release(slot, keep=False)
        with suppress(Exception):
            table.forget()
    return [torch.stack(logits) for logits in seen]


def room_for(expected: Sequence[Expected]) -> int:
    """The tokens for which the cache must have room in `compare`."""
    longest = max(len(each.prompt) for each in expected) + _NEW
    return 8 * max(SMALLEST, 1 << (longest - 1).bit_length())


def expect(model: PreTrainedModel, prompt: list[int], adapter: str | None = None) -> Expected:
    """What `generate` makes of a prompt; the model answers as `adapter` already."""
    return Expected(prompt, adapter, *_generated(model, prompt))


def some_prompts(model: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Token ids spread over the vocabulary; special tokens, at either end of it, are left out."""
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    low, high = size // 8, max(size - size // 8, size // 8 + 1)
    return [torch.randint(low, high, (length,), generator=generator).tolist() for length in lengths]


def _generated(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """The tokens that `generate` makes of a prompt, and the logits before each, (new tokens, vocabulary)."""
    inputs = torch.tensor([prompt], device=model.device)
    settings: dict[str, Any] = {"max_new_tokens": _NEW, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    config = GenerationConfig(**settings, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    # The same plain search for all, whatever the model's own settings are.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.inference_mode():
            output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    finally:
        model.generation_config = own
    return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).float()


def _check_close(logits: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    spread = (wanted.amax(-1) - wanted.amin(-1)).clamp(min=1e-6)
    apart = ((logits - wanted).abs().amax(-1) / spread).max()
    if not apart <= _CLOSE.get(dtype, 1e-1):
        raise NotBatchable("in a batch its logits are not those of its own generate")
