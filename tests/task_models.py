"""The tiny models with their task runners, and transformers' own pipelines on the same files to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, pipeline

from huggingface.tasks.json_values import json_value
from huggingface.tasks.runner import TaskRunner

HEAD_OF = {
    "gpt2": "causal-lm",
    "llama": "causal-lm",
    "bart": "seq2seq-lm",
    "t5": "seq2seq-lm",
    "mbart": "seq2seq-lm",
    "bert-mlm": "masked-lm",
    "roberta-mlm": "masked-lm",
    "distilbert-sst2": "sequence-classification",
    "bert-nli": "sequence-classification",
    "bert-ner": "token-classification",
    "bert-qa": "question-answering",
    "bert-embed": "base",
    "tapas": "table-question-answering",
}
CLASS_OF = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "table-question-answering": "AutoModelForTableQuestionAnswering",
    "base": "AutoModel",
}
LONG = "the cat sat " * 600
CHAT = [{"role": "user", "content": "Where is the cat?"}]
TABLE = {"name": ["cat", "dog"], "age": ["1", "2"]}


class Models:
    """The tiny models, each loaded once, with a runner and with transformers' own pipelines."""

    def __init__(self, directory: Path, build: Callable[[str], str]) -> None:
        self.directory, self.build = directory, build
        self.runners: dict[str, TaskRunner] = {}
        self.pipelines: dict[tuple[str, str], Any] = {}

    def load(self, name: str) -> tuple[str, Any, Any]:
        """The id, the model and the tokenizer."""
        model_id = self.build(name)
        folder = self.directory / model_id
        kind = getattr(transformers, CLASS_OF[HEAD_OF[name]])
        return model_id, kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def runner(self, name: str) -> TaskRunner:
        """The runner of a model."""
        if name not in self.runners:
            self.runners[name] = TaskRunner(*self.load(name), HEAD_OF[name])
        return self.runners[name]

    def run(self, name: str, task: str, inputs: Any, **parameters: Any) -> Any:
        """A task's result; draws always begin at the same point."""
        torch.manual_seed(0)
        return self.runner(name).run(task, inputs, parameters)

    def upstream(self, name: str, task: str, inputs: Any, **parameters: Any) -> Any:
        """What `transformers.pipeline(task, model=folder)` gives for the same call."""
        if (name, task) not in self.pipelines:
            folder = self.directory / self.build(name)
            self.pipelines[name, task] = pipeline(task, model=str(folder), device="cpu")
        torch.manual_seed(0)
        return json_value(self.pipelines[name, task](copy.deepcopy(inputs), **parameters))


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Tiny models are quickest on a single thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
