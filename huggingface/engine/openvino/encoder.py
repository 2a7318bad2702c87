"""A transformers model that reads texts, to embed, classify or fill them, as an OpenVINO graph.

There is no cache: tokens go in, and all that the model's own forward pass returns comes out. `Encoder.serve` replaces
the model's own `forward` by the graph, so that callers of the model go on as before; the model's own modules do what
the graph cannot. Engine's thread only, except the building. Must not know files, tasks or tokenizers.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...cancellation import NEVER, Cancellation
from ..layers import NotBatchable
from . import graph as graphs
from .failures import infer
from .lazy_weights import Reserve, seem_whole
from .library import openvino

Tensors = dict[str, torch.Tensor]

# The largest difference of outputs from torch's, as a share of the largest number among them, or of 1 if that is
# smaller; the server's limit for batches too. Outputs of compressed weights are rounded on the way: a larger difference
# is a fault.
CLOSE: Mapping[str | None, float] = MappingProxyType({None: 1e-5, "int8": 0.1, "int4": 0.6})

# The values of inputs that are not given.
_FILLINGS: Mapping[str, int] = MappingProxyType({"attention_mask": 1, "token_type_ids": 0})

# Families with attention of their own that is known to convert for every length; the trace of another one might hold
# only one case.
_CONVERTIBLE = frozenset({"deberta-v2", "megatron-bert", "mpnet", "rembert", "roformer"})

# Lengths of the tested rows, which are computed together, with padding between them. The first are stored with the
# graph and tested at each load; the longest are tested once, when the graph is made.
_KEPT = ((21, 5, 13), (2,))
_ONCE = ((40, 40), (33, 150, 97))
_LONGEST = 520  # tokens, if the model reads as many
_LONGEST_WINDOW = 1100  # the most tokens of a row that is made longer to go past a window
_NUMBERS = 2**26  # the most numbers in an output of a tested row

# The index of the mask among the inputs of OpenVINO's attention.
_MASK = 3

# Exact products. One stream has all cores.
_PROPERTIES: Mapping[str, str] = MappingProxyType({"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"})


@dataclass(frozen=True, slots=True)
class EncoderForm:
    """The inputs and outputs of a graph.

    Each of `inputs` is (rows, tokens), integers; those in `optional` may be missing. `outputs` are the fields of the
    model's result, whose class is `kind`: its module and its name.
    """

    inputs: tuple[str, ...]
    optional: tuple[str, ...]
    outputs: tuple[str, ...]
    kind: tuple[str, str]

    @property
    def output_class(self) -> type[ModelOutput]:
        """The class of the result; the model's own module has imported it.

        Raises:
            NotBatchable: there is no such class.
        """
        found = getattr(sys.modules.get(self.kind[0]), self.kind[1], None)
        if not (isinstance(found, type) and issubclass(found, ModelOutput)):
            raise NotBatchable(f"its outputs are of a class that is not there ({self.kind[1]})")
        return found


@dataclass(frozen=True, slots=True)
class Sample:
    """A batch, and torch's results for it."""

    inputs: Tensors
    outputs: Tensors


@dataclass(frozen=True, slots=True)
class Padding:
    """How rows of different lengths become a batch: the padding token and its side; no padding if `token` is None."""

    token: int | None
    left: bool = False


class _Traced(torch.nn.Module):
    """The model with only tensors in its signature, as tracing needs it."""

    def __init__(self, model: PreTrainedModel, form: EncoderForm) -> None:
        super().__init__()
        self.model = model
        self.form = form

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = _run(self.model, dict(zip(self.form.inputs, tensors, strict=True)))
        return tuple(output[name] for name in self.form.outputs)


def find_form(model: PreTrainedModel, named: Sequence[str]) -> EncoderForm:
    """Finds the inputs and outputs for a graph of the model; `named` are the inputs that its tokenizer makes.

    Raises:
        NotBatchable: a trace cannot hold the model's forward pass.
    """
    _check_kind(model)
    known = inspect.signature(model.forward).parameters
    if not {"input_ids", "attention_mask"} <= set(known):
        raise NotBatchable("its forward pass takes no attention mask")
    ids = _some_ids(model, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole = _run(model, inputs)
    for name, value in whole.items():
        if not isinstance(value, torch.Tensor):
            raise NotBatchable(f"it gives more than one tensor as its {name}")
    names, optional = list(inputs), []
    if _gives_same(model, {"input_ids": ids}, whole):
        optional.append("attention_mask")
    if "token_type_ids" in known:
        without = _gives_same(model, {**inputs, "token_type_ids": torch.zeros_like(ids)}, whole)
        if without or "token_type_ids" in named:
            names.append("token_type_ids")
        if without:
            optional.append("token_type_ids")
    return EncoderForm(tuple(names), tuple(optional), tuple(whole), (type(whole).__module__, type(whole).__qualname__))


def _check_kind(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        raise NotBatchable("it is an encoder-decoder")
    if config._attn_implementation != "sdpa" and config.model_type not in _CONVERTIBLE:
        raise NotBatchable("its attention is code of its own, which may change with the length of the text")
    if not getattr(config, "vocab_size", None):
        raise NotBatchable("what it reads is no vocabulary's tokens")
    graphs.check_rotary(config)


def _gives_same(model: PreTrainedModel, inputs: Tensors, expected: ModelOutput) -> bool:
    try:
        given = _run(model, inputs)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return list(given) == list(expected) and _apart(given, expected, None) <= CLOSE[None]


def convert(model: PreTrainedModel, form: EncoderForm) -> Any:
    """Converts the model to a graph, float32; its constants are the model's own memory.

    Raises:
        Exception: any error of the model's code or of OpenVINO's conversion for what cannot be traced.
    """
    ov = openvino()
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder as trace  # noqa: N813 - that is all it does

    ids = _some_ids(model, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns of values that are the same for every shape here
        example = tuple(made[name] for name in form.inputs)
        # Without torch's own check of the trace, which traces again: `check` checks more.
        traced = trace(_Traced(model, form).eval(), example_input=example, trace_kwargs={"check_trace": False})
        graph = ov.convert_model(traced, example_input=example)
    for ports, names in ((graph.inputs, form.inputs), (graph.outputs, form.outputs)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    graph.reshape({name: ov.PartialShape([-1, -1]) for name in form.inputs})
    _see_something(graph)
    graph.validate_nodes_and_infer_types()
    return graph


def _see_something(graph: Any) -> None:
    """Lets a padding token, which may see no other, see all alike.

    A token that sees none would compute NaN, and spread it to the others, though they give it no weight.
    """
    ov = openvino()
    from openvino import opset13 as ops

    seen = ops.constant(np.float32(0))
    unseen = ops.constant(np.finfo(np.float32).min)
    for node in graph.get_ops():
        if node.get_type_name() == "ScaledDotProductAttention" and node.get_input_size() > _MASK:
            mask = node.input_value(_MASK)
            if mask.get_element_type() == ov.Type.boolean:
                node.input(_MASK).replace_source_output(ops.select(mask, seen, unseen).output(0))


def _run(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> ModelOutput:
    """The model's results, without keys and values for later tokens."""
    fixed = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        output: ModelOutput = model(**inputs, **fixed, return_dict=True)
    return output


# Comparing with torch -------------------------------------------------------------------------------------------------


def samples(
    model: PreTrainedModel,
    form: EncoderForm,
    padding: Padding,
    *,
    kept: bool,
    maximum: int | None = None,
    cancellation: Cancellation = NEVER,
) -> Iterator[Sample]:
    """Batches of rows of different lengths, with torch's results, for `check`.

    `kept`: the batches that are stored with the graph, otherwise those that are tested once. `maximum` is the most
    tokens that the model can read.

    Raises:
        Cancelled: by `cancellation`.
    """
    reads = _LONGEST if maximum is None else min(maximum, _LONGEST)
    for lengths in _KEPT if kept else (*_ONCE, (_longest(model, maximum, reads),)):
        cancellation.check()
        inputs = _batch(model, form, padding, [min(length, reads) if kept else length for length in lengths], maximum)
        yield Sample(inputs, dict(_run(model, inputs)))


def _longest(model: PreTrainedModel, maximum: int | None, reads: int) -> int:
    """The length of the longest tested row: past every window, if that is not too far."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) or 0 for name in ("sliding_window", "local_attention", "attention_window")]
    wanted = max([reads, *(each + 9 for each in windows if isinstance(each, int) and each < _LONGEST_WINDOW)])
    width = config.vocab_size if model.get_output_embeddings() is not None else 1
    return max(1, min(wanted, maximum or wanted, _NUMBERS // width))


def _batch(
    model: PreTrainedModel, form: EncoderForm, padding: Padding, lengths: Sequence[int], maximum: int | None
) -> Tensors:
    lengths = [min(length, maximum or length) for length in lengths]
    longest = max(lengths)
    if padding.token is None:
        lengths = [longest] * len(lengths)
    ids = _some_ids(model, (len(lengths), longest))
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    if (getattr(model.config, "type_vocab_size", None) or 0) > 1:
        types[:, longest // 2 :] = 1
    for row, length in enumerate(lengths):
        beside = slice(longest - length) if padding.left else slice(length, longest)
        mask[row, beside] = types[row, beside] = 0
        if padding.token is not None:
            ids[row, beside] = padding.token
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {name: made[name] for name in form.inputs}


def _some_ids(model: PreTrainedModel, shape: tuple[int, int]) -> torch.Tensor:
    """Token ids spread over the vocabulary; special tokens, at either end of it, are left out."""
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(size // 8, max(size - size // 8, size // 8 + 1), shape, generator=generator)


def check(encoder: Encoder, expected: Sequence[Sample], quantization: str | None = None) -> None:
    """Checks that the graph gives torch's results.

    Raises:
        NotBatchable: it does not; the message says how much they differ.
    """
    for sample in expected:
        apart = _apart(encoder.compute(sample.inputs), sample.outputs, sample.inputs["attention_mask"].bool())
        if not apart <= CLOSE[quantization]:
            raise NotBatchable(f"its outputs lie {apart:.2g} from torch's")


def _apart(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], mask: torch.Tensor | None) -> float:
    """The largest difference of outputs, relative to the largest expected number; values at padding do not count."""
    apart = 0.0
    for name, wanted in expected.items():
        seen = given[name]
        if seen.shape != wanted.shape:
            return float("inf")
        if mask is not None and wanted.shape[:2] == mask.shape:
            seen, wanted = seen[mask], wanted[mask]
        difference = (seen - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)
        apart = max(apart, float(difference) if torch.isfinite(difference) else float("inf"))
    return apart


# Serving with the graph -----------------------------------------------------------------------------------------------


class Encoder:
    """Computes the results of a model's forward pass."""

    def __init__(self, graph: Any, form: EncoderForm) -> None:
        """Compiles a `graph`."""
        self.weight_bytes, self.copied_bytes = graphs.constant_bytes(graph)
        self._form = form
        self._class = form.output_class
        self._tensor = openvino().Tensor
        compiled = openvino().Core().compile_model(graph, "CPU", dict(_PROPERTIES))
        self._request = compiled.create_infer_request()
        self._reserve: Reserve | None = None

    def compute(self, inputs: Mapping[str, torch.Tensor]) -> Tensors:
        """All outputs for `inputs`, which are all that the graph takes, each (rows, tokens)."""
        arrays = {name: np.ascontiguousarray(inputs[name].numpy()) for name in self._form.inputs}
        for name, array in arrays.items():
            self._request.set_tensor(name, self._tensor(array, shared_memory=True))
        infer(self._request)
        return {name: torch.from_numpy(self._request.get_tensor(name).data.copy()) for name in self._form.outputs}

    def serve(self, shell: PreTrainedModel, reserve: Reserve) -> None:
        """Computes the model's forward pass from now on; `reserve` has the weights for what only its own modules can
        do."""
        self._reserve = reserve
        own = shell.forward
        signature = inspect.signature(own)
        config = shell.config.get_text_config()
        vocabulary = shell.get_input_embeddings().num_embeddings
        maximum = getattr(config, "max_position_embeddings", None)
        types = getattr(config, "type_vocab_size", None)

        @functools.wraps(own)
        def forward(*arguments: Any, **named: Any) -> Any:
            reserve.release_idle()
            given = {
                name: value
                for name, value in signature.bind(*arguments, **named).arguments.items()
                if value is not None and value != {}
            }
            as_tuple = not given.pop("return_dict", getattr(shell.config, "return_dict", True))
            if given.get("use_cache") is False:
                del given["use_cache"]
            inputs = self._whole(given)
            if inputs is None or (maximum is not None and inputs["input_ids"].shape[1] > maximum > 0):
                reserve.fetch()
                return own(*arguments, **named)
            _check_range(inputs["input_ids"], vocabulary)
            if types and "token_type_ids" in inputs:
                _check_range(inputs["token_type_ids"], types)
            output = self._class(**self.compute(inputs))
            return output.to_tuple() if as_tuple else output

        shell.forward = forward
        base = shell.base_model
        if base is not shell:
            seem_whole(base)
            base.register_forward_pre_hook(lambda *_: reserve.fetch())

    def release_idle(self) -> None:
        """Drops weights that were loaded on demand, after some time without requests."""
        if self._reserve is not None:
            self._reserve.unload()

    def _whole(self, given: Mapping[str, Any]) -> Tensors | None:
        """All inputs of the graph; None where a given input is unknown to it, or a needed one is missing."""
        ids = given.get("input_ids")
        if (
            not isinstance(ids, torch.Tensor)
            or ids.dim() != 2
            or not ids.numel()
            or not set(given) <= set(self._form.inputs)
        ):
            return None
        inputs = {}
        for name in self._form.inputs:
            value = given.get(name)
            if value is None and name in self._form.optional:
                value = torch.full_like(ids, _FILLINGS[name])
            if not isinstance(value, torch.Tensor) or value.shape != ids.shape or value.is_floating_point():
                return None
            inputs[name] = value.to(torch.int64)
        return inputs


def _check_range(ids: torch.Tensor, size: int) -> None:
    """Refuses ids for which a table has no row, as torch does: OpenVINO would read a row of zeros.

    Raises:
        IndexError: an id is not below `size`.
    """
    least, maximum = torch.aminmax(ids)
    if int(least) < 0 or int(maximum) >= size:
        raise IndexError("index out of range in self")
