"""Anthropic's API on a live server, raw, by Anthropic's own client, and by Claude Code's requests."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import anthropic
import claude_code
import pydantic
import pytest
import requests
from conftest import PATIENCE, Server, until

from huggingface.api.anthropic.schemas import CountBody, MessagesBody
from huggingface.api.anthropic.turns import chat_messages

HI = [{"role": "user", "content": "where is the cat?"}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
NOW = {"name": "now", "input_schema": {"type": "object", "properties": {}}}
GREEDY = {"temperature": 0}  # Anthropic's client has no word for it any more
IGNORED = "X-Local-LLM-Ignored"
CALLS = (
    "{% if tools %}<tool_call> {{ tools | tojson }}\n{% endif %}"
    "{% if reasoning_effort %}effort {{ reasoning_effort }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}\n{% endfor %}"
)
# Whose model thinks where it is asked to, and whose model always does.
SWITCHED = (
    CALLS + "{% if add_generation_prompt %}a:{% if enable_thinking %}<think>\n{% endif %}{% endif %}{# </think> #}"
)
ALWAYS = CALLS + "{% if add_generation_prompt %}a:<think>\n{% endif %}{# </think> #}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """A live server of these tests' own: they register models under other types than others do."""
    server = Server(tmp_path_factory.mktemp("server"), models_dir)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client on the live server."""
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(server: Server, tiny: Callable[[str], str]) -> str:
    """A tiny model that chats, whose template knows neither tools nor thinking."""
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    return model_id


def copied(server: Server, models_dir: Path, tiny: Callable[[str], str], name: str, template: str) -> str:
    """The same model with another template, and a context in which Claude Code's prompts have room."""
    folder = models_dir / "tiny" / name
    if not folder.exists():
        shutil.copytree(models_dir / tiny("llama"), folder)
        (folder / "chat_template.jinja").write_text(template)
        for file, changes in (
            ("tokenizer_config.json", {"chat_template": None, "model_max_length": 16384}),
            ("config.json", {"max_position_embeddings": 16384}),
        ):
            settings = json.loads((folder / file).read_text()) | changes
            kept = {key: value for key, value in settings.items() if value is not None}
            (folder / file).write_text(json.dumps(kept))
    server.add(f"tiny/{name}", "text-generation")
    return f"tiny/{name}"


@pytest.fixture(scope="module")
def tooled(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> str:
    """A model whose template knows tools, efforts, and whether to think."""
    return copied(server, models_dir, tiny, "anthropic-tooled", SWITCHED)


@pytest.fixture(scope="module")
def thinker(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> str:
    """A model that thinks, whatever it is told."""
    return copied(server, models_dir, tiny, "anthropic-thinker", ALWAYS)


def post(server: Server, model: str, path: str = "", headers: dict[str, str] | None = None, **body: Any) -> Any:
    """A request as it is; greedy and short unless the body says otherwise."""
    full = {"model": model, "max_tokens": 12, "temperature": 0, "messages": HI, **body}
    sent = {name: value for name, value in full.items() if value is not ...}
    return requests.post(f"{server.url}/v1/messages{path}", json=sent, headers=headers, timeout=PATIENCE)


def events_of(response: requests.Response) -> list[dict[str, Any]]:
    """The events of a stream; each is named as its type."""
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"].startswith("text/event-stream")
    events = []
    for block in response.content.decode().strip().split("\n\n"):
        first, second = block.split("\n")
        event = json.loads(second.removeprefix("data: "))
        assert first == f"event: {event['type']}"
        events.append(event)
    return events


def told(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's events add up to."""
    assert [event["type"] for event in (events[0], *events[-2:])] == ["message_start", "message_delta", "message_stop"]
    message = events[0]["message"]
    assert message["content"] == []
    blocks: list[dict[str, Any]] = []
    open_block = False
    for event in events[1:-2]:
        match event["type"]:
            case "content_block_start":
                assert not open_block
                assert event["index"] == len(blocks)
                open_block = True
                blocks.append(
                    {**event["content_block"], **({"input": ""} if "input" in event["content_block"] else {})}
                )
            case "content_block_delta":
                assert open_block
                assert event["index"] == len(blocks) - 1
                delta = {name: value for name, value in event["delta"].items() if name != "type"}
                for name, value in delta.items():
                    blocks[-1][{"partial_json": "input"}.get(name, name)] += value
            case "content_block_stop":
                assert open_block
                open_block = False
            case kind:
                assert kind == "ping"
    assert not open_block
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["input"])
    return {**message, "content": blocks, **events[-2]["delta"], "usage": events[-2]["usage"]}


def nameless(message: dict[str, Any]) -> dict[str, Any]:
    """A message without its ids, and without what the cache held, which differ from time to time."""
    blocks = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    usage = message["usage"]
    counts = {"read": usage["input_tokens"] + usage["cache_read_input_tokens"], "made": usage["output_tokens"]}
    return {**message, "id": None, "content": blocks, "usage": counts}


# Answers --------------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_one_that_openais_route_gives(server: Server, model: str) -> None:
    asked = {"model": model, "max_tokens": 12, "temperature": 0, "messages": [{"role": "system", "content": "a"}, *HI]}
    same = requests.post(f"{server.url}/v1/chat/completions", json=asked, timeout=PATIENCE).json()
    response = post(server, model, system="a")
    answer = response.json()
    assert answer["content"] == [{"type": "text", "text": same["choices"][0]["message"]["content"]}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", model)
    assert answer["id"].startswith("msg_")
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
    assert set(answer["usage"]) == {
        *("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
    }
    assert nameless(answer)["usage"] == {"read": same["usage"]["prompt_tokens"], "made": 12}
    assert response.headers["request-id"] == response.headers["X-Local-LLM-Request-Id"]
    assert IGNORED not in response.headers


def test_tokens_that_the_cache_held_are_not_among_the_inputs(server: Server, model: str) -> None:
    first = post(server, model, system="some words that no other test says").json()["usage"]
    again = post(server, model, system="some words that no other test says").json()["usage"]
    assert again["cache_read_input_tokens"] > first["cache_read_input_tokens"]
    assert sum(again.values()) == sum(first.values())


def test_a_stream_is_the_same_answer_in_named_events(server: Server, model: str) -> None:
    events = events_of(post(server, model, stream=True))
    assert nameless(told(events)) == nameless(post(server, model).json())
    assert events[0]["message"]["stop_reason"] is None
    assert events[0]["message"]["usage"]["input_tokens"] == nameless(told(events))["usage"]["read"]


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 3},
        {"system": "a dog"},
        {"system": [{"type": "text", "text": "a dog"}]},
        {"messages": [{"role": "system", "content": "a dog"}, *HI]},
        {"messages": [*HI, {"role": "system", "content": "a dog"}]},
        {"messages": [*HI, {"role": "assistant", "content": "here"}, *HI]},
        {"messages": [*HI, {"role": "assistant", "content": "The cat"}]},
        {"tools": [WEATHER]},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {"repetition_penalty": 5.0},
        {"min_p": 0.0, "suppress_tokens": list(range(20, 200))},
        {"temperature": 4.0, "top_k": 0},
    ],
    ids=lambda change: "-".join(change),
)
def test_each_field_changes_the_answer(server: Server, model: str, change: dict[str, Any]) -> None:
    assert post(server, model, **change).json()["content"] != post(server, model).json()["content"]


def test_drawing_is_by_the_fields_given(server: Server, model: str) -> None:
    """Without a word everything is sampled; `top_k` and `top_p` narrow it down."""

    def texts(**change: Any) -> set[str]:
        return {post(server, model, **change).json()["content"][0]["text"] for _ in range(4)}

    greedy = texts()
    assert len(texts(temperature=...)) > 1
    assert texts(temperature=5.0, top_k=1) == texts(temperature=5.0, top_p=0.0001) == greedy


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_stop_sequence_ends_the_answer_and_is_named(server: Server, tiny: Callable[[str], str], name: str) -> None:
    """In a batch, and for a model that is served one request at a time."""
    model = tiny(name)
    server.add(model, "text-generation" if name == "llama" else "text2text-generation")
    long = {"max_tokens": 24, "min_new_tokens": 24}
    whole = post(server, model, **long).json()["content"][0]["text"]
    pairs = [whole[place : place + 2] for place in range(3, len(whole))]
    stop = next(pair for place, pair in enumerate(pairs, 3) if pair.isascii() and whole.index(pair) == place)
    for stream in (False, True):
        response = post(server, model, **long, stop_sequences=["never there", stop], stream=stream)
        answer = told(events_of(response)) if stream else response.json()
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
        assert answer["content"][0]["text"] == whole[: whole.index(stop)]
    kept = post(server, model, **long, stop_sequences=["never there"]).json()
    assert kept["stop_sequence"] is None
    assert kept["content"][0]["text"] == whole


def test_an_answer_that_the_model_ends_is_an_ended_turn(server: Server, model: str) -> None:
    answer = post(server, model, eos_token_id=list(range(20, 268)), max_tokens=100).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)


def test_a_form_holds_the_text(server: Server, model: str) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}
    form = {"type": "json_schema", "schema": schema}
    for body in ({"output_config": {"format": form}}, {"output_format": form}):
        for more in ({}, {"tools": [WEATHER], "tool_choice": {"type": "none"}}):
            answer = post(server, model, max_tokens=80, **body, **more).json()
            assert json.loads(answer["content"][0]["text"])["age"] <= 99
            assert answer["stop_reason"] == "end_turn"


# Tools ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model", "tooled"])
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=["any", "tool"])
def test_a_call_that_must_be_made_fits_its_tool(
    server: Server, request: pytest.FixtureRequest, which: str, choice: dict[str, Any]
) -> None:
    """For a template that knows tools, and for one that does not; whole and streamed."""
    name = request.getfixturevalue(which)
    body = {"tools": [WEATHER, NOW], "tool_choice": {**choice, "disable_parallel_tool_use": True}, "max_tokens": 120}
    whole = post(server, name, **body).json()
    streamed = told(events_of(post(server, name, **body, stream=True)))
    assert nameless(whole) == nameless(streamed)
    for answer in (whole, streamed):
        [call] = answer["content"]
        assert (call["type"], answer["stop_reason"]) == ("tool_use", "tool_use")
        assert call["id"].startswith("toolu_")
        assert call["name"] in (["get_weather"] if "name" in choice else ["get_weather", "now"])
        assert set(call["input"]) == ({"city"} if call["name"] == "get_weather" else set())


def test_several_calls_are_made_unless_that_is_switched_off(server: Server, tooled: str) -> None:
    body = {"tools": [NOW], "max_tokens": 200, "suppress_tokens": [2]}  # which would end the answer
    several = post(server, tooled, **body, tool_choice={"type": "any"}).json()
    assert len({call["id"] for call in several["content"]}) > 1
    assert len(several["content"]) > 1
    one = post(server, tooled, **body, tool_choice={"type": "any", "disable_parallel_tool_use": True}).json()
    assert len(one["content"]) == 1


def test_a_call_that_the_tokens_did_not_suffice_for_is_told_as_such(server: Server, tooled: str) -> None:
    answer = post(server, tooled, tools=[WEATHER], tool_choice={"type": "any"}, max_tokens=25).json()
    assert answer["stop_reason"] == "max_tokens"
    assert all(isinstance(call["input"], dict) for call in answer["content"])


def test_tools_of_anthropics_servers_are_left_out_and_named(server: Server, tooled: str) -> None:
    plain = post(server, tooled, tools=[WEATHER])
    theirs = [{"type": "web_search_20250305", "name": "web_search"}, {"type": "bash_20250124", "name": "bash"}]
    response = post(server, tooled, tools=[*theirs, {**WEATHER, "type": "custom"}])
    assert response.json()["content"] == plain.json()["content"]
    assert response.headers[IGNORED] == "tools.web_search_20250305, tools.bash_20250124"
    assert IGNORED not in plain.headers


# Conversations --------------------------------------------------------------------------------------------------------


def laid_out(**body: Any) -> list[dict[str, Any]]:
    """A body's conversation as chat messages."""
    return chat_messages(CountBody.model_validate({"model": "m", **body}))


def said(*blocks: dict[str, Any]) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": list(blocks)}


def test_calls_and_their_results_are_put_to_the_model() -> None:
    call = {"type": "tool_use", "id": "toolu_a", "name": "w", "input": {"city": "Paris"}}
    gave = {"type": "tool_result", "tool_use_id": "toolu_a", "content": [{"type": "text", "text": "sun"}]}
    failed = {"type": "tool_result", "tool_use_id": "toolu_b", "is_error": True, "content": "no such city"}
    empty = {"type": "tool_result", "tool_use_id": "toolu_c"}
    messages = laid_out(
        messages=[
            *HI,
            said({"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "I look."}, call),
            {"role": "assistant", "content": [{**call, "id": "toolu_b"}]},
            {"role": "user", "content": [gave, failed, empty, {"type": "text", "text": "and?"}]},
        ]
    )
    function = {"name": "w", "arguments": {"city": "Paris"}}
    assert messages == [
        *HI,
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {"id": "000000000", "type": "function", "function": function},
                {"id": "000000001", "type": "function", "function": function},
            ],
        },
        {"role": "tool", "content": "sun", "tool_call_id": "000000000"},
        {"role": "tool", "content": "Error: no such city", "tool_call_id": "000000001"},
        {"role": "tool", "content": "", "tool_call_id": "000000002"},
        {"role": "user", "content": "and?"},
    ]


def test_turns_of_one_role_are_one_and_what_was_thought_is_not_shown() -> None:
    thought = said({"type": "thinking", "thinking": "x", "signature": "s"}, {"type": "redacted_thinking", "data": "y"})
    messages = laid_out(messages=[{"role": "user", "content": "a"}, thought, {"role": "user", "content": "b"}])
    assert messages == [{"role": "user", "content": "a\nb"}]


def test_instructions_come_first_or_in_their_place() -> None:
    messages = laid_out(
        system=[claude_code.BILLING, {"type": "text", "text": "one"}],
        messages=[{"role": "system", "content": "two"}, *HI, {"role": "system", "content": "three"}],
    )
    told_in_place = "where is the cat?\n<system-reminder>\nthree\n</system-reminder>"
    assert messages == [{"role": "system", "content": "one\ntwo"}, {"role": "user", "content": told_in_place}]


@pytest.mark.parametrize(
    ("written", "shown"), [("{broken", {"input": "{broken"}), ('{"a": 1}', {"a": 1}), (None, {}), ([1], {"input": [1]})]
)
def test_a_past_call_whose_input_is_no_object_does_not_end_the_conversation(written: Any, shown: Any) -> None:
    call = {"type": "tool_use", "id": "t", "name": "w", "input": written}
    assert laid_out(messages=[*HI, said(call)])[1]["tool_calls"][0]["function"]["arguments"] == shown


def test_what_a_program_replays_is_taken_and_named(server: Server, model: str) -> None:
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    cached = {"cache_control": {"type": "ephemeral"}}
    response = post(
        server,
        model,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "hi", **cached}], "uuid": "1"},
            said(search, {"type": "text", "text": "ho", "citations": [{}], "parsed_output": None}),
            *HI,
        ],
        tools=[{**NOW, **cached, "strict": True, "input_examples": []}],
    )
    assert response.status_code == 200
    assert set(response.headers[IGNORED].split(", ")) == {
        *("messages.uuid", "messages.cache_control", "messages.citations", "messages.server_tool_use"),
        *("tools.cache_control", "tools.strict", "tools.input_examples"),
    }


NOTHING: dict[str, Any] = {
    "metadata": {"user_id": "me"},
    "service_tier": "auto",
    "cache_control": {"type": "ephemeral"},
    "container": "container_1",
    "context_management": {"edits": []},
    "inference_geo": "eu",
    "speed": "standard",
    "diagnostics": {"previous_message_id": None},
    "thinking": {"type": "disabled"},
    "output_config": {"effort": "low"},
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_makes_no_difference_is_taken_and_named(server: Server, model: str, name: str) -> None:
    response = post(server, model, **{name: NOTHING[name]})
    assert response.status_code == 200, response.text
    assert response.json()["content"] == post(server, model).json()["content"]
    assert response.headers[IGNORED] == {"output_config": "output_config.effort"}.get(name, name)


def test_what_asks_for_nothing_is_not_named(server: Server, model: str) -> None:
    nothing = {"mcp_servers": [], "tools": [], "tool_choice": {"type": "auto"}, "stop_sequences": [], "top_k": None}
    response = post(server, model, **nothing, system=None, thinking=None)
    assert response.status_code == 200
    assert IGNORED not in response.headers


# Thinking -------------------------------------------------------------------------------------------------------------


def test_what_is_thought_is_a_block_of_its_own(server: Server, tooled: str) -> None:
    body = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 20}
    response = post(server, tooled, **body)
    [block] = response.json()["content"]
    assert (block["type"], block["signature"]) == ("thinking", "")
    assert block["thinking"]
    assert response.headers[IGNORED] == "thinking.budget_tokens"
    events = events_of(post(server, tooled, **body, stream=True))
    assert told(events)["content"] == [block]
    kinds = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert kinds == [*["thinking_delta"] * (len(kinds) - 1), "signature_delta"]


def test_whether_to_think_is_the_templates_where_it_knows(server: Server, tooled: str) -> None:
    for off in ({"type": "disabled"}, {"type": "adaptive"}):
        response = post(server, tooled, thinking=off)
        assert response.json()["content"] == post(server, tooled).json()["content"]
        assert IGNORED not in response.headers


def test_a_model_that_always_thinks_is_answered_for_as_was_asked(server: Server, thinker: str) -> None:
    [shown] = post(server, thinker).json()["content"]
    assert shown["type"] == "thinking"
    [omitted] = post(server, thinker, thinking={"type": "adaptive", "display": "omitted"}).json()["content"]
    assert omitted == {"type": "thinking", "thinking": "", "signature": ""}
    hidden = post(server, thinker, thinking={"type": "disabled"})
    assert hidden.json()["content"] == []
    assert hidden.headers[IGNORED] == "thinking"


def test_an_effort_is_put_in_the_templates_words(server: Server, tooled: str) -> None:
    def answer(effort: str) -> Any:
        response = post(server, tooled, output_config={"effort": effort})
        assert IGNORED not in response.headers
        return response.json()["content"]

    assert answer("low") != answer("high")
    assert answer("high") == answer("xhigh") == answer("max")


# Counting -------------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_as_the_model_reads_them(
    client: anthropic.Anthropic, server: Server, tooled: str, model: str
) -> None:
    bodies: list[dict[str, Any]] = [{}, {"system": "a b c"}, {"tools": [WEATHER]}, {"output_config": {"effort": "low"}}]
    for body in bodies:
        counted = client.messages.count_tokens(model=tooled, messages=HI, **body).input_tokens
        assert counted == nameless(post(server, tooled, **body).json())["usage"]["read"]
    long = [{"role": "user", "content": "the cat " * 3000}]
    assert client.messages.count_tokens(model=model, messages=long).input_tokens > 3000, "more than its context holds"


# Failures -------------------------------------------------------------------------------------------------------------

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": ...}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages.0.content.0.type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}]},
        "messages.0.content.0.content.0.type",
    ),
    ({"system": [IMAGE]}, "system.0.type"),
    ({"temperature": 11}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": "a"}, "top_k"),
    ({"stop_sequences": "a"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences.0"),
    ({"tools": [{"name": "a"}]}, "tools.0.input_schema"),
    ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "tools.0.input_schema"),
    ({"tools": [NOW, NOW]}, "tools"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools.0.name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [NOW], "tool_choice": {"type": "tool", "name": "nix"}}, "tool_choice"),
    ({"tools": [NOW], "tool_choice": {"type": "perhaps"}}, "tool_choice.type"),
    ({"tools": [NOW], "tool_choice": "any"}, "tool_choice"),
    ({"thinking": {"type": "hard"}}, "thinking.type"),
    ({"output_config": {"effort": "none"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "text", "schema": {}}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "output_config.format"),
    ({"mcp_servers": [{"type": "url", "url": "https://example.org", "name": "a"}]}, "mcp_servers"),
    ({"adapter": "nix"}, "adapter"),
    ({"max_token": 3}, "max_token"),
    ({"compaction": {}}, "compaction"),
    ({"thread": {"type": "create"}}, "thread"),
]


@pytest.mark.parametrize(("body", "field"), REFUSED, ids=[f"{n}-{field}" for n, (_, field) in enumerate(REFUSED)])
def test_what_cannot_be_honoured_is_refused_by_name(
    server: Server, model: str, body: dict[str, Any], field: str
) -> None:
    response = post(server, model, **body)
    assert response.status_code == 400, response.text
    failure = response.json()
    assert set(failure) == {"type", "error", "request_id"}
    assert failure["type"] == "error"
    assert set(failure["error"]) - {"details"} == {"type", "message"}
    assert failure["error"]["type"] == "invalid_request_error"
    assert f"field '{field}'" in failure["error"]["message"] or f"field: {field}" in failure["error"]["message"]


@pytest.mark.parametrize("path", ["", "/count_tokens"])
@pytest.mark.parametrize("body", ["", "{", "[]", '"a"', "{}", '{"model": 3}', '{"model": "a", "model": "b"}', "\xff"])
def test_bodies_that_are_none(server: Server, path: str, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    url = f"{server.url}/v1/messages{path}"
    response = requests.post(url, data=body.encode("latin-1"), headers=headers, timeout=PATIENCE)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("method", "path", "arguments", "status", "kind"),
    [
        ("POST", "/v1/messages/batches", {"json": {}}, 404, "not_found_error"),
        ("POST", "/v1/messages/nix", {"json": {}}, 404, "not_found_error"),
        ("GET", "/v1/messages", {}, 405, "invalid_request_error"),
        ("POST", "/v1/messages", {"data": "{}"}, 415, "invalid_request_error"),
        ("POST", "/v1/messages", {"json": {"a": "b" * 17 * 2**20}}, 413, "request_too_large"),
        ("POST", "/v1/messages", {"json": {}, "headers": {"Origin": "http://evil.example"}}, 403, "permission_error"),
        ("GET", "/v1/models/nix", {"headers": {"anthropic-version": "2023-06-01"}}, 404, "not_found_error"),
    ],
)
def test_failures_before_any_view_have_anthropics_shape(
    server: Server, method: str, path: str, arguments: dict[str, Any], status: int, kind: str
) -> None:
    response = requests.request(method, f"{server.url}{path}", timeout=PATIENCE, **arguments)
    assert (response.status_code, response.json()["type"]) == (status, "error")
    assert response.json()["error"]["type"] == kind


def test_other_routes_keep_their_own_shape(server: Server) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    chat = requests.post(f"{server.url}/v1/chat/completions", json={}, headers=headers, timeout=PATIENCE)
    assert set(chat.json()["error"]) == {"message", "type", "param", "code"}
    assert set(requests.get(f"{server.url}/v1/models/nix", timeout=PATIENCE).json()["error"]) == set(
        chat.json()["error"]
    )
    assert (
        requests.get(f"{server.url}/v1/messagesque", headers=headers, timeout=PATIENCE).json()["error"]["code"] is None
    )


def test_each_failure_is_the_clients_own_exception(
    client: anthropic.Anthropic, server: Server, model: str, tiny: Callable[[str], str]
) -> None:
    def ask(**body: Any) -> Any:
        return client.messages.create(**{"model": model, "max_tokens": 5, "messages": HI, **body})

    with pytest.raises(anthropic.NotFoundError, match=f"Registered here: .*{model}.*ANTHROPIC_MODEL"):
        ask(model="claude-any")
    with pytest.raises(anthropic.BadRequestError, match="nonsense"):
        ask(extra_body={"nonsense": 1})
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 512 maximum") as caught:
        ask(messages=[{"role": "user", "content": "the cat " * 3000}])
    assert caught.value.request_id == caught.value.body["request_id"]
    assert caught.value.request_id
    embedding = tiny("bert-embed")
    server.add(embedding, "feature-extraction")
    with pytest.raises(anthropic.BadRequestError, match="cannot do 'generate'"):
        ask(model=embedding)
    with pytest.raises(anthropic.APIStatusError) as late:
        ask(max_tokens=400, extra_body={"timeout": 0.001, "min_new_tokens": 400})
    assert (late.value.status_code, late.value.body["error"]["type"]) == (504, "timeout_error")


def test_a_model_without_a_generation_config_is_refused_on_openais_routes_too(
    server: Server, tiny: Callable[[str], str]
) -> None:
    embedding = tiny("bert-embed")
    server.add(embedding, "feature-extraction")
    answer = requests.post(
        f"{server.url}/v1/chat/completions", json={"model": embedding, "messages": HI}, timeout=PATIENCE
    )
    assert answer.status_code == 400
    assert "cannot do 'generate'" in answer.json()["error"]["message"]


def test_a_full_server_says_when_to_come_again(start_server: Callable[..., Server], tiny: Callable[[str], str]) -> None:
    model = tiny("llama")
    full = start_server(LOCAL_LLM_MAX_BATCH="1", LOCAL_LLM_MAX_QUEUE="1")
    full.add(model, "text-generation")
    long = {"max_tokens": 400, "min_new_tokens": 400, "stream": True, "repetition_penalty": 1.0}
    post(full, model)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(full, model, **long), range(8)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "overloaded_error")
        assert int(answer.headers["Retry-After"]) >= 1
    for answer in answers:
        if answer.status_code == 200:
            assert told(events_of(answer))["usage"]["output_tokens"] == 400


def test_a_stream_that_waits_has_begun_and_pings(
    start_server: Callable[..., Server], models_dir: Path, tiny: Callable[[str], str]
) -> None:
    narrow = start_server(LOCAL_LLM_MAX_BATCH="1")
    model = copied(narrow, models_dir, tiny, "anthropic-tooled", SWITCHED)
    body = {"model": model, "messages": HI, "stream": True}
    long = {**body, "max_tokens": 15000, "min_new_tokens": 15000}
    url = f"{narrow.url}/v1/messages"
    with requests.post(url, json=long, stream=True, timeout=PATIENCE) as first:
        running = first.iter_lines()
        assert next(running) == b"event: message_start"
        with requests.post(url, json={**body, "max_tokens": 3}, stream=True, timeout=PATIENCE) as second:
            lines = second.iter_lines()
            names = [next(lines).decode() for _ in range(5)][::3]
            first.close()
            names += [line.decode() for line in lines if line.startswith(b"event")]
    assert names[:2] == ["event: message_start", "event: ping"]
    assert names[-1] == "event: message_stop"


def listed(server: Server) -> list[str]:
    """The ids of the requests that run."""
    return [each["request_id"] for each in server.call("GET", "/requests").json()["requests"]]


def test_a_stream_that_is_cancelled_ends_with_an_error_event(
    client: anthropic.Anthropic, server: Server, tooled: str
) -> None:
    long = {"max_tokens": 15000, "min_new_tokens": 15000}
    body = {"model": tooled, "messages": HI, "stream": True, **long}
    with requests.post(f"{server.url}/v1/messages", json=body, stream=True, timeout=PATIENCE) as stream:
        lines = stream.iter_lines()
        assert next(lines) == b"event: message_start"
        own = stream.headers["request-id"]
        server.call("DELETE", f"/requests/{own}")
        *_, name, data = [line.decode() for line in lines if line]
    assert name == "event: error"
    failure = json.loads(data.removeprefix("data: "))
    assert (failure["type"], failure["error"]["type"], failure["request_id"]) == ("error", "api_error", own)
    with client.messages.create(model=tooled, messages=HI, stream=True, max_tokens=15000, extra_body=long) as events:
        next(iter(events))
        for each in listed(server):
            server.call("DELETE", f"/requests/{each}")
        with pytest.raises(anthropic.APIStatusError, match="cancelled"):
            list(events)


def test_a_client_that_hangs_up_frees_its_place(client: anthropic.Anthropic, server: Server, tooled: str) -> None:
    long = {"min_new_tokens": 15000}
    events = client.messages.create(model=tooled, messages=HI, stream=True, max_tokens=15000, extra_body=long)
    assert next(iter(events)).type == "message_start"
    assert listed(server)
    events.close()
    until(lambda: not listed(server))


# Anthropic's own client -----------------------------------------------------------------------------------------------


def test_the_models_are_listed_and_shown(client: anthropic.Anthropic, server: Server, model: str, tooled: str) -> None:
    shown = list(client.models.list())
    ids = [each.id for each in shown]
    assert {model, tooled} <= set(ids)
    assert [each.id for each in client.models.list(limit=1)] == ids, "page by page"
    page = client.models.list(before_id=ids[1])
    assert ([each.id for each in page.data], page.has_more) == (ids[:1], False)
    one = client.models.retrieve(model)
    assert (one.id, one.type, one.display_name) == (model, "model", model)
    assert abs(one.created_at.timestamp() - time.time()) < 86400
    with pytest.raises(anthropic.BadRequestError, match="limit"):
        client.models.list(limit=0)
    with pytest.raises(anthropic.BadRequestError, match="after_id"):
        client.models.list(after_id="nix")
    assert requests.get(f"{server.url}/v1/models", timeout=PATIENCE).json()["object"] == "list", (
        "without the header, OpenAI's"
    )


def test_answers_whole_and_streamed(client: anthropic.Anthropic, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "max_tokens": 12, "messages": HI, "extra_body": GREEDY}
    answer = client.messages.create(**asked)
    assert answer.content[0].type == "text"
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert answer.content[0].text == text == final.content[0].text
    assert (answer.stop_reason, final.stop_reason) == ("max_tokens", "max_tokens")
    assert final.usage.output_tokens == answer.usage.output_tokens == 12
    assert answer._request_id


def test_the_asynchronous_client(server: Server, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "max_tokens": 12, "messages": HI, "extra_body": GREEDY}

    async def run() -> tuple[list[str], str]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(*(client.messages.create(**asked) for _ in range(3)))
            async with client.messages.stream(**asked) as stream:
                text = "".join([piece async for piece in stream.text_stream])
            return [answer.content[0].text for answer in answers], text

    texts, streamed = asyncio.run(run())
    assert set(texts) == {streamed}


class Cat(pydantic.BaseModel):
    """What is asked for."""

    sits: bool
    fur: Literal["red", "grey"]


def test_structured_output(client: anthropic.Anthropic, model: str) -> None:
    answer = client.messages.parse(model=model, max_tokens=100, messages=HI, output_format=Cat)
    assert isinstance(answer.parsed_output, Cat)


def test_a_tool_loop(client: anthropic.Anthropic, tooled: str) -> None:
    """The model's call comes, what the tool gave goes back as the client's own blocks."""
    messages: list[Any] = list(HI)
    asked: dict[str, Any] = {"model": tooled, "max_tokens": 200, "tools": [WEATHER], "extra_body": GREEDY}
    with client.messages.stream(messages=messages, tool_choice={"type": "any"}, **asked) as stream:
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"} for call in first.content]
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    last = client.messages.create(messages=messages, tool_choice={"type": "none"}, **asked)
    assert last.content[0].type == "text"
    assert last.stop_reason in ("end_turn", "max_tokens")


def test_the_clients_own_tool_runner(client: anthropic.Anthropic, tooled: str) -> None:
    seen: list[str] = []

    @anthropic.beta_tool
    def look(place: Literal["roof"]) -> str:
        """Look at a place.

        Args:
            place: where to look.
        """
        seen.append(place)
        return "a cat"

    runner = client.beta.messages.tool_runner(
        model=tooled,
        max_tokens=300,
        tools=[look],
        messages=HI,
        max_iterations=2,
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        extra_body=GREEDY,
    )
    answers = list(runner)
    assert len(answers) == 2
    assert all(answer.content[0].type == "tool_use" for answer in answers)
    assert seen


# Claude Code ----------------------------------------------------------------------------------------------------------


def code(server: Server, body: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """What Claude Code gets for a request of its own, and which fields were taken without effect."""
    url = f"{server.url}/v1/messages{claude_code.QUERY}"
    response = requests.post(url, json=body, headers=claude_code.HEADERS, timeout=PATIENCE)
    return told(events_of(response)), set(response.headers[IGNORED].split(", "))


def test_claude_codes_requests_are_taken_and_its_tool_loop_runs(server: Server, tooled: str) -> None:
    """A model by chance would not call a tool: that it has to is all that is put into Claude Code's own bodies."""
    assert requests.head(server.url, timeout=PATIENCE).status_code == 200
    name, ignored = code(server, claude_code.title(tooled))
    assert set(json.loads(name["content"][0]["text"])) == {"title"}
    assert ignored == {"metadata", "system.x-anthropic-billing-header"}
    first = claude_code.turn(tooled)
    free, ignored = code(server, {**first, "max_tokens": 20})
    assert free["stop_reason"] in ("max_tokens", "end_turn")
    assert ignored == {
        *("messages.cache_control", "metadata", "context_management", "system.x-anthropic-billing-header"),
    }
    choice = {"type": "tool", "name": "Read", "disable_parallel_tool_use": True}
    called, _ = code(server, {**first, "tool_choice": choice})
    [call] = called["content"]
    assert (call["name"], call["input"], called["stop_reason"]) == ("Read", {"file_path": "/notes.txt"}, "tool_use")
    replayed = [{"role": "assistant", "content": [call]}, claude_code.result(call, "1\thello from notes\n")]
    last, _ = code(server, {**claude_code.turn(tooled, *replayed), "max_tokens": 20})
    assert last["stop_reason"] in ("max_tokens", "end_turn")
    assert last["usage"]["cache_read_input_tokens"] > last["usage"]["input_tokens"], "the turn before is not read again"


def test_claude_codes_prompt_has_a_refusal_of_its_own_where_it_is_too_long(server: Server, model: str) -> None:
    url = f"{server.url}/v1/messages{claude_code.QUERY}"
    response = requests.post(url, json=claude_code.turn(model), headers=claude_code.HEADERS, timeout=PATIENCE)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("prompt is too long: ")


def test_the_bodies_tell_of_no_more_fields_than_they_take() -> None:
    """What is said to be ignored is among the fields."""
    assert set(NOTHING) <= set(MessagesBody.model_fields)
