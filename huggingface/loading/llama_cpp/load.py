"""llama.cpp as a backend: decides whether it computes a model, and opens the model's GGUF file.

The loader calls it, on its thread. Must not know the registry or the manager.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from ...cancellation import Cancellation
from ...engine.layers import NotBatchable
from ...engine.llama_cpp import agreement, library
from ...engine.llama_cpp.runner import LlamaRunner
from ...engine.openvino.lazy_weights import Reserve
from ...engine.slots import SMALLEST
from ...engine.torch.lora import Adapters
from ...engine.torch.parity import Expected, as_tensors, from_tensors
from ...errors import LocalLLMError, ModelUnsupported, OutOfMemory
from ...host.memory import few_file_pages, forget_frames
from ...model.memory import ModelMemory
from ...model.parts import Serving
from ...types import Estimate, LoadOptions
from ..backend import Declined, Load, Opened, check_named, unable, unsuited
from ..estimate import Weights, estimate
from ..kept import KeptFolder, write_json
from ..lora import AttachedAdapters
from ..plan import Plan, file_bytes, gguf_paths, marks_of
from ..shell import Shell, open_shell
from ..torch import TorchCompute, check_cache

logger = logging.getLogger(__name__)

_WIDE = frozenset({"F32", "F16", "BF16"})  # kinds of tensors that are not rounded to 8 bits or fewer

# Increase this whenever earlier findings must not be used any more.
_FORMAT = 1


class LlamaCpp:
    """llama.cpp as a `Backend`."""

    name = "llama.cpp"

    def offers(self, plan: Plan) -> bool:
        """Whether the model is a GGUF file, whose weights are rounded already."""
        return plan.gguf is not None

    def why_not(self, plan: Plan, options: LoadOptions, adapters: Mapping[str, Any]) -> Declined | None:  # noqa: ARG002 - the protocol's
        """A model that is no GGUF file, a setting, a missing package, or a record that its numbers are wrong."""
        if (reason := _rule_against(plan, adapters)) is not None:
            return unsuited(self.name, reason)
        try:
            library.library()
        except library.LibraryUnusable as error:
            message = f"Model '{plan.record.model_id}' cannot be computed by llama.cpp: {error}"
            return Declined(str(error), ModelUnsupported(message))
        reason = _Findings(plan).refused
        return None if reason is None else unable(self.name, plan, reason)

    def estimate(self, plan: Plan, options: LoadOptions, before: Declined | None) -> Estimate:
        """The file, which is mapped, what a step takes, and the KV cache."""
        size = file_bytes(plan, options) + _step_bytes(plan)
        return estimate(plan, options, self.name, lambda _: Weights(size, {plan.placement.device: size}), before)

    def convert(self, *_: object, aside: bool) -> None:
        """Nothing to make: the file is read as it is."""

    def open(self, load: Load) -> Opened | Declined:
        """Reads the model without its weights; the file is mapped when it is served."""
        plan, options = load.plan, load.options
        shell = open_shell(plan, options)
        compute = LlamaCompute(plan, shell, self.estimate(plan, options, None).token_bytes)
        return Opened(compute, "cpu", untried=not compute.tried)


class LlamaCompute:
    """A model that llama.cpp computes, as a `Compute`."""

    backend = LlamaCpp.name

    def __init__(self, plan: Plan, shell: Shell, token_bytes: int) -> None:
        """`token_bytes` is what the keys and values of one token take."""
        self.model = shell.model
        self.adapters: Adapters = AttachedAdapters("", shell.model, {})
        self._plan = plan
        self._files = gguf_paths(plan)
        self._shell = shell
        self._token_bytes = token_bytes
        self._findings = _Findings(plan)

    @property
    def tried(self) -> bool:
        """Whether the file has been compared with its unpacked model."""
        return self._findings.expected() is not None

    @property
    def weights(self) -> Mapping[str, int]:
        """Bytes of the file, or of its parts, which are mapped."""
        return {"cpu": sum(path.stat().st_size for path in self._files)}

    def serve(self, memory: ModelMemory, cancellation: Cancellation) -> Serving:
        """Serves in a batch; where llama.cpp gives other numbers, by torch, unless it was asked for by name."""
        reserve = Reserve(self.model, self._shell.read, memory.take_own, self._shell.weights)
        try:
            known = self._findings.expected()
            wanted = known or self._try(memory, cancellation)
            rows = self.model.get_input_embeddings().num_embeddings
            # Some processors get the weights in another layout, in memory of their own.
            with few_file_pages(*self._files), ExitStack() as failed:
                runner = LlamaRunner(self._files[0], rows, self._token_bytes, reserve, half=_half(self._plan))
                failed.callback(runner.close)
                close = _close(self._plan)
                agreement.check(runner, wanted.rows, wanted.columns, close, cancellation, alone=known is None)
                failed.pop_all()
            if known is None:
                self._findings.keep(wanted)
            return Serving(self.backend, runner)
        except library.NoMemory as error:
            raise OutOfMemory(f"Not enough memory to try model '{self._plan.record.model_id}'") from error
        except (NotBatchable, library.FileUnusable) as error:
            logger.warning("a %s is not computed by llama.cpp: %s", type(self.model).__name__, error)
            self._findings.refuse(str(error))
            check_named(self._plan, unable(self.backend, self._plan, str(error)))
            check_cache(self._plan)
            forget_frames(error)
            declined = str(error)
        memory.set_weights({})
        reserve.fetch()
        reserve.stay()
        compute = TorchCompute(self._plan.head, self.model)
        memory.set_weights(compute.weights)
        return replace(compute.serve(memory, cancellation), declined=declined)

    def _try(self, memory: ModelMemory, cancellation: Cancellation) -> _Wanted:
        """What the unpacked model computes, while llama.cpp computes the file in a process of its own.

        Raises:
            FileUnusable, NoMemory: as `library.try_out`.
            NotBatchable, OutOfMemory: as `_expect`.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="try") as beside:
            tried = beside.submit(library.try_out, self._files[0], cancellation.until, half=_half(self._plan))
            wanted = self._expect(memory, cancellation)
            tried.result()
        return wanted

    def _expect(self, memory: ModelMemory, cancellation: Cancellation) -> _Wanted:
        """What the unpacked model computes.

        Raises:
            NotBatchable: its layers cannot be unpacked one by one.
            OutOfMemory: there is no memory for one.
        """
        from . import reference  # takes gguf, which only a file that is new here needs

        size = reference.needed_bytes(self.model)
        if not memory.take_own(size):
            raise OutOfMemory(f"Not enough memory to compare model '{self._plan.record.model_id}' ({size} bytes)")
        try:
            vocabulary = self.model.get_input_embeddings().num_embeddings
            sequences = agreement.sequences(self.model.config, vocabulary)
            return _Wanted(*reference.expected(self._plan, self._files[0], sequences, cancellation))
        except (NotBatchable, LocalLLMError, MemoryError):
            raise
        except Exception as error:
            logger.info("the unpacked model cannot be computed", exc_info=error)
            raise NotBatchable(f"its unpacked model cannot be computed ({type(error).__name__})") from error
        finally:
            memory.take_own(-size)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What an unpacked model computes: `rows`, with a logit of each token in `columns`."""

    rows: Sequence[Expected]
    columns: torch.Tensor


class _Findings(KeptFolder):
    """What is known of a GGUF file: the numbers of its unpacked model, or why llama.cpp does not compute it."""

    def __init__(self, plan: Plan) -> None:
        marks = marks_of(plan.folder, gguf_paths(plan))
        name = marks[0][0]
        made_of = [_FORMAT, library.PINNED, transformers.__version__, torch.backends.cpu.get_cpu_capability(), marks]
        called = hashlib.sha256(f"{name}{'/half' if _half(plan) else ''}".encode()).hexdigest()[:8]
        super().__init__(plan.folder, f"llama.cpp-{called}", made_of)

    def expected(self) -> _Wanted | None:
        """The unpacked model's numbers, if they are stored."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(self.path / "expected.safetensors")
            columns = tensors.pop("columns")
            return _Wanted(from_tensors(tensors), columns)
        except (OSError, SafetensorError, KeyError):
            return None

    def keep(self, wanted: _Wanted) -> None:
        """Stores the unpacked model's numbers, if the folder can be written to."""
        from safetensors.torch import save_file

        def write(folder: Path) -> None:
            tensors = {**as_tensors(wanted.rows), "columns": wanted.columns}
            save_file(tensors, os.fspath(folder / "expected.safetensors"))
            write_json(folder / "about.json", {})

        with suppress(OSError):
            self.write(write)


def _rule_against(plan: Plan, adapters: Mapping[str, Any]) -> str | None:
    """The rule that keeps llama.cpp from computing such a model with these settings; None if none does."""
    placement = plan.placement
    rules = (
        (plan.gguf is None, "its weights are no GGUF file"),
        (plan.head != "causal-lm", "it does not continue texts"),
        (placement.device != "cpu" or placement.device_map is not None, "it is not on the CPU alone"),
        (placement.dtype is not torch.float32, "it rounds as the file does, and dtype says otherwise"),
        (placement.kv_dtype not in (None, torch.float32, torch.float16), "its keys and values are float32 or float16"),
        (placement.quantization is not None, "the file is quantized already"),
        (bool(adapters), "it has adapters"),
        (placement.attention is not None, "attn_implementation is for torch"),
        (placement.compiles, "compile is for torch"),
    )
    return next((reason for applies, reason in rules if applies), None)


def _close(plan: Plan) -> float:
    """How close the logits are to the unpacked model's."""
    kinds = {tensor.type for tensor in ((plan.gguf and plan.gguf.tensors) or {}).values()}
    return agreement.CLOSE_WIDE if kinds <= _WIDE else agreement.CLOSE


def _half(plan: Plan) -> bool:
    """Whether keys and values are float16."""
    return plan.placement.kv_dtype is torch.float16


def _step_bytes(plan: Plan) -> int:
    """Bytes that the first context takes besides keys and values."""
    config = plan.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)  # a recurrent model has none
    return library.context_bytes(SMALLEST, heads, config.vocab_size, config.hidden_size, half=_half(plan))
