"""A model that is built in half precision is built as ever, and the threads beside it compute in their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from changed_models import copy, edit
from conftest import PATIENCE
from torch.overrides import TorchFunctionMode
from transformers import modeling_utils

from huggingface.loading import loader
from huggingface.loading.default_dtype import local_dtype
from huggingface.registry.records import LoadSettings, ModelRecord
from huggingface.types import LoadOptions

HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def process_wide(dtype: torch.dtype, model_class_name: str | None = None) -> Iterator[None]:
    """What transformers' own context manager does: the reference."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def seen() -> set[torch.dtype]:
    """The default dtype, in each way in which a thread may come upon it."""
    return {
        torch.get_default_dtype(),
        torch.Tensor(1).dtype,
        torch.ones(1).dtype,
        torch.tensor(1.5).dtype,
        (torch.tensor([1], device="cpu") / 2).dtype,
        torch.result_type(torch.tensor([1]), 0.5),
    }


def elsewhere() -> set[torch.dtype]:
    """What a thread that has begun now sees."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(seen).result()


# While a model is built -----------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> tuple[ModelRecord, LoadOptions, Path]:
    """A tiny Llama whose config says that its weights are in bfloat16."""
    folder = copy(tmp_path, "llama", "tiny/half")
    edit(folder, torch_dtype="bfloat16")
    return ModelRecord("tiny/half", "half", "text-generation"), LoadOptions(tmp_path, device="cpu"), folder


@pytest.fixture
def watched(
    llama: tuple[ModelRecord, LoadOptions, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[set[torch.dtype], set[torch.dtype]]]]:
    """What the building thread and one that was there before it see, from inside the constructor of each Llama."""
    found = []
    with ThreadPoolExecutor(1) as other:
        assert other.submit(seen).result() == {torch.float32}

        class Watched(transformers.LlamaForCausalLM):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                found.append((seen(), other.submit(seen).result()))

        mapping = transformers.AutoModelForCausalLM._model_mapping._extra_content
        monkeypatch.setitem(mapping, transformers.LlamaConfig, Watched)
        yield found


@pytest.mark.parametrize("dtype", HALVES)
def test_a_thread_beside_a_load_in_half_precision_keeps_its_default_dtype(
    dtype: torch.dtype, watched: list[Any], llama: tuple[ModelRecord, LoadOptions, Path]
) -> None:
    loaded = loader.load(*llama, settings=LoadSettings(dtype=str(dtype).removeprefix("torch.")))
    loaded.close()
    assert watched == [({dtype}, {torch.float32})]
    assert seen() == {torch.float32}


def test_a_thread_beside_an_estimate_of_a_model_in_half_precision_keeps_its_default_dtype(
    watched: list[Any], llama: tuple[ModelRecord, LoadOptions, Path]
) -> None:
    loader.estimate(*llama)
    assert watched == [({torch.bfloat16}, {torch.float32})]
    assert seen() == {torch.float32}


def test_two_threads_build_under_a_dtype_of_their_own_at_once() -> None:
    inside, done = threading.Barrier(2, timeout=PATIENCE), threading.Barrier(2, timeout=PATIENCE)

    def build(dtype: torch.dtype) -> set[torch.dtype]:
        with local_dtype(dtype):
            inside.wait()
            found = seen()
            done.wait()
            return found

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(build, HALVES)) == [{dtype} for dtype in HALVES]


# What is built --------------------------------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
PAIR = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
XGLM = {"vocab_size": 99, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.5] * 4}

# Of each family: its config, what it adds to the shape, and the model.
FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any], Any]] = {
    "bert": (transformers.BertConfig, SHAPE, transformers.AutoModelForMaskedLM),
    "bloom": (transformers.BloomConfig, {**SHAPE, "n_layer": 2, "n_head": 4}, transformers.AutoModelForCausalLM),
    "deberta-v2": (
        transformers.DebertaV2Config,
        {**SHAPE, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]},
        transformers.AutoModelForMaskedLM,
    ),
    "falcon": (transformers.FalconConfig, {**SHAPE, "alibi": True}, transformers.AutoModelForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, {**SHAPE, "head_dim": 8}, transformers.AutoModelForCausalLM),
    "gpt2": (
        transformers.GPT2Config,
        {"vocab_size": 99, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
        transformers.AutoModelForCausalLM,
    ),
    "llama": (transformers.LlamaConfig, SHAPE, transformers.AutoModelForCausalLM),
    "m2m_100": (transformers.M2M100Config, PAIR, transformers.AutoModelForSeq2SeqLM),
    "mamba": (transformers.MambaConfig, {**SHAPE, "state_size": 4}, transformers.AutoModelForCausalLM),
    "marian": (
        transformers.MarianConfig,
        {**PAIR, "pad_token_id": 98, "decoder_start_token_id": 98},
        transformers.AutoModelForSeq2SeqLM,
    ),
    "phi3": (
        transformers.Phi3Config,
        {**SHAPE, "max_position_embeddings": 128, "original_max_position_embeddings": 64, "rope_parameters": LONG},
        transformers.AutoModelForCausalLM,
    ),
    "t5": (transformers.T5Config, T5, transformers.AutoModelForSeq2SeqLM),
    "xglm": (transformers.XGLMConfig, XGLM, transformers.AutoModelForCausalLM),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_built_as_under_the_default_dtype_of_the_process(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, shape, auto = FAMILIES[family]

    def build(device: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        with torch.device(device), torch.no_grad():
            model = auto.from_config(config(**shape), dtype=dtype)
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    assert modeling_utils.local_torch_dtype is local_dtype
    ours = {device: build(device) for device in ("cpu", "meta")}
    with monkeypatch.context() as patch:
        patch.setattr(modeling_utils, "local_torch_dtype", process_wide)
        theirs = {device: build(device) for device in ("cpu", "meta")}
    assert dtype in {tensor.dtype for tensor in ours["meta"].values()}
    for device in ("cpu", "meta"):
        # Also the dtypes, the shapes and the devices.
        torch.testing.assert_close(ours[device], theirs[device], rtol=0, atol=0, equal_nan=True)


WHOLE = torch.tensor([1, 3, 259])
FACTS = WHOLE > 2
WIDE = torch.tensor([1 / 3, 2.0, 4.0], dtype=torch.float64)
SINGLE = WIDE.float()

# What torch makes of it depends on the default dtype, or must not.
EXPRESSIONS: dict[str, Callable[[], Any]] = {
    "ones": lambda: torch.ones(2),
    "a dtype that is None": lambda: torch.zeros(2, dtype=None),
    "a dtype that is said": lambda: torch.zeros(2, dtype=torch.float32),
    "an array that is given": lambda: torch.ones(3, out=torch.empty(3, dtype=torch.float64)),
    "rand": lambda: torch.rand(4),
    "randn": lambda: torch.randn(4),
    "normal": lambda: torch.normal(0.0, 1.0, (4,)),
    "normal of tensors": lambda: torch.normal(WIDE, 1.0),
    "eye": lambda: torch.eye(2),
    "linspace": lambda: torch.linspace(0, 1, 7),
    "logspace": lambda: torch.logspace(0, 1, 7),
    "hann_window": lambda: torch.hann_window(7),
    "fftfreq": lambda: torch.fft.fftfreq(7),
    "scalar_tensor": lambda: torch.scalar_tensor(1),
    "arange of whole numbers": lambda: torch.arange(5),
    "arange of floats": lambda: torch.arange(0, 1, 0.1),
    "arange of a wide tensor": lambda: torch.arange(torch.tensor(3.0, dtype=torch.float64)),
    "full of a float": lambda: torch.full((2,), 1 / 3),
    "full of a tensor": lambda: torch.full((2,), torch.tensor(1 / 3, dtype=torch.float64)),
    "full of a whole number": lambda: torch.full((2,), 7),
    "full of a truth value": lambda: torch.full((2,), True),
    "tensor of a float": lambda: torch.tensor(1 / 3),
    "tensor of floats and whole numbers": lambda: torch.tensor([[1, 2], [3, 1 / 3]]),
    "tensor of whole numbers": lambda: torch.tensor([1, 2]),
    "tensor of nothing": lambda: torch.tensor([]),
    "tensor of tensors": lambda: torch.tensor([torch.tensor(1), 0.5]),
    "tensor of single tensors": lambda: torch.tensor([torch.tensor(1.0, dtype=torch.float32), 0.5]),
    "tensor of an array": lambda: torch.tensor(np.ones(2, dtype=np.float32)),
    "tensor of arrays' numbers": lambda: torch.tensor([np.float32(0.1), 0.1]),
    "tensor of half numbers": lambda: torch.tensor([np.float16(0.1), 0.1]),
    "tensor of a number of an array": lambda: torch.tensor(np.float64(0.1)),
    "as_tensor of floats": lambda: torch.as_tensor([1 / 3]),
    "as_tensor of a tensor": lambda: torch.as_tensor(SINGLE),
    "asarray of a float": lambda: torch.asarray(1 / 3),
    "asarray of an array": lambda: torch.asarray(np.ones(2)),
    "a whole number divided": lambda: WHOLE / 3,
    "whole numbers divided": lambda: torch.div(WHOLE, torch.tensor(7)),
    "whole numbers divided down": lambda: WHOLE // 2,
    "a number divided by whole ones": lambda: 1 / WHOLE,
    "whole numbers times a float": lambda: WHOLE * 0.3,
    "a float and whole numbers": lambda: 0.3 - WHOLE,
    "a float to the power of whole numbers": lambda: 1.01**WHOLE,
    "whole numbers to the power of a float": lambda: torch.pow(WHOLE, 0.5),
    "roots": lambda: torch.sqrt(WHOLE),
    "a method": lambda: WHOLE.exp().log(),
    "truth values divided": lambda: FACTS / 3,
    "truth values times a float": lambda: FACTS * 0.3,
    "single and whole numbers": lambda: SINGLE * WHOLE,
    "single numbers divided": lambda: SINGLE / 3,
    "a choice of floats": lambda: torch.where(FACTS, 1 / 3, 0.0),
    "a choice of whole numbers and floats": lambda: torch.where(FACTS, WHOLE, 0.5),
    "a choice of single numbers": lambda: torch.where(FACTS, SINGLE, 0.5),
    "float": lambda: WHOLE.float(),
    "double": lambda: WHOLE.double(),
    "half": lambda: WHOLE.half(),
    "type": lambda: WHOLE.type(torch.float32),
    "type by its name": lambda: WHOLE.type("torch.FloatTensor"),
    "to": lambda: WHOLE.to(torch.float32),
    "to, named": lambda: WHOLE.to(dtype=torch.float32),
    "to a tensor's": lambda: WHOLE.to(SINGLE),
    "view": lambda: WHOLE.view(torch.float32),
    "sum": lambda: WHOLE.sum(dtype=torch.float32),
    "like": lambda: torch.zeros_like(WHOLE),
    "like, in single": lambda: torch.ones_like(WHOLE, dtype=torch.float32),
    "new": lambda: WHOLE.new_tensor([1.5]),
    "new, of single numbers": lambda: SINGLE.new_zeros(2),
    "result_type": lambda: torch.zeros(1, dtype=torch.result_type(WHOLE, 0.5)),
    "result_type of single numbers": lambda: torch.zeros(1, dtype=torch.result_type(SINGLE, 0.5)),
    "what is asked": lambda: SINGLE.to(torch.get_default_dtype()),
    "a tensor in the old way": lambda: torch.zeros_like(torch.Tensor(2, 3)),
    "a tensor of numbers in the old way": lambda: torch.Tensor([1 / 3, 2]),
    "a tensor of a tensor in the old way": lambda: torch.Tensor(torch.ones(2)),
    "a tensor of nothing in the old way": lambda: torch.Tensor(),
    "a single tensor in the old way": lambda: torch.FloatTensor([1 / 3]),
    "layer": lambda: torch.nn.Linear(2, 3).weight,
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_torch_makes_under_a_threads_default_dtype_what_it_makes_under_that_of_the_process(name: str) -> None:
    for dtype in (*HALVES, torch.float32):
        torch.manual_seed(0)
        with process_wide(dtype):
            theirs = EXPRESSIONS[name]()
        torch.manual_seed(0)
        with local_dtype(dtype):
            ours = EXPRESSIONS[name]()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


# Coming and going -----------------------------------------------------------------------------------------------------


def test_a_dtype_that_cannot_be_the_default_is_refused_in_transformers_words() -> None:
    with pytest.raises(
        ValueError, match=r"^Some cannot be instantiated under `dtype=torch.int8` as it's not a floating"
    ):
        local_dtype(torch.int8, "Some").__enter__()
    with pytest.raises(ValueError, match=r"^Cannot set `torch.int8` as torch's default as it's not a floating-point"):
        local_dtype(torch.int8).__enter__()
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM cannot be instantiated under `dtype=torch.int64`"):
        transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE), dtype=torch.int64)
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        local_dtype(torch.float8_e4m3fn).__enter__()
    assert seen() == {torch.float32}


def test_the_inner_of_two_default_dtypes_counts_and_the_outer_one_comes_back() -> None:
    with local_dtype(torch.bfloat16):
        for inner in (torch.float16, torch.float32, torch.bfloat16, torch.float64):
            with local_dtype(inner):
                assert seen() == {inner}
                assert elsewhere() == {torch.float32}
            assert seen() == {torch.bfloat16}
    assert seen() == {torch.float32}


def test_a_construction_that_fails_leaves_no_default_dtype_behind() -> None:
    class Failing(Exception):
        pass

    class Broken(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            assert seen() == {torch.float16}
            raise Failing

    with local_dtype(torch.bfloat16):
        with pytest.raises(Failing):
            Broken._from_config(transformers.LlamaConfig(**SHAPE), dtype=torch.float16)
        assert seen() == {torch.bfloat16}
    with pytest.raises(Failing):
        Broken._from_config(transformers.LlamaConfig(**SHAPE), dtype=torch.float16)
    assert seen() == elsewhere() == {torch.float32}
    assert torch._C._len_torch_function_stack() == 0


def test_a_default_dtype_that_a_constructor_sets_stays_in_its_thread_and_ends_with_it() -> None:
    with local_dtype(torch.bfloat16):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        assert seen() == {torch.float64}
        assert elsewhere() == {torch.float32}
        torch.set_default_dtype(before)
        assert seen() == {torch.bfloat16}
        torch.set_default_dtype(torch.float16)
        with pytest.raises(TypeError):
            torch.set_default_dtype(torch.int8)
    assert seen() == elsewhere() == {torch.float32}


def test_a_default_dtype_goes_with_other_modes_and_devices() -> None:
    class Other(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with local_dtype(torch.bfloat16), Other(), torch.device("meta"):
        made = (torch.ones(2), torch.tensor([0.5]), torch.arange(3) / 2)
    assert {(tensor.dtype, tensor.device.type) for tensor in made} == {(torch.bfloat16, "meta")}
    with torch.device("meta"), Other(), local_dtype(torch.float16):
        assert (torch.arange(3) / 2).dtype is torch.float16
        assert torch.tensor(0.5).device.type == "meta"
    assert torch._C._len_torch_function_stack() == 0


def test_a_compiled_function_that_asks_for_the_default_dtype_is_compiled_whole() -> None:
    def ask(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.to(torch.get_default_dtype()) / torch.Tensor([2])

    assert modeling_utils.local_torch_dtype is local_dtype
    assert torch.compile(ask, fullgraph=True, backend="eager")(WHOLE).dtype is torch.float32
