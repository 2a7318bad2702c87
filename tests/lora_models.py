"""LoRA adapters for the tests, made by peft as a training would leave them, and models served with them.

`save_adapter` writes a folder as peft saves it, its factors by chance and large enough to change what the model says.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from causal_models import build
from peft import LoraConfig, PeftModel, get_peft_model

from huggingface.engine.batch import TransformersBatch, sequence_of
from huggingface.engine.constraints import Constraints
from huggingface.engine.engine import Engine
from huggingface.engine.generate_fallback import Solo
from huggingface.engine.input_processor import Preparer
from huggingface.engine.layers import NotBatchable
from huggingface.engine.logprobs import TokenTexts
from huggingface.engine.ticket import Ticket
from huggingface.engine.torch.parity import batch_runner
from huggingface.loading.lora import AttachedAdapters, attach
from huggingface.modeling.demand import MemoryClaims
from huggingface.tasks.generation import generation_arguments
from huggingface.tasks.runner import TaskRunner
from huggingface.types import Chunk, EngineOptions, GenerationRequest


def save_adapter(model: Any, folder: Path, seed: int, **config: Any) -> Path:
    """An adapter of `model`, which stays as it is."""
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, **config}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
    adapted.save_pretrained(folder)
    return folder


def reference(model: Any, folder: Path | None) -> Any:
    """A copy of `model` with one adapter at work, as peft itself loads it."""
    copied = copy.deepcopy(model)
    return copied.eval() if folder is None else PeftModel.from_pretrained(copied, folder).eval()


class Served:
    """A model with adapters, served by the engine's own parts."""

    def __init__(self, name: str, folders: Mapping[str, Path], model: Any = None, **options: Any) -> None:
        plain, self.tokenizer = build(name)
        self.model = plain if model is None else model
        self.adapters: AttachedAdapters = attach(f"tiny/{name}", self.model, folders, self.tokenizer)
        engine_options = EngineOptions(**options)
        constraints = Constraints(self.tokenizer, self.model.config.vocab_size, [])
        texts = TokenTexts(self.tokenizer, lambda: constraints.tokens)
        try:
            self.runner: Any = batch_runner(self.model, engine_options.findings, adapters=self.adapters)
            self.reason = ""
        except NotBatchable as error:
            self.runner, self.reason = None, str(error)
        self.batch = TransformersBatch(name, self.runner, texts, engine_options) if self.runner else None
        active = self.adapters.active
        self.tasks = TaskRunner(name, self.model, self.tokenizer, "causal-lm", active=active)
        self.engine = Engine(name, self.batch, self.tasks, engine_options)
        self.preparer = Preparer(
            name,
            self.model,
            self.tokenizer,
            contexts=(512, 512),
            room=None,
            constraints=constraints,
            arguments=lambda given: generation_arguments(given, self.model),
            check_adapter=self.adapters.check,
        )
        claims = MemoryClaims(name, self.model, lambda _: True, lambda: None, lambda: False)
        self.solo = Solo(name, self.model, self.tokenizer, texts, claims, active)

    def generate(self, prompt: str, parameters: Mapping[str, Any], adapter: str | None = None) -> Ticket:
        """Queue a generation."""
        prepared = self.preparer.prepare(GenerationRequest(parameters, prompt=prompt, adapter=adapter))
        ticket = Ticket(prepared.prompt_tokens, prepared.end)
        if self.batch is not None and prepared.resolved is not None:
            sequence = sequence_of(prepared, prepared.resolved, self.tokenizer, ticket, False)
            self.engine.submit(sequence)
        else:
            self.engine.submit_job(
                ticket, lambda cancellation: self.solo.generate(prepared, False, 0.0, ticket.put, cancellation)
            )
        return ticket

    def last(self, prompt: str, parameters: Mapping[str, Any], adapter: str | None = None) -> Chunk:
        """The last chunk of an answer."""
        return list(self.generate(prompt, parameters, adapter))[-1]

    def text(self, prompt: str, parameters: Mapping[str, Any], adapter: str | None = None) -> str:
        """The text of an answer."""
        return self.last(prompt, parameters, adapter).whole or ""

    def run(self, task: str, inputs: Any, parameters: Mapping[str, Any]) -> Any:
        """The result of a task."""
        call = self.tasks.submit(task, inputs, parameters)
        self.engine.wake()
        return call.future.result(60)

    def expect(self, model: Any, prompt: str, parameters: Mapping[str, Any]) -> str:
        """What `generate` of a model gives, called as a notebook would."""
        inputs = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            output = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **parameters)
        return str(self.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True))
