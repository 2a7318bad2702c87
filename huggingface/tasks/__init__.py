"""The tasks, the model types, and the kind of model (head) that each task needs.

Names and tables only, nothing that runs; any thread may read them. Must not know pydantic, HTTP, torch or transformers:
validation and model descriptions import this module, so it must stay cheap.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from ..errors import InvalidRequest

Head = Literal[
    "causal-lm",
    "seq2seq-lm",
    "masked-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "table-question-answering",
    "base",
]

HEADS: tuple[Head, ...] = get_args(Head)


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a model.

    `heads` are those that can always do it. `generates`: the task writes text token by token and so takes the
    generation parameters. `aliases` are other names with the same meaning.
    """

    name: str
    heads: tuple[Head, ...]
    summary: str
    aliases: tuple[str, ...] = ()
    generates: bool = False


@dataclass(frozen=True, slots=True)
class ModelType:
    """A value of a record's `model_type`: its own `task`, and the `heads` to load it with, the likeliest first."""

    name: str
    task: str
    heads: tuple[Head, ...]
    summary: str


def _table(*tasks: Task) -> Mapping[str, Task]:
    return MappingProxyType({task.name: task for task in tasks})


TASKS: Mapping[str, Task] = _table(
    Task("text-generation", ("causal-lm",), "Continue a text, or answer a chat.", generates=True),
    Task("text2text-generation", ("seq2seq-lm",), "Turn a text into another.", generates=True),
    Task("summarization", ("seq2seq-lm",), "Summarize a text.", generates=True),
    Task("translation", ("seq2seq-lm",), "Translate a text.", generates=True),
    Task("question-answering", ("question-answering",), "Find the answer to a question in a text."),
    Task("fill-mask", ("masked-lm",), "Fill in a masked token."),
    Task(
        "text-classification",
        ("sequence-classification",),
        "Label a text, or a pair of texts.",
        aliases=("sentiment-analysis",),
    ),
    Task("token-classification", ("token-classification",), "Label the tokens of a text.", aliases=("ner",)),
    Task("zero-shot-classification", ("sequence-classification",), "Sort a text into labels of your own."),
    # Only some encoder-decoder models can: those that make the decoder's input from the encoder's (BART does). Models
    # for tables do not read text. A model's TaskRunner knows what this model can do beyond the table.
    Task(
        "feature-extraction",
        tuple(head for head in HEADS if head not in ("seq2seq-lm", "table-question-answering")),
        "Give the model's last hidden states.",
    ),
    Task("table-question-answering", ("table-question-answering",), "Answer a question from a table."),
)

GENERATION_TASKS: frozenset[str] = frozenset(name for name, task in TASKS.items() if task.generates)

_NAMES: Mapping[str, str] = MappingProxyType(
    {name: task.name for task in TASKS.values() for name in (task.name, *task.aliases)}
)
_TRANSLATION = re.compile(r"translation_[^_\s]+_to_[^_\s]+")


def canonical_task(task: str) -> str:
    """The name in `TASKS` for `task`: itself, an alias's task, or `translation` (for `translation_en_to_fr`).

    Raises:
        InvalidRequest: the task is unknown; the message lists the known names.
    """
    if task in _NAMES:
        return _NAMES[task]
    if _TRANSLATION.fullmatch(task):
        return "translation"
    names = ", ".join((*_NAMES, "translation_xx_to_yy"))
    raise InvalidRequest(f"Invalid value for field 'task': unknown task '{task}'. Supported tasks: {names}", "task")


def supported_tasks(head: Head) -> tuple[str, ...]:
    """The tasks that every model with this head can do, aliases included, in the table's order."""
    return tuple(name for task in TASKS.values() if head in task.heads for name in (*task.aliases, task.name))


def _types() -> Mapping[str, ModelType]:
    types = {
        name: ModelType(name, task.name, task.heads, task.summary)
        for task in TASKS.values()
        for name in (task.name, *task.aliases)
    }
    chat = ModelType("conversational", "text-generation", ("causal-lm", "seq2seq-lm"), "Hold a conversation.")
    types[chat.name] = chat
    # A model registered for its hidden states is loaded without a head, whose weights would never be used.
    bare = types["feature-extraction"]
    types[bare.name] = ModelType(bare.name, bare.task, ("base",), bare.summary)
    return MappingProxyType(types)


MODEL_TYPES: Mapping[str, ModelType] = _types()
