"""The tensors of the batch: takes rows of tokens, returns the logits that follow each row.

Owns the model's twin and its KV cache. Decoding rows and chunks of prompts are computed alike; each row has positions
of its own. Engine's thread only. Must not know tickets, text or sampling.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from ...cancellation import NEVER, Cancellation
from ...modeling.rotary import changing
from ..layers import NotBatchable, layer_kinds, probe
from ..slots import Lengths, Slot
from .attention import attend_by_segments, make_twin, wants_float_masks
from .cache import Segment, SlotCache
from .lora import Adapters, Mix, NotMixable, mix_adapters
from .matmul import Products
from .rotary import ByLength

# Which tokens (`kv`, a row of positions) a new token at position `at` sees, by kind of layer. The same rules as in
# transformers.masking_utils: `at` is (rows, new tokens, 1), `kv` is (length), the number is that of the window or
# chunk.
_SEES: Mapping[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "full_attention": lambda at, kv, _: kv <= at,
    "sliding_attention": lambda at, kv, window: (kv <= at) & (kv > at - window),
    "chunked_attention": lambda at, kv, chunk: (kv <= at) & (kv // chunk == at // chunk),
}

# Rows of one bank are attended to together, up to the longest of them, unless that wastes much.
_ALIKE_TOKENS = 64
_ALIKE_SHARE = 1.25


@dataclass(frozen=True, slots=True)
class Piece:
    """A row of work: `tokens` that follow the `start` tokens in the slot.

    `every`: the logits after each token are wanted. `adapter` computes the row, None for the model itself. `at_once` is
    how many of the row's first tokens count as computed in one pass.
    """

    slot: Slot
    tokens: Sequence[int]
    start: int
    every: bool = False
    adapter: str | None = None
    at_once: int = 0

    @property
    def kept(self) -> Sequence[int]:
        """The places of the tokens whose logits are wanted."""
        return range(len(self.tokens)) if self.every else (len(self.tokens) - 1,)


class BatchRunner:
    """Computes rows with a transformers model's own modules."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        by_segments: bool = True,
        adapters: Adapters | None = None,
        mixes: bool = True,
    ) -> None:
        """Reads what the model keeps and how it masks; `parity.py` tests whether its numbers are right.

        With `by_segments`, all rows share one forward pass, if the model's attention allows it; otherwise each pass
        serves neighbouring rows of one bank, with masks that any model can read. With `mixes`, rows of different
        `adapters` share a pass; otherwise the twin's layers are switched between them.

        Raises:
            NotBatchable: the model keeps something other than keys and values, has an unknown kind of layer, or has
                adapters that cannot be mixed as asked.
        """
        text = model.config.get_text_config()
        kinds = layer_kinds(text)
        self._kinds, self._by_kind = kinds.names, kinds.by_kind
        self._numbers = {
            "sliding_attention": getattr(text, "sliding_window", None) or 0,
            "chunked_attention": getattr(text, "attention_chunk_size", None) or 0,
        }
        self._device = model.device
        self.cache = SlotCache(probe(model))
        try:
            self._twin = make_twin(model)
        except Exception as error:
            raise NotBatchable("its modules cannot be copied") from error
        self._rotary = self._by_length(text)
        self._adapters = adapters if adapters is not None and adapters.keys else None
        self._numbered = {name: number for number, name in enumerate(self._adapters.keys)} if self._adapters else {}
        self._mix = self._mixed(self._adapters) if self._adapters is not None and mixes else None
        self._active: str | None = None  # the adapter that the twin answers as, if its layers are switched
        self.products: Products | None = None
        parameters = inspect.signature(self._twin.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_keep = "logits_to_keep" in parameters
        self._float_masks = wants_float_masks(self._twin)
        self._nothing = torch.zeros((), dtype=self._twin.dtype, device=self._device)
        self._hidden = torch.full_like(self._nothing, torch.finfo(self._twin.dtype).min)
        self.by_segments = by_segments and attend_by_segments(self._twin, self.cache)

    def use_fastest_products(
        self, findings: MutableMapping[Hashable, Any] | None = None, cancellation: Cancellation = NEVER
    ) -> None:
        """Measures how this machine multiplies fastest, and uses that from now on; see `Products`.

        Layers that are switched stay as they are: some of them read the base's weights, in any layout.
        """
        if self._adapters is None or self._mix is not None:
            self.products = Products(self._twin, findings, cancellation)

    @property
    def lengths(self) -> Lengths:
        """How results depend on the lengths of texts."""
        return Lengths() if self._rotary is None else Lengths(self._rotary.table, self._rotary.restart)

    @property
    def mixes(self) -> bool:
        """Whether rows of different adapters share a forward pass."""
        return self._mix is not None

    def restore_weights(self) -> None:
        """Restores the model itself for use outside the batch."""
        if self.products is not None:
            self.products.restore_weights()

    def release_idle(self) -> None:
        """Drops nothing: no weights are loaded on demand."""

    def close(self) -> None:
        """Drops the cache."""
        self.cache.drop_all()

    @property
    def copied_bytes(self) -> int:
        """Bytes of weights that have a copy in another layout."""
        return self.products.copied_bytes if self.products is not None else 0

    @torch.inference_mode()
    def forward(
        self, pieces: Sequence[Piece], every: Callable[[int, torch.Tensor], None] = lambda *_: None
    ) -> torch.Tensor:
        """The logits that follow each row's last token, (rows, vocabulary), float32; the cache gets all rows' tokens.

        Decoding rows must be in the order of their banks and rows. `every` is called with the index of each row that
        asks for all its logits, and with these: (tokens, vocabulary).
        """
        if self.products is not None:
            self.products.step()
        logits = [torch.empty(0)] * len(pieces)
        passes = self._passes(pieces)
        for group in passes:
            together = [pieces[index] for index in group]
            self._begin(together)
            if self.by_segments:
                kept = self._compute_packed(together)
                if len(passes) == 1 and not any(piece.every for piece in pieces):
                    return kept
                computed: Iterable[torch.Tensor] = torch.split(kept, [len(piece.kept) for piece in together])
            else:
                computed = self._compute_aligned(together)
            for index, rows in zip(group, computed, strict=True):
                logits[index] = rows
        for index, piece in enumerate(pieces):
            if piece.every:
                every(index, logits[index])
        return torch.stack([rows[-1] for rows in logits])

    def _passes(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Which rows share a forward pass, by index; each pass keeps their order."""
        groups = [list(range(len(pieces)))]
        if self._adapters is not None and self._mix is None:
            by_adapter: dict[str | None, list[int]] = defaultdict(list)
            for index, piece in enumerate(pieces):
                by_adapter[piece.adapter].append(index)
            groups = list(by_adapter.values())
        if self.by_segments:
            return groups
        return [part for group in groups for part in _split(group, lambda a, b: _neighbours(pieces[a], pieces[b]))]

    def _begin(self, pieces: Sequence[Piece]) -> None:
        """Sets the adapters and rotary embeddings of the next pass."""
        if self._rotary is not None:
            ends = [range(piece.start + 1, piece.start + len(piece.tokens) + 1) for piece in pieces]
            self._rotary.begin(
                [max(piece.at_once, end) for piece, each in zip(pieces, ends, strict=True) for end in each]
            )
        if self._adapters is None:
            return
        if self._mix is None:
            [adapter] = {piece.adapter for piece in pieces}
            if adapter != self._active:
                self._adapters.activate(self._twin, adapter)
                self._active = adapter
            return
        numbers = [-1 if piece.adapter is None else self._numbered[piece.adapter] for piece in pieces]
        tokens = [number for number, piece in zip(numbers, pieces, strict=True) for _ in piece.tokens]
        kept = [number for number, piece in zip(numbers, pieces, strict=True) for _ in piece.kept]
        self._mix.begin(tokens, kept, self._device)

    def _by_length(self, config: Any) -> ByLength | None:
        if not (kinds := changing(config)):
            return None
        try:
            return ByLength(self._twin)
        except Exception as error:
            reason = f"its rotary embeddings ({', '.join(kinds)}) change with the length of the text in code of its own"
            raise NotBatchable(reason) from error

    def _mixed(self, adapters: Adapters) -> Mix:
        try:
            return mix_adapters(self._twin, list(adapters.keys.values()))
        except NotMixable as error:
            raise NotBatchable("its adapters cannot share a forward pass") from error

    # One forward pass -------------------------------------------------------------------------------------------------

    def _compute_packed(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Computes all rows in one forward pass, their tokens one after the other, so that the weights are read once.

        Returns the kept logits, (kept, vocabulary), row after row.
        """
        groups = _split(range(len(pieces)), lambda a, b: _alike(pieces[a], pieces[b]))
        segments, at = [], 0
        for group in groups:
            segments.append(self._segment([pieces[index] for index in group], at))
            at = segments[-1].tokens.stop
        begins = accumulate((len(piece.tokens) for piece in pieces), initial=0)
        self.cache.handles = {kind: torch.empty((1, 1, 1, 1), device=self._device) for kind in self._kinds}
        self.cache.packed = True
        logits = self._run(
            segments,
            ids=[[token for piece in pieces for token in piece.tokens]],
            positions=torch.cat([segment.positions.reshape(1, -1) for segment in segments], dim=1),
            masks=self.cache.handles,
            keep=[begin + place for begin, piece in zip(begins, pieces, strict=False) for place in piece.kept],
        )
        return logits[0]

    def _compute_aligned(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Computes one segment in a forward pass of its own, each sequence in a row of the batch, as any model does.

        Returns the kept logits of each, (rows, kept, vocabulary).
        """
        segment = self._segment(pieces, 0)
        self.cache.packed = False
        ids = [list(piece.tokens) for piece in pieces]
        return self._run([segment], ids, segment.positions, segment.masks, keep=list(pieces[0].kept))

    def _run(
        self,
        segments: Sequence[Segment],
        ids: list[list[int]],
        positions: torch.Tensor,
        masks: Mapping[str, torch.Tensor],
        keep: list[int],
    ) -> torch.Tensor:
        """The logits at the places `keep` of each row of `ids`, (rows, places, vocabulary), float32."""
        self.cache.segments = segments
        inputs: dict[str, Any] = {"input_ids": torch.tensor(ids, device=self._device)}
        if self._takes_positions:
            inputs["position_ids"] = positions
        inputs["attention_mask"] = dict(masks) if self._by_kind else masks[self._kinds[0]]
        all_of_them = len(keep) == len(ids[0])
        if self._takes_keep and not all_of_them:
            inputs["logits_to_keep"] = torch.tensor(keep, device=self._device)
        logits: torch.Tensor = self._twin(
            **inputs, past_key_values=self.cache, use_cache=True, return_dict=True
        ).logits.float()
        return logits if self._takes_keep or all_of_them else logits[:, keep]

    def _segment(self, pieces: Sequence[Piece], first: int) -> Segment:
        """Makes a segment of `pieces` that are neighbours with one token each, or of one piece with several tokens.

        `first` is the place of the first token in a packed pass.
        """
        row, starts, count = pieces[0].slot.row, [piece.start for piece in pieces], len(pieces[0].tokens)
        positions = torch.tensor(starts, device=self._device)[:, None] + torch.arange(count, device=self._device)
        length = max(starts) + count
        return Segment(
            bank=pieces[0].slot.bank.key,
            rows=slice(row, row + len(pieces)),
            tokens=slice(first, first + count * len(pieces)),
            length=length,
            start=None if len(pieces) > 1 else starts[0],
            positions=positions,
            index=torch.arange(row, row + len(pieces), device=self._device),
            masks={kind: self._mask(kind, positions, length) for kind in self._kinds},
        )

    def _mask(self, kind: str, positions: torch.Tensor, length: int) -> torch.Tensor:
        """What is added to the scores of the `length` tokens, (rows, 1, new tokens, length): nothing for visible ones.

        `sdpa` would turn a mask that selects into this one in every layer again. There is always a mask: without one,
        `sdpa` takes a slower path where heads share keys.
        """
        number = self._numbers.get(kind, 0)
        seen = _SEES[kind](positions[:, :, None], torch.arange(length, device=self._device), number)[:, None]
        if self.by_segments or self._float_masks:
            return torch.where(seen, self._nothing, self._hidden)
        return seen


def _neighbours(one: Piece, other: Piece) -> bool:
    """Whether two rows may share a forward pass: one token each, the second one's slot right behind the first one's."""
    adjacent = one.slot.bank is other.slot.bank and other.slot.row == one.slot.row + 1
    return adjacent and len(one.tokens) == len(other.tokens) == 1


def _alike(one: Piece, other: Piece) -> bool:
    """Whether two rows may be attended to together: neighbours of about the same length."""
    short, long = sorted((one.start, other.start))
    return _neighbours(one, other) and long <= _ALIKE_SHARE * short + _ALIKE_TOKENS


def _split(items: Iterable[int], together: Callable[[int, int], bool]) -> list[list[int]]:
    """Cuts a list between neighbouring items that do not belong together."""
    listed = list(items)
    cuts = [index + 1 for index, (a, b) in enumerate(pairwise(listed)) if not together(a, b)]
    return [listed[start:end] for start, end in pairwise([0, *cuts, len(listed)]) if end > start]
