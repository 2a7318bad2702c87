"""Computes the memory that a model's own `generate` takes beside the weights, and claims it before it is allocated.

Each beam and each returned sequence is a row with keys, values and logits of its own, so a small request or
`generation_config.json` can ask for much memory. The numbers come from the model's config and are rather too large than
too small. Runs on the engine's thread, except `MemoryClaims.check`. Must not know requests, HTTP, or where memory comes
from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..errors import InvalidRequest, OutOfMemory
from ..host.memory import readable

_AHEAD = 256  # tokens for which memory is claimed before they are generated
_FLOAT = 4  # bytes of a float32: much is computed in it, whatever the model's dtype
_LOGITS = 6  # copies of a step's logits at once: the model's, in float32, as logs, processed, summed, sorted
_SLACK = 1.25  # factor for an allocator whose memory grows and moves with each token
_BEAM = 24  # bytes of a beam search for each possible token: known, running and finished
_NO_LENGTH = 20  # tokens that `generate` makes where nothing sets a limit

# Kinds of caches that are allocated in full at the start.
_STATIC = ("static", "offloaded_static", "hybrid", "sliding_window", "hybrid_chunked", "offloaded_hybrid")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one call of `generate` asks for: `rows` at once, a `prompt` of so many tokens, the `longest` text in tokens.

    `searches`: beam search. `doubled`: each row is computed twice (guidance). `whole`: a cache that is allocated in
    full at the start. `kept`: the logits of all generated tokens are kept. `told`: the prompt's logits are kept.
    `why` says to the client what asks for more than one row; `field` is that parameter's name.
    """

    rows: int
    prompt: int
    longest: int
    searches: bool = False
    doubled: bool = False
    whole: bool = False
    kept: bool = False
    told: bool = False
    why: str = ""
    field: str | None = None


def asked_of(
    model: PreTrainedModel,
    settings: Mapping[str, Any],
    prompt: int,
    named: Mapping[str, Any] | None = None,
    *,
    kept: bool = False,
    told: bool = False,
) -> Wanted:
    """What `generate` does with `settings` over the model's own; `named` are the settings given by the request."""
    own = model.generation_config
    named = settings if named is None else named

    def effective(name: str, default: Any) -> Any:
        value = settings[name] if name in settings else getattr(own, name, None)
        return default if value is None else value

    counts = {name: int(effective(name, 1)) for name in ("num_beams", "num_return_sequences")}
    field = max(counts, key=lambda name: counts[name])
    rows = max(1, counts[field])
    why = "" if rows == 1 else f"{field} {rows}"
    if rows > 1 and named.get(field) is None:
        why = f"{why} of the model's own settings (generation_config.json)"
    before = 1 if model.config.is_encoder_decoder else max(1, prompt)
    new, total = effective("max_new_tokens", None), effective("max_length", None)
    if "max_new_tokens" not in settings and "max_length" in settings:
        new = None
    longest = before + int(new) if new is not None else int(total) if total is not None else before + _NO_LENGTH
    return Wanted(
        rows=rows,
        prompt=prompt,
        longest=max(before, longest),
        searches=counts["num_beams"] > 1,
        doubled=float(effective("guidance_scale", 1.0)) != 1.0,
        whole=effective("cache_implementation", None) in _STATIC,
        kept=kept,
        told=told,
        why=why,
        field=field if rows > 1 else None,
    )


class Demand:
    """The bytes that one model takes for each token, row and step."""

    def __init__(self, model: PreTrainedModel) -> None:
        config, item = model.config.get_text_config(decoder=True), model.dtype.itemsize
        # Where layers differ, only the configs of the single layers hold their sizes.
        layered = list(config.per_layer_config) if config.is_heterogeneous else [config]

        def number(*names: str) -> int:
            """The first of these numbers that the config has; the largest where layers differ."""
            told = ([getattr(each, name, None) for each in layered] for name in names)
            found = ([value for value in values if isinstance(value, int)] for values in told)
            return next((int(max(values)) for values in found if values), 0)

        hidden = number("hidden_size", "d_model", "n_embd")
        heads = number("decoder_attention_heads", "num_attention_heads", "num_heads") or 1
        layers = number("num_decoder_layers", "decoder_layers", "num_hidden_layers", "num_layers")
        width = number("head_dim", "d_kv") or -(-hidden // heads)
        latent = number("qk_nope_head_dim") + number("qk_rope_head_dim")
        groups = heads if latent else number("num_key_value_heads") or heads
        pair = (latent or width) + (number("v_head_dim") or width)  # a head's key and value
        inner = number("intermediate_size", "decoder_ffn_dim", "d_ff", "n_inner") or 4 * hidden
        states = number("state_size", "mamba_d_state") * max(inner, 2 * hidden)
        self.encodes = bool(model.config.is_encoder_decoder)
        self._layer = groups * pair * item
        self._token = layers * self._layer
        self._row = layers * states * _FLOAT
        self._step = (number("vocab_size") or 1) * _FLOAT
        # One layer's keys and values again: the new ones, the reordered ones, and those repeated for each head.
        self._moved = 2 * self._layer + heads * pair * item
        self._read = _FLOAT * (4 * hidden + 5 * heads * width + 4 * inner + 4 * states)
        eager = model.config._attn_implementation in (None, "eager")
        self._scores = 3 * heads * _FLOAT if eager else 2 * _FLOAT  # per pair of tokens: attention, or only its mask
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters or self.encodes

    def size(self, asked: Wanted, length: int, *, reading: bool) -> int:
        """Bytes in use while a row is `length` tokens long; with `reading`, while the prompt is read."""
        rows, prompt = asked.rows * (2 if asked.doubled else 1), asked.prompt
        kept = asked.longest if asked.whole else length
        size = rows * (kept * self._token * _SLACK + self._row)
        if self.encodes:
            size += rows * prompt * (self._token + self._layer)  # cross-attention's cache, and the encoder's states
        size += rows * length * self._moved
        if asked.searches:
            size += asked.rows * asked.longest * _BEAM
        if asked.kept:
            size += (asked.rows + 2) * length * self._step
        step = rows * (_LOGITS * self._step + length * self._scores)
        if reading:
            read = (1 if self.encodes else rows) * prompt
            step += read * (self._read + prompt * self._scores) + (0 if self._keeps_last else read * self._step)
        if asked.told:
            step = max(step, 3 * prompt * self._step)
        return int(size + step)


class MemoryClaims:
    """Claims the memory that one model's own `generate` takes."""

    def __init__(
        self,
        model_id: str,
        model: PreTrainedModel,
        take: Callable[[int], bool],
        maximum: Callable[[], int | None],
        relieve: Callable[[], bool],
    ) -> None:
        """Claims nothing yet.

        Args:
            take: claims so many bytes more, or gives them back where the number is negative; whether it could.
            maximum: the most bytes that could ever be free beside the model, None for no limit.
            relieve: evicts another model; whether there was one.
        """
        self._model_id = model_id
        self._demand = Demand(model)
        self._take = take
        self._maximum = maximum
        self._relieve = relieve

    def check(self, asked: Wanted) -> int:
        """Refuses a call that could never fit; returns the bytes that it takes at first.

        Raises:
            InvalidRequest: a parameter asks for too much; the error names it.
            OutOfMemory: the prompt alone is too long.
        """
        need, maximum = self._first(asked), self._maximum()
        if maximum is not None and need > maximum:
            message = f"{self._needs(asked, need)}, and models may have {readable(maximum)} here beside its weights"
            raise InvalidRequest(message, asked.field) if asked.field else OutOfMemory(message)
        return need

    @contextmanager
    def held(self, asked: Wanted) -> Iterator[Callable[[int], None]]:
        """Holds the memory until the block ends. The block calls the yielded function with a row's length in tokens.

        Raises:
            InvalidRequest, OutOfMemory: as `check`, or no memory is free now. The yielded function raises the same.
        """
        has = ready = 0

        def have(need: int) -> None:
            nonlocal has
            while not self._take(need - has):
                if not self._relieve():
                    raise OutOfMemory(f"{self._needs(asked, need)}, which is not available now")
            has = need

        def reached(length: int) -> None:
            nonlocal ready
            if length >= ready:
                ready = min(length + max(_AHEAD, length // 4), max(asked.longest, length + 1))
                have(self._demand.size(asked, ready, reading=False))

        need = self.check(asked)
        try:
            have(need)
            yield reached
        finally:
            self._take(-has)

    def _first(self, asked: Wanted) -> int:
        before = 1 if self._demand.encodes else max(1, asked.prompt)
        ready = min(asked.longest, before + _AHEAD)
        sizes = (self._demand.size(asked, before, reading=True), self._demand.size(asked, ready, reading=False))
        return max(sizes)

    def _needs(self, asked: Wanted, need: int) -> str:
        what = f"{asked.why} with" if asked.why else ""
        what = f"{what} a prompt of {asked.prompt} tokens takes {readable(need)} ({need} bytes)".strip()
        return f"Not enough memory to generate with model '{self._model_id}': {what}"
