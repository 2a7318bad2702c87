"""Computes rows of tokens to logits by OpenVINO with paged attention: the counterpart of `engine/torch/runner.py`.

All tokens of a step are in one line, prompts and decoding rows alike; each row attends over its own blocks. Engine's
thread only. Must not know tickets, text or sampling.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..layers import NotBatchable
from ..slots import Lengths
from ..torch.cache import LayerShape
from ..torch.runner import Piece
from . import graph as graphs
from .failures import infer
from .lazy_weights import Reserve
from .library import openvino
from .paged_cache import BLOCK, BlockCache


class OpenVINORunner:
    """Computes rows with the model's graph."""

    lengths = Lengths()

    def __init__(
        self,
        graph: Any,
        windows: Mapping[int, int],
        shapes: Sequence[LayerShape],
        tokens: int,
        reserve: Reserve | None = None,
    ) -> None:
        """Compiles a stateful `graph`, which it consumes; see `graph.paged` for `windows`.

        `shapes` are what each layer keeps of a token, `tokens` the most tokens in the cache. `reserve` has the weights
        for what only the model's own modules can do.

        Raises:
            NotBatchable: OpenVINO cannot serve the graph in this way.
        """
        ov = openvino()
        graphs.paged(graph, windows)
        self.weight_bytes, self.copied_bytes = graphs.constant_bytes(graph)
        compiled = ov.Core().compile_model(graph, "CPU", _PROPERTIES)
        _check_blocks(compiled)
        self._request = compiled.create_infer_request()
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self.cache = BlockCache(shapes, tokens)
        for layer, (keys, values) in enumerate(self.cache.tensors):
            self._request.set_tensor(f"key_cache.{layer}", ov.Tensor(keys, shared_memory=True))
            self._request.set_tensor(f"value_cache.{layer}", ov.Tensor(values, shared_memory=True))
        self._tensor = ov.Tensor
        self._reserve = reserve

    def forward(
        self, pieces: Sequence[Piece], every: Callable[[int, torch.Tensor], None] = lambda *_: None
    ) -> torch.Tensor:
        """The logits that follow each row's last token, (rows, vocabulary), float32; the cache gets all rows' tokens.

        They are valid until the next call. `every` is called with the index of each row that asks for all its logits,
        and with these: (tokens, vocabulary).
        """
        if self._reserve is not None:
            self._reserve.release_idle()
        counts = [len(piece.tokens) for piece in pieces]
        begins = list(accumulate(counts, initial=0))
        tables = [
            self.cache.blocks(piece.slot.bank.key, piece.slot.row, piece.start, len(piece.tokens)) for piece in pieces
        ]
        kept = [begin + place for begin, piece in zip(begins, pieces, strict=False) for place in piece.kept]
        positions = [np.arange(piece.start, piece.start + len(piece.tokens)) for piece in pieces]
        self._set("input_ids", [token for piece in pieces for token in piece.tokens], np.int64)
        self._set("position_ids", np.concatenate(positions), np.int64)
        self._set("past_lens", [piece.start for piece in pieces])
        self._set("subsequence_begins", begins)
        self._set("block_indices", [block for table in tables for block in table])
        self._set("block_indices_begins", list(accumulate(map(len, tables), initial=0)))
        self._set("max_context_len", max(piece.start + len(piece.tokens) for piece in pieces))
        self._set("kept", kept)
        infer(self._request)
        logits = torch.from_numpy(self._request.get_tensor("logits").data).flatten(0, 1)
        if len(kept) == len(pieces) and not any(piece.every for piece in pieces):
            return logits
        rows = torch.split(logits, [len(piece.kept) for piece in pieces])
        for index, piece in enumerate(pieces):
            if piece.every:
                every(index, rows[index])
        return torch.stack([of_row[-1] for of_row in rows])

    def _set(self, name: str, values: Any, dtype: type = np.int32) -> None:
        if name in self._inputs:  # a model that counts positions itself takes none
            self._request.set_tensor(name, self._tensor(np.asarray(values, dtype=dtype)))

    def restore_weights(self) -> None:
        """Loads the model's own weights, for use outside the batch.

        Raises:
            OutOfMemory: there is no room for them beside the graph's.
        """
        if self._reserve is not None:
            self._reserve.fetch()

    def release_idle(self) -> None:
        """Drops weights that were loaded on demand, after some time without requests."""
        if self._reserve is not None:
            self._reserve.unload()

    def close(self) -> None:
        """Drops the graph, the cache and the model's weights."""
        self.cache.drop_all()
        self.release_idle()
        del self._request


# Exact products, and a cache of exact numbers: less is only for callers that ask for it. One stream has all cores.
_PROPERTIES = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "PERFORMANCE_HINT": "LATENCY",
}


def _check_blocks(compiled: Any) -> None:
    """Checks that the compiled graph reads blocks as `paged_cache.py` holds them.

    Raises:
        NotBatchable: on this processor blocks have another shape, or other numbers.
    """
    for port in compiled.inputs:
        if port.get_any_name().startswith(("key_cache.", "value_cache.")):
            size, numbers = port.get_partial_shape()[2], port.get_element_type()
            if size.is_dynamic or size.get_length() != BLOCK or numbers != openvino().Type.f32:
                raise NotBatchable(f"its cache has blocks of {size} tokens and numbers of the type {numbers} here")


def read_graph(path: Path) -> Any:
    """Reads a saved graph, its constants mapped from its file.

    Raises:
        RuntimeError: OpenVINO cannot read the file.
    """
    return openvino().Core().read_model(os.fspath(path))
