"""Rotary embeddings that depend on a text's length: each text of a pass gets those of its own length.

For the kinds `longrope` and `dynamic`, transformers picks the frequencies for all tokens of a forward pass by its last
position, and keeps those of `dynamic` for later passes. Here each token gets those of its own text, whatever else is in
the pass or came before. Must not know rows, slots or the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from ...modeling.rotary import borders, changing


def _modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if "rotary" in type(module).__name__.lower()]


def forget_between_passes(model: Any) -> None:
    """Resets the model's rotary embeddings before every forward pass.

    Those of the kind `dynamic` keep the frequencies of the longest text so far, which change the results of shorter
    ones.
    """
    if not hasattr(model, "config") or not changing(model.config.get_text_config()):
        return
    for module in _modules(model):
        module.register_forward_pre_hook(_restoring(module))


def _restoring(fresh: Any) -> Callable[..., None]:
    """The function that resets a module, or its twin, to the current state of `fresh`."""
    names, buffers = frozenset(vars(fresh)) | {"forward"}, dict(fresh._buffers)
    state = {name: value for name, value in vars(fresh).items() if isinstance(value, int | float | torch.Tensor)}

    def restore(module: Any, *_: Any) -> None:
        for name in vars(module).keys() - names:
            delattr(module, name)
        vars(module).update(state)
        module._buffers.update(buffers)

    return restore


class ByLength:
    """Gives each token the rotary embeddings of a pass over its own text only.

    `restart` is the number of tokens at which the model computes a growing text again from its first token on; None if
    it never does.
    """

    def __init__(self, twin: Any) -> None:
        """Sets up a twin of a model, whose rotary embeddings are as they were loaded.

        Raises:
            ValueError: no known module holds them.
        """
        self._borders = borders(twin.config.get_text_config())
        self._groups: list[tuple[int, torch.Tensor | slice]] = []
        self._tokens = 0
        modules = _modules(twin)
        if not modules:
            raise ValueError("no module of rotary embeddings")
        for module in modules:
            module.forward = self._by_groups(module, _restoring(module), module.forward)
        lengths = [border for kind, border in self._borders if kind == "longrope"]
        self.restart = next((border + 1 for border in lengths if _starts_anew(twin, border)), None)

    def table(self, length: int) -> Hashable:
        """A key that texts share if their embeddings are the same, for a text of so many tokens."""
        return tuple(0 if length <= border else 1 if kind == "longrope" else length for kind, border in self._borders)

    def begin(self, lengths: Sequence[int]) -> None:
        """Sets the length of the text in which each token of the next pass is read, in order."""
        groups: dict[Hashable, tuple[int, list[int]]] = {}
        for place, length in enumerate(lengths):
            groups.setdefault(self.table(length), (length, []))[1].append(place)
        self._tokens = len(lengths)
        if len(groups) == 1:
            self._groups = [(lengths[0], slice(None))]
        else:
            self._groups = [(length, torch.tensor(places)) for length, places in groups.values()]

    def _by_groups(self, module: Any, restore: Callable[..., None], forward: Callable[..., Any]) -> Callable[..., Any]:
        def by_groups(x: Any, position_ids: Any, *further: Any, **named: Any) -> Any:
            """As the module's own, called for each group of tokens as if these were all of their text."""
            if position_ids.dim() != 2 or position_ids.numel() != self._tokens:
                raise ValueError("positions of another shape than the tokens")
            flat, whole = position_ids.reshape(-1), []
            for length, places in self._groups:
                restore(module)
                last = flat.new_tensor([length - 1])
                made = forward(x, torch.cat([flat[places], last])[None], *further, **named)
                whole.append(made if isinstance(made, tuple) else (made,))
            parts = tuple(self._put(parts, position_ids.shape) for parts in zip(*whole, strict=True))
            return parts if isinstance(made, tuple) else parts[0]

        return by_groups

    def _put(self, parts: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor:
        """Puts the results of all groups, each (1, its tokens and one more, width), in order: (*shape, width)."""
        first = parts[0]
        result = first.new_empty((self._tokens, *first.shape[2:]))
        for (_, places), part in zip(self._groups, parts, strict=True):
            result[places] = part[0, :-1]
        return result.reshape(*shape, *first.shape[2:])


def _starts_anew(model: Any, border: int) -> bool:
    """Whether the model computes a whole text again when it grows beyond the border, as Phi-3 does."""
    from transformers import DynamicCache

    cache, ids = DynamicCache(), torch.zeros((1, border + 1), dtype=torch.long, device=model.device)
    filler = torch.zeros((1, 1, border, 1), device=model.device)
    cache.update(filler, filler, 0)
    inputs = model.prepare_inputs_for_generation(
        ids, next_sequence_length=1, past_key_values=cache, attention_mask=torch.ones_like(ids), use_cache=True
    )
    return bool(inputs["input_ids"].shape[1] > 1)
