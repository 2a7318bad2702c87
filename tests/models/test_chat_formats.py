"""How models write calls and reasoning: found from their templates, read in pieces of any size, held to by grammars."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import llguidance.hf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from tiny_tokenizers import byte_level
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from huggingface.chat.formats import (
    HERMES,
    JSON,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    ReasoningTags,
    ToolFormat,
    begins_inside_reasoning,
    describe_tools,
    find_reasoning,
    find_tool_format,
    takes_tools,
)
from huggingface.chat.grammar import Frame, answer_grammar, calls_grammar
from huggingface.chat.parser import AnswerParser, CallArguments, CallStart, Content, Part, Reasoning
from huggingface.forms.notation import notation
from huggingface.types import Constraint

THINK = ReasoningTags("<think>", "</think>")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object"}}},
]
NAMES = ["get_weather", "now"]

# What a model wrote: its form, whether it thinks, the text, and what that says: thought, said, calls.
Case = tuple[ToolFormat, ReasoningTags | None, str, str, str, list[tuple[str, Any]]]
OSLO = {"city": "Oslo"}
CASES: list[Case] = [
    (
        HERMES,
        None,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        "",
        "",
        [("get_weather", OSLO)],
    ),
    (
        HERMES,
        THINK,
        "<think>\nLet me see: {a} <tool>\n</think>\n\nI look.\n\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ål \\"q\\" {x}"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "Let me see: {a} <tool>",
        "I look.",
        [("get_weather", {"city": 'Ål "q" {x}'}), ("now", {})],
    ),
    (
        HERMES,
        None,
        '<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_weather"}</tool_call>',
        "",
        "",
        [("get_weather", OSLO)],
    ),
    (HERMES, None, '<tool_call>\n{"name": "now"}\n</tool_call>\nDone.', "", "Done.", [("now", {})]),
    (
        HERMES,
        None,
        '<tool_call>\n{"name": "now", "arguments": "{\\"a\\": 1}"}\n</tool_call>',
        "",
        "",
        [("now", {"a": 1})],
    ),
    (HERMES, None, "a <tool_call> b < c", "", "a <tool_call> b < c", []),
    (HERMES, None, '<tool_call>\n{"nom": 1}\n</tool_call>', "", '<tool_call>\n{"nom": 1}\n</tool_call>', []),
    (HERMES, None, "<tool_call>\nnot json\n</tool_call> and on", "", "<tool_call>\nnot json\n</tool_call> and on", []),
    (HERMES, THINK, "Just text. <think>", "", "Just text. <think>", []),
    (LLAMA, None, '{"name": "get_weather", "parameters": {"city": "Oslo"}}', "", "", [("get_weather", OSLO)]),
    (
        LLAMA,
        None,
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Oslo"}}; {"name": "now", "parameters": {}}',
        "",
        "",
        [("get_weather", OSLO), ("now", {})],
    ),
    (LLAMA, None, '{"name": "other", "parameters": {}}', "", '{"name": "other", "parameters": {}}', []),
    (LLAMA, None, '{"a": [1, {"name": "now"}]}', "", '{"a": [1, {"name": "now"}]}', []),
    (
        MISTRAL,
        None,
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}}, {"name": "now", "arguments": {}}]',
        "",
        "",
        [("get_weather", OSLO), ("now", {})],
    ),
    (
        MISTRAL,
        None,
        'Sure.\n[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}',
        "",
        "Sure.",
        [("get_weather", OSLO), ("now", {})],
    ),
    (JSON, None, '{"name": "get_weather", "arguments": {"city": "Oslo"}}', "", "", [("get_weather", OSLO)]),
    (JSON, None, '```json\n{"name": "now", "parameters": {}}\n```', "", "", [("now", {})]),
    (
        JSON,
        None,
        '[{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Oslo"}}]',
        "",
        "",
        [("now", {}), ("get_weather", OSLO)],
    ),
    (JSON, None, "```python\nprint(1)\n```", "", "```python\nprint(1)\n```", []),
    (JSON, None, '[1, 2, {"name": "now"}]', "", '[1, 2, {"name": "now"}]', []),
    (JSON, THINK, '<think>so</think>{"name": "now", "arguments": {}}', "so", "", [("now", {})]),
    (JSON, None, "Hello, world. ", "", "Hello, world. ", []),
    # What is written twice, before the name, or as a string.
    (
        HERMES,
        None,
        '<tool_call>\n{"name": "now", "arguments": {}, "parameters": {"a": 1}}\n</tool_call>',
        "",
        "",
        [("now", {})],
    ),
    *(
        (HERMES, None, text, "", text, [])
        for text in (
            '<tool_call>\n{"arguments": {bad}, "name": "now"}\n</tool_call>',
            '<tool_call>\n{"name": "now", "arguments": "{bad"}\n</tool_call>',
            '<tool_call>\n{"name": "now", "arguments": [1]}\n</tool_call>',
        )
    ),
    # Brackets too few and too many, and answers that end within a marker.
    (
        HERMES,
        None,
        '<tool_call>\n{"name": "now", "arguments": {"a": 1}\n</tool_call>\nSo.',
        "",
        "So.",
        [("now", {"a": 1})],
    ),
    (HERMES, None, '<tool_call>\n{"name": "now", "arguments": {}}}\n</tool_call>', "", "", [("now", {})]),
    (HERMES, None, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_c', "", "", [("now", {})]),
    (JSON, None, '```json\n{"name": "now", "arguments": {}}\n``', "", "", [("now", {})]),
    (HERMES, None, '<tool_call>\n{"name": "no', "", '<tool_call>\n{"name": "no', []),
    # A `}` or a marker within a string is none.
    (
        HERMES,
        None,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "}]</tool_call> \\\\"}}\n</tool_call>',
        "",
        "",
        [("get_weather", {"city": "}]</tool_call> \\"})],
    ),
    (MISTRAL, None, "[TOOL_CALLS]now or never", "", "[TOOL_CALLS]now or never", []),
    (MISTRAL, None, '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "abcdefghi"}]', "", "", [("now", {})]),
]


def told(parts: list[Part]) -> tuple[str, str, list[tuple[str, str]]]:
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
    said = "".join(part.text for part in parts if isinstance(part, Content))
    return thought, said, calls


def read(case: Case, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """What an answer in such pieces says."""
    parser = AnswerParser(case[0], case[1], tools=NAMES)
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return told([*parts, *parser.finish()])


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_an_answer_is_read_whole_and_letter_by_letter(case: Case) -> None:
    for pieces in ([case[2]], list(case[2])):
        thought, said, calls = read(case, pieces)
        assert (thought, said) == case[3:5]
        assert [(name, json.loads(arguments)) for name, arguments in calls] == case[5]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CASES), st.lists(st.integers(0, 200), max_size=12))
def test_how_an_answer_is_cut_makes_no_difference(case: Case, cuts: list[int]) -> None:
    places = sorted({0, len(case[2]), *(cut % (len(case[2]) + 1) for cut in cuts)})
    assert read(case, [case[2][a:b] for a, b in itertools.pairwise(places)]) == read(case, [case[2]])


_BITS = ["<tool_call>", "</tool_call>", "<think>", "</think>", '{"name": "now", "arguments": {}}', "{", "}", '"', "\n"]
_BITS += ["[TOOL_CALLS]", "[", "]", "now", "[ARGS]", "<|python_tag|>", "```json", "```", "text ", "\\", ",", ";", ":"]


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from([HERMES, LLAMA, MISTRAL, JSON]),
    st.sampled_from([None, THINK]),
    st.lists(st.sampled_from(_BITS), max_size=14),
    st.booleans(),
)
def test_whatever_a_model_writes_nothing_breaks(
    form: ToolFormat, tags: ReasoningTags | None, bits: list[str], inside: bool
) -> None:
    text = "".join(bits)
    results = []
    for pieces in ([text], list(text), bits):
        parser = AnswerParser(form, tags, inside_reasoning=inside, tools=NAMES)
        results.append(told([*(part for piece in pieces for part in parser.feed(piece)), *parser.finish()]))
    assert results[0] == results[1] == results[2]


_JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('aé"\\{}[]<>\n,: </tool_call>[ARGS]', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"}é', max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, JSON]),
    st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=3), _JSON_VALUES)), min_size=1),
    st.booleans(),
    st.integers(1, 7),
)
def test_whatever_the_arguments_are_they_come_as_they_were_written(
    form: ToolFormat, calls: list[tuple[str, dict[str, Any]]], ascii_only: bool, size: int
) -> None:
    text = "<think>\nSo.\n</think>\n\n" + written(form, *calls, ascii_only=ascii_only)
    thought, said, found = read(
        (form, THINK, "", "", "", []), [text[at : at + size] for at in range(0, len(text), size)]
    )
    assert (thought, said) == ("So.", "")
    assert found == [(name, json.dumps(arguments, ensure_ascii=ascii_only)) for name, arguments in calls]


@pytest.mark.parametrize(
    ("arguments", "kept", "said"),
    [
        ('{"a": "unclosed}}', '{"a": "unclosed}}', ""),
        ('{"a": [1}}', '{"a": [1', ""),
        ('{"a": 1, "b": {"c": 2}', '{"a": 1, "b": {"c": 2}', ""),
        ('{"a": <b>}}', '{"a": ', "<b>}}\n</tool_call>"),
    ],
)
def test_a_call_that_breaks_off_keeps_what_was_told_and_the_next_is_read(arguments: str, kept: str, said: str) -> None:
    text = f'<tool_call>\n{{"name": "now", "arguments": {arguments}\n</tool_call>\n'
    text += '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    for pieces in ([text], list(text)):
        calls = [("now", kept), ("get_weather", '{"city": "Oslo"}')]
        assert read((HERMES, None, "", "", "", []), pieces) == ("", said, calls)


def test_an_opening_tag_after_the_prompts_is_not_thought() -> None:
    for pieces in (["<think>\nSo.</think>Hi"], list("<think>\nSo.</think>Hi")):
        parser = AnswerParser(None, THINK, inside_reasoning=True)
        assert told([*(part for piece in pieces for part in parser.feed(piece)), *parser.finish()])[:2] == ("So.", "Hi")


def test_prose_after_a_marker_is_not_held_back() -> None:
    parser = AnswerParser(MISTRAL, None, tools=NAMES)
    assert told(parser.feed("[TOOL_CALLS]now or")) == ("", "[TOOL_CALLS]now or", [])


def test_reading_a_long_answer_takes_time_in_proportion() -> None:
    def seconds(size: int) -> float:
        text = '<tool_call>\n{"name": "now", "arguments": {"a": "' + "x" * size + '"}}\n</tool_call>'
        begun = time.perf_counter()
        AnswerParser(HERMES, None, tools=NAMES).feed(text)
        return time.perf_counter() - begun

    assert min(seconds(320_000) for _ in range(3)) < 24 * min(seconds(40_000) for _ in range(3))


def test_no_more_is_held_back_than_has_to_be() -> None:
    """Text, reasoning and arguments come as they are written."""
    parser = AnswerParser(HERMES, THINK, tools=NAMES, inside_reasoning=True)
    assert parser.feed("I think") == [Reasoning("I think")]
    assert parser.feed(" so.</th") == [Reasoning(" so.")]
    assert parser.feed("ink>\n\nWell") == [Content("Well")]
    assert parser.feed(", a<") == [Content(", a")]
    assert parser.feed("b ") == [Content("<b")]
    parser.feed('<tool_call>\n{"name": "get_weather", "argu')
    [start, first] = parser.feed('ments": {"ci')
    assert isinstance(start, CallStart)
    assert first == CallArguments(0, '{"ci')
    assert parser.feed('ty": "O') == [CallArguments(0, 'ty": "O')]
    assert parser.feed('slo"}}') == [CallArguments(0, 'slo"}')]


def test_without_tools_nothing_is_a_call() -> None:
    parser = AnswerParser(HERMES, None, tools=None)
    text = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert told([*parser.feed(text), *parser.finish()]) == ("", text, [])


def test_ids_are_as_long_as_the_templates_want() -> None:
    for form, text in ((MISTRAL, "[TOOL_CALLS]now{}"), (HERMES, '<tool_call>{"name": "now"}</tool_call>')):
        ids = {AnswerParser(form, None, tools=NAMES).feed(text)[0].id for _ in range(20)}  # type: ignore[union-attr]
        assert len(ids) == 20
        assert {len(each) for each in ids} == ({9} if form is MISTRAL else {29})


# Formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "added", "form"),
    [
        ("{% if tools %}...<tool_call></tool_call>", (), HERMES),
        ("{% for tool in tools %}", ("<tool_call>",), HERMES),
        ("{{ '[TOOL_CALLS]' }}{{ tools }}", (), MISTRAL),
        ("{{ tools }}{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", (), MISTRAL_ARGS),
        ("{% for message in messages %}", ("<tool_call>", "</tool_call>"), JSON),  # it is told of tools by us
        ("{{ '[TOOL_CALLS]' + message }}", (), JSON),
        ("{% if tools is not none %}<|python_tag|>", (), LLAMA),
        ('{{ tools }}<|start_header_id|> {"name": x, "parameters": y}', ("<|eot_id|>",), LLAMA),
        ("{% for message in messages %}", (), JSON),
        (None, (), JSON),
        ({"default": "{{ messages }}", "tool_use": "{{ tools }}<tool_call>"}, (), HERMES),
    ],
)
def test_the_form_of_the_calls_is_told_from_the_template(template: Any, added: Any, form: ToolFormat) -> None:
    assert find_tool_format(template, added) is form


def test_templates_tell_of_tools_and_reasoning() -> None:
    assert takes_tools("{% if tools %}")
    assert not takes_tools("{{ messages }}")
    assert find_reasoning("...</think>...", ()) == THINK
    assert find_reasoning("", ("<think>", "</think>")) == THINK
    assert find_reasoning("plain", ()) is None
    assert begins_inside_reasoning("<|assistant|>\n<think>\n", THINK)
    assert not begins_inside_reasoning("<think>\n\n</think>\n\n", THINK)
    assert "get_weather" in describe_tools(TOOLS, "auto")


FORMS = [HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, JSON]

# Grammars -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["none", "ordinary", "special"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that has the markers as tokens, ordinary or special ones, or not at all."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level(folder, ["<|endoftext|>"], lambda _: processors.ByteLevel(trim_offsets=False))
    made = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    markers = ["<tool_call>", "</tool_call>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]
    if request.param != "none":
        special = request.param == "special"
        made.add_tokens([AddedToken(marker, special=special) for marker in markers], special_tokens=special)
    return made


def matcher(tokenizer: Any, grammar: Any) -> Any:
    """llguidance's own, for a grammar that compiles."""
    made = LLMatcher(llguidance.hf.from_tokenizer(tokenizer), notation("grammar", grammar)[0])
    assert not made.is_error(), made.get_error()
    return made


def accepts(tokenizer: Any, grammar: Any, text: str) -> bool:
    """Whether a text is whole by a grammar."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    made = matcher(tokenizer, grammar)
    return made.try_consume_tokens(ids) == len(ids) and made.is_accepting()


def written(form: ToolFormat, *calls: tuple[str, dict[str, Any]], ascii_only: bool = True) -> str:
    """Calls as a model writes them."""
    if form is MISTRAL_ARGS:
        whole = [(name, json.dumps(arguments, ensure_ascii=ascii_only)) for name, arguments in calls]
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in whole)
    key = "parameters" if form is LLAMA else "arguments"
    texts = [json.dumps({"name": name, key: arguments}, ensure_ascii=ascii_only) for name, arguments in calls]
    match form.name:
        case "hermes":
            return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
        case "mistral":
            return f"[TOOL_CALLS][{', '.join(texts)}]"
        case "llama":
            return "; ".join(texts)
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


@pytest.mark.parametrize("form", FORMS, ids=["hermes", "llama", "mistral", "mistral-args", "json"])
def test_a_grammar_allows_calls_that_fit_and_no_others(form: ToolFormat, tokenizer: Any) -> None:
    def grammar(name: str | None = None, *, parallel: bool = True, inside: bool = False) -> Any:
        return calls_grammar(
            form,
            TOOLS,
            Frame(THINK, tokenizer.get_added_vocab(), inside),
            required_name=name,
            parallel=parallel,
        )

    good, nothing = ("get_weather", OSLO), ("now", dict[str, Any]())
    assert accepts(tokenizer, grammar(), written(form, good))
    assert accepts(tokenizer, grammar(), written(form, good, nothing))
    assert accepts(tokenizer, grammar("now"), written(form, nothing))
    assert accepts(tokenizer, grammar(parallel=False), written(form, good))
    assert accepts(tokenizer, grammar(inside=True), "So\n{x}.</think>\n\n" + written(form, good))
    assert not accepts(tokenizer, grammar(parallel=False), written(form, good, nothing))
    assert not accepts(tokenizer, grammar("now"), written(form, good))
    for name, arguments in (("other", {}), ("get_weather", {}), ("get_weather", {"city": 1}), ("now", {"a": 1})):
        assert not accepts(tokenizer, grammar(), written(form, (name, arguments)))
    assert not accepts(tokenizer, grammar(), "I do not call.")


def walk(tokenizer: Any, grammar: Any, seed: int) -> Iterator[int]:
    """Tokens drawn at random from those that a grammar allows, to its end."""
    draw = random.Random(seed)
    made = matcher(tokenizer, grammar)
    mask = np.zeros((len(tokenizer) + 31) // 32, dtype=np.int32)
    for _ in range(3000):
        if made.is_stopped() or (made.is_accepting() and draw.random() < 0.3):
            return
        made.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(tokenizer)].nonzero()[0].tolist()
        token = draw.choice([each for each in allowed if each != tokenizer.eos_token_id] or allowed)
        made.consume_token(token)
        yield token
    raise AssertionError("it does not end")


@pytest.mark.parametrize("form", FORMS, ids=["hermes", "llama", "mistral", "mistral-args", "json"])
def test_whatever_a_grammar_allows_is_read_as_calls_that_fit(form: ToolFormat, tokenizer: Any) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}  # type: ignore[index]
    grammar = calls_grammar(
        form,
        TOOLS,
        Frame(None, tokenizer.get_added_vocab()),
    )
    for seed in range(12):
        text = tokenizer.decode(list(walk(tokenizer, grammar, seed)), skip_special_tokens=False)
        parser = AnswerParser(form, None, tools=NAMES)
        thought, said, calls = told([*parser.feed(text), *parser.finish()])
        assert (thought, said) == ("", "")
        assert calls
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[name])


def test_an_answer_may_think_before_it_is_json(tokenizer: Any) -> None:
    added = tokenizer.get_added_vocab()
    schema = {"$ref": "#/$defs/A", "$defs": {"A": {"enum": ["x", 1]}}}
    grammar = answer_grammar(Constraint("json_schema", schema), Frame(THINK, added, inside_reasoning=True))
    assert accepts(tokenizer, grammar, 'hm.</think>\n\n"x"')
    assert not accepts(tokenizer, grammar, 'hm.</think>\n\n"y"')
    anything = answer_grammar(Constraint("json_object"), Frame(THINK, {}, inside_reasoning=True))
    assert accepts(tokenizer, anything, 'hm.</think>\n\n{"a": [1]}') is ("</think>" not in added)


_A = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        (None, {}, {"x": 1}),
        ({}, {}, {"x": 1}),
        ({"type": "object", "properties": {}}, {}, {"x": 1}),
        (_A, {"x": 1}, {"x": 1, "y": 2}),
        ({"$ref": "#/$defs/A", "$defs": {"A": _A}}, {"x": 1}, {"x": "a"}),
        ({"allOf": [_A]}, {"x": 1}, {"x": "a"}),
        ({"anyOf": [_A, {"type": "object", "required": ["y"]}]}, {"y": 1}, {"x": "a"}),
        ({**_A, "properties": {"x": {"type": "integer"}, "in": {"$ref": "#"}}}, {"x": 1, "in": {"x": 2}}, {"in": 1}),
        ({**_A, "properties": {**_A["properties"], "y": {"$ref": "#/properties/x"}}}, {"x": 1, "y": 2}, {"y": 2}),  # type: ignore[dict-item]
        ({"type": "object", "required": ["x"]}, {"x": [1]}, {}),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, {"any": 1}, {"any": "a"}),
        ({"properties": {"$defs": {"type": "integer"}}, "required": ["$defs"]}, {"$defs": 1}, {}),
    ],
    ids=range(12),
)
def test_arguments_are_held_to_the_schema_wherever_it_says_what_they_are(
    parameters: Any, good: Any, bad: Any, tokenizer: Any
) -> None:
    function = {"name": "f"} if parameters is None else {"name": "f", "parameters": parameters}
    grammar = calls_grammar(
        JSON,
        [{"type": "function", "function": function}],
        Frame(None, {}),
        parallel=False,
    )
    assert accepts(tokenizer, grammar, written(JSON, ("f", good)))
    assert not accepts(tokenizer, grammar, written(JSON, ("f", bad)))


def test_of_two_functions_one_may_be_called_as_the_other_begins(tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("now", "now_utc")]
    names = ["now", "now_utc", "now"]
    for form in FORMS:
        grammar = calls_grammar(
            form,
            tools,
            Frame(None, tokenizer.get_added_vocab()),
        )
        assert accepts(tokenizer, grammar, written(form, *((name, {}) for name in names)))


def test_schemas_that_refer_to_their_own_definitions(tokenizer: Any, tmp_path: Path) -> None:
    parameters = {
        "type": "object",
        "properties": {"one": {"$ref": "#/$defs/Kind"}},
        "required": ["one"],
        "$defs": {"Kind": {"enum": ["a", "b"]}},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    grammar = calls_grammar(
        HERMES,
        tools,
        Frame(None, tokenizer.get_added_vocab()),
        parallel=False,
    )
    assert accepts(tokenizer, grammar, written(HERMES, ("f", {"one": "a"})))
    assert not accepts(tokenizer, grammar, written(HERMES, ("f", {"one": "c"})))
