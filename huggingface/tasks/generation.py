"""Turns the API's generation parameters into arguments of a given model's `generate`.

Called on the engine's thread. Owns what only the model can tell: its token ids, and whether its defaults allow several
answers. Refuses what `generate` would refuse late, ignore, or fail on. Must not know HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .inputs import refuse

_TOKEN_FIELDS = (
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "decoder_start_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
)


def generation_arguments(parameters: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Returns the parameters as `model.generate` takes them; other names pass unchanged.

    A temperature of 0 becomes greedy decoding, for which `generate` takes no temperature.

    Raises:
        InvalidRequest: a token id is outside the model's vocabulary, or no token is left to generate.
    """
    arguments = dict(parameters)
    if arguments.get("temperature") == 0:
        del arguments["temperature"]
        arguments["do_sample"] = False
    vocabulary = model.config.get_text_config().vocab_size
    for field in _TOKEN_FIELDS:
        for token in _token_ids(field, arguments.get(field)):
            if token >= vocabulary:
                raise refuse(field, f"token {token} is not in the model's vocabulary of {vocabulary}")
    banned = set(arguments.get("suppress_tokens", ()))
    banned.update(run[0] for run in arguments.get("bad_words_ids", ()) if len(run) == 1)
    if arguments.get("min_new_tokens") or arguments.get("min_length"):  # then end tokens are banned too, at first
        ends = arguments.get("eos_token_id", model.generation_config.eos_token_id)
        banned.update(_token_ids("", ends))
    if len(banned) >= vocabulary:
        raise refuse("suppress_tokens", "leaves no token to generate")
    if "exponential_decay_length_penalty" in arguments:
        if "eos_token_id" not in arguments and model.generation_config.eos_token_id is None:
            raise refuse("exponential_decay_length_penalty", "the model has no end-of-text token")
        arguments["exponential_decay_length_penalty"] = tuple(arguments["exponential_decay_length_penalty"])
    return arguments


def _token_ids(field: str, value: Any) -> Iterator[int]:
    if field == "sequence_bias":
        value = [run for run, _ in value or ()]
    if isinstance(value, int):
        yield value
    elif value is not None:
        for item in value:
            yield from _token_ids("", item)


def check_sequences(arguments: Mapping[str, Any], model: Any, *, do_sample: bool, num_beams: int) -> None:
    """Refuses more answers than the decoding can give; `do_sample` and `num_beams` are defaults.

    Raises:
        InvalidRequest: `num_return_sequences` is too large.
    """

    def effective(name: str, default: Any) -> Any:
        value = arguments[name] if name in arguments else getattr(model.generation_config, name, None)
        return default if value is None else value

    wanted = effective("num_return_sequences", 1)
    beams = effective("num_beams", num_beams)
    if wanted > beams > 1:
        raise refuse("num_return_sequences", f"must not exceed num_beams ({beams})")
    if wanted > 1 and beams == 1 and not effective("do_sample", do_sample):
        raise refuse("num_return_sequences", "must be 1 without sampling or beams, which give a single answer")
