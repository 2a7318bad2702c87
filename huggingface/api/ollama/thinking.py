"""`think`: what it asks of a model's chat template, and whether the model can be asked so.

A model thinks aloud where its template knows the tags of that, or a variable that switches it. Pure functions. Must not
know HTTP.
"""

from __future__ import annotations

from typing import Any

from ...chat.formats import ReasoningTags, find_reasoning
from ...errors import InvalidRequest
from ...types import ChatTraits
from ..http.fields import note_ignored
from ..openai.conversation import has_variable

_SWITCHES = ("enable_thinking", "thinking")  # of templates that can do without; the latter is DeepSeek's and Granite's
_EFFORT = "reasoning_effort"


def can_think(template: str, tags: ReasoningTags | None) -> bool:
    """Whether a model of that chat template thinks aloud."""
    return tags is not None or any(has_variable(template, name) for name in (*_SWITCHES, _EFFORT))


def variables(think: bool | str | None, traits: ChatTraits, name: str) -> dict[str, Any]:
    """The variables that the chat template is given for it. `name` is what the client calls the model.

    Raises:
        InvalidRequest: the model cannot do it.
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
    note_ignored("think")  # it thinks anyway: as with Ollama, what the template has no variable for cannot be chosen
    return {}
