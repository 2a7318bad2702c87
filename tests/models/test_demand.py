"""What a model's own `generate` takes is asked for before it is taken, held while it runs, and given back after."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import changed_models
import pytest
from causal_models import build, serve
from loaded_parts import noted_models, noted_parts
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from huggingface.engine.ticket import Ticket
from huggingface.errors import Cancelled, InvalidRequest, OutOfMemory
from huggingface.manager.budget import Budget, Limit
from huggingface.manager.manager import ModelManager
from huggingface.model.loaded import LoadedModel
from huggingface.modeling.demand import Demand, MemoryClaims, Wanted, asked_of
from huggingface.registry.records import ModelRecord
from huggingface.registry.registry import ModelRegistry
from huggingface.types import EngineOptions, GenerationRequest, LoadOptions

MILLION = 1_000_000
LIMIT = 48 * 2**20  # bytes: plenty for a tiny model, and nothing for a thousand beams
PROMPT = "The little harbour lies " * 8


@pytest.fixture
def manage(tmp_path: Path, models_dir: Path) -> Iterator[Callable[..., ModelManager]]:
    """Makes a manager of the models that are named, with little memory for them."""
    made: list[ModelManager] = []

    def make(*records: ModelRecord) -> ModelManager:
        registry = ModelRegistry(tmp_path / "registry.json")
        for record in records:
            registry.add(record)
        budget = Budget({"cpu": Limit(bytes=LIMIT)}, free=lambda _: None)
        options = LoadOptions(models_dir, "cpu", backend="torch", engine=EngineOptions(kv_cache_bytes=2**20))
        made.append(ModelManager(registry, options, memory_timeout=0.5, budget=budget))
        return made[-1]

    yield make
    for manager in made:
        manager.close()
        manager.statistics.close()


def record(model_id: str, model_type: str = "text-generation", **fields: Any) -> ModelRecord:
    return ModelRecord(model_id, model_id, model_type, **fields)


def text(model: LoadedModel, **parameters: Any) -> str:
    """The first text that a model makes."""
    asked = {"max_new_tokens": 4, "do_sample": False, **parameters}
    return next(chunk.whole for chunk in model.generate(GenerationRequest(asked, prompt=PROMPT)) if chunk.index == 0)


def taken(manager: ModelManager) -> int:
    """Bytes that count as taken by models at this moment."""
    return sum(manager.budget.held().values())


def held(manager: ModelManager) -> int:
    """The same once loads and generations have given back what they had for themselves."""
    for model_id, model in manager.loaded().items():
        until(lambda name=f"prepare-{model_id}": name not in {thread.name for thread in threading.enumerate()})
        model.engine.call(lambda: None)
    return taken(manager)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"num_beams": 1024}, "num_beams"),
        ({"num_beams": 1024, "num_return_sequences": 2, "max_new_tokens": 20}, "num_beams"),
        ({"do_sample": True, "num_return_sequences": 1024}, "num_return_sequences"),
        ({"do_sample": True, "num_beams": 1024}, "num_beams"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_more_beams_or_texts_than_there_is_memory_for_are_refused_by_name_and_size(
    name: str, parameters: dict[str, Any], field: str, manage: Any, tiny: Any
) -> None:
    """The refusal comes before anything is taken; what fits is answered as ever, and nothing stays taken."""
    kind = "text-generation" if name == "llama" else "text2text-generation"
    manager = manage(record(tiny(name), kind))
    with manager.lease(tiny(name)) as model:
        wanted, before = text(model, num_beams=2), held(manager)
        with pytest.raises(InvalidRequest, match=rf"{field} 1024 .*takes .* \(\d+ bytes\)") as refused:
            text(model, **parameters)
        assert refused.value.field == field
        with pytest.raises(InvalidRequest, match=rf"{field} 1024"):
            model.run(kind, PROMPT, {"max_new_tokens": 4, **parameters})
        assert held(manager) == before
        assert text(model, num_beams=2) == wanted
        assert held(manager) == before


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_what_a_models_own_settings_ask_for_is_refused_by_their_file(name: str, manage: Any, models_dir: Path) -> None:
    """A generation_config.json may ask for a million of anything; whoever asks for less himself is answered."""
    model_id, kind = f"tiny/{name}-of-a-million", "text-generation" if name == "llama" else "text2text-generation"
    folder = changed_models.copy(models_dir, name, model_id)
    changed_models.edit(folder, "generation_config.json", num_beams=MILLION, num_return_sequences=MILLION)
    manager = manage(record(model_id, kind))
    with manager.lease(model_id) as model:
        before = held(manager)
        with pytest.raises(InvalidRequest, match=r"num_beams 1000000 of the model's own settings \(generation_config"):
            text(model)
        with pytest.raises(InvalidRequest, match=r"1000000"):
            text(model, num_beams=1, do_sample=True)
        own = "text-generation" if name == "llama" else "summarization"
        with pytest.raises(InvalidRequest, match=r"1000000 of the model's own settings"):
            model.run(own, PROMPT, {"max_new_tokens": 4})
        assert held(manager) == before
        assert text(model, num_beams=1, num_return_sequences=1)
        assert model.run(own, PROMPT, {"max_new_tokens": 4, "num_beams": 1, "num_return_sequences": 1})


def test_a_length_without_a_limit_is_no_memory_that_is_taken_at_once() -> None:
    """However long a text may become by a model's own settings, only what it is long counts; a batch says no."""
    for name in ("llama", "bloom"):
        model, tokenizer = build(name)
        model.generation_config.max_length = 10**12
        loaded = serve(name, model, tokenizer)
        ticket = loaded.generate(GenerationRequest({"max_new_tokens": 3, "do_sample": True}, prompt="The cat"))
        assert [chunk.usage.completion_tokens for chunk in ticket][-1] <= 3
        endless = GenerationRequest({"do_sample": True, "max_time": 0.2}, prompt="The cat")
        if name == "llama":
            with pytest.raises(OutOfMemory, match="KV cache"):
                loaded.generate(endless)
        else:
            assert list(loaded.generate(endless))[-1].finish_reason is not None
        loaded.close()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_model_whose_layers_differ_takes_what_its_largest_layers_take() -> None:
    """As Gemma 4 has them, whose config does not tell one width for all of its heads."""
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size_per_layer_input": 0}
    shape |= {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16}
    sizes = []
    for width in (8, 16):
        model = AutoModelForCausalLM.from_config(Gemma4TextConfig(**shape, head_dim=width))
        asked = asked_of(model, {"num_beams": 2, "max_new_tokens": 8}, 40)
        sizes.append(Demand(model).size(asked, 48, reading=True))
    assert sizes[0] == sizes[1] > 0


def test_memory_is_held_while_beams_are_searched_and_given_back_when_they_are_given_up(manage: Any, tiny: Any) -> None:
    """What a running search takes counts for everybody; a search that is cancelled, or fails, leaves nothing taken."""
    manager = manage(record(tiny("llama")))
    with manager.lease(tiny("llama")) as model:
        text(model, num_beams=2)
        before = held(manager)
        asked = {"num_beams": 8, "min_new_tokens": 400, "max_new_tokens": 400, "do_sample": False}
        ticket: Ticket = model.generate(GenerationRequest(asked, prompt="The cat"))
        until(lambda: taken(manager) > before)
        ticket.cancel()
        with pytest.raises(Cancelled):
            list(ticket)
        until(lambda: taken(manager) == before)


def test_an_idle_model_goes_for_beams_but_not_for_what_could_never_be_had(manage: Any, tiny: Any) -> None:
    """Memory that an idle model has is there for a search; a search beyond all memory costs nobody his model."""
    manager = manage(record(tiny("llama")), record(tiny("gpt2")))
    with manager.lease(tiny("gpt2")):
        pass
    other = sum(manager.budget.held(tiny("gpt2")).values())
    with noted_parts() as parts, noted_models() as read, manager.lease(tiny("llama")) as model:
        with pytest.raises(InvalidRequest):
            text(model, num_beams=1024)
        assert tiny("gpt2") in manager.loaded()
        text(model, num_beams=2)
        assert tiny("gpt2") in manager.loaded()
        room = manager.budget.available("cpu")
        need = MemoryClaims("x", read[-1], lambda _: True, lambda: None, bool).check
        maximum = max(rows for rows in range(1, 20_000) if need(_rows(rows)) < room + other // 2)
        assert need(_rows(maximum)) > room, "one that needs a part of what the other has"
        with parts[tiny("llama")].claims.held(_rows(maximum)):
            assert tiny("gpt2") not in manager.loaded()


def _rows(rows: int) -> Wanted:
    """One more token after a prompt of one, as a search of so many beams."""
    return Wanted(rows=rows, prompt=1, longest=2, why=f"num_beams {rows}", field="num_beams")


def test_two_at_once_are_not_granted_the_same_memory_and_growth_is_asked_for() -> None:
    """Of two models' searches that fit one by one the second is refused while the first runs; so is what grows on."""
    budget = Budget({"cpu": Limit(bytes=350 * 10**6)}, free=lambda _: None)
    model, _ = build("llama")

    def claims(owner: str) -> MemoryClaims:
        return MemoryClaims(
            owner, model, lambda size: budget.allocate(owner, "kv cache", "cpu", size), lambda: 350 * 10**6, bool
        )

    asked = asked_of(model, {"num_beams": 400, "max_new_tokens": 10**4}, 50)
    first, second = claims("first"), claims("second")
    assert 350 * 10**6 / 2 < first.check(asked) < 350 * 10**6
    with first.held(asked) as reached:
        with pytest.raises(OutOfMemory, match="num_beams 400"), second.held(asked):
            pass
        assert set(budget.holders("cpu")) == {"first"}
        small = budget.holders("cpu")["first"]
        reached(51)
        lengths = []
        with pytest.raises(OutOfMemory, match="num_beams 400"):
            for length in range(52, 10**4):
                reached(length)
                lengths.append(length)
        assert len(lengths) > 200
        assert small <= budget.holders("cpu")["first"] <= 350 * 10**6
    assert budget.holders("cpu") == {}
    with second.held(asked):
        assert set(budget.holders("cpu")) == {"second"}
    errors: list[BaseException] = []
    both = threading.Barrier(2)

    def run(each: MemoryClaims) -> None:
        try:
            both.wait()
            with each.held(asked):
                both.wait(20)
        except (OutOfMemory, threading.BrokenBarrierError) as error:
            errors.append(error)
            both.abort()

    threads = [threading.Thread(target=run, args=(each,)) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(error, OutOfMemory) for error in errors) == 1
    assert budget.holders("cpu") == {}
