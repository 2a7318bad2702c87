"""The parts that models in memory are built of, for tests that watch them or have them fail."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from huggingface.engine.batch import TransformersBatch
from huggingface.engine.input_processor import Preparer
from huggingface.loading import torch as by_torch
from huggingface.model import parts as built
from huggingface.modeling.demand import MemoryClaims


@dataclass
class Parts:
    """What a model is served by: its batch and the runner in that, where it is batched, and what is beside it.

    `model` is transformers', for what a batch does not do; where OpenVINO computes, it has its weights only at times.
    """

    batch: Any = None
    runner: Any = None
    preparer: Any = None
    claims: Any = None
    model: Any = None


@contextmanager
def noted_parts() -> Iterator[dict[str, Parts]]:
    """Notes the parts of each model that is prepared meanwhile, by its id; of one that is loaded again, the later."""
    noted: dict[str, Parts] = {}

    def batch(model_id: str, runner: Any, *arguments: Any) -> TransformersBatch:
        noted[model_id] = Parts(TransformersBatch(model_id, runner, *arguments), runner)
        return noted[model_id].batch

    def claims(model_id: str, *arguments: Any) -> MemoryClaims:
        parts = noted.setdefault(model_id, Parts())
        parts.claims = MemoryClaims(model_id, *arguments)
        return parts.claims

    def preparer(model_id: str, model: Any, *arguments: Any, **named: Any) -> Preparer:
        parts = noted.setdefault(model_id, Parts())
        parts.model, parts.preparer = model, Preparer(model_id, model, *arguments, **named)
        return parts.preparer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(built, "TransformersBatch", batch)
        patch.setattr(built, "MemoryClaims", claims)
        patch.setattr(built, "Preparer", preparer)
        yield noted


@contextmanager
def noted_models() -> Iterator[list[Any]]:
    """Notes every transformers model that a load reads meanwhile, in their order."""
    read, noted = by_torch.read_model, []

    def note(*arguments: Any) -> Any:
        noted.append(read(*arguments))
        return noted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_torch, "read_model", note)
        yield noted


class Findings(dict[Hashable, Any]):
    """What was found out about this machine, with its findings about products changed, whatever it is fastest at."""

    def __init__(self, change: Callable[[Any], dict[str, Any]]) -> None:
        """`change` gives what a finding is to have otherwise, by the names of its fields."""
        super().__init__()
        self.change = change

    def __setitem__(self, key: Any, finding: Any) -> None:
        super().__setitem__(key, replace(finding, **self.change(finding)) if key[0] == "products" else finding)


def laying_out() -> Findings:
    """Findings by which enough weights are copied into another layout for the steps of a batch."""
    return Findings(lambda _: {"packed": 0.0})
