"""Translates `think` into variables of a model's chat template, and refuses it where the model cannot think.

A model can think where its template has tags for reasoning, or a variable that switches it. Pure functions. Must not
know HTTP.
"""

from __future__ import annotations

from typing import Any

from ...chat.formats import ReasoningTags, find_reasoning
from ...errors import InvalidRequest
from ...types import ChatTraits
from ..http.fields import note_ignored
from ..openai.conversation import has_variable

_SWITCHES = ("enable_thinking", "thinking")  # variables of templates; `thinking` is DeepSeek's and Granite's
_EFFORT = "reasoning_effort"


def can_think(template: str, tags: ReasoningTags | None) -> bool:
    """Whether a model with this chat template can think."""
    return tags is not None or any(has_variable(template, name) for name in (*_SWITCHES, _EFFORT))


def variables(think: bool | str | None, traits: ChatTraits, name: str) -> dict[str, Any]:
    """The variables of the chat template for `think`. `name` is the client's name for the model.

    Raises:
        InvalidRequest: the model cannot think.
    """
    template = traits.template if isinstance(traits.template, str) else "\n".join((traits.template or {}).values())
    switch = next((switch for switch in _SWITCHES if has_variable(template, switch)), None)
    thinks = can_think(template, find_reasoning(traits.template, traits.added_tokens))
    if think is None:
        return {}
    if not thinks:
        if think:
            raise InvalidRequest(f'"{name}" does not support thinking', "think")
        note_ignored("think")
        return {}
    if isinstance(think, str) and has_variable(template, _EFFORT):
        return {_EFFORT: think}
    if switch is not None:
        return {switch: bool(think)}
    note_ignored("think")  # without a variable in its template, the model always thinks, as with Ollama
    return {}
