"""Translates a chat in OpenAI's form for one model: its template's input, its answer's constraint and its parser.

OpenAI's, Anthropic's and Ollama's routes share this file; must not know their bodies. `huggingface.chat` knows the
forms of models' answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

from ...chat.formats import (
    JSON,
    ReasoningTags,
    ToolFormat,
    begins_inside_reasoning,
    describe_tools,
    find_reasoning,
    find_tool_format,
    harmony_tokens,
    speaks_harmony,
    takes_tools,
)
from ...chat.grammar import Frame, answer_grammar, calls_grammar
from ...chat.harmony import HarmonyReader
from ...chat.parser import AnswerParser, AnswerReader
from ...chat.regions import RegionReader
from ...errors import InvalidRequest
from ...types import ChatTraits, Constraint, GenerationRequest
from ..requests.fan_out import seeded
from .thinking import Thought

# Variables of chat templates that have their own fields, or that only this server sets.
_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
    | {"return_dict", "return_tensors", "padding", "truncation", "max_length", "return_assistant_tokens_mask"}
    | {"tokenizer_kwargs", "bos_token", "eos_token", "unk_token", "pad_token", "conversation"}
    | {"raise_exception", "strftime_now"}
)


@dataclass(frozen=True, slots=True)
class Wish:
    """The requested answer, in any protocol.

    `form` is the constraint of its text, `tools` are OpenAI's (`{"type": "function", "function": …}`), `choice` is
    `none`, `auto`, `required` or the name of the tool to call. `template` are variables that the model's template must
    have, `hints` variables that are passed only if it has them.
    """

    form: Constraint | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    choice: str = "auto"
    parallel: bool = True
    thought: Thought = field(default_factory=Thought)
    template: Mapping[str, Any] | None = None
    hints: Mapping[str, Any] | None = None

    @property
    def must_call(self) -> bool:
        """Whether the answer must be calls only."""
        return bool(self.tools) and self.choice not in ("auto", "none")

    def names(self, form: str) -> dict[str, str]:
        """The engine's names of constraints, and the body's for the same; `form` is the body's field."""
        return {"json_schema": form, "grammar": "tools" if self.must_call else form}


class Conversation:
    """Makes the requests for a wish to one model, and the readers of its answers."""

    def __init__(self, traits: ChatTraits, messages: Sequence[Mapping[str, Any]], wish: Wish) -> None:
        """`messages` are OpenAI's, with plain text as their content.

        Raises:
            InvalidRequest: the model's template does not support the wish.
        """
        self._wish = wish
        self._form = None if wish.must_call else wish.form
        self._tools = list(wish.tools) if wish.choice != "none" else []
        templates = traits.template if isinstance(traits.template, Mapping) else {"default": traits.template or ""}
        name = "tool_use" if self._tools and "tool_use" in templates else "default"
        self._template = str(templates.get(name, ""))
        self._added, self._special = traits.added_tokens, traits.special_tokens
        self._harmony = speaks_harmony(traits.template)
        self._reasoning: ReasoningTags | None = None
        if not self._harmony:
            self._reasoning = find_reasoning(traits.template, traits.added_tokens)
        self._format: ToolFormat | None = None
        if self._tools:
            self._format = find_tool_format(traits.template, traits.added_tokens)
        self.ignored: list[str] = []  # fields without effect on this model
        self._regions: Mapping[str, Any] | None = None
        if not self._harmony and self._form is None and self._format in (None, JSON) and self._reads_regions(traits):
            self._regions = traits.response_template
        self.variables = self._variables()
        self._told = ""  # this server's own description of the tools
        self.messages, *self._fallbacks = self._layouts(messages)

    def requests(
        self,
        parameters: Mapping[str, Any],
        count: int,
        *,
        streams: bool,
        logprobs: int | None,
        adapter: str | None = None,
    ) -> list[GenerationRequest]:
        """The requests for `count` answers."""
        kept = set(self._format.special_tokens if self._format else ())
        kept |= set(self._reasoning.special_tokens if self._reasoning else ())
        kept |= set(harmony_tokens() if self._harmony else ())
        if self._regions is not None:  # its marks are patterns, so any token may belong to one
            kept |= self._special
        return [
            GenerationRequest(
                seeded(parameters, number),
                messages=self.messages,
                streams=streams,
                fills=True,
                template=self.variables,
                logprobs=logprobs,
                constraint=self._constraint(),
                special_tokens=tuple(kept & self._special),
                adapter=adapter,
                fallbacks=self._fallbacks,
                told=self._told,
            )
            for number in range(count)
        ]

    def parser(self, prompt_end: str) -> AnswerReader:
        """The reader for an answer to a prompt with this end."""
        tools = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in self._tools}
        if self._harmony:
            return HarmonyReader(tools, prompt_end=prompt_end)
        if self._regions is not None:
            return RegionReader(self._regions, prompt_end, self._tools)
        return AnswerParser(
            self._format,
            self._reasoning,
            inside_reasoning=self._inside(prompt_end),
            tools=tools or None,
            exact=self._form is not None,
        )

    @property
    def must_call(self) -> bool:
        """Whether the answer must be calls only."""
        return self._wish.must_call

    @property
    def thinks(self) -> bool:
        """Whether the model writes reasoning."""
        return self._reasoning is not None

    @property
    def single_call(self) -> bool:
        """Whether the answer may have one call at most."""
        return not self._wish.parallel

    def _inside(self, prompt_end: str) -> bool:
        return self._reasoning is not None and begins_inside_reasoning(prompt_end, self._reasoning)

    def _reads_regions(self, traits: ChatTraits) -> bool:
        """Whether the tokenizer's own response template reads the answers: for calls of a form that is unknown here,
        and only where no constraint enforces them."""
        return traits.response_template is not None and not self._wish.must_call and takes_tools(self._template)

    def _constraint(self) -> Constraint | Callable[[str], Constraint | None] | None:
        wish, form = self._wish, self._form
        if not self.must_call and form is None:
            return None
        if not self._tools and self._reasoning is None and not self._harmony:
            return form

        def constraint(end: str) -> Constraint | None:
            inside = self._inside(end)
            harmony = self._harmony and not end.endswith("<|message|>")
            frame = Frame(self._reasoning, self._added, inside, harmony)
            if self._format is None:
                assert form is not None  # noqa: S101 - without calls, there is a form
                return Constraint("grammar", answer_grammar(form, frame)) if inside or harmony else form
            grammar = calls_grammar(
                self._format,
                self._tools,
                frame,
                required_name=wish.choice if wish.choice not in ("auto", "required") else None,
                parallel=wish.parallel,
                text=form,
            )
            return Constraint("grammar", grammar)

        return constraint

    def _variables(self) -> dict[str, Any]:
        """The template's variables besides the messages."""
        given, self.ignored = self._wish.thought.settle(
            self._wish.template or {}, self._has, self._reasoning is not None
        )
        for name in given.keys() & (self._wish.template or {}).keys():
            if name in _RESERVED or not self._has(name):
                reason = "the chat template of this model has no such variable"
                raise InvalidRequest(
                    f"Invalid value for field 'chat_template_kwargs.{name}': {reason}", f"chat_template_kwargs.{name}"
                )
        hints = self._wish.hints or {}
        given |= {name: value for name, value in hints.items() if name not in given and self._has(name)}
        if self._tools and takes_tools(self._template) and not self._tools_in_system:
            given["tools"] = self._tools
        return given

    @property
    def _tools_in_system(self) -> bool:
        """Whether the template expects the tools in the system message, as Phi-4-mini's does."""
        return re.search(r"message(\.tools\b|\[['\"]tools['\"]\])", self._template) is not None

    def _has(self, variable: str) -> bool:
        return has_variable(self._template, variable)

    def _layouts(self, messages: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        """The messages in the template's form, and further layouts for templates that require alternating turns or
        have no system role: in these, messages that this server added are merged into their neighbours."""
        takes = takes_tools(self._template) and not self._tools_in_system
        laid = self._laid_out(messages, takes=takes)
        if not self._tools or takes:
            layouts = [laid, _merged(laid)]
        else:
            told = describe_tools(self._tools, self._wish.choice, answers=self._form is not None)
            if self._tools_in_system:
                functions = json.dumps([tool["function"] for tool in self._tools], ensure_ascii=False)
                layouts = [_with_system(each, "", tools=functions) for each in (laid, _merged(laid))]
            else:
                self._told = told
                layouts = [_with_system(each, told) for each in (laid, _merged(laid))]
                layouts.append(_with_user(_merged(laid), told))
        unmarked = [[{k: v for k, v in message.items() if k != "made"} for message in each] for each in layouts]
        return [each for place, each in enumerate(unmarked) if each not in unmarked[:place]]

    def _laid_out(self, messages: Sequence[Mapping[str, Any]], *, takes: bool) -> list[dict[str, Any]]:
        """Each message in the template's form; `takes` says whether the template supports tools."""
        result: list[dict[str, Any]] = []
        names: dict[str, str] = {}  # of the called functions, by the calls' ids
        thinks = "thinking" in self._template and "reasoning_content" not in self._template
        for message in messages:
            laid = dict(message)
            if laid["role"] == "developer" and "developer" not in self._template:
                laid["role"] = "system"
            if thinks and "reasoning_content" in laid:
                laid["thinking"] = laid["reasoning_content"]
            for call in laid.get("tool_calls", ()):
                names[call["id"]] = call["function"]["name"]
            if laid["role"] == "tool":
                laid["name"] = names.get(laid["tool_call_id"], "")
            result.append(laid if takes else _without_tools(laid))
        return result


def _with_system(messages: Sequence[dict[str, Any]], told: str, **more: Any) -> list[dict[str, Any]]:
    """Adds a text to the system message, which is made if there is none."""
    first = [messages[0]] if messages and messages[0]["role"] == "system" else []
    system = {"role": "system", "content": "", **(first[0] if first else {}), **more}
    system["content"] = "\n\n".join(filter(None, [system["content"], told]))
    return [system, *messages[len(first) :]]


def _with_user(messages: Sequence[dict[str, Any]], told: str) -> list[dict[str, Any]]:
    """Adds a text before the user's first message."""
    result = list(messages)
    place = next((place for place, message in enumerate(result) if message["role"] == "user"), None)
    if place is None:
        at = 1 if result and result[0]["role"] == "system" else 0
        return [*result[:at], {"role": "user", "content": told}, *result[at:]]
    content = "\n\n".join(filter(None, [told, result[place]["content"]]))
    result[place] = {**result[place], "content": content}
    return result


def _merged(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merges the user's turns that were `made` here with the user's turns next to them."""
    result: list[dict[str, Any]] = []
    for message in messages:
        last = result[-1] if result else {}
        both = message["role"] == last.get("role") == "user"
        if both and (message.get("made") or last.get("made")):
            result[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}", "made": True}
        else:
            result.append(message)
    return result


def has_variable(template: str, variable: str) -> bool:
    """Whether a chat template uses the variable."""
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True).parse(template)
        return variable in find_undeclared_variables(parsed)
    except (TemplateSyntaxError, RecursionError):  # transformers has its own tag for an assistant's turn
        pass
    return re.search(rf"(?<![\w.'\"]){re.escape(variable)}(?![\w(])", template) is not None


def _without_tools(message: dict[str, Any]) -> dict[str, Any]:
    """A message of a chat with tools, for a template that does not support tools."""
    if message["role"] == "tool":
        told = f"Result of {message['name'] or 'the call'}:\n{message['content']}"
        return {"role": "user", "content": told, "made": True}
    if calls := message.get("tool_calls"):
        written = json.dumps([call["function"] for call in calls], ensure_ascii=False)
        return {"role": "assistant", "content": "\n".join(filter(None, [message.get("content"), written]))}
    return message
