"""The fields that set how much a model thinks, and their translation into variables of its chat template.

OpenAI has `reasoning_effort`, OpenRouter `reasoning`, Qwen's templates `enable_thinking`, others `think` and
`thinking`. A field that a model's template does not support has no effect; but asking a model not to think that always
thinks is refused. Must not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ...errors import InvalidRequest
from .hints import Hinted, hint, so_anyway
from .parts import Part, Text, refuse

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_SWITCHES = ("enable_thinking", "thinking")  # variables of chat templates that are true or false
_AMOUNT = "reasoning_effort"  # a variable of chat templates with words for the effort
_NEVER = ("none", "minimal")


class ReasoningOptions(Hinted):
    """How much to think, in the form of `/v1/responses` and OpenRouter."""

    place = "reasoning"

    effort: Effort | None = None
    enabled: bool | None = None
    exclude: Literal[False] | None = so_anyway()
    summary: Text | None = hint("No effect: this server makes no summaries.")
    generate_summary: Text | None = hint("No effect: this server makes no summaries.")
    context: Text | None = hint("No effect: the input holds the whole conversation.")


class ThinkingOptions(Part):
    """Whether to think, in the form of Anthropic and DeepSeek."""

    type: Literal["enabled", "disabled", "adaptive"]


@dataclass(frozen=True, slots=True)
class Thought:
    """The requested thinking: an `effort`, or a `switch` on or off; `names` are the fields that set them."""

    effort: str | None = None
    switch: bool | None = None
    names: Mapping[str, str] | None = None

    def settle(
        self, template: Mapping[str, Any], has: Callable[[str], bool], thinks: bool
    ) -> tuple[dict[str, Any], list[str]]:
        """Returns the template's variables, those of `template` included, and the fields without effect.

        `has` says whether the model's chat template has a variable, `thinks` whether the model writes reasoning.

        Raises:
            InvalidRequest: the request disables thinking, which this model's template does not support; or `template`
                contradicts the fields.
        """
        given, ignored = dict(template), []
        wanted = {name: template[name] for name in (*_SWITCHES, _AMOUNT) if name in template and not has(name)}
        for name, value in wanted.items():
            _check(f"chat_template_kwargs.{name}", value in (False, *_NEVER), thinks)
            del given[name]
            ignored.append(f"chat_template_kwargs.{name}")
        switch = next((name for name in _SWITCHES if has(name)), None)
        names = self.names or {}
        if self.effort is not None:
            field = names.get("effort", "reasoning_effort")
            if has(_AMOUNT):
                _set(given, _AMOUNT, self.effort, field)
            elif switch is not None and self.switch is None:
                _set(given, switch, self.effort not in _NEVER, field)
            else:
                ignored.append(field)
                _check(field, self.effort in _NEVER, thinks and switch is None)
        if self.switch is not None:
            if switch is not None:
                _set(given, switch, self.switch, names.get("switch", "enable_thinking"))
            else:
                ignored.append(names.get("switch", "enable_thinking"))
                _check(ignored[-1], not self.switch, thinks or has(_AMOUNT))
        return given, ignored


def _set(template: dict[str, Any], name: str, value: Any, field: str) -> None:
    """Sets a variable of the template for `field`; refuses it if the variable has another value already."""
    if template.setdefault(name, value) != value:
        raise InvalidRequest(
            f"Invalid value for field '{field}': says something else than chat_template_kwargs.{name}", field
        )


def _check(field: str, unwanted: bool, thinks: bool) -> None:
    if unwanted and thinks:
        reason = "this model always thinks: its chat template has no variable to turn it off"
        raise InvalidRequest(f"Invalid value for field '{field}': {reason}", field)


class Thinks(Part):
    """The fields that set how much to think."""

    reasoning_effort: Effort | None = None
    reasoning: ReasoningOptions | None = Field(None, description="The same, in OpenRouter's form.")
    enable_thinking: bool | None = Field(None, description="Whether to think, if the model's template supports it.")
    think: bool | Literal["low", "medium", "high"] | None = Field(None, description="Whether to think, or how much.")
    thinking: ThinkingOptions | None = Field(None, description="Whether to think.")

    @model_validator(mode="after")
    def _of_one_mind(self) -> Self:
        for said in (self._efforts, self._switches):
            given = list(said())
            for name, value in given[1:]:
                if value != given[0][1]:
                    raise refuse(name, f"says something else than {given[0][0]}")
        effort, switch = next(self._efforts(), None), next(self._switches(), None)
        if effort is not None and switch is not None:
            contrary = effort[1] == "none" if switch[1] else effort[1] not in _NEVER
            if contrary:
                raise refuse(effort[0], f"says something else than {switch[0]}")
        return self

    def _efforts(self) -> Iterator[tuple[str, str]]:
        if self.reasoning_effort is not None:
            yield "reasoning_effort", self.reasoning_effort
        if self.reasoning is not None and self.reasoning.effort is not None:
            yield "reasoning.effort", self.reasoning.effort
        if isinstance(self.think, str):
            yield "think", self.think

    def _switches(self) -> Iterator[tuple[str, bool]]:
        if self.enable_thinking is not None:
            yield "enable_thinking", self.enable_thinking
        if isinstance(self.think, bool):
            yield "think", self.think
        if self.thinking is not None:
            yield "thinking.type", self.thinking.type != "disabled"
        if self.reasoning is not None and self.reasoning.enabled is not None:
            yield "reasoning.enabled", self.reasoning.enabled

    def thought(self) -> Thought:
        """All fields as one `Thought`."""
        effort, switch = next(self._efforts(), None), next(self._switches(), None)
        names = {"effort": effort[0]} if effort else {}
        names |= {"switch": switch[0]} if switch else {}
        return Thought(effort and effort[1], switch and switch[1], names)
