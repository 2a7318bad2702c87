"""Which model is in memory: what a load takes, who goes for whom, how long a model stays, and what comes back.

Models of a hundred megabytes where resident memory is looked at, tiny ones elsewhere; budgets are the tests' own.
"""

from __future__ import annotations

import json
import math
import mmap
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import requests
import sized_models
import tiny_models
import torch
import transformers
from conftest import PATIENCE, STARTER, Server, until
from hub_place import Place
from loaded_parts import Findings, noted_parts
from lora_models import save_adapter
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

from huggingface.cancellation import Cancellation
from huggingface.engine.failures import typed
from huggingface.errors import (
    Cancelled,
    DeviceFailed,
    EngineFailed,
    InvalidRequest,
    MemoryHeld,
    NeverFits,
    OutOfMemory,
)
from huggingface.host.memory import few_file_pages, ran_out_of_memory, readable
from huggingface.loading import loader
from huggingface.loading import torch as by_torch
from huggingface.manager.budget import Budget, Limit, parse_limits
from huggingface.manager.eviction import Evictor, Idle, choose
from huggingface.manager.manager import ModelManager
from huggingface.manager.table import ModelTable
from huggingface.progress import Progress
from huggingface.registry.records import LoadSettings, ModelRecord
from huggingface.registry.registry import ModelRegistry
from huggingface.types import EngineOptions, Estimate, GenerationRequest, LoadOptions

SIZED = 125_864_192  # bytes of a sized model with the KV cache of its first generations
LONG = {"do_sample": False, "num_beams": 24, "min_new_tokens": 230, "max_new_tokens": 240}  # seconds on a tiny model


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with three models of about 90 MB."""
    root = tmp_path_factory.mktemp("sized")
    for name in "abc":
        sized_models.build(root, f"sized/{name}")
    return root


@pytest.fixture
def manage(tmp_path: Path, models_dir: Path) -> Iterator[Callable[..., ModelManager]]:
    """Makes managers of their own registry with the models that are named."""
    made: list[ModelManager] = []

    def make(*records: ModelRecord, root: Path = models_dir, **options: Any) -> ModelManager:
        registry = ModelRegistry(tmp_path / f"registry-{len(made)}.json")
        for record in records:
            registry.add(record)
        options.setdefault("memory_timeout", 0.5)
        made.append(ModelManager(registry, LoadOptions(root, "cpu"), **options))
        return made[-1]

    yield make
    for manager in made:
        manager.close()
        manager.statistics.close()


def record(model_id: str, model_type: str = "text-generation", **fields: Any) -> ModelRecord:
    return ModelRecord(model_id, model_id, model_type, **fields)


def generate(server: Server, model_id: str, **fields: Any) -> Any:
    body = {"model_id": model_id, "prompt": "The little harbour", "max_new_tokens": 4, "do_sample": False, **fields}
    return server.call("POST", "/generate", json=body)


def cached(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.call("GET", "/cache").json()["cached_models"]
    return found


# The ledger -----------------------------------------------------------------------------------------------------------


def test_a_budget_is_read_in_amounts_shares_and_by_device() -> None:
    assert parse_limits("12GB") == {"*": Limit(bytes=12 * 10**9)}
    assert parse_limits("0.8") == {"*": Limit(share=0.8)}
    both = {"cpu": Limit(bytes=3 * 2**29), "cuda:0": Limit(share=0.5)}
    assert parse_limits("cpu=1.5GiB, cuda=0.5") == both


@pytest.mark.parametrize("text", ["much", "12XB", "gpu=3GB", "cpu=", "-1GB", "0", "1.5", "cpu=1GB,cpu=2GB"])
def test_a_budget_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="memory"):
        parse_limits(text)


def test_what_is_set_aside_counts_until_it_is_taken_or_given_up() -> None:
    budget = Budget({"*": Limit(bytes=1000)}, lambda _: 10_000)
    assert budget.reserve("a", {"cpu": 600})
    assert not budget.reserve("b", {"cpu": 500})
    assert (budget.available("cpu"), budget.maximum("cpu")) == (400, 1000)
    budget.record("a", "weights", {"cpu": 550})
    budget.commit("a")
    assert budget.available("cpu") == 450
    assert budget.allocate("a", "kv cache", "cpu", 450)
    assert not budget.allocate("a", "kv cache", "cpu", 1)
    assert budget.allocate("a", "kv cache", "cpu", -100)
    assert budget.holders("cpu") == {"a": 900}
    budget.forget("a")
    assert budget.held() == {}


def test_what_is_kept_for_later_can_be_taken_when_all_else_is_gone() -> None:
    budget = Budget({"*": Limit(bytes=1000)}, lambda _: 10_000)
    assert budget.reserve_floor("a", "kv cache", "cpu", 300)
    budget.record("b", "weights", {"cpu": 700})
    assert budget.available("cpu") == 0
    assert not budget.reserve_floor("a", "kv cache", "cpu", 301)
    assert budget.allocate("a", "kv cache", "cpu", 300)
    assert not budget.allocate("a", "kv cache", "cpu", 1)
    assert budget.holders("cpu") == {"a": 300, "b": 700}
    assert budget.allocate("a", "kv cache", "cpu", -200)
    assert budget.available("cpu") == 0  # it is still kept


def test_what_is_given_back_by_who_is_going_is_not_to_be_had_before_he_has_gone() -> None:
    resident = 1000
    budget = Budget({"*": Limit(bytes=1000)}, lambda _: 10_000, lambda: resident)
    budget.begin()
    budget.record("a", "weights", {"cpu": 500})
    assert budget.allocate("a", "kv cache", "cpu", 300)
    resident += 800
    budget.freeze("a")
    assert budget.allocate("a", "kv cache", "cpu", -300)
    assert (budget.available("cpu"), budget.unrecorded("cpu")) == (200, 0)
    resident -= 800
    budget.forget("a")
    assert budget.available("cpu") == 1000


def test_what_a_load_reserved_is_what_it_notes_and_not_besides() -> None:
    budget = Budget({"*": Limit(bytes=1000)}, lambda _: 10_000)
    assert budget.reserve("a", {"cpu": 600})
    budget.record("a", "weights", {"cpu": 500})
    assert budget.reserve_floor("a", "kv cache", "cpu", 100)
    assert budget.available("cpu") == 400
    budget.commit("a")
    assert budget.available("cpu") == 400
    assert budget.holders("cpu") == {"a": 600}


def test_what_the_process_has_besides_is_not_to_be_had_but_for_a_model_that_is_alone() -> None:
    """A load may be let in beside a tenth of a budget in bytes that nobody noted; what grows later may not."""
    resident = 5000
    budget = Budget({"*": Limit(bytes=1000)}, lambda _: 10_000, lambda: resident)
    budget.begin()
    resident += 130
    assert (budget.available("cpu"), budget.maximum("cpu"), budget.unrecorded("cpu")) == (970, 1000, 30)
    budget.begin()  # only the first time says what the process is without models
    assert budget.lacking("a", "cpu", 1000) == 0
    assert budget.reserve("a", {"cpu": 600})
    resident += 600
    assert budget.available("cpu") == 370  # what is read just now is not what the process has besides
    budget.record("a", "weights", {"cpu": 600})
    budget.commit("a")
    assert budget.available("cpu") == 370
    assert budget.lacking("b", "cpu", 400) == 30
    assert budget.lacking("b", "cpu", 1000) == 600  # all that others have; then it is alone
    assert budget.lacking("b", "cpu", 1001) == 601
    assert not budget.reserve("b", {"cpu": 380})
    assert budget.allocate("a", "kv cache", "cpu", 270)
    assert not budget.allocate("a", "kv cache", "cpu", 1)
    assert budget.allocate("a", "kv cache", "cpu", -270)
    assert budget.reserve("b", {"cpu": 370})
    resident -= 130  # a moment later it may have it again
    assert budget.available("cpu") == 0


def test_what_the_process_has_besides_does_not_count_twice_where_the_budget_is_a_share_of_what_is_free() -> None:
    resident = 5000
    budget = Budget({"*": Limit(share=0.5)}, lambda _: 1000, lambda: resident)
    budget.begin()
    resident += 400
    assert budget.available("cpu") == 500


def test_a_share_is_of_what_models_have_and_what_is_free_and_an_amount_is_never_more_than_that() -> None:
    free = 1000
    budget = Budget({"*": Limit(share=0.5)}, lambda _: free)
    assert budget.available("cpu") == 500
    budget.record("a", "weights", {"cpu": 200})
    free -= 200
    assert (budget.available("cpu"), budget.maximum("cpu")) == (300, 500)
    assert Budget({"*": Limit(bytes=10**9)}, lambda _: 700).available("cpu") == 700


def test_cuda_is_its_first_device() -> None:
    budget = Budget({"cuda": Limit(bytes=100)}, lambda _: None)
    budget.record("a", "weights", {"cuda": 60})
    assert budget.available("cuda:0") == 40
    assert budget.available("cuda:1") == 100


def test_an_idle_model_goes_for_another_whether_the_device_is_named_with_its_index_or_not() -> None:
    """A load says `cuda`; torch, and so a model in memory, says `cuda:0`."""
    budget, table, gone = Budget({"cuda": Limit(bytes=100)}, lambda _: None), ModelTable(), []

    def evict(model_id: str, _: str) -> bool:
        gone.append(model_id)
        table.of(model_id).model = None
        budget.forget(model_id)
        return True

    evictor = Evictor(budget, table, 0, tuple, evict)
    table.of("idle").model = cast("Any", object())
    budget.record("idle", "weights", {"cuda:0": 60})
    estimate = Estimate(50, 0, 0, 0, "cuda", "bfloat16", None, {"cuda": 50})
    forecast = evictor.forecast("new", estimate)
    assert (forecast.fits, forecast.evicts) == (True, ["idle"])
    assert (dict(forecast.available), dict(forecast.limits)) == ({"cuda:0": 40}, {"cuda:0": 100})
    evictor.reserve("new", {"cuda": 50}, Progress())
    assert gone == ["idle"]
    budget.commit("new")
    budget.record("new", "weights", {"cuda:0": 50})
    assert evictor.forecast("new", estimate).available == {"cuda:0": 100}  # what it has itself is there for it


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_what_says_that_memory_ran_out_is_told_from_what_breaks_a_device(error: BaseException) -> None:
    assert ran_out_of_memory(error)
    with pytest.raises(OutOfMemory), typed("tiny/llama"):
        raise error
    broken = torch.AcceleratorError("CUDA error: device-side assert triggered")
    assert not ran_out_of_memory(broken)
    with pytest.raises(EngineFailed), typed("tiny/llama"):
        raise broken


def test_a_load_on_a_device_that_has_failed_says_so_and_not_that_the_files_are_damaged(
    tiny: Callable[[str], str], models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
    model_id = tiny("llama")
    with pytest.raises(DeviceFailed, match=r"'cpu' has failed \(CUDA error: device-side assert triggered\); restart"):
        loader.load(record(model_id, "auto"), LoadOptions(models_dir, "cpu"), models_dir / model_id)


@pytest.mark.parametrize(
    ("lacking", "gone"),
    [
        ({"cpu": 5}, ["old"]),
        ({"cpu": 15}, ["middle"]),  # which has to go, and is enough
        ({"cpu": 25}, ["old", "middle"]),
        ({"cpu": 100}, ["large"]),  # once the large one has to go, the others need not
        ({"cpu": 141}, []),  # all of them would not do, so none goes
        ({"cuda:0": 5}, ["elsewhere"]),
    ],
)
def test_the_longest_unused_go_first_and_no_more_than_are_needed(lacking: dict[str, int], gone: list[str]) -> None:
    idle = [
        Idle("large", 3, {"cpu": 110}),
        Idle("middle", 2, {"cpu": 20}),
        Idle("old", 1, {"cpu": 10}),
        Idle("elsewhere", 0, {"cuda:0": 50}),
    ]
    assert sorted(model.model_id for model in choose(idle, lacking)) == sorted(gone)


# Estimates ------------------------------------------------------------------------------------------------------------


def check_estimate(root: Path, model_id: str, engine: EngineOptions | None = None, **settings: Any) -> None:
    """What a load is said to take is what is measured, within a tenth, after a first generation."""
    options, wanted = LoadOptions(root, "cpu", engine=engine or EngineOptions()), LoadSettings(**settings)
    told = loader.estimate(record(model_id, "auto"), options, root / model_id, wanted)
    model = loader.load(record(model_id, "auto"), options, root / model_id, settings=wanted)
    try:
        model.prepared()
        if model.head == "causal-lm" and model.status is not None and model.status.mode == "batched":
            list(model.generate(GenerationRequest({"max_new_tokens": 2, "do_sample": False}, prompt="The cat")))
        sizes = model.sizes
        assert abs(told.weights + told.copies - sizes.weights - sizes.copies) <= 0.1 * (sizes.weights + sizes.copies)
        assert abs(told.total - sizes.total) <= 0.1 * sizes.total
        assert sum(told.devices.values()) == told.total
        assert sizes.peak == sizes.total
    finally:
        model.close()


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_an_estimate_is_what_is_measured(tiny: Callable[[str], str], models_dir: Path, name: str) -> None:
    check_estimate(models_dir, tiny(name))


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"slots": 2}, {"attn_implementation": "eager"}])
def test_an_estimate_knows_the_settings(tiny: Callable[[str], str], models_dir: Path, settings: dict[str, Any]) -> None:
    check_estimate(models_dir, tiny("llama"), **settings)


@pytest.mark.filterwarnings("ignore")  # what peft says when it saves an adapter
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("settings", [{}, {"quantization": "int8"}])
def test_an_estimate_counts_the_adapters(
    tmp_path: Path, manage: Callable[..., ModelManager], half: bool, settings: dict[str, Any]
) -> None:
    """Two of them, together larger than the model; factors of 16 bits are computed with, and lie there, in 32."""
    model_id = tiny_models.build(tmp_path, "llama")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / model_id)
    for number, adapter in enumerate(("one", "two")):
        folder = save_adapter(base, tmp_path / "lora" / adapter, number, target_modules="all-linear", r=48)
        if half:
            path = folder / "adapter_model.safetensors"
            save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    adapters = {"a": "lora/one", "b": "lora/two"}
    manager = manage(record(model_id), root=tmp_path)
    plain = manager.forecast(model_id, LoadSettings(**settings)).estimate
    manager = manage(record(model_id, adapters=adapters, **settings), root=tmp_path)
    told = manager.forecast(model_id).estimate
    assert told.weights > 1.5 * plain.weights
    model = manager.load(model_id)
    model.prepared()
    with manager.lease(model_id) as leased:
        list(leased.generate(GenerationRequest({"max_new_tokens": 2, "do_sample": False}, prompt="The cat")))
    assert abs(told.total - model.sizes.total) <= 0.1 * model.sizes.total
    assert told.weights == pytest.approx(model.sizes.weights, rel=0.1)
    assert manager.budget.held(model_id) == model.sizes.devices


@pytest.mark.filterwarnings("ignore")
def test_beams_that_draw_among_more_tokens_than_torch_can_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="num_beams"), typed("some/model"):
        torch.multinomial(torch.ones(2**24 + 1), 1)


def test_the_adapters_of_a_model_in_memory_are_shown(tmp_path: Path, start_server: Any) -> None:
    model_id = tiny_models.build(tmp_path, "llama")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / model_id)
    save_adapter(base, tmp_path / "lora" / "one", 1, target_modules=["q_proj"])
    server = start_server(LOCAL_LLM_MODELS_DIR=str(tmp_path))
    server.add(model_id, "text-generation", adapters={"a": "lora/one"})
    assert server.call("GET", f"/models/{model_id}").json()["model"]["details"]["adapters"] == {"a": None}
    assert generate(server, model_id, adapter="a").status_code == 200
    assert cached(server)[model_id]["adapters"] == {"a": "lora/one"}
    changed = server.call("PUT", f"/models/{model_id}", json={"adapters": {"b": "lora/one", "c": model_id}}).json()
    told = changed["model"]["details"]["adapters"]
    assert told["b"] is None
    assert "no adapter_config.json" in told["c"]
    assert "Adapter 'c'" in told["c"]
    shown = server.call("GET", f"/models/{model_id}/preflight").json()["details"]
    assert shown["adapters"] == told
    assert shown["problem"] == told["c"]


@pytest.mark.filterwarnings("ignore")
def test_a_budget_has_room_for_the_adapters_too(tmp_path: Path, manage: Callable[..., ModelManager]) -> None:
    model_id = tiny_models.build(tmp_path, "llama")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / model_id)
    save_adapter(base, tmp_path / "lora" / "one", 1, target_modules="all-linear", r=48)
    needs = manage(record(model_id), root=tmp_path).forecast(model_id).estimate.total
    budget = Budget({"*": Limit(bytes=needs + 1000)})
    adapted = manage(record(model_id, adapters={"a": "lora/one"}), root=tmp_path, budget=budget)
    with pytest.raises(NeverFits):
        adapted.load(model_id)


def test_the_starter_model_takes_what_was_told(starter_models_dir: Path) -> None:
    check_estimate(starter_models_dir, STARTER)


@pytest.mark.parametrize("seconds", [0.0, math.inf])
def test_an_estimate_knows_whether_weights_will_be_laid_out_anew(starter_models_dir: Path, seconds: float) -> None:
    """That depends on the processor; a table of embeddings that is multiplied too lies there twice then."""
    findings = Findings(lambda _: {"packed": seconds})
    check_estimate(starter_models_dir, STARTER, EngineOptions(findings=findings))


def test_an_estimate_reads_the_model_again_only_where_its_files_have_changed(
    tiny: Callable[[str], str], models_dir: Path, tmp_path: Path
) -> None:
    """The pass that tells how much a token takes is made once for the same files, and afresh for others."""
    folder, options = tmp_path / "model", LoadOptions(tmp_path, "cpu")
    shutil.copytree(models_dir / tiny("llama"), folder)
    passes: list[str] = []
    hook = register_module_forward_pre_hook(lambda module, _: passes.append(type(module).__name__))
    try:
        told = [loader.estimate(record("model"), options, folder).token_bytes for _ in range(3)]
        assert (len(set(told)), passes.count("LlamaForCausalLM")) == (1, 1)
        config = json.loads((folder / "config.json").read_text())
        config["num_hidden_layers"] *= 2
        (folder / "config.json").write_text(json.dumps(config))
        assert loader.estimate(record("model"), options, folder).token_bytes == 2 * told[0]
        assert passes.count("LlamaForCausalLM") == 2
    finally:
        hook.remove()


def tried(options: LoadOptions) -> list[Any]:
    """What was found out about products."""
    return [finding for key, finding in options.engine.findings.items() if key[0] == "products"]


def test_an_estimate_tries_products_for_torch_alone(starter_models_dir: Path) -> None:
    """OpenVINO has products of its own; for torch a load then finds what the estimate has found out."""
    options = LoadOptions(starter_models_dir, "cpu", backend="auto")
    model, folder = record(STARTER, "auto"), starter_models_dir / STARTER
    assert loader.estimate(model, options, folder, LoadSettings(backend="openvino")).backend == "openvino"
    assert not tried(options)
    assert loader.estimate(model, options, folder, LoadSettings(backend="torch")).backend == "torch"
    assert options.engine.findings


def test_an_estimate_over_http_says_whether_it_fits_and_who_would_go(sized: Path, start_server: Any) -> None:
    server = start_server(LOCAL_LLM_MODELS_DIR=str(sized), LOCAL_LLM_MEMORY_BUDGET="300MB")
    for name in "abc":
        server.add(f"sized/{name}", "text-generation")
        told = server.call("GET", f"/models/sized/{name}/estimate").json()
        assert (told["bytes"], told["fits"], told["possible"]) == (SIZED, True, True)
        assert told["evicts"] == (["sized/a"] if name == "c" else [])
        assert generate(server, f"sized/{name}").status_code == 200
        assert cached(server)[f"sized/{name}"]["bytes"] == pytest.approx(SIZED, rel=0.02)
    assert set(cached(server)) == {"sized/b", "sized/c"}
    assert server.call("GET", "/models/sized/a/estimate?dtype=bfloat16").json()["weights_bytes"] < 0.6 * SIZED
    refused = server.call("GET", "/models/sized/a/estimate?dtype=int3")
    assert refused.status_code == 400
    assert "dtype" in refused.json()["error"]
    refused = server.call("GET", "/models/sized/a/estimate?kv_cache_dtype=float16")  # llama.cpp's
    assert refused.status_code == 400
    assert "kv_cache_dtype" in refused.json()["error"]


def test_what_can_never_fit_is_refused_with_both_numbers_before_anything_is_read(
    sized: Path, start_server: Any
) -> None:
    server = start_server(LOCAL_LLM_MODELS_DIR=str(sized), LOCAL_LLM_MEMORY_BUDGET="100MB")
    server.add("sized/a", "text-generation")
    refused = server.call("POST", "/models/sized/a/load")
    assert refused.status_code == 400
    assert str(SIZED) in refused.json()["error"]
    assert "100000000" in refused.json()["error"]
    told = server.call("GET", "/models/sized/a/estimate").json()
    assert (told["fits"], told["possible"]) == (False, False)
    assert cached(server) == {}


# Who goes -------------------------------------------------------------------------------------------------------------


def test_the_longest_unused_goes_and_never_a_pinned_one(sized: Path, manage: Callable[..., ModelManager]) -> None:
    records = [record("sized/a", pinned=True), record("sized/b"), record("sized/c")]
    manager = manage(*records, root=sized, budget=Budget({"*": Limit(bytes=260_000_000)}))
    for name in ("a", "b", "c", "b"):
        manager.load(f"sized/{name}")
    assert set(manager.loaded()) == {"sized/a", "sized/b"}
    shown = manager.statistics.shown()
    assert {name: counts["evictions"] for name, counts in shown.items()} == {
        "sized/a": 0,
        "sized/b": 1,
        "sized/c": 1,
    }


def test_a_model_in_use_stays_and_the_refusal_says_who_has_the_memory(
    sized: Path, manage: Callable[..., ModelManager]
) -> None:
    records = [record("sized/a", pinned=True), record("sized/b"), record("sized/c")]
    manager = manage(*records, root=sized, budget=Budget({"*": Limit(bytes=260_000_000)}))
    manager.load("sized/a")
    with manager.lease("sized/b") as model:
        with pytest.raises(MemoryHeld, match=r"'sized/a' \(12\d MB, pinned\), 'sized/b' \(12\d MB, in use\)"):
            manager.load("sized/c")
        assert manager.loaded()["sized/b"] is model
    manager.load("sized/c")
    assert set(manager.loaded()) == {"sized/a", "sized/c"}


def test_who_waits_for_memory_has_his_turn_when_those_who_use_it_are_done(
    sized: Path, manage: Callable[..., ModelManager]
) -> None:
    """Callers that keep two models busy without a pause do not keep a third one out for ever."""
    records = [record(f"sized/{name}") for name in "abc"]
    budget = Budget({"*": Limit(bytes=260_000_000)})
    manager = manage(*records, root=sized, budget=budget, memory_timeout=30.0)
    stop = threading.Event()

    def keep_busy(model_id: str, offset: float) -> None:
        time.sleep(offset)
        while not stop.is_set():
            with manager.lease(model_id, Cancellation(stop.is_set)):
                time.sleep(0.3)

    with ThreadPoolExecutor(4) as pool:
        for name in "ab":
            for offset in (0.0, 0.15):
                pool.submit(keep_busy, f"sized/{name}", offset)
        time.sleep(2)
        try:
            with manager.lease("sized/c") as model:
                assert manager.loaded()["sized/c"] is model
                assert len(manager.loaded()) <= 2  # one of the others has gone for it, and may be coming back
        finally:
            stop.set()


def test_whose_memory_came_free_takes_it_before_those_who_waited_for_the_model_that_had_it(
    sized: Path, manage: Callable[..., ModelManager]
) -> None:
    """A load waits for a model in use: when its last user leaves, none of the callers that came later gets it first."""
    records = [record("sized/a"), record("sized/b", pinned=True), record("sized/c")]
    budget = Budget({"*": Limit(bytes=260_000_000)})
    manager = manage(*records, root=sized, budget=budget, memory_timeout=240.0)
    manager.load("sized/b")
    order: list[str] = []

    def use(model_id: str, asked: threading.Semaphore) -> None:
        def looks() -> bool:
            asked.release()
            return False

        with manager.lease(model_id, Cancellation(looks)):
            order.append(model_id)

    for _ in range(3):
        order.clear()
        with ThreadPoolExecutor(17) as pool, manager.lease("sized/a"):
            pool.submit(use, "sized/c", threading.Semaphore(0))
            until(lambda: waits_for_memory(manager, "sized/c"))
            others = [threading.Semaphore(0) for _ in range(16)]
            for asked in others:
                pool.submit(use, "sized/a", asked)
            for asked in others:
                assert asked.acquire(timeout=PATIENCE)
        assert order[0] == "sized/c"
        assert Counter(order) == {"sized/c": 1, "sized/a": 16}


def test_a_load_that_was_refused_is_next_when_it_is_asked_for_again(
    sized: Path, manage: Callable[..., ModelManager]
) -> None:
    """Callers that follow one another without a pause, each longer than a load waits, do not keep it out for ever."""
    records = [record("sized/a"), record("sized/b", pinned=True), record("sized/c")]
    manager = manage(*records, root=sized, budget=Budget({"*": Limit(bytes=260_000_000)}), memory_timeout=0.1)
    manager.load("sized/b")
    asked, done = threading.Event(), threading.Event()

    def next_caller() -> None:
        def looks() -> bool:
            asked.set()
            return False

        with manager.lease("sized/a", Cancellation(looks)):
            asked.set()
            done.wait()

    with ThreadPoolExecutor(1) as pool:
        try:
            with manager.lease("sized/a"):
                with pytest.raises(MemoryHeld):
                    manager.load("sized/c")
                pool.submit(next_caller)
                assert asked.wait(240)
            manager.load("sized/c")
            assert set(manager.loaded()) == {"sized/b", "sized/c"}
        finally:
            done.set()


def test_loads_that_wait_for_memory_have_their_turns_in_the_order_they_came(
    sized: Path, manage: Callable[..., ModelManager]
) -> None:
    names = [f"sized/{name}" for name in "cdefg"]
    for name in names[1:]:
        sized_models.build(sized, name)
    records = [record("sized/a", pinned=True), record("sized/b"), *map(record, names)]
    budget = Budget({"*": Limit(bytes=260_000_000)})
    manager = manage(*records, root=sized, budget=budget, memory_timeout=240.0)
    manager.load("sized/a")
    order: list[str] = []

    def use(model_id: str) -> None:
        with manager.lease(model_id):
            order.append(model_id)

    with ThreadPoolExecutor(len(names)) as pool, manager.lease("sized/b"):
        for name in names:
            pool.submit(use, name)
            until(partial(waits_for_memory, manager, name))
    assert order == names


def test_who_waited_for_a_load_gets_the_model_before_it_can_go_for_another(
    sized: Path, manage: Callable[..., ModelManager]
) -> None:
    """A model that has just been loaded is its callers' at once: no other load takes it from them meanwhile."""
    records = [record(f"sized/{name}") for name in "abc"]
    manager = manage(*records, root=sized, budget=Budget({"*": Limit(bytes=130_000_000)}), memory_timeout=240.0)

    def use(model_id: str) -> None:
        with manager.lease(model_id):
            pass

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(use, [f"sized/{name}" for name in "abc"] * 8))
    shown = manager.statistics.shown()
    assert sum(counts["loads"] for counts in shown.values()) <= 24


def waits_for_memory(manager: ModelManager, model_id: str) -> bool:
    """Whether a load of the model has found no room, and waits for it."""
    progress = manager.loading().get(model_id)
    version, moments = progress.since(-1) if progress is not None else (0, [])
    return version > 0 and "waiting" in [moment.phase for moment in moments]  # one that has not begun has none yet


def test_a_load_that_never_fits_is_told_so_whoever_is_there(sized: Path, manage: Callable[..., ModelManager]) -> None:
    manager = manage(record("sized/a"), root=sized, budget=Budget({"*": Limit(bytes=10**6)}))
    with pytest.raises(NeverFits, match="1 MB"):
        manager.load("sized/a")
    assert manager.budget.holders("cpu") == {}


@pytest.fixture
def halves(sized: Path, tmp_path: Path) -> Path:
    """A folder with a model whose weights are in bfloat16, `half`, and the same in float32, `full`."""
    for name, dtype in (("half", torch.bfloat16), ("full", torch.float32)):
        model = AutoModelForCausalLM.from_pretrained(sized / "sized/a", dtype=torch.bfloat16)
        model.to(dtype).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(sized / "sized/a").save_pretrained(tmp_path / name)
    return tmp_path


NARROW, INT8, INT4 = (
    LoadSettings(dtype="bfloat16"),
    LoadSettings(quantization="int8"),
    LoadSettings(quantization="int4"),
)


def needs(manage: Callable[..., ModelManager], root: Path, name: str, settings: LoadSettings) -> int:
    """The bytes of a load with these settings, where there is room for any."""
    return sum(manage(record(name), root=root).forecast(name, settings).estimate.devices.values())


@pytest.mark.parametrize(
    ("name", "asked", "fits", "wanted"),
    [
        ("half", LoadSettings(dtype="float32"), NARROW, "dtype bfloat16 ({0}), quantization int8 ({1}) or {2}"),
        ("half", LoadSettings(), INT8, "quantization int8 ({1}) or {2}"),
        ("full", LoadSettings(), INT8, "quantization int8 ({1}) or {2}"),
        ("full", INT8, INT4, "{2}"),
    ],
)
def test_a_load_that_never_fits_is_told_what_would_and_that_does(
    halves: Path, manage: Callable[..., ModelManager], name: str, asked: LoadSettings, fits: LoadSettings, wanted: str
) -> None:
    """Each setting that makes the model small enough is named with its size."""
    sizes = [readable(needs(manage, halves, name, each)) for each in (NARROW, INT8, INT4)]
    budget = Budget({"*": Limit(bytes=needs(manage, halves, name, fits) + 1000)})
    manager = manage(record(name), root=halves, budget=budget)
    with pytest.raises(NeverFits) as caught:
        manager.load(name, settings=asked)
    sizes[2] = f"quantization int4 ({sizes[2]})"
    assert str(caught.value).endswith(f"It fits with {wanted.format(*sizes)}")
    manager.load(name, settings=fits)
    assert name in manager.loaded()


def test_a_load_whose_float32_never_fits_has_the_16_bits_of_its_weights(
    halves: Path, manage: Callable[..., ModelManager]
) -> None:
    """The forecast says so before; where float32 fits it is taken, and where it is asked for it is refused."""
    narrow = needs(manage, halves, "half", NARROW)
    small, large = (Budget({"*": Limit(bytes=size)}) for size in (narrow + 1000, 3 * narrow))
    manager = manage(record("half"), root=halves, budget=small)
    forecast = manager.forecast("half")
    assert (forecast.estimate.dtype, forecast.fits, forecast.possible) == ("bfloat16", True, True)
    assert sum(forecast.estimate.devices.values()) == narrow
    manager.load("half")
    model = manager.loaded()["half"]
    assert (model.effective["dtype"], model.dtype) == ("bfloat16", "bfloat16")
    assert model.generate(GenerationRequest({"max_new_tokens": 2}, prompt="The cat")).__next__()
    with pytest.raises(NeverFits):
        manager.load("half", settings=LoadSettings(dtype="float32"))
    roomy = manage(record("half"), root=halves, budget=large)
    assert roomy.forecast("half").estimate.dtype == "float32"
    roomy.load("half")
    assert roomy.loaded()["half"].dtype == "float32"


def test_a_load_whose_float32_never_fits_computes_in_float32_with_16_bits_in_memory(
    halves: Path, manage: Callable[..., ModelManager]
) -> None:
    """Where that fits: it answers as float32 does, says what it has in memory, and takes what was told."""
    exact = manage(record("half"), root=halves)
    request = GenerationRequest({"max_new_tokens": 12, "do_sample": False}, prompt="The cat")
    exact.load("half", settings=LoadSettings(backend="torch"))
    wanted = list(exact.loaded()["half"].generate(request))[-1].whole
    stored = needs(manage, halves, "half", LoadSettings(dtype="stored"))
    narrow, full = (needs(manage, halves, "half", each) for each in (NARROW, LoadSettings()))
    assert narrow < stored < full
    manager = manage(record("half"), root=halves, budget=Budget({"*": Limit(bytes=stored + 1000)}))
    estimate = manager.forecast("half").estimate
    assert (estimate.dtype, estimate.is_stored, estimate.own_dtype) == ("float32", True, "bfloat16")
    manager.load("half")
    model = manager.loaded()["half"]
    assert (model.effective["dtype"], model.effective["weights_dtype"]) == ("float32", "bfloat16")
    assert model.sizes.weights == pytest.approx(estimate.weights, rel=0.01)
    assert list(model.generate(request))[-1].whole == wanted


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_callers_that_mix_more_models_than_fit_see_nothing_but_answers_and_503(
    sized: Path, start_server: Any, engine: str
) -> None:
    """No model is loaded twice at once or taken from who uses it. All that the process grows by stays within the
    budget and a tenth of it, what it has for itself and its callers included."""
    budget, ids = 300_000_000, [f"sized/{engine}-{name}" for name in "abc"]
    for model_id in ids:
        sized_models.build(sized, model_id, initializer_range=0.05)  # with larger ones rounding is much of the logits
    settings = {"LOCAL_LLM_MODELS_DIR": str(sized), "LOCAL_LLM_MEMORY_BUDGET": str(budget)}
    server = start_server(**settings, LOCAL_LLM_BACKEND=engine, LOCAL_LLM_IMPORT_AT_START="false")  # not forked
    for model_id in ids:
        server.add(model_id, "text-generation")
    server.call("GET", f"/models/{ids[0]}/estimate")  # imports what loads need
    process, stop = psutil.Process(server.process.pid), threading.Event()
    before, maximum = process.memory_info().rss, [0]

    def watch() -> None:
        while not stop.is_set():
            maximum[0] = max(maximum[0], process.memory_info().rss - before)
            time.sleep(0.02)

    def call(number: int) -> Counter[int]:
        draw, seen = random.Random(number), Counter[int]()
        while seen[200] < 4:
            answer = generate(server, draw.choice(ids), prompt=f"Number {draw.randint(0, 9)}", max_new_tokens=12)
            seen[answer.status_code] += 1
            if answer.status_code != 200:
                assert answer.status_code == 503
                assert "No room for model" in answer.json()["error"]
                assert int(answer.headers["Retry-After"]) >= 1
                time.sleep(0.2)
        return seen

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(32) as pool:
            seen = sum(pool.map(call, range(32)), Counter[int]())
    finally:
        stop.set()
        watcher.join()
    assert seen[200] == 32 * 4  # nobody is kept out
    statistics = server.call("GET", "/statistics").json()["statistics"]["models"]
    assert all(statistics[model_id]["requests"] for model_id in ids)
    loads = sum(counts["loads"] for counts in statistics.values())
    evictions = sum(counts["evictions"] for counts in statistics.values())
    assert evictions >= 1
    assert loads == evictions + len(cached(server))  # each load is of a model that was not there
    assert maximum[0] > 0.8 * budget
    assert maximum[0] <= 1.1 * budget
    assert server.call("DELETE", "/cache").status_code == 200


def test_what_is_copied_from_a_mapped_file_does_not_lie_in_memory_twice(tmp_path: Path) -> None:
    """While somebody reads it all, few of its pages are there at a time, and none is afterwards."""
    path, size = tmp_path / "weights.bin", 64 * 2**20
    path.write_bytes(bytes(size))
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        assert mapped_bytes(path) == size
        with few_file_pages(path):
            until(lambda: mapped_bytes(path) < size // 4)
            assert mapped[-1] == 0
        assert mapped_bytes(path) == 0


def mapped_bytes(path: Path) -> int:
    """Bytes of a mapped file that lie in this process's memory."""
    return sum(part.rss for part in psutil.Process().memory_maps() if part.path == str(path))


# How long a model stays -----------------------------------------------------------------------------------------------


def test_a_model_goes_when_nobody_has_used_it_for_long_enough(start_server: Any, tiny: Any) -> None:
    server, model_id = start_server(LOCAL_LLM_KEEP_ALIVE="0.6"), tiny("gpt2")
    server.add(model_id, "text-generation")
    assert generate(server, model_id).status_code == 200
    assert cached(server)[model_id]["expires_at"] is not None
    until(lambda: not cached(server))


def test_the_request_says_it_before_the_record_and_the_record_before_the_setting(start_server: Any, tiny: Any) -> None:
    server, model_id = start_server(LOCAL_LLM_KEEP_ALIVE="0"), tiny("gpt2")
    server.add(model_id, "text-generation", keep_alive=-1)
    generate(server, model_id)
    assert cached(server)[model_id]["expires_at"] is None
    generate(server, model_id, keep_alive=100)
    assert cached(server)[model_id]["expires_at"] is not None
    task = {"model_id": model_id, "task": "text-generation", "inputs": "Hello", "max_new_tokens": 2}
    assert server.call("POST", "/pipeline", json=task | {"keep_alive": 0}).status_code == 200
    until(lambda: not cached(server))
    assert server.call("PUT", f"/models/{model_id}", json={"keep_alive": None}).status_code == 200
    generate(server, model_id)
    until(lambda: not cached(server))
    completion = {"model": model_id, "prompt": "Hello", "max_tokens": 2, "keep_alive": 50}
    assert requests.post(f"{server.url}/v1/completions", json=completion, timeout=PATIENCE).status_code == 200
    assert cached(server)[model_id]["expires_at"] is not None


@pytest.mark.parametrize("value", [-2, -0.5, "long", True])
def test_a_keep_alive_that_means_nothing_is_refused(server: Server, tiny: Any, value: Any) -> None:
    model_id = tiny("gpt2")
    server.add(model_id, "text-generation")
    for answer in (
        generate(server, model_id, keep_alive=value),
        server.call("PUT", f"/models/{model_id}", json={"keep_alive": value}),
        server.call("POST", f"/models/{model_id}/load", json={"keep_alive": value}),
    ):
        assert answer.status_code == 400, answer.text
        assert "keep_alive" in answer.json()["error"]


def test_the_clock_starts_when_the_last_use_ends(start_server: Any, tiny: Any) -> None:
    """A generation that is longer than the time to live has its model to the end, and it is loaded once."""
    server, model_id = start_server(), tiny("gpt2")
    server.add(model_id, "text-generation", keep_alive=0.2)
    body = {"model_id": model_id, "prompt": "The cat", **LONG}
    answer = server.call("POST", "/generate", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["timings"]["total"] > 0.4
    assert sum(f"loaded {model_id}" in line for line in server.lines) == 1
    until(lambda: not cached(server))
    assert server.call("GET", "/statistics").json()["statistics"]["models"][model_id]["loads"] == 1


# Unloading ------------------------------------------------------------------------------------------------------------


def test_an_unload_gives_the_memory_back_and_says_how_much(sized: Path, start_server: Any) -> None:
    server = start_server(LOCAL_LLM_MODELS_DIR=str(sized), LOCAL_LLM_IMPORT_AT_START="false")
    server.add("sized/a", "text-generation")
    assert generate(server, "sized/a").status_code == 200
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    answer = server.call("POST", "/models/sized/a/unload").json()
    assert answer["message"] == "Model 'sized/a' unloaded successfully"
    assert answer["bytes"] == pytest.approx(SIZED, rel=0.02)
    assert answer["freed_bytes"] >= 0.9 * SIZED
    assert before - process.memory_info().rss >= 0.9 * SIZED
    assert cached(server) == {}
    again = server.call("POST", "/models/sized/a/unload").json()
    assert again == {
        "success": True,
        "message": "Model 'sized/a' was not in memory",
        "bytes": 0,
        "freed_bytes": 0,
    }
    assert server.call("POST", "/models/nobody/unload").status_code == 404


def test_an_unload_waits_for_who_uses_the_model_and_is_refused_if_that_takes_long(start_server: Any, tiny: Any) -> None:
    server, model_id = start_server(LOCAL_LLM_BUSY_TIMEOUT="0.2"), tiny("gpt2")
    server.add(model_id, "text-generation")
    generate(server, model_id)
    body = {"model_id": model_id, "prompt": "The cat", **LONG}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: server.call("POST", "/generate", json=body))
        until(lambda: cached(server)[model_id]["in_use"] == 1)
        refused = server.call("POST", f"/models/{model_id}/unload")
        assert refused.status_code == 409
        assert "in use" in refused.json()["error"]
        assert running.result().status_code == 200


def test_fifty_rounds_of_loading_and_unloading_leave_memory_as_it_was(start_server: Any, tiny: Any) -> None:
    server = start_server(LOCAL_LLM_IMPORT_AT_START="false")
    ids = [tiny(name) for name in ("gpt2", "llama", "bert-mlm", "t5", "distilbert-sst2")]
    types = ["text-generation", "text-generation", "fill-mask", "translation", "sentiment-analysis"]
    for model_id, model_type in zip(ids, types, strict=True):
        server.add(model_id, model_type)
    process = psutil.Process(server.process.pid)

    def rounds(count: int) -> int:
        for number in range(count):
            model_id = ids[number % len(ids)]
            assert server.call("POST", f"/models/{model_id}/load").status_code == 200
            if number % len(ids) < 2:
                assert generate(server, model_id).status_code == 200
            assert server.call("POST", f"/models/{model_id}/unload").status_code == 200
        return process.memory_info().rss

    first = rounds(15)
    assert rounds(50) - first < 8 * 2**20


# How a model is loaded ------------------------------------------------------------------------------------------------


def test_settings_of_a_load_are_in_effect_until_the_unload_and_shown(start_server: Any, tiny: Any) -> None:
    server, model_id = start_server(), tiny("llama")
    server.add(model_id, "text-generation", slots=3)
    asked = {"dtype": "bfloat16", "attn_implementation": "eager", "max_context": 64}
    answer = server.call("POST", f"/models/{model_id}/load", json=asked).json()
    given = {
        "slots": 3,
        "weights_dtype": None,
        "kv_cache_dtype": "bfloat16",
        "quantization": None,
        "compile": False,
        "device": "cpu",
        "device_map": None,
        "backend": "torch",
        "engine": "torch",
    }
    effective = given | asked
    assert answer["settings"] == effective
    shown = cached(server)[model_id]
    assert (shown["settings"], shown["dtype"]) == (effective, "bfloat16")
    long = generate(server, model_id, prompt="a b c d e f g h " * 20)
    assert long.status_code == 400
    assert "64" in long.json()["error"]
    loaded_at = shown["loaded_at"]
    assert server.call("POST", f"/models/{model_id}/load").status_code == 200
    assert cached(server)[model_id]["loaded_at"] == loaded_at
    server.call("POST", f"/models/{model_id}/unload")
    server.call("POST", f"/models/{model_id}/load")
    assert cached(server)[model_id]["dtype"] == "float32"


def test_a_record_that_changes_how_its_model_is_loaded_has_it_loaded_anew(start_server: Any, tiny: Any) -> None:
    server, model_id = start_server(), tiny("llama")
    server.add(model_id, "text-generation")
    generate(server, model_id)
    assert server.call("PUT", f"/models/{model_id}", json={"dtype": "bfloat16"}).json()["model"]["dtype"] == "bfloat16"
    assert generate(server, model_id).status_code == 200
    assert cached(server)[model_id]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:7"}, "device"),
        ({"dtype": "int3"}, "dtype"),
        ({"attn_implementation": "magic"}, "attn_implementation"),
        ({"attn_implementation": "somebody/kernels"}, "attn_implementation"),
        ({"attn_implementation": "flex_attention"}, "attn_implementation"),  # on a CPU
        ({"quantization": "int1"}, "quantization"),
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": "float16"}, "kv_cache_dtype"),  # llama.cpp's
        ({"device_map": "everywhere"}, "device_map"),
        ({"device_map": {"": "cuda:7"}}, "device_map"),
        ({"device_map": {"": "disk"}}, "device_map"),
        ({"device_map": {"nosuch": "cpu"}}, "device_map"),
        ({"device_map": {"model.embed_tokens": "cpu"}}, "device_map"),
        ({"device": "cpu", "device_map": "auto"}, "device_map"),
        ({"max_context": 0}, "max_context"),
        ({"max_context": 100_000}, "max_context"),
        ({"slots": 0}, "slots"),
        ({"slots": 2.5}, "slots"),
        ({"compile": "yes"}, "compile"),
        ({"compile": True}, "compile"),  # it generates
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused_by_its_name(
    server: Server, tiny: Any, settings: dict[str, Any], field: str
) -> None:
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    answer = server.call("POST", f"/models/{model_id}/load", json=settings)
    assert answer.status_code == 400, answer.text
    assert field in answer.json()["error"]


def test_a_model_that_is_spread_over_devices_and_disk_answers_as_one_that_is_not(start_server: Any, tiny: Any) -> None:
    server, model_id = start_server(), tiny("llama")
    server.add(model_id, "text-generation")
    wanted = generate(server, model_id).json()["response"]
    for device_map in ("auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        answer = server.call("POST", f"/models/{model_id}/load", json={"device_map": device_map})
        assert answer.status_code == 200, answer.text
        assert answer.json()["settings"]["device_map"]
        assert generate(server, model_id).json()["response"] == wanted


def test_a_compiled_model_answers_as_one_that_is_not(start_server: Any, tiny: Any) -> None:
    server, model_id = start_server(), tiny("bert-ner")
    server.add(model_id, "token-classification")
    body = {"model_id": model_id, "task": "token-classification", "inputs": "Anna lives in Paris"}
    wanted = server.call("POST", "/pipeline", json=body).json()["results"]
    answer = server.call("POST", f"/models/{model_id}/load", json={"compile": True})
    assert answer.json()["settings"]["compile"] is True, answer.text
    found = server.call("POST", "/pipeline", json=body).json()["results"]
    assert [entity["entity"] for entity in found] == [entity["entity"] for entity in wanted]
    assert [entity["score"] for entity in found] == pytest.approx([entity["score"] for entity in wanted], abs=1e-4)


def test_a_load_can_be_watched(start_server: Any, tiny: Any) -> None:
    server, model_id = start_server(), tiny("llama")
    server.add(model_id, "text-generation")
    answer = server.call("POST", f"/models/{model_id}/load", json={"stream": True})
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    phases = [event["progress"]["phase"] for event in events[:-1]]
    assert list(dict.fromkeys(phases))[-2:] == ["read", "ready"]
    assert events[-1]["message"] == f"Model '{model_id}' loaded successfully"
    last = [event["progress"] for event in events[:-1] if event["progress"]["phase"] == "read"][-1]
    assert last["bytes_total"] > 200_000
    assert server.call("POST", "/models/nobody/load", json={"stream": True}).status_code == 404


# Ready ----------------------------------------------------------------------------------------------------------------


def test_models_of_a_setting_are_loaded_at_the_start_and_ready_waits_for_them(
    start_server: Any, tiny: Any, tmp_path: Path
) -> None:
    model_id = tiny("gpt2")
    first = start_server()
    first.add(model_id, "text-generation")
    assert requests.get(f"{first.url}/ready", timeout=PATIENCE).json() == {"success": True, "status": "ready"}
    assert requests.get(f"{first.url}/health", timeout=PATIENCE).json() == {"success": True, "status": "ok"}
    first.stop()
    server = start_server(LOCAL_LLM_PRELOAD=f"{model_id}")
    early = requests.get(f"{server.url}/ready", timeout=PATIENCE)
    assert early.status_code in (200, 503)
    if early.status_code == 503:
        assert f"'{model_id}'" in early.json()["error"]
    until(lambda: requests.get(f"{server.url}/ready", timeout=PATIENCE).status_code == 200)
    assert set(cached(server)) == {model_id}
    server.stop()
    failing = start_server(LOCAL_LLM_PRELOAD=f"{model_id},nobody")
    until(lambda: "failed" in requests.get(f"{failing.url}/ready", timeout=PATIENCE).text)
    assert requests.get(f"{failing.url}/ready", timeout=PATIENCE).status_code == 503


def test_models_can_be_warmed_up_in_the_background(start_server: Any, tiny: Any) -> None:
    server, ids = start_server(), [tiny("gpt2"), tiny("llama")]
    for model_id in ids:
        server.add(model_id, "text-generation")
    answer = server.call("POST", "/cache/warm", json={"model_ids": ids})
    assert answer.status_code == 200
    assert set(answer.json()["models"]) == {*ids}
    until(lambda: set(cached(server)) == {*ids})
    assert server.call("POST", "/cache/warm", json={"model_ids": ["nobody"]}).status_code == 404


# Statistics -----------------------------------------------------------------------------------------------------------


def test_statistics_tell_how_a_model_did_and_survive_a_restart(start_server: Any, tiny: Any) -> None:
    server, model_id = start_server(), tiny("gpt2")
    server.add(model_id, "text-generation")
    for _ in range(3):
        assert generate(server, model_id).status_code == 200
    assert generate(server, model_id, prompt="word " * 400).status_code == 400

    def shown(of: Server) -> dict[str, Any]:
        found: dict[str, Any] = of.call("GET", "/statistics").json()["statistics"]["models"][model_id]
        return found

    counts = shown(server)
    assert (counts["requests"], counts["tokens"], counts["loads"]) == (3, 12, 1)
    assert (counts["cache_hits"], counts["cache_misses"], counts["errors"]) == (3, 1, {"ContextExceeded": 1})
    assert 0 < counts["latency_seconds"]["p50"] <= counts["latency_seconds"]["p95"] <= counts["latency_seconds"]["p99"]
    assert counts["tokens_per_second"] > 0
    assert counts["load_seconds"]["mean"] == counts["load_seconds"]["last"] > 0
    server.stop()
    again = start_server()
    assert shown(again) == counts
    assert generate(again, model_id).status_code == 200
    assert shown(again)["requests"] == 4


def test_a_removed_model_leaves_no_statistics(start_server: Any, tiny: Any) -> None:
    """One that is registered by the same name later begins anew, after a restart too."""
    server, gone, stays = start_server(), tiny("gpt2"), tiny("llama")

    def shown(of: Server) -> dict[str, int]:
        found: dict[str, Any] = of.call("GET", "/statistics").json()["statistics"]["models"]
        return {model_id: counts["requests"] for model_id, counts in found.items()}

    for model_id in (gone, stays):
        server.add(model_id, "text-generation")
        assert generate(server, model_id).status_code == 200
    server.stop()  # which writes them
    server = start_server()
    assert shown(server) == {gone: 1, stays: 1}
    assert server.call("DELETE", f"/models/{gone}").status_code == 200
    assert shown(server) == {stays: 1}
    server.add(gone, "text-generation")
    assert generate(server, gone).status_code == 200
    assert shown(server) == {gone: 1, stays: 1}
    assert server.call("DELETE", f"/models/{gone}").status_code == 200
    server.stop()
    assert shown(start_server()) == {stays: 1}


def test_a_damaged_file_of_statistics_is_set_aside(start_server: Any, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "models.statistics.json").write_text('{"models": 3}')
    server, model_id = start_server(), tiny("gpt2")
    server.add(model_id, "text-generation")
    generate(server, model_id)
    assert server.call("GET", "/statistics").json()["statistics"]["models"][model_id]["requests"] == 1
    server.stop()
    assert [*tmp_path.glob("models.statistics.json.corrupt-*")]
    assert start_server().call("GET", "/statistics").json()["statistics"]["models"][model_id]["requests"] == 1


def test_readable_sizes() -> None:
    assert [readable(size) for size in (999, 1500, 125_864_192, 3 * 10**9, 2 * 10**13)] == [
        "999 B",
        "1.5 kB",
        "126 MB",
        "3 GB",
        "20 TB",
    ]


def test_a_setting_refused_by_the_loader_has_a_field(models_dir: Path, tiny: Any) -> None:
    model_id = tiny("llama")
    with pytest.raises(InvalidRequest) as refused:
        loader.load(record(model_id, device="cuda:9"), LoadOptions(models_dir, "cpu"), models_dir / model_id)
    assert refused.value.field == "device"


# Models that are not here yet -----------------------------------------------------------------------------------------


def test_a_model_that_is_not_here_is_estimated_by_its_config_and_refused_before_it_is_downloaded(
    tmp_path: Path, models_dir: Path
) -> None:
    place = Place(tmp_path, models_dir)
    with place.hub:
        place.publish("org/model", "llama")
        server = place.serve(LOCAL_LLM_MEMORY_BUDGET="100kB")
        try:
            server.add("org/model", "text-generation")
            with place.hub.recording() as made:
                told = server.call("GET", "/models/org/model/estimate").json()
                refused = server.call("POST", "/models/org/model/load")
            here = loader.estimate(record("org/model"), LoadOptions(models_dir, "cpu"), models_dir / "tiny" / "llama")
            assert (told["bytes"], told["weights_bytes"]) == (here.total, here.weights)
            assert (told["fits"], told["possible"]) == (False, False)
            assert refused.status_code == 400, refused.text
            assert str(here.total) in refused.json()["error"]
            assert {request.file for request in made if request.method == "GET"} <= {"config.json", "model"}
        finally:
            server.stop()


# What a tester found --------------------------------------------------------------------------------------------------


def test_a_load_with_a_wrong_setting_leaves_the_model_as_it_was(start_server: Any, tiny: Any) -> None:
    server, model_id = start_server(), tiny("llama")
    server.add(model_id, "text-generation")
    generate(server, model_id)
    loaded_at = cached(server)[model_id]["loaded_at"]
    for wrong in ({"max_context": 100_000}, {"device": "cuda"}, {"device_map": {"nosuch": "cpu"}}):
        assert server.call("POST", f"/models/{model_id}/load", json=wrong).status_code == 400
        assert generate(server, model_id).status_code == 200
    assert server.call("POST", f"/models/{model_id}/load", json={"max_context": 100_000}).status_code == 400
    assert cached(server)[model_id]["settings"]["max_context"] is None
    assert loaded_at <= cached(server)[model_id]["loaded_at"]


def test_models_that_are_not_batched_give_their_memory_back_too(tmp_path: Path, start_server: Any) -> None:
    """An encoder of 100 MB: its weights are nobody's after the unload."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    root = tmp_path / "models"
    source = root / tiny_models.build(root, "bert-mlm")
    tokenizer = AutoTokenizer.from_pretrained(source)
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 12}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(root / "sized" / "bert")
    tokenizer.save_pretrained(root / "sized" / "bert")
    server = start_server(LOCAL_LLM_MODELS_DIR=str(root))
    server.add("sized/bert", "fill-mask")
    task = {"model_id": "sized/bert", "task": "fill-mask", "inputs": f"The {tokenizer.mask_token} harbour"}
    assert server.call("POST", "/pipeline", json=task).status_code == 200
    answer = server.call("POST", "/models/sized/bert/unload").json()
    assert answer["bytes"] > 100_000_000
    assert answer["freed_bytes"] >= 0.9 * answer["bytes"]


def test_a_model_loaded_beside_one_of_half_precision_is_batched(start_server: Any, tiny: Any) -> None:
    """transformers changes torch's default type for the process while it builds such a model."""
    server, half, whole = start_server(), tiny("llama"), tiny("gpt2")
    for model_id in (half, whole):
        server.add(model_id, "text-generation")
    stop = threading.Event()

    def reload() -> None:
        while not stop.is_set():
            server.call("POST", f"/models/{half}/load", json={"dtype": "bfloat16", "force_reload": True})

    with ThreadPoolExecutor(2) as pool:
        pool.submit(reload)
        try:
            for _ in range(8):
                assert server.call("POST", f"/models/{whole}/load", json={"force_reload": True}).status_code == 200
                assert generate(server, whole).status_code == 200
                assert cached(server)[whole]["engine"]["mode"] == "batched"
        finally:
            stop.set()


def test_a_model_that_is_called_as_a_route_can_be_shown_and_removed(server: Server) -> None:
    for name in ("download", "preflight", "estimate"):
        server.add(f"routes/{name}", "text-generation")
        assert server.call("GET", f"/models/routes/{name}").json()["model"]["model_id"] == f"routes/{name}"
        assert server.call("DELETE", f"/models/routes/{name}").status_code == 200


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"gguf_file": "../x.gguf"}, "gguf_file"),
        ({"gguf_file": "x.bin"}, "gguf_file"),
        ({"gguf_file": ""}, "gguf_file"),
        ({"adapters": {"a": "../x"}}, "adapters.a"),
        ({"adapters": {"": "org/x"}}, "adapters"),
        ({"revision": "v99"}, "revision"),  # of a folder that is here
        ({"quantization": "int3"}, "quantization"),
        ({"attn_implementation": "magic"}, "attn_implementation"),
        ({"details": {"known": True}}, "details"),
    ],
)
def test_a_record_refuses_by_name_what_could_never_be(
    server: Server, tiny: Any, fields: dict[str, Any], field: str
) -> None:
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    answer = server.call("PUT", f"/models/{model_id}", json=fields)
    assert answer.status_code == 400, answer.text
    assert field in answer.json()["error"]


# Out of memory --------------------------------------------------------------------------------------------------------


def test_a_step_that_lacks_memory_is_tried_again_when_an_idle_model_has_gone(
    manage: Callable[..., ModelManager], tiny: Any
) -> None:
    manager = manage(record(tiny("gpt2")), record(tiny("llama")))
    request = GenerationRequest({"max_new_tokens": 4, "do_sample": False}, prompt="The cat")
    manager.load(tiny("gpt2"))
    with noted_parts() as parts, manager.lease(tiny("llama")) as model:
        wanted = "".join(chunk.text for chunk in model.generate(request))
        runner = parts[tiny("llama")].runner
        forward, failures = runner.forward, [RuntimeError("can't allocate memory: 1 GB")]

        def short(*arguments: Any) -> Any:
            if failures:
                raise failures.pop()
            return forward(*arguments)

        runner.forward = short
        assert "".join(chunk.text for chunk in model.generate(request)) == wanted
        assert set(manager.loaded()) == {tiny("llama")}
        failures += [RuntimeError("can't allocate memory: 1 GB")] * 2
        with pytest.raises(OutOfMemory, match="Not enough memory to generate"):
            list(model.generate(request))
        failures.clear()
        assert "".join(chunk.text for chunk in model.generate(request)) == wanted


def test_a_load_that_lacks_memory_is_tried_again_when_the_idle_models_have_gone(
    manage: Callable[..., ModelManager], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = manage(record(tiny("gpt2")), record(tiny("llama")))
    manager.load(tiny("gpt2"))
    read, failures = by_torch.read_model, [OutOfMemory("no room")]

    def short(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return read(*arguments)

    monkeypatch.setattr(by_torch, "read_model", short)
    manager.load(tiny("llama"))
    assert set(manager.loaded()) == {tiny("llama")}
    manager.unload(tiny("llama"))
    failures.append(OutOfMemory("no room"))
    with pytest.raises(OutOfMemory, match="no room"):
        manager.load(tiny("llama"))
    assert manager.budget.holders("cpu") == {}
    manager.load(tiny("llama"))


def test_who_leaves_a_forced_load_does_not_end_it_for_who_asked(
    manage: Callable[..., ModelManager], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = manage(record(tiny("llama")))
    manager.load(tiny("llama"))
    read, reading = by_torch.read_model, threading.Event()

    def slow(*arguments: Any) -> Any:
        reading.set()
        time.sleep(1)
        return read(*arguments)

    monkeypatch.setattr(by_torch, "read_model", slow)
    with ThreadPoolExecutor(2) as pool:
        forced = pool.submit(manager.load, tiny("llama"), force_reload=True)
        assert reading.wait(10)
        gone = Cancellation()
        other = pool.submit(manager.load, tiny("llama"), cancellation=gone)
        time.sleep(0.2)
        gone.cancel()
        with pytest.raises(Cancelled):
            other.result(10)
        assert forced.result(10).setup.record.model_id == tiny("llama")


def test_a_model_that_was_let_in_can_serve_whatever_the_others_have_taken_since(
    manage: Callable[..., ModelManager], tiny: Any
) -> None:
    """Also one for which there was so much room that nobody looked closely."""
    manager = manage(record(tiny("llama")), budget=Budget({"*": Limit(bytes=3 * 10**9)}))
    manager.load(tiny("llama")).prepared()
    manager.budget.record("others", "weights", {"cpu": manager.budget.available("cpu") or 0})
    with manager.lease(tiny("llama")) as model:
        request = GenerationRequest({"max_new_tokens": 4, "do_sample": False}, prompt="The cat")
        assert "".join(chunk.text for chunk in model.generate(request))
        assert model.sizes.kv_cache > 0
