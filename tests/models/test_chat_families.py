"""Calls and reasoning of today's model families: read back as their templates write them, and held to by grammars."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import llguidance.hf
import numpy as np
import pytest
from chat_families import FAMILIES, NAMES, Family, marks, render, written
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from tiny_tokenizers import byte_level
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from huggingface.api.openai.conversation import Conversation, Wish
from huggingface.chat.formats import find_reasoning, find_tool_format
from huggingface.chat.parser import CallArguments, CallStart, Content, Part, Reasoning
from huggingface.forms.notation import notation
from huggingface.forms.unique import Tokens, Watch, Watched
from huggingface.types import ChatTraits, Constraint

# Every kind of argument, by name and by reference, required or not.
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F", "</parameter"]},
        "level": {"enum": [1, 2.5, True, None]},
        "place": {"$ref": "#/$defs/Place"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "note": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
        "code": {"type": "string", "pattern": "^[a-c/]{2,4}$"},
        "size": {"anyOf": [{"type": "integer", "minimum": 10}, {"type": "string", "minLength": 1, "maxLength": 5}]},
    },
    "required": ["city", "place"],
    "additionalProperties": False,
    "$defs": {
        "Place": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "kind": {"$ref": "#/$defs/Kind"}},
            "required": ["x"],
            "additionalProperties": False,
        },
        "Kind": {"type": "string", "enum": ["sea", "land"]},
    },
}
NOW: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": PARAMETERS, "now": NOW, "now.utc": NOW}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
OSLO = {"city": "Oslo", "place": {"x": 1}}
FORM = Constraint(
    "json_schema",
    {
        "type": "object",
        "properties": {"name": {"enum": ["now", "cat"]}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["name", "age"],
    },
)

# The tags of one function are sets of two, those of the other are all the same.
SET = {"type": "array", "items": {"type": "string", "pattern": r"^[a(\\\[]$"}, "uniqueItems": True, "minItems": 2}
SETS: dict[str, Any] = {
    "tag": {
        "type": "object",
        "properties": {
            "note": {"type": "string", "maxLength": 5},
            "tags": {**SET, "maxItems": 3},
            "deep": {"$ref": "#/$defs/Deep"},
        },
        "required": ["tags", "deep"],
        "additionalProperties": False,
        "$defs": {
            "Deep": {
                "type": "object",
                "properties": {
                    "sets": {"type": "array", "items": {"$ref": "#/$defs/Set"}, "minItems": 2, "maxItems": 2}
                },
                "required": ["sets"],
            },
            "Set": {**SET, "items": {"type": "integer", "minimum": 0, "maximum": 2}, "minItems": 2, "maxItems": 3},
        },
    },
    "list": {
        "type": "object",
        "properties": {"tags": {"type": "array", "items": {"const": "a"}, "minItems": 2, "maxItems": 3}},
        "required": ["tags"],
        "additionalProperties": False,
    },
}

every_family = pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
with_history = pytest.mark.parametrize(
    "family", [each for each in FAMILIES if each.history], ids=lambda each: each.name
)


def conversation(family: Family, added: Mapping[str, int] | None = None, **wish: Any) -> Conversation:
    """A chat with a model of the family that may call tools."""
    traits = ChatTraits(family.template, added or {}, frozenset())
    return Conversation(traits, [{"role": "user", "content": "so?"}], Wish(**{"tools": TOOLS, **wish}))


def prompt_end(family: Family) -> str:
    """How the prompt of such a chat ends."""
    return render(family.template, [{"role": "user", "content": "so?"}], add_generation_prompt=True)[-60:]


Told = tuple[str, str, list[tuple[str, str]]]


def told(parts: list[Part]) -> Told:
    """Thought, said, and the calls with their arguments' text."""
    calls: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, CallStart):
            assert part.index == len(calls)
            calls.append((part.name, ""))
        elif isinstance(part, CallArguments):
            assert part.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    thought = "".join(part.text for part in parts if isinstance(part, Reasoning))
    return thought, "".join(part.text for part in parts if isinstance(part, Content)), calls


def read(family: Family, pieces: list[str], end: str | None = None, **wish: Any) -> Told:
    """What an answer in such pieces says."""
    reader = conversation(family, **wish).parser(prompt_end(family) if end is None else end)
    parts = [part for piece in pieces for part in reader.feed(piece)]
    return told([*parts, *reader.finish()])


def values(calls: list[tuple[str, str]]) -> list[tuple[str, Any]]:
    """The calls with what their arguments say."""
    return [(name, json.loads(arguments)) for name, arguments in calls]


# Read as the templates write -----------------------------------------------------------------------------------------


@every_family
def test_a_family_is_known_by_its_template(family: Family) -> None:
    assert find_tool_format(family.template, ()) is family.form
    if not family.harmony:
        assert find_reasoning(family.template, ()) == family.reasoning


@with_history
@pytest.mark.parametrize("calls", [[("get_weather", OSLO)], [("now", {}), ("get_weather", OSLO), ("now.utc", {})], []])
@pytest.mark.parametrize("thought", ["", "Let me {see}."])
@pytest.mark.parametrize("content", ["", "I look: <b> [x]."])
def test_what_a_template_writes_of_an_answer_is_read_back(
    family: Family, calls: list[tuple[str, Any]], thought: str, content: str
) -> None:
    """Calls, several of them, reasoning before, text around: whole and letter by letter."""
    if not (family.reasoning or family.harmony):
        thought = ""
    if calls and not family.content_with_calls:
        content = ""
    text = written(family, content, calls, thought)
    for pieces in ([text], list(text)):
        found = read(family, pieces)
        assert (found[0], found[1], values(found[2])) == (thought, content, calls)


@with_history
def test_arguments_come_back_by_their_schemas(family: Family) -> None:
    """Texts that look like numbers stay texts; what stands bare for another type becomes one."""
    arguments = {
        "city": "12",
        "days": -3,
        "unit": "C",
        "level": 2.5,
        "place": {"x": 0.5, "kind": "sea"},
        "tags": ["a", "</parameter>", '"'],
        "note": None,
        "code": "ab/",
        "size": "x1",
    }
    for each in (arguments, {**arguments, "city": 'a "b"\n\\ é', "note": "true", "level": True, "size": 11}):
        text = written(family, "", [("get_weather", each)])
        assert values(read(family, list(text))[2]) == [("get_weather", each)]


_TEXTS = st.text("aé\"\\{}[]<>|\n,: =('", max_size=8)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | _TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_however_an_answer_is_cut_the_same_calls_are_read(data: Any) -> None:
    family = data.draw(st.sampled_from([each for each in FAMILIES if each.history]))
    calls = data.draw(
        st.lists(
            st.tuples(
                st.just("get_weather"),
                st.fixed_dictionaries(
                    {}, optional={"city": _TEXTS, "days": st.integers(), "other": st.dictionaries(_KEYS, _VALUES)}
                ),
            ),
            min_size=1,
            max_size=3,
        )
    )
    text = written(family, "", calls)
    places = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=9))})
    found = read(family, [text[start:end] for start, end in itertools.pairwise(places)])
    assert (found[0], found[1], values(found[2])) == ("", "", calls)


_KEYS = st.text("abc", min_size=1, max_size=3)


def _bits(family: Family) -> list[str]:
    sample = written(family, "", [("get_weather", OSLO), ("now", {})]) if family.history else '[{"name": "now"'
    half = len(sample) // 2
    return [
        *marks(family), sample, sample[:half], sample[half:], "now", "get_weather", "{", "}", "[", "]", "(", ")", '"',
        "\n", "text ", "<", "|", "call:", "<function=now>", "<parameter=city>", "</parameter>", "</function>", "=1",
        "functions.now:0", "to=functions.now", '<invoke name="now">', "```", "analysis", "{}", ",", "</think>",
        "<think>",
    ]  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_whatever_a_model_writes_nothing_breaks_and_cuts_make_no_difference(data: Any) -> None:
    family = data.draw(st.sampled_from(FAMILIES))
    bits = data.draw(st.lists(st.sampled_from(_bits(family)), max_size=12))
    form = data.draw(st.sampled_from([None, FORM]))
    text = "".join(bits)
    results = [read(family, pieces, form=form) for pieces in ([text], list(text), bits)]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    "family", [each for each in FAMILIES if each.history and not each.form.as_object], ids=lambda family: family.name
)
def test_a_call_that_breaks_off_is_never_a_whole_one(family: Family) -> None:
    """Cut anywhere, an answer has no call with fewer arguments than the model meant to write."""
    text = written(family, "", [("get_weather", {"city": "Oslo", "days": 12, "place": {"x": 1}})])
    for size in range(len(text)):
        for _, arguments in read(family, [text[:size]])[2]:
            try:
                value = json.loads(arguments)
            except ValueError:
                continue
            assert value == {"city": "Oslo", "days": 12, "place": {"x": 1}}


def test_texts_are_told_as_they_are_written() -> None:
    """In the forms that write them bare, too; a tag that begins is waited for."""
    for name, head in (
        ("qwen3.5", "<tool_call>\n<function=get_weather>\n<parameter=city>\n"),
        ("glm4.5", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>"),
        ("minimax-m2", '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">'),
        ("gemma4", '<|tool_call>call:get_weather{city:<|"|>'),
        (
            "deepseek-v3.1",
            '<\uff5ctool▁calls▁begin\uff5c><\uff5ctool▁call▁begin\uff5c>get_weather<\uff5ctool▁sep\uff5c>{"city": "',
        ),
        ("gpt-oss", '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "'),
    ):
        family = FAMILIES[NAMES.index(name)]
        reader = conversation(family).parser(prompt_end(family))
        assert told(reader.feed(head))[2] == [("get_weather", '{"city": "')]
        assert reader.feed("Os") == [CallArguments(0, "Os")]
        assert reader.feed("lo <") in ([CallArguments(0, "lo ")], [CallArguments(0, "lo <")])


def test_what_looks_like_a_call_of_another_kind_is_text() -> None:
    for name, text in (
        ("qwen3.5", "<tool_call>\nI would call.\n</tool_call>"),
        ("qwen3.5", "<tool_call>\n<function=now>x"),
        ("glm4.5", "<tool_call>I would</tool_call>"),
        ("gemma4", "<|tool_call>call me"),
        ("deepseek-v3", "<\uff5ctool▁calls▁begin\uff5c> none"),
        ("kimi-k2", "<|tool_calls_section_begin|>none"),
        ("llama4", "[1, 2, now()]"),
        ("llama4", '[other(a="now()")]'),
        ("llama4", "[now(1)]"),
        ("lfm2", "<|tool_call_start|>now<|tool_call_end|>"),
    ):
        family = FAMILIES[NAMES.index(name)]
        for pieces in ([text], list(text)):
            assert read(family, pieces) == ("", text, [])


def test_gpt_oss_is_read_with_tools_and_without() -> None:
    family = FAMILIES[NAMES.index("gpt-oss")]
    answer = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|return|>"
    called = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"
    assert read(family, list(answer)) == ("Hm.", "Hello.", [])
    assert read(family, list(answer), tools=()) == ("Hm.", "Hello.", [])
    assert read(family, [called], tools=()) == ("", "{}", [])
    assert read(family, ["Plain."]) == ("", "Plain.", [])


# Held to by grammars -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["none", "ordinary", "special"])
def tokens(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that has the families' marks as tokens, ordinary or special ones, or not at all."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level(folder, ["<|endoftext|>"], lambda _: processors.ByteLevel(trim_offsets=False))
    made = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    if request.param != "none":
        special = request.param == "special"
        each = dict.fromkeys(mark for family in FAMILIES for mark in marks(family))
        made.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in each], special_tokens=special)
    return made, llguidance.hf.from_tokenizer(made)


def grammar(family: Family, tokenizer: Any, end: str | None = None, **wish: Any) -> tuple[str, Watch | None]:
    """What an answer is held to, in llguidance's notation, and what is to be watched."""
    chat = conversation(family, tokenizer.get_added_vocab(), **wish)
    [request] = chat.requests({}, 1, streams=False, logprobs=None)
    made = request.constraint
    if callable(made):
        made = made(prompt_end(family) if end is None else end)
    assert made is not None
    return notation(made.kind, made.value)


def opened(tokens: Any, grammar: tuple[str, Watch | None]) -> LLMatcher | Watched:
    """A text of a grammar, at its beginning."""
    made: LLMatcher | Watched = LLMatcher(tokens[1], grammar[0])
    assert not made.is_error(), made.get_error()
    return made if grammar[1] is None else Watched(made, Tokens(tokens[1]), grammar[1])  # type: ignore[arg-type]


def walk(tokens: Any, grammar: tuple[str, Watch | None], seed: int, begun: str = "") -> Iterator[int]:
    """Tokens drawn at random from those that a grammar allows, to its end, after those of a text."""
    tokenizer, _ = tokens
    draw = random.Random(seed)
    made = opened(tokens, grammar)
    for token in tokenizer.encode(begun, add_special_tokens=False):
        made.consume_token(token)
        yield token
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for _ in range(3000):
        if made.is_stopped() or (made.is_accepting() and draw.random() < 0.3):
            return
        mask = np.frombuffer(made.compute_bitmask(), dtype=np.uint8)
        assert not made.is_error(), made.get_error()
        allowed = np.unpackbits(mask, bitorder="little")[: len(tokenizer)].nonzero()[0].tolist()
        if end in allowed and draw.random() < 0.2:  # of what is thought
            allowed = [end]
        token = draw.choice([each for each in allowed if each != tokenizer.eos_token_id] or allowed)
        made.consume_token(token)
        yield token
    raise AssertionError("it does not end")


def accepts(tokens: Any, grammar: tuple[str, Watch | None], text: str) -> bool:
    """Whether a text is whole by a grammar."""
    made = opened(tokens, grammar)
    for token in tokens[0].encode(text, add_special_tokens=False):
        made.consume_token(token)
    return not made.is_error() and made.is_accepting()


def drawn(tokens: Any, grammar: tuple[str, Watch | None], seeds: int) -> Iterator[str]:
    """Texts that a grammar allows."""
    for seed in range(seeds):
        yield tokens[0].decode(list(walk(tokens, grammar, seed)), skip_special_tokens=False)


@every_family
def test_a_call_that_must_be_made_is_read_as_one_that_fits(family: Family, tokens: Any) -> None:
    if family.harmony and "<|end|>" not in tokens[0].get_added_vocab():
        return  # what is thought would never end
    for choice, parallel in (("required", True), ("required", False), ("now.utc", True)):
        wish: dict[str, Any] = {"choice": choice, "parallel": parallel}
        for text in drawn(tokens, grammar(family, tokens[0], **wish), 6):
            _, said, calls = read(family, [text], **wish)
            assert not said, text
            assert calls, text
            assert parallel or len(calls) == 1
            for name, arguments in values(calls):
                assert choice in ("required", name)
                jsonschema.validate(arguments, SCHEMAS[name])


@every_family
def test_an_answer_of_a_form_or_a_call_is_told_apart(family: Family, tokens: Any) -> None:
    """By the model's choice, either; what it writes is the one or the other, and fits."""
    if family.harmony and "<|end|>" not in tokens[0].get_added_vocab():
        return  # what is thought would never end
    for text in drawn(tokens, grammar(family, tokens[0], form=FORM), 8):
        _, said, calls = read(family, [text], form=FORM)
        assert bool(said) != bool(calls), text
        if said:
            jsonschema.validate(json.loads(said), FORM.value)
        for name, arguments in values(calls):
            jsonschema.validate(arguments, SCHEMAS[name])


@every_family
@pytest.mark.parametrize("wanted", ["call", "call or text", "text"])
def test_sets_have_no_item_twice_in_the_calls_and_texts_of_every_family(
    family: Family, wanted: str, tokens: Any
) -> None:
    """By themselves, within others, and behind what is thought; lists of the same names may still repeat."""
    if family.harmony and "<|end|>" not in tokens[0].get_added_vocab():
        return  # what is thought would never end
    tools = [{"type": "function", "function": {"name": name, "parameters": each}} for name, each in SETS.items()]
    wish: dict[str, Any] = {"tools": tools}
    if wanted != "call":
        wish["form"] = Constraint("json_schema", {**SET, "items": {**SET, "maxItems": 2}, "maxItems": 3})
    wish["choice"] = {"call": "required", "text": "none"}.get(wanted, "auto")
    ends = [(prompt_end(family), "")]
    if family.reasoning:
        thought = f'[[tags=[1, {{"tags": {family.reasoning.close}\n\n'
        ends.append((prompt_end(family) + family.reasoning.open, thought))
    for (end, begun), seed in itertools.product(ends, range(2)):
        made = grammar(family, tokens[0], end, **wish)
        text = tokens[0].decode(list(walk(tokens, made, seed, begun)), skip_special_tokens=False)
        _, said, calls = read(family, [text], end=end, **wish)
        assert bool(said) != bool(calls), text
        if said:
            jsonschema.validate(json.loads(said), wish["form"].value)
        for name, arguments in values(calls):
            jsonschema.validate(arguments, SETS[name])


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3.5", "llama4", "kimi-k2"])
def test_what_an_argument_says_of_calls_is_no_call(name: str, tokens: Any) -> None:
    """A text that reads like a call with a set may repeat what it wants; the set behind it may not."""
    family = FAMILIES[NAMES.index(name)]
    properties = {"note": {"type": "string"}, "tags": {**SET, "items": {"type": "integer"}}}
    parameters = {"type": "object", "properties": properties, "required": ["note", "tags"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    made = grammar(family, tokens[0], choice="required", tools=tools)
    note = '[f(tags=[1, 1])] <function=f>\n<parameter=tags>\n[1, 1]\n f:0{"name": "f", "arguments": {"tags": [1, 1]}}'
    for tags, fits in ([1, 2], True), ([1, 2, 1], False), ([1, 1.0], False):
        whole = written(family, "", [("f", {"note": note, "tags": tags})]).strip()
        assert accepts(tokens, made, whole) is fits, whole


@with_history
def test_a_grammar_allows_what_the_template_writes(family: Family, tokens: Any) -> None:
    """For texts and no arguments, of which there is one way to write them; not for what is no call of the tools."""
    made = grammar(family, tokens[0], choice="required", tools=TOOLS[1:])
    called = written(family, "", [("now", {})])
    if family.harmony:
        called = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
    called = called.removeprefix("\n") if family.name != "gpt-oss" else called
    assert accepts(tokens, made, called), called
    assert not accepts(tokens, made, called.replace("now", "not"))
    assert not accepts(tokens, made, "I do not call.")
    assert not accepts(tokens, made, '{"name": "cat", "age": 3}')
    either = grammar(family, tokens[0], form=FORM)
    answer = '{"name": "now", "age": 3}'
    assert accepts(tokens, either, called)
    assert accepts(tokens, either, f"<|channel|>final<|message|>{answer}" if family.harmony else answer)


@pytest.mark.parametrize("family", [each for each in FAMILIES if each.reasoning], ids=lambda family: family.name)
def test_calls_and_texts_of_a_form_come_after_the_reasoning(family: Family, tokens: Any) -> None:
    assert family.reasoning is not None
    end = prompt_end(family) + family.reasoning.open
    made = grammar(family, tokens[0], end, form=FORM)
    called = written(family, "", [("now", {})]).removeprefix("\n")
    for answer in (called, '{"name": "cat", "age": 3}'):
        assert accepts(tokens, made, f"So {{x}}.{family.reasoning.close}{answer}")
        assert not accepts(tokens, made, answer)


def test_gpt_oss_may_think_before_it_calls_or_answers(tokens: Any) -> None:
    family = FAMILIES[NAMES.index("gpt-oss")]
    thought = "<|channel|>analysis<|message|>So {x}.<|end|><|start|>assistant"
    called = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
    answer = '<|channel|>final<|message|>{"name": "cat", "age": 3}'
    both = grammar(family, tokens[0], form=FORM)
    assert all(accepts(tokens, both, text) for text in (called, answer, thought + called, thought + answer))
    form = grammar(family, tokens[0], form=FORM, choice="none")
    assert [accepts(tokens, form, text) for text in (called, answer, thought + answer)] == [False, True, True]


def test_texts_of_every_form_may_stand_beside_calls(tokens: Any) -> None:
    family = FAMILIES[NAMES.index("qwen2.5")]
    for form, good, bad in (
        (Constraint("json_object"), '{"a": [1]}', "[1]"),
        (Constraint("regex", "[a/]+\\.x|é"), "a/.x", "b"),
        (Constraint("choice", ["one", 'two "2"']), 'two "2"', "three"),
        (Constraint("grammar", 'start: "a" call\ncall: "b"+'), "abb", "a"),
    ):
        for end in ("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"):
            made = grammar(family, tokens[0], end, form=form)
            before = "Hm.</think>\n\n" if "<think>" in end else ""
            assert accepts(tokens, made, before + good)
            assert not accepts(tokens, made, before + bad)
            assert accepts(tokens, made, before + written(family, "", [("now", {})]).strip())


def test_a_bare_text_never_holds_what_ends_it(tokens: Any) -> None:
    """Else the reader would end it there; and a text within JSON may hold it, for there it ends nothing."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "array"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    family = FAMILIES[NAMES.index("qwen3.5")]
    made = grammar(family, tokens[0], choice="required", tools=tools)
    for text, allowed in (("x <b>\n", True), ("x</parameter", True), ("x</parameter>y", False)):
        call = f"<tool_call>\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>"
        assert accepts(tokens, made, call) is allowed
    called = written(family, "", [("f", {"a": "x", "b": ["</parameter>"]})]).strip()
    assert accepts(tokens, made, called)
    assert values(read(family, list(called), tools=tools)[2]) == [("f", {"a": "x", "b": ["</parameter>"]})]


def test_an_object_that_names_a_tool_is_a_call_only_with_arguments_and_nothing_else() -> None:
    """Where an answer may be JSON of a form: for models whose calls nothing marks."""
    plain = Family("plain", FAMILIES[0].form)
    chat = ChatTraits("{{ messages }}", {}, frozenset())
    assert plain.name
    for text, calls in (
        ('{"name": "now", "age": 3}', []),
        ('{"name": "cat", "arguments": {}}', []),
        ('{"age": 3, "name": "now", "arguments": {}}', []),
        ('{"name": "now", "arguments": {}}', [("now", "{}")]),
        ('{"name": "now"}', []),
    ):
        for pieces in ([text], list(text)):
            reader = Conversation(chat, [{"role": "user", "content": "a"}], Wish(form=FORM, tools=TOOLS)).parser("")
            parts = [part for piece in pieces for part in reader.feed(piece)]
            assert told([*parts, *reader.finish()]) == ("", "" if calls else text, calls)


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"anyOf": [{"required": ["a"]}], "properties": {"a": {}}}, "anyOf"),
        ({"properties": {"a>b": {}}}, "a>b"),
        ({"properties": {"a": {"type": "string", "enum": [1]}}}, "no value"),
    ],
)
def test_a_schema_that_arguments_one_by_one_cannot_be_held_to_is_refused(
    parameters: Any, word: str, tokens: Any
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", **parameters}}}
    with pytest.raises(ValueError, match=word):
        grammar(FAMILIES[NAMES.index("qwen3.5")], tokens[0], choice="required", tools=[tool])


# By the tokenizer's own description ----------------------------------------------------------------------------------

# In the words of transformers' response templates: a form that nothing here knows.
DESCRIBED: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<bot>",
    "fields": {
        "reasoning_content": {"open": "<muse>", "close": "</muse>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<do (?P<name>[\w.]+)>",
            "close": "</do>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}


def described(pieces: list[str], end: str = "<bot>", **wish: Any) -> Told:
    """What an answer says by that description."""
    traits = ChatTraits("{{ tools }}{{ messages }}", {}, frozenset(), DESCRIBED)
    chat = Conversation(traits, [{"role": "user", "content": "a"}], Wish(**{"tools": TOOLS, **wish}))
    reader = chat.parser(end)
    parts = [part for piece in pieces for part in reader.feed(piece)]
    return told([*parts, *reader.finish()])


@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        ("Hello.", "<bot>", ("", "Hello.", [])),
        ("<muse>\nHm.\n</muse>\n\nHi there. ", "<bot>", ("Hm.", "Hi there.", [])),
        ("Hm.</muse>Hi", "x<bot><muse>", ("Hm.", "Hi", [])),
        (
            'I do.\n<do now>{}</do>\n<do get_weather>{"city": "Oslo"}</do>',
            "<bot>",
            ("", "I do.", [("now", "{}"), ("get_weather", '{"city": "Oslo"}')]),
        ),
        ("I do.\n<do now>{bad</do> and on", "<bot>", ("", "I do.\n<do now>{bad</do> and on", [])),
        ('<do now>{"a": ', "<bot>", ("", "", [])),
    ],
)
def test_a_tokenizer_that_describes_its_answers_has_them_read_so(text: str, end: str, expected: Told) -> None:
    for pieces in ([text], list(text)):
        assert described(pieces, end) == expected


def test_a_call_that_must_be_made_is_written_as_json_where_the_form_is_not_known() -> None:
    assert described(['{"name": "now", "arguments": {}}'], choice="required") == ("", "", [("now", "{}")])


def test_templates_that_find_the_tools_in_the_system_message_get_them_there(tmp_path: Path) -> None:
    assert tmp_path
    family = FAMILIES[NAMES.index("phi4-mini")]
    chat = conversation(family)
    assert "tools" not in chat.variables
    assert '"get_weather"' in render(family.template, chat.messages)
