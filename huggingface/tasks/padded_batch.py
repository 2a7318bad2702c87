"""Runs a model's forward pass over several rows: padded, cut back to each row's length, and checked.

Many models give other outputs for a padded row than for the same row alone. So the first batch of a sort is compared
with its rows alone, and a sort that differs is not batched again. Called on the model's engine thread only. Must not
know tasks or calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

from ..errors import GenerationFailed
from ..modeling.rotary import changing
from .vocabulary import check_vocabulary, vocabulary_rows

Tensors = Mapping[str, Any]
Outputs = tuple[Any, ...]

# The most tokens of a batch, rows times the longest row: more rows gain little speed and delay all others.
_TOKENS = MappingProxyType({"cpu": 512})
_TOKENS_ELSEWHERE = 8192
# The most numbers in one output of a batch: a score for each of 250,000 words at each token soon takes a gigabyte.
_NUMBERS = 2**24
_ROWS = 128
# The largest share of padding in a batch, which is computed for nothing.
_PADDING = 0.25
# The largest difference between a batched row and the same row alone, relative to the largest number of its output.
_TOLERANCE = MappingProxyType({"float16": 1e-2, "bfloat16": 5e-2})
_EXACT = 1e-5
# After this many failed batches in a row, whose rows succeeded alone, the model gets no more batches.
_FAILURES = 3


class Lane:
    """One way to run one model. Rows of the same lane may share a forward pass, whatever their task."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        reads: Sequence[str | int],
        *,
        device: Any,
        per_token: bool,
        width: int = 1,
        fixed: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`reads` are the outputs by name or position: (rows, ...) each, or (rows, tokens, ...) if `per_token`.

        `width` is the number of values per token in an output; `fixed` are further arguments of every forward pass.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._reads = reads
        self._device = device
        self._per_token = per_token
        self._fixed = fixed
        self._tokens = max(1, min(_TOKENS.get(device.type, _TOKENS_ELSEWHERE), _NUMBERS // width))
        # BigBird reads short inputs differently from long ones, and treats padding as a part of the input.
        strange = getattr(model.config, "attention_type", None) == "block_sparse"
        # Rotary embeddings that change with the length of a pass follow its longest row.
        strange = strange or bool(changing(model.config.get_text_config()))
        self._masks = not strange and "attention_mask" in inspect.signature(model.forward).parameters
        self._vocabulary = vocabulary_rows(model)
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is None or self._vocabulary is None or pad < self._vocabulary else None
        self._kinds: dict[Hashable, int] = {}
        self._agreed: dict[tuple[bool, int], bool] = {}
        self._failures = 0

    # Which rows share a pass ------------------------------------------------------------------------------------------

    def kind(self, row: Tensors) -> int | None:
        """A number that rows share if they may be computed together; None for a row that must run alone.

        Raises:
            NoRow: the row holds a token for which the model has no embedding.
        """
        ids = row["input_ids"]
        check_vocabulary(int(ids.max()) if ids.numel() else 0, self._vocabulary)
        if ids.shape[0] != 1:
            return None
        shapes = tuple((name, row[name].dtype, _beyond(row[name], ids.shape[1])) for name in sorted(row))
        pads = self._masks and "attention_mask" in row and self._pad is not None
        config = self._model.config
        # BART and T5 classify by the last </s>, and fail on rows with different numbers of it.
        by_end = config.is_encoder_decoder and isinstance(config.eos_token_id, int)
        ends = int((ids == config.eos_token_id).sum()) if by_end else 0
        return self._kinds.setdefault((shapes, ends, None if pads else ids.shape[1]), len(self._kinds))

    def takes(self, rows: int, tokens: int, shortest: int, longest: int) -> bool:
        """Whether so many rows of one kind may form a batch, with `tokens` in all and lengths from `shortest` to
        `longest`."""
        if rows == 1:
            return True
        cells = rows * longest
        if rows > _ROWS or cells > self._tokens or cells - tokens > _PADDING * cells or self._failures >= _FAILURES:
            return False
        return self._agreed.get(_sort(shortest, longest), True)

    # Computing rows ---------------------------------------------------------------------------------------------------

    def run(self, rows: Sequence[Tensors]) -> list[Outputs | GenerationFailed | None]:
        """The outputs of each row on the CPU, each with a first dimension of 1, as if the row had run alone.

        A row whose outputs are not numbers gets its error instead. None for a row that must run again: the first batch
        of a sort is compared with its shortest and its longest row alone; where these differ, the others are not
        trusted, and `takes` allows no such batch again.

        Raises:
            Exception: the model's error. Call `failed` for it if there was more than one row.
        """
        found = self._run(rows)
        return [self._checked(row, outputs) for row, outputs in zip(rows, found, strict=True)]

    def run_alone(self, row: Tensors) -> Outputs:
        """The outputs of one row.

        Raises:
            GenerationFailed: they are not numbers.
            Exception: the model's error.
        """
        (outputs,) = self.run([row])
        if isinstance(outputs, GenerationFailed):
            raise outputs
        assert outputs is not None  # noqa: S101 - a row alone is always trusted
        return outputs

    def _run(self, rows: Sequence[Tensors]) -> list[Outputs | None]:
        outputs: list[Outputs | None] = [*self._forward(rows)]
        if len(rows) == 1:
            return outputs
        self._failures = 0
        lengths = [token_count(row) for row in rows]
        sort = _sort(min(lengths), max(lengths))
        if sort in self._agreed:
            return outputs
        samples = {lengths.index(min(lengths)), len(lengths) - 1 - lengths[::-1].index(max(lengths))}
        alone = {index: self._forward([rows[index]])[0] for index in samples}
        self._agreed[sort] = all(_same(outputs[index], alone[index]) for index in samples)
        return outputs if self._agreed[sort] else [alone.get(index) for index in range(len(rows))]

    def failed(self, *, memory: bool) -> bool:
        """Records a batch that raised; returns whether its rows must now run one by one, to find the faulty row.

        With `memory` no row is at fault: memory ran out, and batches are half as large from now on.
        """
        if memory:
            self._tokens //= 2
            return False
        self._failures = min(self._failures + 1, _FAILURES)
        return True

    def excuse(self) -> None:
        """Records that a row failed alone: so the batches do not fail because they are batches."""
        if self._failures < _FAILURES:
            self._failures = 0

    def _checked(self, row: Tensors, outputs: Outputs | None) -> Outputs | GenerationFailed | None:
        """The outputs, or an error if they are not numbers; values at a row's own padding do not count."""
        mask = row.get("attention_mask")
        for tensor in outputs or ():
            read = tensor[mask.bool()] if self._per_token and mask is not None and _fits(mask, tensor) else tensor
            if read.is_floating_point() and not bool((read < float("inf")).all()):
                return GenerationFailed("The model computed a value that is not a number")
        return outputs

    def _forward(self, rows: Sequence[Tensors]) -> list[Outputs]:
        import torch

        lengths = [token_count(row) for row in rows]
        longest = max(lengths)
        with self._place(), torch.no_grad():
            inputs = {name: self._stack(name, rows, lengths).to(self._device) for name in rows[0]}
            output = self._model(**inputs, **self._fixed)
            # The first item is the only output of a model that is set to return tuples.
            found = [output[name] if isinstance(output, dict) else output[0] for name in self._reads]
            found = [tensor.to("cpu") for tensor in found]
        return [
            tuple(self._cut(tensor[index : index + 1], length, longest) for tensor in found)
            for index, length in enumerate(lengths)
        ]

    def _stack(self, name: str, rows: Sequence[Tensors], lengths: Sequence[int]) -> Any:
        """Stacks one input of all rows into one tensor, padded where lengths differ."""
        import torch

        parts = [row[name] for row in rows]
        if all(part.shape == parts[0].shape for part in parts):
            return torch.cat(parts)
        shape = (len(rows), max(lengths), *parts[0].shape[2:])
        stacked = parts[0].new_full(shape, self._filling(name))
        for index, (part, length) in enumerate(zip(parts, lengths, strict=True)):
            stacked[index : index + 1, self._span(length, shape[1])] = part
        return stacked

    def _filling(self, name: str) -> int:
        if name == "input_ids" and self._pad is not None:
            return int(self._pad)
        return int(getattr(self._tokenizer, "pad_token_type_id", 0)) if name == "token_type_ids" else 0

    def _span(self, length: int, longest: int) -> slice:
        """The slice of a row's own tokens among the padding."""
        return slice(longest - length, longest) if self._tokenizer.padding_side == "left" else slice(length)

    def _cut(self, tensor: Any, length: int, longest: int) -> Any:
        # A model with other than one state per token cannot be cut; the comparison notices it.
        cut = self._per_token and length < longest and tensor.shape[1:2] == (longest,)
        return tensor[:, self._span(length, longest)] if cut else tensor

    def _place(self) -> AbstractContextManager[Any]:
        import torch

        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def token_count(row: Tensors) -> int:
    """The length of a row, its own padding included."""
    return int(row["input_ids"].shape[-1])


def _fits(mask: Any, tensor: Any) -> bool:
    return bool(mask.shape == tensor.shape[:2])


def _beyond(tensor: Any, length: int) -> tuple[int, ...]:
    """The shape of a row's tensor without the dimension that padding changes."""
    return tuple(tensor.shape[2:] if tensor.shape[1:2] == (length,) else tensor.shape)


def _sort(shortest: int, longest: int) -> tuple[bool, int]:
    """The sort of a batch: padded or not, and a class of lengths, because models treat long inputs differently."""
    return shortest < longest, longest.bit_length()


def _same(batched: Outputs | None, alone: Outputs) -> bool:
    import torch

    if batched is None:
        return False
    for one, other in zip(batched, alone, strict=True):
        if one.shape != other.shape:
            return False
        tolerance = _TOLERANCE.get(str(other.dtype).removeprefix("torch."), _EXACT)
        one, other = one.float(), other.float()
        size = max(1.0, other.nan_to_num().abs().max().item()) if other.numel() else 1.0
        if not torch.allclose(one, other, rtol=0, atol=tolerance * size, equal_nan=True):
            return False
    return True
