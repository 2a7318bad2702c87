"""Models that change somewhere along a text: each text gets what it gets alone, whatever else comes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import build_config, serve
from changed_models import copy as copied
from changed_models import edit, load
from long_models import CHANGING, LENGTHS, ROTARY, own, served, together, tokens

from huggingface.engine.borders import nearest
from huggingface.engine.layers import NotBatchable
from huggingface.engine.slots import SMALLEST, Lengths, SlotTable
from huggingface.engine.torch.parity import batch_runner
from huggingface.errors import InvalidRequest
from huggingface.inspection.names import Names
from huggingface.inspection.rules import context_of
from huggingface.model.loaded import LoadedModel
from huggingface.modeling.rotary import context


@dataclass
class Served:
    """A model as it is served, and itself."""

    model: Any
    tokenizer: Any
    loaded: LoadedModel


@pytest.fixture(scope="module", params=ROTARY)
def rotary(request: pytest.FixtureRequest) -> Iterator[Served]:
    """A model whose rotary embeddings change with the length of a text."""
    model, tokenizer = build_config(*ROTARY[request.param])
    loaded = serve(request.param, copy.deepcopy(model), tokenizer)
    yield Served(model, tokenizer, loaded)
    loaded.close()


def test_a_text_is_what_generate_makes_of_it_beside_longer_and_shorter_ones(rotary: Served) -> None:
    """Prompts on both sides of the border, and texts that grow across it; twice, so that prefixes are there."""
    assert rotary.loaded.status is not None
    assert rotary.loaded.status.mode == "batched"
    prompts = [(tokens(seed, count), new) for seed, (count, new) in enumerate(LENGTHS)]
    expected = [own(rotary.model, rotary.tokenizer, prompt, max_new_tokens=new) for prompt, new in prompts]
    for _ in range(2):
        assert together(rotary.loaded, prompts) == expected


def test_a_prompt_that_begins_like_one_from_the_other_side_of_the_border_is_its_own(rotary: Served) -> None:
    """A chat grows across the border, and back: what was computed of a shorter or longer text is not used."""
    first = tokens(20, 50)
    for prompt in (first, first + tokens(21, 60), first + tokens(22, 8), first + tokens(21, 60), first):
        expected = own(rotary.model, rotary.tokenizer, prompt, max_new_tokens=10)
        assert served(rotary.loaded, prompt, max_new_tokens=10) == expected


def test_beams_do_not_depend_on_what_was_asked_before(rotary: Served) -> None:
    """They run on the model itself, whose rotary embeddings would keep the longest text so far."""
    for seed, count in ((30, 200), (31, 70), (32, 20)):
        asked = {"num_beams": 2, "max_new_tokens": 6}
        prompt = [*tokens(seed, count), *rotary.tokenizer("a", add_special_tokens=False)["input_ids"]]  # a whole letter
        expected = own(rotary.model, rotary.tokenizer, prompt, **asked)
        assert served(rotary.loaded, prompt, **asked) == expected


def test_log_probabilities_of_a_prompt_are_those_of_one_pass_over_it(rotary: Served) -> None:
    """However the prompt is read: `echo` with `logprobs`."""
    from huggingface.types import GenerationRequest

    for seed, count in ((40, 30), (41, 150), (42, 30)):
        prompt = tokens(seed, count)
        request = GenerationRequest(
            {"do_sample": False, "max_new_tokens": 1}, tokens=prompt, logprobs=0, prompt_logprobs=True
        )
        [chunk] = list(rotary.loaded.generate(request))
        with torch.inference_mode():
            logits = copy.deepcopy(rotary.model)(torch.tensor([prompt])).logits[0]
        wanted = torch.log_softmax(logits, -1)[torch.arange(count - 1), torch.tensor(prompt[1:])]
        told = torch.tensor([token.logprob for token in chunk.prompt[1:]])
        assert torch.allclose(told, wanted, atol=1e-3)


def test_a_prefix_is_reused_among_texts_of_one_table_only() -> None:
    """The slots' part of it, in integers."""
    from test_slots import Lists

    table = SlotTable(store := Lists(), 8 * SMALLEST, Lengths(lambda length: length > 8))
    slot = table.take(list(range(6)), 10, at_once=6)
    assert slot is not None
    store.write(slot, list(range(6)))
    table.release(slot)
    longer = table.take(list(range(12)), 20, at_once=12)
    assert longer is not None
    assert not longer.tokens
    again = table.take(list(range(7)), 20, at_once=7)
    assert again is not None
    assert again.tokens == list(range(6))


@pytest.mark.parametrize("scaling", ["longrope", "dynamic"])
def test_a_task_gives_each_text_what_it_gets_alone(tmp_path: Path, scaling: str) -> None:
    """Vectors of texts on both sides of a border of 90 tokens, in calls that would share batches."""
    folder = copied(tmp_path, "llama", f"long/{scaling}")
    rope = {**ROTARY[scaling][1]["rope_parameters"], "original_max_position_embeddings": 90}
    edit(folder, rope_scaling=rope, max_position_embeddings=90, rope_theta=10000.0)

    def vectors(*calls: list[str]) -> list[torch.Tensor]:
        model = load(tmp_path, f"long/{scaling}", "feature-extraction")
        try:
            return [torch.tensor(found) for texts in calls for found in model.run("feature-extraction", texts, {})]
        finally:
            model.close()

    short, long = "a" * 70, "b" * 120
    calls = [[short, "c" * 80], [long, "e" * 110], ["f" * 85, "d" * 100, short]]
    found = vectors(*calls)
    assert {one.shape[1] > 90 for one in found} == {True, False}
    for text, one in zip([text for call in calls for text in call], found, strict=True):
        [alone] = vectors([text])
        assert torch.allclose(one, alone, atol=1e-5)


SCALINGS: list[tuple[int, dict[str, Any] | None, int]] = [
    (64, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    (64, {"rope_type": "yarn", "factor": 4.0}, 256),
    (64, {"type": "linear", "factor": 4.0}, 256),
    (64, {"rope_type": "dynamic", "factor": 4.0}, 256),
    (40960, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
    (163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),
    (131072, {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}, 131072),
    (512, None, 512),
]


@pytest.mark.parametrize(("positions", "scaling", "expected"), SCALINGS)
def test_a_scaling_makes_the_context_as_long_as_it_says(
    positions: int, scaling: dict[str, Any] | None, expected: int
) -> None:
    """Qwen's own instructions for YaRN leave `max_position_embeddings` as it was."""
    assert context(positions, scaling) == expected
    told = {"model_type": "llama", "max_position_embeddings": positions, "rope_scaling": scaling}
    assert context_of(Names(), told) == expected


@pytest.mark.parametrize("name", CHANGING)
def test_a_model_is_served_as_it_is_right_beyond_its_windows(name: str) -> None:
    """In a batch where that gives what `generate` gives beyond them, else one at a time; it is told why."""
    kind, config, batched = CHANGING[name]
    model, tokenizer = build_config(kind, config)
    loaded = serve(name, copy.deepcopy(model), tokenizer)
    try:
        assert loaded.status is not None
        assert loaded.status.mode == ("batched" if batched else "one at a time")
        assert loaded.status.mode == "batched" or loaded.status.reason
        prompts = [(tokens(seed, count), 8) for seed, count in enumerate((20, 270, 12, 300, 290))]
        expected = [own(model, tokenizer, prompt, max_new_tokens=new) for prompt, new in prompts]
        assert together(loaded, prompts) == expected
    finally:
        loaded.close()


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt-neo", "moshi", "longrope", "phi3-longrope"])
def test_what_lies_too_far_to_be_read_is_tried_on_a_small_model(name: str) -> None:
    """A window of thousands of tokens decides as a near one does, and no prompt is as long."""
    kind, config = (CHANGING[name] if name in CHANGING else ROTARY[name])[:2]
    batched = CHANGING[name][2] if name in CHANGING else True
    far = {key: 5000 for key in config if key in ("sliding_window", "keep_window_size")}
    if name in ROTARY:
        rope = {**config["rope_parameters"], "original_max_position_embeddings": 5000}
        far = {"rope_parameters": rope, "original_max_position_embeddings": 5000}
    if name == "gpt-neo":
        far = {"window_size": 5000}
    model, _ = build_config(kind, {**config, **far, "max_position_embeddings": 8192})
    assert nearest(model.config) == 5000
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, args, named: read.append(named["input_ids"].shape[1]), with_kwargs=True)
    if batched:
        batch_runner(model).close()
    else:
        with pytest.raises(NotBatchable, match="beyond 5000 tokens"):
            batch_runner(model)
    assert max(read) < 200


@pytest.mark.parametrize("window", [100, 5000])
@pytest.mark.parametrize("name", ["mistral", "moshi"])
def test_openvino_computes_what_is_right_beyond_its_windows(name: str, window: int) -> None:
    """Moshi's config has a window that its code does not use."""
    kind, config, right = CHANGING[name]
    model, tokenizer = build_config(kind, {**config, "sliding_window": window, "max_position_embeddings": 8192})
    if not right:
        with pytest.raises((NotBatchable, InvalidRequest), match="torch's"):
            serve(name, model, tokenizer, "openvino")
        return
    loaded = serve(name, copy.deepcopy(model), tokenizer, "openvino")
    prompts = [(tokens(seed, count), 6) for seed, count in enumerate((20, 270, 12))]
    assert together(loaded, prompts) == [own(model, tokenizer, prompt, max_new_tokens=new) for prompt, new in prompts]
    loaded.close()


def test_a_model_that_cannot_be_tried_beyond_a_far_window_is_served_one_at_a_time() -> None:
    """Code whose small form cannot be made."""
    model, _ = build_config("MistralConfig", {"sliding_window": 5000, "max_position_embeddings": 8192, "head_dim": 8})
    own_class = type(model)

    class Sized(own_class):  # type: ignore[misc, valid-type]
        """Code that knows one size only."""

        def __init__(self, config: Any) -> None:
            assert config.sliding_window == 5000
            super().__init__(config)

    model.__class__ = Sized
    with pytest.raises(NotBatchable, match="5000 tokens, which is too far to be tried"):
        batch_runner(model)
