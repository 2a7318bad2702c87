"""OpenAI's API on a live server, by OpenAI's own client and LangChain's: every field does something, or is refused."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
import requests
import torch
from conftest import PATIENCE, STARTER, Graphs, Server, until
from transformers import AutoModelForCausalLM, AutoTokenizer

from huggingface.api.documented.system import VERSION
from huggingface.api.openai.chat import reason_of
from huggingface.types import Chunk

pytestmark = pytest.mark.each_backend

HI = [{"role": "user", "content": "where is the cat?"}]
LONG = 24  # tokens
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path, backend: str, graphs: Graphs
) -> Iterator[Server]:
    """A live server of these tests' own: they register models under other types than others do."""
    server = Server(tmp_path_factory.mktemp("server"), models_dir, graphs if backend == "openvino" else None)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """OpenAI's client on the live server."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(server: Server, tiny: Callable[[str], str]) -> str:
    """A tiny model that chats."""
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    return model_id


@pytest.fixture(scope="module")
def tooled(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> str:
    """The same with a template that knows tools, reasoning efforts and a variable of its own."""
    folder = models_dir / "tiny/tooled"
    if not folder.exists():
        shutil.copytree(models_dir / tiny("llama"), folder)
        template = (
            "{% if tools %}<tool_call> {{ tools | tojson }}\n{% endif %}"
            "{% if reasoning_effort %}effort {{ reasoning_effort }}\n{% endif %}{% if mood %}{{ mood }}\n{% endif %}"
            "{% for message in messages %}{{ message.role }}: {{ message.content }}"
            "{% for call in message.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% if thinks %}<think>\n{% endif %}{% endif %}"
            "{# </think> #}"
        )
        (folder / "chat_template.jinja").write_text(template)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    server.add("tiny/tooled", "text-generation")
    return "tiny/tooled"


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory, starter_models_dir: Path) -> Any:
    """A server with the starter model, and OpenAI's client on it."""
    server = Server(tmp_path_factory.mktemp("starter"), starter_models_dir)
    server.add(STARTER, "text-generation")
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    server.stop()


def say(client: openai.OpenAI, model: str, **options: Any) -> str:
    """A greedy answer, unless options say otherwise."""
    options = {"messages": HI, "temperature": 0, "max_tokens": LONG, **options}
    return client.chat.completions.create(model=model, **options).choices[0].message.content or ""


# Models ---------------------------------------------------------------------------------------------------------------


def test_the_registered_models_are_listed(client: openai.OpenAI, model: str) -> None:
    assert model in [each.id for each in client.models.list()]
    shown = client.models.retrieve(model)
    assert (shown.id, shown.object, shown.owned_by) == (model, "model", "tiny")
    assert abs(shown.created - time.time()) < 86400


# Chats ----------------------------------------------------------------------------------------------------------------


def test_a_greedy_answer_is_what_generate_gives(
    client: openai.OpenAI, model: str, models_dir: Path, server: Server
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models_dir / model)
    plain = AutoModelForCausalLM.from_pretrained(models_dir / model).eval()
    ids = tokenizer.apply_chat_template(HI, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.inference_mode():
        made = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LONG)
    wanted = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    answer = client.chat.completions.create(model=model, messages=HI, temperature=0, max_tokens=LONG)
    [choice] = answer.choices
    assert choice.message.content == wanted
    assert answer.usage.prompt_tokens == ids.shape[1]
    assert answer.usage.completion_tokens == made.shape[1] - ids.shape[1]
    assert choice.finish_reason == ("length" if answer.usage.completion_tokens == LONG else "stop")
    parts = [{"role": "user", "content": [{"type": "text", "text": HI[0]["content"]}]}]
    assert say(client, model, messages=parts) == wanted
    record = server.call("GET", f"/models/{model}").json()["model"]
    assert record["usage_count"] >= 1


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI, model: str, server: Server) -> None:
    options = {"model": model, "messages": HI, "temperature": 0, "max_tokens": LONG}
    events = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events[:-1]) == say(client, model)
    assert [event.choices[0].finish_reason for event in events[:-1]].count(None) == len(events) - 2
    assert events[-1].choices == []
    told, whole = events[-1].usage, client.chat.completions.create(**options).usage
    assert (told.prompt_tokens, told.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert {event.id for event in events} == {events[0].id}
    raw = requests.post(f"{server.url}/v1/chat/completions", json={**options, "stream": True}, timeout=PATIENCE)
    assert raw.headers["Content-Type"].startswith("text/event-stream")
    assert raw.text.endswith("data: [DONE]\n\n")
    assert "usage" not in raw.text


def test_answers_tell_what_made_them(client: openai.OpenAI, model: str) -> None:
    """TGI's client and Hugging Face's classes of a chat want `system_fingerprint`, whole or in pieces."""
    options: dict[str, Any] = {"model": model, "max_tokens": 2}
    chat = client.chat.completions.create(messages=HI, **options)
    text = client.completions.create(prompt="the cat", **options)
    assert chat.system_fingerprint == text.system_fingerprint == f"local-llm-{VERSION}"
    for stream in (
        client.chat.completions.create(messages=HI, stream=True, **options),
        client.completions.create(prompt="the cat", stream=True, **options),
    ):
        assert {event.system_fingerprint for event in stream} == {f"local-llm-{VERSION}"}


CHANGES: list[dict[str, Any]] = [
    {"max_tokens": 3},
    {"max_completion_tokens": 3, "max_tokens": 3},
    {"temperature": 5.0, "seed": 1},
    {"temperature": 5.0, "seed": 2, "top_p": 0.2},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 2.0},
    {"logit_bias": {"30": 100}},
    {"response_format": {"type": "json_object"}, "max_tokens": 100},
    {"messages": [{"role": "system", "content": "a dog"}, *HI]},
    {"messages": [{"role": "developer", "content": "a dog"}, *HI]},
    {"messages": [*HI, {"role": "assistant", "content": "here"}, *HI]},
]
OWN: list[dict[str, Any]] = [
    {"top_k": 1, "temperature": 5.0, "seed": 4},
    {"min_p": 0.9, "temperature": 2.0, "seed": 4},
    {"typical_p": 0.1, "temperature": 3.0, "seed": 4},
    {"top_h": 0.1, "temperature": 3.0, "seed": 4},
    {"epsilon_cutoff": 0.5, "temperature": 3.0, "seed": 4},
    {"eta_cutoff": 0.5, "temperature": 3.0, "seed": 4},
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 9.0},
    {"encoder_no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(20, 200))},
    {"begin_suppress_tokens": list(range(3, 260))},
    {"bad_words_ids": [[token] for token in range(20, 200)]},
    {"eos_token_id": list(range(20, 268))},
    {"guidance_scale": 5.0},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(change))
def test_each_field_changes_the_answer(client: openai.OpenAI, model: str, change: dict[str, Any]) -> None:
    assert say(client, model, **change) != say(client, model)


@pytest.mark.parametrize("change", OWN, ids=lambda change: next(iter(change)))
def test_each_of_this_servers_own_fields_changes_the_answer(
    client: openai.OpenAI, model: str, change: dict[str, Any]
) -> None:
    drawn = {name: change[name] for name in ("temperature", "seed") if name in change}
    rest = {name: value for name, value in change.items() if name not in drawn}
    assert say(client, model, **drawn, extra_body=rest) != say(client, model, **drawn)


def test_a_stop_ends_the_answer(client: openai.OpenAI, model: str) -> None:
    whole = say(client, model)
    stop = whole[5:7]
    for stops in (stop, ["never there", stop]):
        answer = client.chat.completions.create(model=model, messages=HI, temperature=0, max_tokens=LONG, stop=stops)
        assert answer.choices[0].message.content == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_again_and_n_gives_several(client: openai.OpenAI, model: str) -> None:
    def ask(**options: Any) -> list[str]:
        made = client.chat.completions.create(model=model, messages=HI, max_tokens=LONG, temperature=3, **options)
        assert [choice.index for choice in made.choices] == list(range(len(made.choices)))
        return [choice.message.content or "" for choice in made.choices]

    several = ask(seed=5, n=3)
    assert several == ask(seed=5, n=3)
    assert several[:1] == ask(seed=5)
    assert len(set(several)) == 3
    pieces = client.chat.completions.create(
        model=model, messages=HI, max_tokens=LONG, temperature=3, seed=5, n=3, stream=True
    )
    streamed = ["", "", ""]
    for event in pieces:
        streamed[event.choices[0].index] += event.choices[0].delta.content or ""
    assert streamed == several


def test_log_probabilities_are_the_models_own(client: openai.OpenAI, model: str, models_dir: Path) -> None:
    options = {"model": model, "messages": HI, "temperature": 0, "max_tokens": 6}
    [choice] = client.chat.completions.create(logprobs=True, top_logprobs=2, **options).choices
    told = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in told).decode("utf-8", "replace") == choice.message.content
    tokenizer = AutoTokenizer.from_pretrained(models_dir / model)
    plain = AutoModelForCausalLM.from_pretrained(models_dir / model).eval()
    ids = tokenizer.apply_chat_template(HI, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.inference_mode():
        top = plain(ids).logits[0, -1].log_softmax(-1).topk(2)
    assert [each.logprob for each in told[0].top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert told[0].logprob == pytest.approx(top.values[0].item(), abs=1e-4)
    events = client.chat.completions.create(logprobs=True, stream=True, **options)
    streamed = [token for event in events if (found := event.choices[0].logprobs) for token in found.content]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in told])
    assert client.chat.completions.create(**options).choices[0].logprobs is None


def test_a_stream_tells_the_tokens_of_its_text_and_none_of_a_stop_string(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "messages": HI, "temperature": 0, "max_tokens": 24, "logprobs": True}
    greedy = client.chat.completions.create(**options).choices[0].message.content
    for stop in {greedy[at : at + size] for at in (1, 4, 7) for size in (1, 3)}:
        whole = client.chat.completions.create(stop=[stop], **options).choices[0]
        events = list(client.chat.completions.create(stop=[stop], stream=True, **options))
        text = "".join(event.choices[0].delta.content or "" for event in events)
        told = [token.token for event in events if (found := event.choices[0].logprobs) for token in found.content]
        assert text == whole.message.content
        assert told == [token.token for token in whole.logprobs.content], stop


def test_parameters_come_from_the_request_then_the_record_then_the_model(
    server: Server, models_dir: Path, tiny: Callable[[str], str], client: openai.OpenAI
) -> None:
    """OpenAI's own defaults are the last: without any word everything is sampled."""
    folder = models_dir / "tiny/configured"
    if not folder.exists():
        shutil.copytree(models_dir / tiny("llama"), folder)
        settings = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True, "top_k": 1}))
    server.add("tiny/configured", "text-generation")

    def ask(**options: Any) -> str:
        options = {"messages": HI, "max_tokens": 12, **options}
        return client.chat.completions.create(model="tiny/configured", **options).choices[0].message.content or ""

    greedy = ask(temperature=0)
    assert {ask() for _ in range(4)} == {greedy}, "the model's own top_k of 1 counts"
    drawn = {"extra_body": {"top_k": 0}, "temperature": 4}
    assert len({ask(**drawn) for _ in range(4)}) > 1
    server.call("PUT", "/models/tiny/configured", json={"parameters": {"top_k": 50, "max_new_tokens": 2}})
    registered = client.chat.completions.create(model="tiny/configured", messages=HI, temperature=4)
    assert registered.usage.completion_tokens <= 2
    assert ask(max_tokens=5, temperature=0) == say(client, "tiny/configured", max_tokens=5)


# Tools ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model", "tooled"])
def test_a_call_that_must_be_made_fits_its_tool(
    which: str, client: openai.OpenAI, request: pytest.FixtureRequest
) -> None:
    """For a template that knows tools, and for one that does not; whole and streamed."""
    name = request.getfixturevalue(which)
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        for seed in range(4):
            options = {"tools": [WEATHER, NOW], "tool_choice": choice, "seed": seed, "temperature": 2.0}
            options |= {"model": name, "messages": HI, "parallel_tool_calls": False, "max_tokens": 300}
            [answer] = client.chat.completions.create(**options).choices
            assert answer.finish_reason == "tool_calls"
            [call] = answer.message.tool_calls
            assert call.function.name in (["get_weather"] if isinstance(choice, dict) else ["get_weather", "now"])
            arguments = json.loads(call.function.arguments)
            assert set(arguments) == ({"city"} if call.function.name == "get_weather" else set())
            streamed: dict[str, str] = {"name": "", "arguments": ""}
            reason = None
            for event in client.chat.completions.create(stream=True, **options):
                reason = event.choices[0].finish_reason or reason
                for delta in event.choices[0].delta.tool_calls or ():
                    streamed["name"] += delta.function.name or ""
                    streamed["arguments"] += delta.function.arguments or ""
                assert not event.choices[0].delta.content
            assert (streamed["name"], streamed["arguments"]) == (call.function.name, call.function.arguments)
            assert reason == "tool_calls"


def test_a_call_that_is_cut_off_is_none_to_act_on(client: openai.OpenAI, model: str) -> None:
    """It ends for its length, or at its stop, and what is not a call yet is not shown as text."""
    long = {"type": "object", "properties": {"a": {"type": "string", "minLength": 500}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": long}}
    options: dict[str, Any] = {"model": model, "messages": HI, "tools": [tool], "tool_choice": "required"}
    for maximum in (3, 60):
        [choice] = client.chat.completions.create(max_tokens=maximum, **options).choices
        assert choice.finish_reason == "length"
        assert not choice.message.content
        events = list(client.chat.completions.create(max_tokens=maximum, stream=True, **options))
        assert events[-1].choices[0].finish_reason == "length"
        assert not any(event.choices[0].delta.content for event in events)
    [stopped] = client.chat.completions.create(stop='"a"', **options).choices
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    ("ended", "calls", "told"),
    [
        ("length", ['{"a": 1}'], "length"),  # more were to come
        ("length", [], "length"),
        ("stop", ['{"a": 1}'], "tool_calls"),
        ("stop", ['{"a": 1}', '{"a'], "stop"),
        ("stop", [], "stop"),
    ],
)
def test_an_answer_ends_for_its_calls_only_if_they_are_whole(ended: Any, calls: list[str], told: str) -> None:
    assert reason_of(Chunk("", finish_reason=ended), calls) == told


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own, of what it adds
def test_what_the_client_parsed_can_be_sent_back(client: openai.OpenAI, model: str) -> None:
    class City(pydantic.BaseModel):
        city: Literal["Oslo", "Rome"]

    options: dict[str, Any] = {"model": model, "temperature": 0}
    tool = openai.pydantic_function_tool(City)
    options |= {"max_tokens": 60}
    asked = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    message = client.chat.completions.parse(messages=HI, **asked, **options).choices[0].message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, City)
    options |= {"max_tokens": 20}
    results = [{"role": "tool", "tool_call_id": call.id, "content": "ok", "name": "f"} for call in message.tool_calls]
    assert client.chat.completions.create(messages=[*HI, message, *results], **options).choices
    parsed = client.chat.completions.parse(messages=HI, response_format=City, **options).choices[0].message
    assert isinstance(parsed.parsed, City)
    assert client.chat.completions.create(messages=[*HI, parsed, *HI], **options).choices


def test_what_is_null_is_left_out(server: Server, model: str) -> None:
    """Whatever OpenAI has that can be null."""
    nothing = {"chat/completions": {"messages": HI}, "completions": {"prompt": "a"}, "responses": {"input": "a"}}
    fields = {
        "chat/completions": "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens "
        "max_tokens metadata modalities n parallel_tool_calls prediction presence_penalty prompt_cache_key "
        "prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier stop store stream "
        "stream_options temperature tool_choice tools top_logprobs top_p user verbosity web_search_options",
        "completions": "best_of echo frequency_penalty logit_bias logprobs n presence_penalty seed stop stream "
        "stream_options suffix temperature top_p user",
        "responses": "background conversation include instructions max_tool_calls metadata parallel_tool_calls "
        "previous_response_id prompt prompt_cache_key reasoning safety_identifier service_tier store stream "
        "stream_options temperature text tool_choice tools top_logprobs top_p truncation user",
    }
    for path, body in nothing.items():
        limit = "max_output_tokens" if path == "responses" else "max_tokens"
        asked = {"model": model, **body, **dict.fromkeys(fields[path].split()), limit: 2}
        answer = requests.post(f"{server.url}/v1/{path}", json=asked, timeout=PATIENCE)
        assert answer.status_code == 200, (path, answer.text)


def test_refusals_of_forms_name_the_field_that_was_sent(server: Server, model: str) -> None:
    bad = {"type": "object", "properties": {"a": {"not": {"minLength": 2}}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": bad}}
    tool = {"type": "function", "function": {"name": "f", "parameters": bad}}
    flat = {"type": "json_schema", "name": "a", "schema": bad}
    endless = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}}}}
    endless["$defs"]["a"] |= {"required": ["x"], "additionalProperties": False}  # type: ignore[index]
    many = {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 3}
    for path, body, field in (
        ("chat/completions", {"messages": HI, "response_format": form}, "response_format"),
        ("chat/completions", {"messages": HI, "tools": [tool], "tool_choice": "required"}, "tools"),
        ("responses", {"input": "a", "text": {"format": flat}}, "text.format"),
        (
            "chat/completions",
            {"messages": HI, "response_format": {**form, "json_schema": {"name": "a", "schema": many}}},
            "response_format",
        ),
    ):
        error = requests.post(f"{server.url}/v1/{path}", json={"model": model, **body}, timeout=PATIENCE).json()[
            "error"
        ]
        assert error["param"] == field, error
        assert "start:" not in error["message"]
    body = {"messages": HI, "response_format": {**form, "json_schema": {"name": "a", "schema": endless}}}
    answer = requests.post(f"{server.url}/v1/chat/completions", json={"model": model, **body}, timeout=PATIENCE)
    assert answer.status_code == 400
    assert "<state>" not in answer.text
    for nonsense in ({"required": 5}, {"required": None}, {"properties": 3}, {"minProperties": 2}):
        tool["function"] = {"name": "f", "parameters": {"type": "object", **nonsense}}
        body = {"messages": HI, "tools": [tool], "tool_choice": "required", "max_tokens": 1}
        answer = requests.post(f"{server.url}/v1/chat/completions", json={"model": model, **body}, timeout=PATIENCE)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    tool["function"] = {"name": "f", "parameters": {"type": "array"}}
    body = {"messages": HI, "tools": [tool]}
    error = requests.post(f"{server.url}/v1/chat/completions", json={"model": model, **body}, timeout=PATIENCE).json()[
        "error"
    ]
    assert error["param"] == "tools.0.function.parameters"


def test_tools_and_what_they_gave_reach_the_template(client: openai.OpenAI, tooled: str) -> None:
    """Each of them changes how many tokens the prompt has."""

    def tokens(messages: list[Any] = HI, **options: Any) -> int:
        return client.chat.completions.create(
            model=tooled, messages=messages, max_tokens=1, **options
        ).usage.prompt_tokens

    plain = tokens()
    assert tokens(tools=[WEATHER]) > plain
    assert tokens(tools=[WEATHER], tool_choice="none") == plain
    called = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    result = {"role": "tool", "tool_call_id": "a", "content": "rain"}
    assert tokens([*HI, {"role": "assistant", "tool_calls": [called]}, result]) > plain
    assert tokens(reasoning_effort="low") > plain
    assert tokens(extra_body={"chat_template_kwargs": {"mood": "glad"}}) > plain


def test_reasoning_comes_apart(client: openai.OpenAI, tooled: str) -> None:
    options: dict[str, Any] = {"model": tooled, "messages": HI, "temperature": 0}
    thinks = {"chat_template_kwargs": {"thinks": True}}
    [choice] = client.chat.completions.create(max_tokens=8, extra_body=thinks, **options).choices
    assert choice.message.model_extra["reasoning_content"]
    assert not choice.message.content
    events = client.chat.completions.create(max_tokens=8, stream=True, extra_body=thinks, **options)
    thought = "".join((event.choices[0].delta.model_extra or {}).get("reasoning_content") or "" for event in events)
    assert thought.strip() == choice.message.model_extra["reasoning_content"].strip()
    [plain] = client.chat.completions.create(max_tokens=8, **options).choices
    assert "reasoning_content" not in (plain.message.model_extra or {})


# Structured output ----------------------------------------------------------------------------------------------------


class Person(pydantic.BaseModel):
    """Someone."""

    name: str = pydantic.Field(max_length=10)
    age: int = pydantic.Field(ge=0, le=150)
    moods: list[Literal["glad", "sad"]] = pydantic.Field(min_length=1, max_length=3)


def test_an_answer_is_parsed_by_a_model_of_pydantics(client: openai.OpenAI, model: str) -> None:
    for seed in range(5):
        answer = client.chat.completions.parse(
            model=model, messages=HI, response_format=Person, seed=seed, temperature=2.0
        )
        assert isinstance(answer.choices[0].message.parsed, Person)
    response = client.responses.parse(model=model, input="who?", text_format=Person, temperature=2.0)
    assert isinstance(response.output_parsed, Person)


def test_a_schema_that_cannot_be_compiled_is_refused_with_the_reason(client: openai.OpenAI, model: str) -> None:
    schema = {"name": "a", "schema": {"type": "object", "properties": {"a": {"not": {"minLength": 2}}}}}
    with pytest.raises(openai.BadRequestError, match="not"):
        say(client, model, response_format={"type": "json_schema", "json_schema": schema})


def test_the_native_route_takes_forms_too(server: Server, model: str) -> None:
    def ask(**fields: Any) -> requests.Response:
        body = {"model_id": model, "prompt": "the", "max_new_tokens": 200, "temperature": 2.0, **fields}
        return server.call("POST", "/generate", json=body)

    answer = ask(choice=["yes", "no"]).json()
    assert answer["response"] in ("yes", "no")
    assert answer["parameters"]["choice"] == ["yes", "no"]
    assert ask(regex="[0-9]{3}").json()["response"].isdigit()
    assert isinstance(json.loads(ask(json_schema={"type": "boolean"}).json()["response"]), bool)
    assert isinstance(json.loads(ask(json_object=True, max_new_tokens=400, do_sample=False).json()["response"]), dict)
    assert ask(grammar='start: "a" "b"').json()["response"] == "ab"
    for fields, field in (
        ({"regex": "(a"}, "regex"),
        ({"choice": []}, "choice"),
        ({"regex": "a", "choice": ["b"]}, "choice"),
        ({"json_object": False}, "json_object"),
        ({"grammar": "start: nothing"}, "grammar"),
    ):
        refused = ask(**fields)
        assert (refused.status_code, field in refused.json()["error"]) == (400, True)


# Completions ----------------------------------------------------------------------------------------------------------


def test_completions_take_prompts_of_every_kind(client: openai.OpenAI, model: str, models_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models_dir / model)
    texts = ["the cat sat", "a dog"]
    ids = [tokenizer(text)["input_ids"] for text in texts]

    def ask(prompt: Any, **options: Any) -> list[str]:
        made = client.completions.create(model=model, prompt=prompt, temperature=0, **options)
        return [choice.text for choice in made.choices]

    each = [ask(text)[0] for text in texts]
    assert ask(texts) == each
    assert ask(ids) == each
    assert ask(ids[0]) == each[:1]
    assert ask(texts[0], echo=True) == [texts[0] + each[0]]
    made = client.completions.create(model=model, prompt=texts, n=2, seed=1, temperature=2.0)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert made.usage.prompt_tokens == sum(map(len, ids))
    assert made.usage.completion_tokens == 4 * 16, "OpenAI's default"
    streamed = [""] * 2
    for event in client.completions.create(model=model, prompt=texts, temperature=0, stream=True, echo=True):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == [text + more for text, more in zip(texts, each, strict=True)]


def test_more_prompts_than_the_queue_holds(client: openai.OpenAI, model: str) -> None:
    prompts = [f"the cat {number}" for number in range(300)]
    made = client.completions.create(model=model, prompt=prompts, temperature=0, max_tokens=2)
    assert [choice.index for choice in made.choices] == list(range(300))
    assert (
        made.choices[7].text
        == client.completions.create(model=model, prompt=prompts[7], temperature=0, max_tokens=2).choices[0].text
    )


def test_completions_tell_how_likely_a_text_is(client: openai.OpenAI, model: str, models_dir: Path) -> None:
    text = "the cat sat on the mat"
    made = client.completions.create(model=model, prompt=text, echo=True, logprobs=2, max_tokens=0, temperature=0)
    told = made.choices[0].logprobs
    tokenizer = AutoTokenizer.from_pretrained(models_dir / model)
    plain = AutoModelForCausalLM.from_pretrained(models_dir / model).eval()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        wanted = plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx(wanted.tolist(), abs=1e-4)
    assert len(told.tokens) == ids.shape[1]
    assert all(
        max(top.values()) >= value for top, value in zip(told.top_logprobs[1:], told.token_logprobs[1:], strict=True)
    )
    assert made.choices[0].text == text
    assert "".join(told.tokens[1:]) == text
    assert made.usage.completion_tokens == 0


def test_a_stream_counts_as_the_whole_answer_does(client: openai.OpenAI, model: str) -> None:
    """Of nothing but the prompt, no token was made."""
    for maximum in (0, 3):
        options = {"model": model, "prompt": "the cat", "echo": True, "max_tokens": maximum, "temperature": 0}
        whole = client.completions.create(**options)
        *_, last = client.completions.create(stream=True, stream_options={"include_usage": True}, **options)
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [getattr(last.usage, name) for name in counts] == [getattr(whole.usage, name) for name in counts]
        assert whole.usage.completion_tokens == maximum


def test_the_best_of_several_is_the_likeliest(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "prompt": "the", "temperature": 3.0, "seed": 1, "max_tokens": 8, "logprobs": 0}
    several = client.completions.create(n=6, **options).choices
    best = client.completions.create(best_of=6, n=2, **options).choices
    ranked = sorted(several, key=lambda choice: -sum(choice.logprobs.token_logprobs))
    assert [choice.text for choice in best] == [choice.text for choice in ranked[:2]]


def test_tokenizers_that_cannot_be_constrained_say_so(
    client: openai.OpenAI, server: Server, tiny: Callable[[str], str]
) -> None:
    """T5's: its tokens are told of, and a form is refused with the reason."""
    model = tiny("t5")
    server.add(model, "text2text-generation")
    made = client.completions.create(model=model, prompt="the cat", logprobs=1, max_tokens=4, temperature=0)
    assert len(made.choices[0].logprobs.tokens) == made.usage.completion_tokens
    body = {"model_id": model, "prompt": "the cat", "regex": "[a-z]+"}
    refused = server.call("POST", "/generate", json=body)
    assert refused.status_code in (200, 400)
    assert refused.status_code == 200 or "cannot be constrained" in refused.json()["error"]


# Responses ------------------------------------------------------------------------------------------------------------


def test_a_response_is_the_same_answer(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "temperature": 0, "max_output_tokens": LONG}
    response = client.responses.create(input=HI[0]["content"], **options)
    assert response.output_text == say(client, model)
    assert response.status == ("incomplete" if response.usage.output_tokens == LONG else "completed")
    assert client.responses.create(input=HI, **options).output_text == response.output_text
    told = client.responses.create(input=HI, instructions="a dog", **options)
    wanted = say(client, model, messages=[{"role": "system", "content": "a dog"}, *HI])
    assert told.output_text == wanted
    events = list(client.responses.create(input=HI, stream=True, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == response.output_text
    assert events[-1].type == f"response.{response.status}"
    assert events[-1].response.output_text == response.output_text


def test_a_response_counts_what_was_thought_and_what_was_there_already(
    client: openai.OpenAI, tooled: str, models_dir: Path
) -> None:
    said = "a question that nobody has asked before, number one"
    thinks = {"chat_template_kwargs": {"thinks": True}}
    options: dict[str, Any] = {"model": tooled, "temperature": 0, "max_output_tokens": 8, "extra_body": thinks}
    first = client.responses.create(input=said, **options)
    again = client.responses.create(input=said, **options)
    assert first.usage.input_tokens_details.cached_tokens < first.usage.input_tokens - 10
    assert again.usage.input_tokens_details.cached_tokens == first.usage.input_tokens - 1, "all but the last"
    [thought] = first.output
    tokenizer = AutoTokenizer.from_pretrained(models_dir / tooled)
    count = len(tokenizer(thought.content[0].text, add_special_tokens=False)["input_ids"])
    assert first.usage.output_tokens_details.reasoning_tokens == count > 0
    plain = client.responses.create(model=tooled, input=said, temperature=0, max_output_tokens=8)
    assert plain.usage.output_tokens_details.reasoning_tokens == 0


def test_a_response_calls_tools(client: openai.OpenAI, tooled: str) -> None:
    tools = [{"type": "function", **WEATHER["function"]}]
    options: dict[str, Any] = {"model": tooled, "tools": tools, "temperature": 2.0, "tool_choice": "required"}
    response = client.responses.create(input="weather?", parallel_tool_calls=False, **options)
    [call] = response.output
    assert (call.type, call.name, set(json.loads(call.arguments))) == ("function_call", "get_weather", {"city"})
    more: list[Any] = [
        {"role": "user", "content": "weather?"},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    answer = client.responses.create(input=more, model=tooled, max_output_tokens=4)
    assert answer.output_text
    events = list(client.responses.create(input="weather?", stream=True, **options))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    calls = [item for item in events[-1].response.output if item.type == "function_call"]
    assert "".join(pieces) == "".join(item.arguments for item in calls)


# Refusals -------------------------------------------------------------------------------------------------------------

CHAT: dict[str, Any] = {"messages": HI}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("chat/completions", {}, "messages"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": "hi"}, "messages"),
    ("chat/completions", {"messages": ["hi"]}, "messages.0"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.type",
    ),
    ("chat/completions", {**CHAT, "temperature": "hot"}, "temperature"),
    ("chat/completions", {**CHAT, "max_tokens": 0}, "max_tokens"),
    ("chat/completions", {**CHAT, "n": 0}, "n"),
    ("chat/completions", {**CHAT, "top_logprobs": 3}, "top_logprobs"),
    ("chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice"),
    ("chat/completions", {**CHAT, "tools": [WEATHER], "tool_choice": {"function": {"name": "f"}}}, "tool_choice"),
    ("chat/completions", {**CHAT, "tools": [{**NOW, "type": "web_search"}]}, "tools.0.type"),
    ("chat/completions", {**CHAT, "response_format": {"type": "xml"}}, "response_format.type"),
    ("chat/completions", {**CHAT, "chat_template_kwargs": {"nonsense": 1}}, "chat_template_kwargs.nonsense"),
    ("chat/completions", {**CHAT, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ("chat/completions", {**CHAT, "logit_bias": {"99999999": 1}}, "logit_bias"),
    *(
        ("chat/completions", {**CHAT, name: value}, name)
        for name, value in {
            "functions": [NOW["function"]],
            "function_call": {"name": "f"},
            "audio": {},
            "web_search_options": {},
            "num_beams": 2,
            "max_new_tokens": 3,
            "nonsense": 1,
        }.items()
    ),
    ("completions", {}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": {"text": "a"}}, "prompt"),
    ("completions", {"prompt": [[]]}, "prompt.0"),
    ("completions", {"prompt": [99999999]}, "prompt"),
    ("completions", {"prompt": "a", "suffix": "b"}, "suffix"),
    ("completions", {"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
    ("completions", {"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
    ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ("completions", {"prompt": "a", "logprobs": True}, "logprobs"),
    ("completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
    ("completions", {"prompt": "a", "stop": [3]}, "stop.0"),
    ("completions", {"prompt": "a", "nonsense": 1}, "nonsense"),
    ("responses", {}, "input"),
    ("responses", {"input": []}, "input"),
    ("responses", {"input": 3}, "input"),
    ("responses", {"input": [{"type": "item_reference", "id": "a"}]}, "input.0.type"),
    ("responses", {"input": "a", "tools": [{"type": 3}]}, "tools.0.type"),
    ("responses", {"input": "a", "text": {"format": {"type": "xml"}}}, "text.format.type"),
    ("responses", {"input": "a", "tool_choice": "required"}, "tool_choice"),
    *(
        ("responses", {"input": "a", name: value}, name)
        for name, value in {
            "background": True,
            "previous_response_id": "resp_1",
            "conversation": "conv_1",
            "prompt": {"id": "a"},
            "n": 2,
            "nonsense": 1,
        }.items()
    ),
]


@pytest.mark.parametrize(("path", "body", "field"), REFUSED, ids=[f"{path}-{field}" for path, _, field in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(
    path: str, body: dict[str, Any], field: str, server: Server, model: str
) -> None:
    answer = requests.post(f"{server.url}/v1/{path}", json={"model": model, **body}, timeout=PATIENCE)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


BODIES = ["", "{", "[]", "null", '"a"', "{}", '{"model": 3}', '{"model": "a", "model": "b"}', "\xff", "NaN"]


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "embeddings", "rerank"])
@pytest.mark.parametrize(
    "body", ["", "{", "[]", "null", '"a"', "{}", '{"model": 3}', '{"model": "a", "model": "b"}', "\xff"]
)
def test_bodies_that_are_none(path: str, body: str, server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{server.url}/v1/{path}", data=body.encode("latin-1"), headers=headers, timeout=PATIENCE)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_each_failure_is_the_clients_own_exception(
    client: openai.OpenAI, model: str, server: Server, start_server: Callable[..., Server], models_dir: Path
) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        say(client, "no/such-model")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such-model")
    with pytest.raises(openai.BadRequestError) as caught:
        say(client, model, messages=[{"role": "user", "content": "the cat " * 3000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        say(client, model, extra_body={"nonsense": 1})
    assert caught.value.param == "nonsense"
    with pytest.raises(openai.NotFoundError, match="No such route"):
        client.post("/nonsense", cast_to=object)
    wrong = requests.get(f"{server.url}/v1/chat/completions", timeout=PATIENCE)
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")
    with pytest.raises(openai.APIStatusError) as late:
        say(client, model, max_tokens=400, extra_body={"timeout": 0.001, "min_new_tokens": 400})
    assert late.value.status_code == 504
    foreign = requests.get(f"{server.url}/v1/models", headers={"Origin": "http://evil.example"}, timeout=PATIENCE)
    assert (foreign.status_code, foreign.json()["error"]["type"]) == (403, "permission_error")
    full = start_server(LOCAL_LLM_MAX_BATCH="1", LOCAL_LLM_MAX_QUEUE="1")
    full.add(model, "text-generation")
    busy = openai.OpenAI(base_url=f"{full.url}/v1", api_key="none", max_retries=0)
    say(busy, model)
    many = {"max_tokens": 450, "extra_body": {"min_new_tokens": 450}}
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(say, busy, model, **many) for _ in range(8)]
        errors = [error for call in calls if (error := call.exception()) is not None]
    assert errors
    assert all(isinstance(error, openai.InternalServerError) and error.status_code == 503 for error in errors)
    assert all("retry-after" in error.response.headers for error in errors)  # type: ignore[attr-defined]


def test_a_client_that_leaves_a_stream_of_several_answers_frees_them_all(
    client: openai.OpenAI, model: str, server: Server
) -> None:
    stream = client.chat.completions.create(
        model=model, messages=HI, n=6, stream=True, max_tokens=450, extra_body={"min_new_tokens": 450}
    )
    next(iter(stream))
    stream.close()

    def idle() -> bool:
        engine = server.call("GET", "/cache").json()["cached_models"][model]["engine"]
        return (engine["running"], engine["waiting"], engine["slots"]) == (0, 0, 0)

    until(idle)


# Others' clients, and a real model ------------------------------------------------------------------------------------


def test_langchain_chats_streams_calls_and_parses(server: Server, model: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model=model, temperature=0, max_tokens=LONG)
    whole = chat.invoke("where is the cat?")
    assert whole.content
    assert whole.usage_metadata["output_tokens"] <= LONG
    assert "".join(str(piece.content) for piece in chat.stream("where is the cat?")) == whole.content
    bigger = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model=model, temperature=0, max_tokens=400)
    assert isinstance(bigger.with_structured_output(Person).invoke("who?"), Person)
    called = bigger.bind_tools([WEATHER], tool_choice="get_weather").invoke("weather?")
    assert [call["name"] for call in called.tool_calls] == ["get_weather"]


def test_a_real_model_answers_calls_and_fills_in_forms(starter: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = starter.chat.completions.create(model=STARTER, messages=question, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"

    class Fact(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=20)
        age: int

    extracted = starter.chat.completions.parse(
        model=STARTER,
        messages=[{"role": "user", "content": "Tom is 12 years old. Extract his name and age."}],
        response_format=Fact,
        temperature=0,
    )
    assert extracted.choices[0].message.parsed == Fact(name="Tom", age=12)
    weather = [{"role": "user", "content": "What is the weather in Oslo?"}]
    options: dict[str, Any] = {"model": STARTER, "temperature": 0, "tools": [WEATHER]}
    [choice] = starter.chat.completions.create(messages=weather, tool_choice="required", **options).choices
    [call] = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Oslo"}


def test_a_form_costs_little_time(starter: openai.OpenAI) -> None:
    """At most a tenth of a token's time; measured in turn, the best of several, with room for a noisy machine."""
    formed = {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "a",
                "schema": {
                    "type": "object",
                    "properties": {"a": {"type": "string", "minLength": 400}},
                    "required": ["a"],
                },
            },
        }
    }
    messages = [{"role": "user", "content": "Write a story as JSON."}]

    def rate(**options: Any) -> float:
        started = time.perf_counter()
        made = starter.chat.completions.create(
            model=STARTER,
            messages=messages,
            temperature=0,
            max_tokens=40,
            extra_body={"min_new_tokens": 40} if not options else {},
            **options,
        )
        assert made.usage.completion_tokens == 40
        return (time.perf_counter() - started) / 40

    rate()
    pairs = [(rate(), rate(**formed)) for _ in range(4)]
    assert min(with_form for _, with_form in pairs) < 1.25 * min(plain for plain, _ in pairs)


def test_many_schemas_at_once_over_http(client: openai.OpenAI, model: str) -> None:
    """Sixteen callers, each with a schema of its own, streamed: every answer validates."""
    lock = threading.Lock()
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        properties = {
            f"field{number}": {"type": "integer", "minimum": 0, "maximum": 10 + number},
            "ok": {"type": "boolean"},
        }
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
        pieces = client.chat.completions.create(
            model=model, messages=HI, response_format=form, stream=True, temperature=2.0, seed=number, max_tokens=100
        )
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        with lock:
            texts[number] = text

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(48)))
    for number, text in texts.items():
        value = json.loads(text)
        assert set(value) == {f"field{number}", "ok"}
        assert 0 <= value[f"field{number}"] <= 10 + number
