"""What the engine tells and keeps to beyond plain text: log-probabilities, forms of the text, room that grows."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
import torch
from causal_models import build, serve
from loaded_parts import noted_parts
from tiny_tokenizers import TEXT
from transformers import LogitsProcessorList

from huggingface.engine.sampling import Sampler
from huggingface.errors import InvalidRequest
from huggingface.forms.json_schema import closed
from huggingface.model.loaded import LoadedModel
from huggingface.types import Chunk, Constraint, GenerationRequest

WORDS = TEXT.split()
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


class Served:
    """A model, and as it is served."""

    def __init__(self, name: str, engine: str = "torch", **options: Any) -> None:
        self.model, self.tokenizer = build(name)
        with noted_parts() as noted:
            self.loaded: LoadedModel = serve(name, self.model, self.tokenizer, engine, **options)
        self.parts = noted[self.loaded.model_id]

    def ask(self, parameters: dict[str, Any], **request: Any) -> list[Chunk]:
        """All chunks of an answer."""
        return list(self.loaded.generate(GenerationRequest(parameters, **request)))


@pytest.fixture(
    scope="module",
    params=[
        *(("torch", name) for name in ("llama", "gpt2", "mistral-window", "gemma2-eager", "mamba")),
        ("openvino", "gpt2"),
    ],
    ids="-".join,
)
def served(request: pytest.FixtureRequest) -> Any:
    """Models that are batched in one pass, in several, and not at all; and one on the other runner."""
    engine, name = request.param
    made = Served(name, engine)
    yield made
    made.loaded.close()


@pytest.fixture(scope="module", params=["torch", "openvino"])
def llama(request: pytest.FixtureRequest) -> Any:
    """One that is batched, on either runner."""
    made = Served("llama", request.param)
    yield made
    made.loaded.close()


# Log-probabilities ----------------------------------------------------------------------------------------------------


def test_tokens_come_with_the_models_own_log_probabilities(served: Served) -> None:
    """Those of the prompt and of what is made are log-softmax of the model's logits, whatever the parameters do."""
    prompt = " ".join(WORDS[:40])
    parameters = {"do_sample": True, "seed": 3, "temperature": 0.5, "top_k": 5, "max_new_tokens": 9}
    before = served.ask(GREEDY, prompt=prompt)  # a prefix to reuse, which must not shorten what is told
    chunks = served.ask(parameters, prompt=prompt, logprobs=3, prompt_logprobs=True)
    assert before
    made = [token for chunk in chunks for token in chunk.tokens]
    read = [token for chunk in chunks for token in chunk.prompt]
    ids = [token.id for token in [*read, *made]]
    with torch.inference_mode():
        expected = served.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert [token.id for token in read] == served.tokenizer(prompt)["input_ids"]
    assert read[0].logprob is None
    for place, token in enumerate([*read[1:], *made]):
        assert token.logprob == pytest.approx(expected[place, token.id].item(), abs=1e-3)
        top = expected[place].topk(3)
        assert [each.logprob for each in token.top] == pytest.approx(top.values.tolist(), abs=1e-3)
    assert "".join(token.text for token in read) == prompt


def test_a_stream_tells_each_token_with_its_text(llama: Served) -> None:
    """One chunk for each token; the tokens' bytes are the text."""
    chunks = llama.ask(GREEDY, prompt="The", streams=True, logprobs=0)
    assert [len(chunk.tokens) for chunk in chunks] == [1] * 12
    raw = b"".join(token.raw for chunk in chunks for token in chunk.tokens if not token.special)
    assert raw.decode("utf-8", "replace") == chunks[-1].whole


# Forms ----------------------------------------------------------------------------------------------------------------


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema as people write them, whose texts are short enough for a model that writes at random."""
    kinds = ["string", "integer", "boolean", "enum", "null", "pattern"]
    kind = "object" if depth == 0 else draw.choice(kinds + (["array", "object"] if depth < 3 else []))
    if kind == "object":
        names = draw.sample(["name", "age", "city", "tags", "ok", "größe", "a b"], draw.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(draw, depth + 1) for name in names},
            "required": draw.sample(names, draw.randint(0, len(names))),
            **draw.choice([{"additionalProperties": False}, {}]),
        }
    if kind == "array":
        return {"type": "array", "items": random_schema(draw, depth + 1), "minItems": 1, "maxItems": draw.randint(1, 3)}
    return {
        "string": {"type": "string", "maxLength": draw.randint(1, 8)},
        "integer": {"type": "integer", "minimum": draw.randint(-5, 0), "maximum": draw.randint(1, 5000)},
        "boolean": {"type": "boolean"},
        "enum": {"enum": draw.sample(["red", "green", 3, None, 'a "quoted" one', "ü☃"], 3)},
        "null": {"type": ["null", "boolean"]},
        "pattern": {"type": "string", "pattern": "^[a-f]{2,5}-[0-9]$"},
    }[kind]


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"properties": {"a": {"type": "integer"}}}, {"a": 1}, {"b": 1}),
        ({"properties": {"a": {"properties": {"b": {}}}}}, {"a": {"b": 1}}, {"a": {"c": 1}}),
        ({"items": {"properties": {"a": {}}}}, [{"a": 1}], [{"b": 1}]),
        ({"$defs": {"A": {"properties": {"a": {}}}}, "$ref": "#/$defs/A"}, {"a": 1}, {"b": 1}),
        ({"properties": {"properties": {"type": "integer"}}}, {"properties": 1}, {"a": 1}),
    ],
)
def test_objects_have_the_properties_that_are_named(schema: Any, good: Any, bad: Any) -> None:
    held = closed(schema)
    jsonschema.validate(bad, schema)
    jsonschema.validate(good, held)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, held)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
        {"properties": {"a": {}}, "required": ["b"]},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"enum": [{"properties": {"a": 1}}]},
        {"type": "object"},
        True,
    ],
)
def test_schemas_that_need_other_properties_stay_as_they_are(schema: Any) -> None:
    assert closed(schema) == schema


def test_deep_schemas_take_no_longer_for_their_depth() -> None:
    """Each level is looked at once."""
    schema: Any = {"type": "integer"}
    for _ in range(60):
        schema = {"type": "object", "properties": {"k": schema}, "required": ["k"]}
    started = time.perf_counter()
    assert closed(schema)["additionalProperties"] is False
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("schema", "held"),
    [
        ({"type": "string", "format": "password"}, {"type": "string"}),
        ({"type": "string", "format": "uuid"}, {"type": "string", "format": "uuid"}),
        ({"properties": {"format": {"type": "null"}}}, None),
        (
            {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "null"}},
            {"type": "object", "additionalProperties": {"type": "null"}},
        ),
        (
            {"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "null"}, "required": ["a"]},
            {
                "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
                "additionalProperties": False,
                "required": ["a"],
            },
        ),
        ({"propertyNames": {"pattern": "^a"}}, {"patternProperties": {"^a": True}, "additionalProperties": False}),
    ],
)
def test_schemas_are_said_in_words_that_are_known(schema: Any, held: Any) -> None:
    assert closed(schema) == (held or {**schema, "additionalProperties": False})


def test_every_answer_is_what_its_schema_says(llama: Served) -> None:
    """500 schemas, sixteen at once, each with its own, greedy and sampled: all answers parse and validate."""
    draw = random.Random(11)
    schemas = [random_schema(draw) for _ in range(500)]

    def ask(index: int) -> str:
        parameters = {"do_sample": bool(index % 2), "seed": index, "max_new_tokens": 400, "temperature": 1.3}
        constraint = Constraint("json_schema", schemas[index])
        [chunk] = llama.ask(parameters, prompt=WORDS[index % 100], constraint=constraint)
        assert chunk.finish_reason == "stop"
        return chunk.whole or ""

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(500)))
    for schema, answer in zip(schemas, answers, strict=True):
        jsonschema.validate(json.loads(answer), schema)
    assert len(set(answers)) > 250


@pytest.mark.parametrize(
    ("constraint", "form"),
    [
        (Constraint("regex", r"[0-9]{3}-(ab|cd)+!"), r"[0-9]{3}-(ab|cd)+!"),
        (Constraint("choice", ["yes", "no", 'per"haps\n', "yes please"]), r'yes|no|per"haps\n|yes please'),
        (Constraint("grammar", 'start: "<" WORD ">"\nWORD: /[a-z]{2,4}/'), r"<[a-z]{2,4}>"),
    ],
)
def test_a_text_has_the_form_that_is_asked_for(served: Served, constraint: Constraint, form: str) -> None:
    """Greedy and sampled, streamed, in the batch and alone; and without the form it would not have it."""
    for seed in range(4):
        parameters = {"do_sample": seed > 0, "seed": seed, "temperature": 2.0, "max_new_tokens": 300}
        chunks = served.ask(parameters, prompt="The", constraint=constraint, streams=True)
        assert re.fullmatch(form, chunks[-1].whole or "")
        assert "".join(chunk.text for chunk in chunks) == chunks[-1].whole
        assert chunks[-1].finish_reason == "stop"
    assert not re.fullmatch(form, served.ask(GREEDY, prompt="The")[-1].whole or "")


def test_greedy_text_of_a_form_is_the_likeliest_token_that_the_form_allows(llama: Served) -> None:
    """As a loop of one's own would choose: digits only, the likeliest at each place."""
    chunks = llama.ask({**GREEDY, "max_new_tokens": 50}, prompt="The", constraint=Constraint("regex", "[0-9]{6}"))
    ids = llama.tokenizer("The")["input_ids"]
    text = ""
    while len(text) < 6:
        with torch.inference_mode():
            logits = llama.model(torch.tensor([ids])).logits[0, -1]
        for token in logits.argsort(descending=True).tolist():
            piece = llama.tokenizer.decode([token])
            if piece.isascii() and piece.isdigit() and len(text + piece) <= 6:
                break
        ids.append(token)
        text += piece
    assert chunks[-1].whole == text


def test_several_texts_of_one_request_each_have_the_form(llama: Served) -> None:
    """`num_return_sequences` is done by `generate` itself, a form for each row."""
    parameters = {"do_sample": True, "num_return_sequences": 5, "max_new_tokens": 40, "temperature": 2.0, "seed": 1}
    chunks = llama.ask(parameters, prompt="The", constraint=Constraint("regex", "[a-c]{1,7}x"))
    texts = [chunk.whole or "" for chunk in chunks]
    assert len(set(texts)) > 1
    assert all(re.fullmatch("[a-c]{1,7}x", text) for text in texts)


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (Constraint("regex", "(a"), "unclosed group"),
        (Constraint("grammar", 'start: "a" nothing'), "nothing"),
        (Constraint("json_schema", {"type": "object", "properties": {"a": {"not": {"minLength": 2}}}}), "not"),
        (Constraint("json_schema", {"type": "nonsense"}), "nonsense"),
        (Constraint("choice", []), "1 to"),
    ],
)
def test_a_form_that_cannot_be_compiled_is_refused_with_the_reason(
    llama: Served, constraint: Constraint, reason: str
) -> None:
    """Before anything is queued."""
    with pytest.raises(InvalidRequest, match=reason) as caught:
        llama.ask(GREEDY, prompt="The", constraint=constraint)
    assert caught.value.field == constraint.kind


def test_what_does_not_go_with_a_form_is_refused(llama: Served) -> None:
    """Beams choose among texts, and a least length among their ends."""
    form = Constraint("regex", "a+")
    for extra, field in (({"num_beams": 2}, "num_beams"), ({"min_new_tokens": 3}, "min_new_tokens")):
        with pytest.raises(InvalidRequest) as caught:
            llama.ask({**GREEDY, **extra}, prompt="The", constraint=form)
        assert caught.value.field == field
    with pytest.raises(InvalidRequest, match="forbid"):
        tokens = [token for token in range(llama.model.config.vocab_size) if "a" in llama.tokenizer.decode([token])]
        llama.ask({**GREEDY, "suppress_tokens": tokens}, prompt="The", constraint=form)


# Room -----------------------------------------------------------------------------------------------------------------


def test_texts_that_outgrow_their_slots_go_on_as_if_nothing_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts begin in small slots; they move to larger ones, and the greedy text is `generate`'s."""
    served = Served("llama")
    try:
        grown = itertools.count()
        slots = served.parts.batch.slots
        original = slots.grow
        monkeypatch.setattr(slots, "grow", lambda *arguments: (next(grown), original(*arguments))[1])
        parameters = {"do_sample": False, "max_new_tokens": 480, "min_new_tokens": 480}

        def ask(index: int) -> str:
            return served.ask(parameters, prompt=WORDS[index])[-1].whole or ""

        with ThreadPoolExecutor(4) as pool:
            texts = list(pool.map(ask, range(4)))
        assert next(grown) >= 4
        for index, text in enumerate(texts):
            ids = torch.tensor([served.tokenizer(WORDS[index])["input_ids"]])
            output = served.model.generate(ids, attention_mask=torch.ones_like(ids), **parameters)
            assert served.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == text
    finally:
        served.loaded.close()


def test_who_cannot_grow_waits_and_goes_on_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two long texts, and four of them: all begin, some have to wait, all are right."""
    token_bytes = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32
    served = Served("llama", kv_cache_bytes=1024 * token_bytes)
    try:
        parameters = {"do_sample": False, "max_new_tokens": 450, "min_new_tokens": 450}
        put_back = itertools.count()
        slots = served.parts.batch.slots
        original = slots.grow
        # Of several that run, one waits whenever there is no larger slot; one that runs alone gets its slot.
        monkeypatch.setattr(slots, "grow", lambda *arguments: original(*arguments) or (next(put_back), False)[1])
        with ThreadPoolExecutor(4) as pool:
            texts = list(pool.map(lambda word: served.ask(parameters, prompt=word)[-1].whole, WORDS[:4]))
        assert next(put_back) > 0, "somebody had to wait"
        for word, text in zip(WORDS, texts, strict=False):
            ids = torch.tensor([served.tokenizer(word)["input_ids"]])
            output = served.model.generate(ids, attention_mask=torch.ones_like(ids), **parameters)
            assert served.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == text
        assert served.loaded.status is not None
        assert served.loaded.status.slots == 0
    finally:
        served.loaded.close()


def test_as_many_tokens_as_there_is_room_for() -> None:
    """`fills` goes to the end of the context or of the cache, whichever is nearer, where nothing else sets a limit."""
    token_bytes = 2 * 2 * 2 * 8 * 4
    for limit, room in ((2**30, 512), (300 * token_bytes, 256)):
        served = Served("llama", kv_cache_bytes=limit)
        try:
            prompt = served.tokenizer("The")["input_ids"]
            ends = {"eos_token_id": [served.model.config.vocab_size - 1], "do_sample": False}
            [chunk] = served.ask(ends, prompt="The", fills=True)
            assert chunk.usage is not None
            assert chunk.usage.completion_tokens == room - len(prompt) + 1
            [chunk] = served.ask({**ends, "max_new_tokens": 3}, prompt="The", fills=True)
            assert chunk.usage is not None
            assert chunk.usage.completion_tokens == 3
        finally:
            served.loaded.close()


def test_a_form_that_is_slow_to_compile_holds_nobody_up(llama: Served) -> None:
    """It is compiled on its own request's thread: others' tokens go on meanwhile."""
    big = {
        "type": "object",
        "properties": {f"field{index}": {"type": "string", "pattern": "^[a-z]{1,40}x{1,40}$"} for index in range(200)},
        "additionalProperties": False,
    }
    done = threading.Event()
    times = []

    def stream() -> None:
        request = GenerationRequest({"do_sample": False, "max_new_tokens": 400}, prompt="The", streams=True)
        for _ in llama.loaded.generate(request):
            times.append(time.monotonic())
        done.set()

    thread = threading.Thread(target=stream)
    thread.start()
    started = time.monotonic()
    llama.ask({**GREEDY, "max_new_tokens": 2}, prompt="The", constraint=Constraint("json_schema", big))
    took = time.monotonic() - started
    thread.join(60)
    assert done.is_set()
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert max(gaps) < max(took, 0.5)


# Drawing --------------------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_by_their_probabilities() -> None:
    """Without a seed: as often as their probabilities say, and one of probability 0 never."""
    torch.manual_seed(3)
    scores = torch.full((1, 500), -torch.inf)
    scores[0, ::7] = torch.randn(72) * 2
    sampler = Sampler(torch.zeros((1, 1), dtype=torch.long), 1, LogitsProcessorList(), True, None)
    count = 20_000
    drawn = torch.stack([sampler.sample(scores)[0] for _ in range(count)])
    seen = torch.bincount(drawn[:, 0], minlength=500)
    expected = scores.softmax(-1)[0] * count
    assert seen[expected == 0].sum() == 0
    often = expected > 5
    squares = ((seen[often] - expected[often]) ** 2 / expected[often]).sum()
    degrees = int(often.sum()) - 1
    assert squares < degrees + 5 * (2 * degrees) ** 0.5
    for only in (0, 250, 499):
        alone = torch.full((1, 500), -torch.inf)
        alone[0, only] = -3.0
        assert sampler.sample(alone)[0].tolist() == [only]
