"""The tensors of the batch: rows of tokens go in, the logits that follow each row come out.

Owns the model's twin and its KV cache. Decoding rows and chunks of prompts are computed alike; each row stands at
positions of its own. Engine's thread only. Must not know tickets, text or sampling.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from .cache import Segment, SlotCache, layer_shapes
from .slots import Slot
from .twin import attend_by_segments, make_twin, wants_float_masks

# Which tokens (`kv`, a row of positions) a new token at position `at` sees, by the kind of layer. The same rules as in
# transformers.masking_utils: `at` is (rows, new tokens, 1), `kv` is (length), the number is the window's or chunk's.
_SEES: Mapping[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "full_attention": lambda at, kv, _: kv <= at,
    "sliding_attention": lambda at, kv, window: (kv <= at) & (kv > at - window),
    "chunked_attention": lambda at, kv, chunk: (kv <= at) & (kv // chunk == at // chunk),
}

# Rows of one bank are attended to together, up to the longest of them, unless that is a waste.
_ALIKE_TOKENS = 64
_ALIKE_SHARE = 1.25
_PADDING = 1.25  # prompts' chunks are computed together where padding makes the work no larger than this


class NotBatchable(Exception):
    """This model's forward pass cannot serve rows at positions of their own; the message says why."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A row of work: `tokens` that follow the `start` ones which the slot holds already."""

    slot: Slot
    tokens: Sequence[int]
    start: int


class BatchRunner:
    """Computes rows with a transformers model's own modules."""

    def __init__(self, model: PreTrainedModel, *, by_segments: bool = True) -> None:
        """Look at what the model keeps and how it masks; whether its numbers are right, `parity.py` finds out.

        Without `by_segments`, or where the model's attention does not allow it, each forward pass serves rows that lie
        next to each other in one bank, with masks that any model can read.

        Raises:
            NotBatchable: it keeps something else than keys and values, or has a kind of layer not known here.
        """
        text = model.config.get_text_config()
        self._kinds, self._by_kind = _layer_kinds(text)
        self._numbers = {
            "sliding_attention": getattr(text, "sliding_window", None) or 0,
            "chunked_attention": getattr(text, "attention_chunk_size", None) or 0,
        }
        self._device = model.device
        self.cache = SlotCache(_probe(model))
        try:
            self._twin = make_twin(model)
        except Exception as error:
            raise NotBatchable("its modules cannot be copied") from error
        parameters = inspect.signature(self._twin.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_keep = "logits_to_keep" in parameters
        self._float_masks = wants_float_masks(self._twin)
        self.by_segments = by_segments and attend_by_segments(self._twin, self.cache)

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """The logits that follow each row's last token, (rows, vocabulary), float32; the cache gets all rows' tokens.

        Rows of one token that stand among the decoding ones must be given in the order of their banks and rows.
        """
        logits: list[torch.Tensor | None] = [None] * len(pieces)
        for group in self._groups(pieces):
            for index, row in zip(group, self._compute([pieces[index] for index in group]), strict=True):
                logits[index] = row
        return torch.stack([row for row in logits if row is not None])

    # Which rows go together ------------------------------------------------------------------------------------------

    def _groups(self, pieces: Sequence[Piece]) -> Iterable[list[int]]:
        """The rows' indices, in groups that are computed in one forward pass each."""
        singles = [index for index, piece in enumerate(pieces) if len(piece.tokens) == 1 and piece.slot.decodes]
        rest = [index for index in range(len(pieces)) if index not in set(singles)]
        if not self.by_segments:
            for index in rest:
                yield [index]
            yield from (group for group in _split(singles, lambda a, b: _neighbours(pieces[a], pieces[b])))
            return
        if singles:
            yield singles
        group: list[int] = []
        total = 0
        for index in sorted(rest, key=lambda index: -len(pieces[index].tokens)):
            longest = len(pieces[group[0]].tokens) if group else 0
            total += len(pieces[index].tokens)
            if group and longest * (len(group) + 1) > _PADDING * total:
                yield group
                group, total = [], len(pieces[index].tokens)
            group.append(index)
        if group:
            yield group

    def _segments(self, pieces: Sequence[Piece], width: int) -> list[Segment]:
        if width > 1 or not pieces[0].slot.decodes:
            return [self._segment([piece], index, width) for index, piece in enumerate(pieces)]
        alike = _alike if self.by_segments else _neighbours
        groups = _split(range(len(pieces)), lambda a, b: alike(pieces[a], pieces[b]))
        return [self._segment([pieces[index] for index in group], group[0], None) for group in groups]

    def _segment(self, pieces: Sequence[Piece], first: int, width: int | None) -> Segment:
        """`pieces` lie side by side in their bank; `width` is that of a prompt's chunk, None for decoding rows."""
        row, starts = pieces[0].slot.row, [piece.start for piece in pieces]
        count = len(pieces[0].tokens) if width is not None else None
        length = max(starts) + (count or 1)
        # What pads a chunk stands where its last token does: beyond it there may be no position.
        offsets = torch.arange(width or 1, device=self._device).clamp(max=(count or 1) - 1)
        positions = torch.tensor(starts, device=self._device)[:, None] + offsets
        index = torch.arange(row, row + len(pieces), device=self._device)
        same = count == width if width is not None else min(starts) == max(starts)
        masks = {kind: self._mask(kind, positions, length, same) for kind in self._kinds}
        batch = slice(first, first + len(pieces))
        bank = pieces[0].slot.bank.key
        return Segment(bank, batch, slice(row, row + len(pieces)), length, positions, index, count, masks)

    def _mask(self, kind: str, positions: torch.Tensor, length: int, same: bool) -> torch.Tensor | None:
        """Which tokens are seen, (rows, 1, new tokens, length); None where `sdpa` knows by itself: all, or causally."""
        number = self._numbers.get(kind, 0)
        width = positions.shape[1]
        if self.by_segments and same and width in (1, length) and (kind == "full_attention" or length <= number):
            return None
        seen = _SEES[kind](positions[:, :, None], torch.arange(length, device=self._device), number)[:, None]
        if not self._float_masks:
            return seen
        zero = torch.zeros((), dtype=self._twin.dtype, device=self._device)
        return torch.where(seen, zero, torch.finfo(self._twin.dtype).min)

    # One forward pass ------------------------------------------------------------------------------------------------

    def _compute(self, pieces: Sequence[Piece]) -> Sequence[torch.Tensor]:
        """The logits after each row; all rows have one token, or all are prompts' chunks."""
        width = max(len(piece.tokens) for piece in pieces)
        segments = self._segments(pieces, width)
        self.cache.segments = segments
        ids = torch.tensor([[*piece.tokens, *[0] * (width - len(piece.tokens))] for piece in pieces])
        inputs: dict[str, Any] = {"input_ids": ids.to(self._device)}
        if self._takes_positions:
            inputs["position_ids"] = torch.cat([segment.positions for segment in segments])
        handles = self._handles(segments[0], len(pieces))
        inputs["attention_mask"] = handles if self._by_kind else handles[self._kinds[0]]
        ends = sorted({len(piece.tokens) - 1 for piece in pieces})
        if self._takes_keep:
            inputs["logits_to_keep"] = 1 if ends == [width - 1] else torch.tensor(ends, device=self._device)
        logits = self._twin(**inputs, past_key_values=self.cache, use_cache=True, return_dict=True).logits.float()
        if self._takes_keep and len(ends) == 1:
            return list(logits[:, -1].unbind())
        places = ends if self._takes_keep else list(range(width))
        return [row[places.index(len(piece.tokens) - 1)] for row, piece in zip(logits, pieces, strict=True)]

    def _handles(self, segment: Segment, rows: int) -> dict[str, torch.Tensor]:
        """What the model gets as its masks: those of its one segment, or what stands for those of several."""
        if not self.by_segments:
            return {kind: mask for kind, mask in segment.masks.items() if mask is not None}
        self.cache.handles = {kind: torch.empty((rows, 1, 1, 1), device=self._device) for kind in self._kinds}
        return dict(self.cache.handles)


def _probe(model: PreTrainedModel) -> list[Any]:
    """What each layer keeps of a token, seen by giving the model one."""
    inputs = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            cache = model(input_ids=inputs, use_cache=True, return_dict=True).past_key_values
        return layer_shapes(cache)
    except Exception as error:
        raise NotBatchable(f"its cache is not one of keys and values for each token ({error})") from error


def _layer_kinds(config: Any) -> tuple[list[str], bool]:
    """The kinds of layers, and whether the model takes a mask for each: `create_masks_for_generate`'s rules."""
    named = getattr(config, "layer_types", None)
    if named is not None:
        kinds, by_kind = sorted(set(named)), True
    elif getattr(config, "sliding_window", None) is not None:
        kinds, by_kind = ["sliding_attention"], False
    elif getattr(config, "attention_chunk_size", None) is not None:
        kinds, by_kind = ["chunked_attention"], False
    else:
        kinds, by_kind = ["full_attention"], False
    if unknown := [kind for kind in kinds if kind not in _SEES]:
        raise NotBatchable(f"it has layers of the kind {', '.join(unknown)}")
    return kinds, by_kind


def _neighbours(one: Piece, other: Piece) -> bool:
    """Whether the second row lies right behind the first one."""
    return one.slot.bank is other.slot.bank and other.slot.row == one.slot.row + 1


def _alike(one: Piece, other: Piece) -> bool:
    """Whether two rows may be attended to together: neighbours of about one length."""
    short, long = sorted((one.start, other.start))
    return _neighbours(one, other) and long <= _ALIKE_SHARE * short + _ALIKE_TOKENS


def _split(items: Iterable[int], together: Callable[[int, int], bool]) -> list[list[int]]:
    """Cut a list where two items that follow each other do not belong together."""
    listed = list(items)
    cuts = [index + 1 for index, (a, b) in enumerate(pairwise(listed)) if not together(a, b)]
    return [listed[start:end] for start, end in pairwise([0, *cuts, len(listed)]) if end > start]
