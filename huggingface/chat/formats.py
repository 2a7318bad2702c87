"""In which form a model writes its calls and its reasoning: told from its chat template and its added tokens.

Sources: the chat templates of the models named below; vLLM's tool parsers; "Function calling" in transformers' docs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Template = str | Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How calls are written.

    `begin` comes before a call, or before a list of them, `end` after it; where `begin` is empty an answer that is
    nothing but calls counts as such. `arguments` is the arguments' name within a call. `special_tokens` are to be left
    in the text, where the model has them as such. `between` stands between the name and the arguments, where a call is
    no JSON object of both.
    """

    name: Literal["hermes", "llama", "mistral", "json"]
    begin: str
    end: str
    arguments: str
    special_tokens: tuple[str, ...]
    id_length: int = 24  # Mistral's templates refuse ids of another length than 9
    between: str = ""


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", "arguments", ("<tool_call>", "</tool_call>"))
LLAMA = ToolFormat("llama", "<|python_tag|>", "", "parameters", ("<|python_tag|>",))
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", "arguments", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), 9)
MISTRAL_ARGS = replace(MISTRAL, between="[ARGS]")  # since Mistral Small 3.2 and Devstral
JSON = ToolFormat("json", "", "", "arguments", ())


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """What a model puts around what it thinks."""

    open: str
    close: str

    @property
    def special_tokens(self) -> tuple[str, str]:
        """What is to be left in the text, where the model has it as special tokens."""
        return self.open, self.close


_REASONING = (
    ReasoningTags("<think>", "</think>"),
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>"),
)


def find_tool_format(template: Template, added_tokens: Collection[str]) -> ToolFormat:
    """The form of a model's calls; `added_tokens` are texts of the tokens added to its vocabulary.

    It is `JSON` where the template takes no tools: see `describe_tools`.
    """
    text = _text(template)
    if not takes_tools(template):
        return JSON
    if "<tool_call>" in text:
        return HERMES
    if "[TOOL_CALLS]" in text:
        return MISTRAL_ARGS if MISTRAL_ARGS.between in text else MISTRAL
    if "<|python_tag|>" in text or "<|python_tag|>" in added_tokens:
        return LLAMA
    if "<tool_call>" in added_tokens:
        return HERMES
    if re.search(r"""["']parameters["']\s*:""", text) and "<|start_header_id|>" in text:
        return LLAMA
    return JSON


def find_reasoning(template: Template, added_tokens: Collection[str]) -> ReasoningTags | None:
    """What a model puts around what it thinks; None for one that does not think aloud."""
    text = _text(template)
    for tags in _REASONING:
        if tags.close in text or (tags.open in added_tokens and tags.close in added_tokens):
            return tags
    return None


def begins_inside_reasoning(prompt_end: str, tags: ReasoningTags) -> bool:
    """Whether a prompt that ends so leaves its answer in the midst of the reasoning."""
    return prompt_end.rstrip().endswith(tags.open)


def takes_tools(template: Template) -> bool:
    """Whether a chat template tells the model of tools."""
    return re.search(r"\btools\b", _text(template)) is not None


def describe_tools(tools: Sequence[Mapping[str, Any]], choice: str) -> str:
    """Tells a model whose template knows no tools of them, and how to call one: in the form `JSON`.

    `choice` is `auto`, `required`, or the name of the function to call.
    """
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    when = {
        "auto": "If a function helps to answer, reply with nothing but a JSON object that calls it",
        "required": "Reply with nothing but a JSON object that calls one of them",
    }.get(choice, f"Reply with nothing but a JSON object that calls {choice}")
    return (
        f"You can call functions. Each is described by a JSON object:\n{functions}\n\n"
        f'{when}: {{"name": "the function\'s name", "arguments": {{its arguments}}}}'
    )


def _text(template: Template) -> str:
    if template is None:
        return ""
    return template if isinstance(template, str) else "\n".join(template.values())
