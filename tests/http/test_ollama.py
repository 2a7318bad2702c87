"""Ollama's API on a live server, by HTTP and by Ollama's own client: every field does something, or is refused."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import ollama
import pytest
import requests
import written_models
from causal_models import build
from conftest import PATIENCE, Server, until
from gguf_files import write_gguf
from hub import Repository
from hub_place import Place
from safetensors.numpy import load_file, save_file

from huggingface.api.http.durations import seconds_of
from huggingface.api.http.sse import NDJSON
from huggingface.api.ollama import names
from huggingface.api.ollama.chat import plain_messages
from huggingface.api.ollama.options import OPTIONS, OptionsBody, Wanted
from huggingface.api.ollama.schemas import OllamaTurn
from huggingface.registry.records import ModelRecord

HI = [{"role": "user", "content": "where is the cat?"}]
GREEDY = {"temperature": 0, "num_predict": 12}
IGNORED = "X-Local-LLM-Ignored"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """A live server of these tests' own: they register models under other types than others do."""
    server = Server(tmp_path_factory.mktemp("server"), models_dir)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[ollama.Client]:
    """Ollama's client on the live server."""
    with ollama.Client(host=server.url) as client:
        yield client


@pytest.fixture(scope="module")
def model(server: Server, tiny: Callable[[str], str]) -> str:
    """A tiny model that chats, registered with parameters of its own."""
    model_id = tiny("llama")
    server.add(model_id, "conversational", parameters={"max_new_tokens": 5, "seed": 3})
    return model_id


@pytest.fixture(scope="module")
def plain(server: Server, tiny: Callable[[str], str]) -> str:
    """A tiny model without a chat template."""
    model_id = tiny("gpt2")
    server.add(model_id, "text-generation")
    return model_id


@pytest.fixture(scope="module")
def embedder(server: Server, tiny: Callable[[str], str]) -> str:
    """A tiny model that makes vectors."""
    model_id = tiny("bert-embed")
    server.add(model_id, "feature-extraction")
    return model_id


@pytest.fixture(scope="module")
def written(server: Server, models_dir: Path) -> str:
    """A model that thinks, calls two tools and answers, always in the same words."""
    model_id = written_models.build(models_dir, "tiny/written", written_models.ANSWERS, written_models.TEMPLATE)
    server.add(model_id, "conversational")
    return model_id


def post(server: Server, route: str, **body: Any) -> requests.Response:
    """A request to a route under `/api`."""
    return requests.post(f"{server.url}/api/{route}", json=body, timeout=PATIENCE)


def whole(server: Server, route: str, **body: Any) -> Any:
    """The answer to a request that is not streamed."""
    answer = post(server, route, stream=False, **body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    return answer.json()


def refused(answer: requests.Response, status: int, *words: str) -> None:
    """Assert Ollama's shape of an error, the status, and words of the message."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    for word in words:
        assert word in answer.json()["error"]


# Models ---------------------------------------------------------------------------------------------------------------


def test_a_client_finds_a_server_that_runs(server: Server) -> None:
    """By the address alone, and by a version that has what is here."""
    assert requests.head(server.url, timeout=PATIENCE).status_code == 200
    assert requests.get(server.url, timeout=PATIENCE).status_code == 200
    version = requests.get(f"{server.url}/api/version", timeout=PATIENCE).json()["version"]
    assert [int(part) for part in version.split(".")] >= [0, 12, 11]


def test_registered_models_are_listed_as_they_are(client: ollama.Client, server: Server, model: str) -> None:
    found = {each.model: each for each in client.list().models}
    assert set(found) == {each["model_id"] for each in server.call("GET", "/models").json()["models"]}
    shown, record = found[model], server.call("GET", f"/models/{model}").json()["model"]
    assert shown.size == record["details"]["weights_bytes"]
    assert shown.modified_at is not None
    assert shown.modified_at.isoformat() == record["added_date"] + "+00:00"
    assert shown.digest is not None
    assert len(bytes.fromhex(shown.digest)) == 32
    assert shown.details is not None
    assert (shown.details.format, shown.details.family, shown.details.quantization_level) == (
        "safetensors",
        "llama",
        "F32",
    )


def test_a_model_is_shown_with_what_its_files_say(client: ollama.Client, server: Server, model: str) -> None:
    shown = client.show(model)
    details = server.call("GET", f"/models/{model}").json()["model"]["details"]
    assert shown.modelinfo == {
        "general.architecture": "llama",
        "general.parameter_count": details["parameters"],
        "llama.context_length": 512,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 512,
    }
    assert shown.parameters is not None
    assert [line.split() for line in shown.parameters.splitlines()] == [["max_new_tokens", "5"], ["seed", "3"]]
    assert shown.template is not None
    assert "<|im_start|>" in shown.template
    verbose = post(server, "show", name=model, verbose=True).json()
    assert verbose["model_info"]["config.hidden_act"] == "silu"


def test_what_a_model_can_do_is_told_by_its_files(
    client: ollama.Client, model: str, plain: str, embedder: str, written: str
) -> None:
    able = {name: client.show(name).capabilities for name in (model, plain, embedder, written)}
    assert able[model] == able[plain] == ["completion"]
    assert able[embedder] == ["embedding"]
    assert able[written] == ["completion", "tools", "thinking"]


def test_models_in_memory_are_told_with_their_bytes_and_until_when(client: ollama.Client, model: str) -> None:
    client.generate(model, keep_alive="2h")
    [entry] = [each for each in client.ps().models if each.model == model]
    assert entry.expires_at is not None
    assert entry.size is not None
    assert 7000 < entry.expires_at.timestamp() - time.time() <= 7200
    assert entry.size > 0
    assert (entry.size_vram, entry.context_length) == (0, 512)
    client.generate(model, keep_alive=-1)
    [entry] = [each for each in client.ps().models if each.model == model]
    assert entry.expires_at is not None
    assert entry.expires_at.year == 9999


@pytest.mark.parametrize("name", ["{}", "{}:latest", "hf.co/{}", "huggingface.co/{}:latest"])
def test_a_model_goes_by_the_names_that_clients_make_of_its_id(client: ollama.Client, model: str, name: str) -> None:
    called = name.format(model)
    answer = client.chat(called, HI, options=GREEDY)
    assert answer.model == called
    assert client.show(called).details == client.show(model).details


@pytest.mark.parametrize("name", ["nope", "tiny/llama:8b", "hf.co/tiny/llama:Q4_K_M"])
def test_an_unknown_model_is_told_in_ollamas_words(server: Server, model: str, name: str) -> None:
    for route in ("chat", "generate", "show"):
        answer = post(server, route, model=name)
        assert (answer.status_code, answer.json()) == (404, {"error": f"model '{name}' not found"})


def test_a_tag_names_the_file_or_the_revision_that_a_model_is_registered_with() -> None:
    quantized = ModelRecord("org/name", "", "", gguf_file="sub/Name-Q4_K_M.gguf")
    assert names.fits(quantized, "q4_k_m")
    assert not names.fits(quantized, "K_M")
    assert not names.fits(quantized, "Q8_0")
    assert names.fits(ModelRecord("org/name", "", "", revision="v2"), "v2")
    files = ["a-Q4_0.gguf", "a-IQ4_0.gguf", "Q4_0.gguf", "a-Q4_0-00001-of-2.gguf", "b-Q4_0-00001-of-00002.gguf"]
    assert names.files_of("Q4_0", files) == ["a-Q4_0.gguf", "Q4_0.gguf", "b-Q4_0-00001-of-00002.gguf"]


# Chats and prompts ----------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_openais_route_answers_it(server: Server, model: str) -> None:
    body = {"model": model, "messages": HI, "temperature": 0, "max_tokens": 12}
    wanted = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE).json()
    answer = whole(server, "chat", model=model, messages=HI, options=GREEDY)
    assert answer["message"] == {"role": "assistant", "content": wanted["choices"][0]["message"]["content"]}
    assert answer["prompt_eval_count"] == wanted["usage"]["prompt_tokens"]
    assert (answer["eval_count"], answer["done"], answer["done_reason"]) == (12, True, "length")
    parts = answer["load_duration"] + answer["prompt_eval_duration"] + answer["eval_duration"]
    assert 0 < parts <= answer["total_duration"] < 120 * 10**9


def test_a_stream_is_the_answer_in_lines_and_the_default(server: Server, model: str) -> None:
    wanted = whole(server, "chat", model=model, messages=HI, options=GREEDY)
    answer = post(server, "chat", model=model, messages=HI, options=GREEDY)
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    *pieces, last = [json.loads(line) for line in answer.text.splitlines()]
    assert len(pieces) > 3
    assert all(list(piece) == ["model", "created_at", "message", "done"] and not piece["done"] for piece in pieces)
    assert "".join(piece["message"]["content"] for piece in pieces) == wanted["message"]["content"]
    assert list(last) == list(wanted)
    assert last["message"] == {"role": "assistant", "content": ""}
    assert (last["eval_count"], last["done_reason"]) == (12, "length")


def test_silence_in_a_stream_leaves_its_lines_whole() -> None:
    """A line that holds nothing would be no JSON."""
    stream = NDJSON.silence * 3 + b"".join(NDJSON.encoded([{"a": 1}, {"b": 2}]))
    assert [json.loads(line) for line in stream.split(b"\n") if line] == [{"a": 1}, {"b": 2}]
    assert b"\n" not in NDJSON.silence


def test_a_prompt_is_the_users_turn_of_a_chat(server: Server, model: str) -> None:
    chat = [{"role": "system", "content": "Be brief."}, *HI]
    wanted = whole(server, "chat", model=model, messages=chat, options=GREEDY)["message"]["content"]
    prompt = {"model": model, "prompt": HI[0]["content"], "system": "Be brief.", "options": GREEDY}
    assert whole(server, "generate", **prompt)["response"] == wanted
    lines = [json.loads(line) for line in post(server, "generate", **prompt).text.splitlines()]
    assert "".join(line["response"] for line in lines) == wanted
    assert lines[-1]["done_reason"] == "length"


def test_a_raw_prompt_is_taken_as_it_is(server: Server, model: str, plain: str) -> None:
    """As is any prompt of a model without a chat template."""
    for name, raw in ((model, {"raw": True}), (plain, {}), (plain, {"raw": True})):
        body = {"model": name, "prompt": "The cat", "max_tokens": 12, "temperature": 0}
        wanted = requests.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).json()["choices"][0]["text"]
        assert whole(server, "generate", model=name, prompt="The cat", options=GREEDY, **raw)["response"] == wanted


def test_logprobs_are_told_of_each_token(client: ollama.Client, model: str) -> None:
    answer = client.chat(model, HI, options=GREEDY, logprobs=True, top_logprobs=2)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 12
    for token in answer.logprobs:
        assert token.top_logprobs is not None
        assert len(token.top_logprobs) == 2
        assert token.logprob == pytest.approx(max(each.logprob for each in token.top_logprobs))
    assert answer.message.content is not None
    stops = {**GREEDY, "stop": answer.message.content[4:7]}
    whole_answer = client.chat(model, HI, options=stops, logprobs=True)
    pieces = [line.logprobs or [] for line in client.chat(model, HI, options=stops, logprobs=True, stream=True)]
    assert [token.token for tokens in pieces for token in tokens] == [
        token.token for token in whole_answer.logprobs or []
    ]
    streamed = [line.logprobs or [] for line in client.chat(model, HI, options=GREEDY, logprobs=True, stream=True)]
    assert [token.token for tokens in streamed for token in tokens] == [token.token for token in answer.logprobs]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_format_holds_the_answer_to_a_schema(client: ollama.Client, model: str, streaming: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    options = {"temperature": 0, "num_predict": 60}
    if streaming:
        lines = client.chat(model, HI, format=schema, options=options, stream=True)
        text = "".join(line.message.content or "" for line in lines)
    else:
        text = client.generate(model, "x", format=schema, options=options).response or ""
    assert json.loads(text)["a"] in (1, 2)


def test_json_is_any_object(server: Server, model: str) -> None:
    body = {"model": model, "messages": HI, "options": {"temperature": 0, "num_predict": 40}}
    assert whole(server, "chat", format="json", **body)["message"]["content"].startswith("{")
    refused(post(server, "chat", format="yaml", **body), 400, "format")
    refused(post(server, "chat", format={"type": "nonsense"}, **body), 400, "format")


@pytest.mark.parametrize("route", ["chat", "generate"])
def test_a_request_that_asks_nothing_loads_or_unloads(
    server: Server, client: ollama.Client, model: str, route: str
) -> None:
    for keep_alive, reason, there in ((60, "load", True), (0, "unload", False), (None, "load", True)):
        answer = post(server, route, model=model, **({} if keep_alive is None else {"keep_alive": keep_alive}))
        assert answer.headers["Content-Type"] == "application/json"
        assert (answer.json()["done"], answer.json()["done_reason"]) == (True, reason)
        assert (model in [each.model for each in client.ps().models]) is there


# Thinking and tools ---------------------------------------------------------------------------------------------------


def test_what_a_model_thinks_is_told_apart(client: ollama.Client, written: str) -> None:
    answer = client.chat(written, HI, think=True)
    assert answer.message.thinking == "It is early."
    assert answer.message.content == "Good morning, then."
    lines = list(client.generate(written, "hi", think=True, stream=True))
    assert "".join(line.thinking or "" for line in lines) == "It is early."
    assert "".join(line.response or "" for line in lines) == "Good morning, then."
    assert client.chat(written, HI, think="high").message.thinking == "It is early."
    assert client.chat(written, HI, think=False).message.content == "Good morning."


def test_a_model_that_always_thinks_is_not_refused(server: Server, models_dir: Path) -> None:
    """What its chat template has no variable for cannot be chosen: it is taken, and named."""
    template = written_models.TEMPLATE.replace("enable_thinking", "true")
    server.add(written_models.build(models_dir, "tiny/thinks", written_models.ANSWERS, template), "conversational")
    for think in (True, False):
        answer = post(server, "chat", model="tiny/thinks", messages=HI, think=think, stream=False)
        assert answer.json()["message"]["thinking"] == "It is early."
        assert answer.headers[IGNORED] == "think"


def test_arguments_of_a_past_call_may_be_the_text_of_an_object(server: Server, model: str) -> None:
    """OpenAI's clients replay them so."""

    def read(arguments: Any) -> int:
        call = {"function": {"name": "now", "arguments": arguments}}
        said = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_name": "now", "content": "x"}]
        count = whole(server, "chat", model=model, messages=said, options=GREEDY)["prompt_eval_count"]
        assert isinstance(count, int)
        return count

    assert read('{"city": "Oslo"}') == read({"city": "Oslo"})
    assert read("{}") == read({})
    call = {"function": {"name": "now", "arguments": "[1]"}}
    refused(post(server, "chat", model=model, messages=[{"role": "assistant", "tool_calls": [call]}]), 400, "arguments")


def test_whether_to_think_is_named_where_no_template_says_it(server: Server, written: str) -> None:
    """A raw prompt has no place for it: it makes no difference, and is named."""
    for think in (True, False):
        answer = post(server, "generate", model=written, prompt="hi", raw=True, think=think, stream=False)
        assert answer.status_code == 200, answer.text
        assert answer.headers[IGNORED] == "think"


def test_numbers_of_any_size_are_told_in_streams_too(server: Server, models_dir: Path) -> None:
    """What a model writes as an argument may be an integer of more than 64 bits."""
    number = 10**30
    call = f'<tool_call>\n{{"name": "now", "arguments": {{"number": {number}}}}}\n</tool_call>'
    template = written_models.TEMPLATE
    server.add(written_models.build(models_dir, "tiny/counts", {"[call]": [call]}, template), "conversational")
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
    answer = post(server, "chat", model="tiny/counts", messages=HI, tools=tools)
    assert answer.status_code == 200, answer.text
    lines = [json.loads(line) for line in answer.text.splitlines()]
    [called] = [call for line in lines for call in line["message"].get("tool_calls", [])]
    assert called["function"]["arguments"] == {"number": number}


def test_a_model_that_cannot_think_is_not_asked_to(server: Server, model: str) -> None:
    for route, ask in (("chat", {"messages": HI}), ("generate", {"prompt": "x"})):
        for think in (True, "low"):
            answer = post(server, route, model=model, think=think, **ask)
            assert (answer.status_code, answer.json()) == (400, {"error": f'"{model}" does not support thinking'})
        answer = post(server, route, model=model, think=False, options=GREEDY, **ask)
        assert answer.status_code == 200
        assert "think" in answer.headers[IGNORED]


def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Which one.
    """
    return f"cold in {city}"


def now() -> str:
    """The time."""
    return "noon"


@pytest.mark.parametrize("streaming", [False, True])
def test_tools_are_called_and_their_results_answered(client: ollama.Client, written: str, streaming: bool) -> None:
    """The loop of Ollama's own documentation, whose calls and results carry no ids."""
    messages: list[Any] = [*HI]
    calls: list[Any] = []
    if streaming:
        content = ""
        for line in client.chat(written, messages, tools=[weather, now], stream=True):
            content += line.message.content or ""
            calls += line.message.tool_calls or []
        messages.append({"role": "assistant", "content": content, "tool_calls": calls})
    else:
        answer = client.chat(written, messages, tools=[weather, now])
        content, calls = answer.message.content or "", list(answer.message.tool_calls or [])
        messages.append(answer.message)
    assert content == "Wait."
    assert [(call.function.name, dict(call.function.arguments)) for call in calls] == [
        ("weather", {"city": "Oslo"}),
        ("now", {}),
    ]
    for call in reversed(calls):
        result = {"weather": weather, "now": now}[call.function.name](**call.function.arguments)
        messages.append({"role": "tool", "content": result, "tool_name": call.function.name})
    assert client.chat(written, messages, tools=[weather, now]).message.content == "Oslo is cold."


def test_a_result_belongs_to_the_call_that_it_names() -> None:
    """By its id, else by the function's name, else by its place; calls without ids have some made for them."""
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g", "f")]
    results = [{"tool_name": "g"}, {"tool_name": "f"}, {}, {"tool_name": "h"}]
    written = [
        {"role": "assistant", "tool_calls": calls},
        *({"role": "tool", "content": "", **each} for each in results),
    ]
    said, *told = plain_messages([OllamaTurn.model_validate(message) for message in written])
    first, second, third = [call["id"] for call in said["tool_calls"]]
    assert all(len(made) == 9 and made.isalnum() for made in (first, second, third))
    assert [message["tool_call_id"] for message in told] == [second, first, third, ""]
    call = {"id": "x", **calls[0]}
    written = [
        {"role": "assistant", "tool_calls": [*calls, call]},
        {"role": "tool", "content": "", "tool_call_id": "x"},
    ]
    assert plain_messages([OllamaTurn.model_validate(message) for message in written])[1]["tool_call_id"] == "x"


def test_a_choice_of_tools_is_honoured(server: Server, model: str, written: str) -> None:
    """Some clients of Ollama send OpenAI's field."""
    parameters = {
        "type": "object",
        "properties": {"a": {"enum": [1]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    functions = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("f", "g")]
    body: dict[str, Any] = {"model": model, "messages": HI, "tools": functions}
    body["options"] = {"num_predict": 60, "temperature": 0}
    for choice, wanted in (
        ("required", {"f", "g"}),
        ({"type": "function", "name": "g"}, {"g"}),
        ({"type": "function", "function": {"name": "f"}}, {"f"}),
    ):
        [call, *_] = whole(server, "chat", **body, tool_choice=choice)["message"]["tool_calls"]
        assert call["function"]["name"] in wanted
        assert call["function"]["arguments"] == {"a": 1}
    answer = post(server, "chat", **{**body, "model": written}, tool_choice="auto", stream=False)
    assert "tool_calls" in answer.json()["message"]
    assert "tool_choice" in answer.headers[IGNORED]
    none = whole(server, "chat", **{**body, "model": written}, tool_choice="none")
    assert none["message"] == {"role": "assistant", "content": "Good morning."}
    refused(post(server, "chat", **body, tool_choice={"type": "function", "name": "h"}), 400, "tool_choice")
    refused(post(server, "chat", model=model, messages=HI, tool_choice="required"), 400, "tool_choice")


def test_a_call_that_is_cut_off_is_told_as_text(server: Server, written: str) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    cut = whole(server, "chat", model=written, messages=HI, tools=tools, options={"num_predict": 4, "temperature": 0})
    assert cut["done_reason"] == "length"
    assert "tool_calls" not in cut["message"]
    assert "weather" in cut["message"]["content"]


def test_what_a_program_replays_never_ends_a_conversation(server: Server, written: str) -> None:
    """Ids, dates and nulls of other servers are dropped, and named."""
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": {}, "index": 0, "extra": 1}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "thinking": "hm", "images": None, "tool_calls": [call], "date": 1},
        {"role": "tool", "content": "y", "tool_call_id": "x", "name": "f"},
        {"role": "tool", "content": "z", "tool_name": "unknown"},
    ]
    answer = post(server, "chat", model=written, messages=messages, stream=False)
    assert answer.json()["message"]["content"] == "Oslo is cold."
    assert set(answer.headers[IGNORED].split(", ")) == {"messages.extra", "messages.date"}


# Options --------------------------------------------------------------------------------------------------------------


def test_every_option_of_the_client_is_known() -> None:
    assert set(ollama.Options.model_fields) <= set(OPTIONS)
    assert set(OPTIONS) == OptionsBody.known_names()


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"num_predict": 7.0}, {"max_new_tokens": 7}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_p": 0}, {"top_k": 1}),
        ({"top_p": 2.0}, {"top_p": 1.0}),
        ({"typical_p": 0.5}, {"typical_p": 0.5}),
        ({"seed": 2**63 - 1}, {"seed": 255}),
        ({"stop": "a"}, {"stop_strings": "a"}),
        ({"stop": ["a", "", "b"]}, {"stop_strings": ["a", "b"]}),
        ({"stop": ""}, {}),
        ({"repeat_penalty": 1.2, "min_p": 0.1}, {"repetition_penalty": 1.2, "min_p": 0.1}),
        ({"temperature": None}, {}),
    ],
)
def test_an_option_is_a_parameter_of_another_name(given: dict[str, Any], asked: dict[str, Any]) -> None:
    assert Wanted.of(OptionsBody.model_validate(given)).asked == asked


def test_no_limit_is_one_even_where_one_is_registered(server: Server, model: str) -> None:
    """And a seed below 0 is a random one."""
    body = {"model": model, "messages": HI}
    assert whole(server, "chat", **body)["eval_count"] == 5
    for none in (-1, -2, 0):
        assert whole(server, "chat", **body, options={"num_predict": none, "temperature": 0})["eval_count"] > 5
    texts = {whole(server, "chat", **body, options={"seed": seed})["message"]["content"] for seed in (3, 3)}
    assert len(texts) == 1
    texts = {whole(server, "chat", **body, options={"seed": -1})["message"]["content"] for _ in range(8)}
    assert len(texts) > 1


def test_options_change_the_answer_as_they_say(server: Server, model: str) -> None:
    body = {"model": model, "messages": HI}

    def text(**options: Any) -> str:
        return str(whole(server, "chat", **body, options={**GREEDY, **options})["message"]["content"])

    greedy = text()
    assert text(temperature=5.0, top_k=1) == greedy
    assert text(temperature=5.0, top_p=0) == greedy
    assert text(stop=greedy[5:8]) == greedy[: greedy.index(greedy[5:8])]
    assert text(repeat_penalty=5.0) != greedy
    assert text(repeat_penalty=5.0, repeat_last_n=0) == greedy
    assert text(repeat_penalty=5.0, repeat_last_n=-1) == text(repeat_penalty=5.0)
    assert text(repeat_penalty=5.0, repeat_last_n=4096) == text(repeat_penalty=5.0)


def test_an_option_may_stand_beside_the_options(server: Server, model: str) -> None:
    """Where some clients of Ollama put them; a null there, or nothing, changes nothing."""
    body = {"model": model, "messages": HI, "stream": False}
    wanted = whole(server, "chat", model=model, messages=HI, options={"temperature": 0, "num_predict": 7})
    for beside in ({"max_output_tokens": 7}, {"num_predict": 7}, {"max_tokens": 7, "top_p": None, "options": None}):
        answer = post(server, "chat", **body, temperature=0, **beside).json()
        assert answer["message"] == wanted["message"]
        assert answer["eval_count"] == 7
    answer = post(server, "chat", **body, num_predict=3, options={"num_predict": 7, "temperature": 0})
    assert answer.json()["message"] == wanted["message"]
    assert answer.headers[IGNORED] == "num_predict"
    refused(post(server, "chat", **body, temperature="hot"), 400, "options.temperature")
    refused(post(server, "chat", **body, options=[1], temperature=0), 400, "temperature")


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_an_option_is_honoured_or_named_or_refused(server: Server, model: str, name: str) -> None:
    """None is taken in silence."""
    option = OPTIONS[name]
    value: Any = {"num_ctx": 512, "repeat_last_n": -1, "stop": "x"}.get(name, True if option.kind is bool else 1)
    values = list(option.so_anyway) or [value]
    for each in values:
        answer = post(server, "chat", model=model, messages=HI, options={**GREEDY, name: each}, stream=False)
        assert answer.status_code == 200, answer.text
        named = f"options.{name}" in answer.headers.get(IGNORED, "")
        assert named is (option.asks is None)
    if option.so_anyway:
        wrong: Any = not option.so_anyway[0] if option.kind is bool else 2
        refused(post(server, "chat", model=model, messages=HI, options={name: wrong}), 400, f"options.{name}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temprature": 1}, ("Unknown field: options.temprature", "Did you mean options.temperature?")),
        ({"num_ctx": 3}, ("options.num_ctx", "24 tokens")),
        ({"temperature": "hot"}, ("options.temperature", "number")),
        ({"temperature": -1}, ("options.temperature",)),
        ({"presence_penalty": 3}, ("options.presence_penalty",)),
        ({"num_predict": 1.5}, ("options.num_predict", "whole number")),
        ({"num_predict": True}, ("options.num_predict", "whole number")),
        ({"stop": [1]}, ("options.stop",)),
    ],
)
def test_an_option_that_cannot_be_honoured_is_named(
    server: Server, model: str, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(post(server, "chat", model=model, messages=HI, options=options), 400, *words)


@pytest.mark.parametrize(
    ("written_as", "seconds"),
    [
        *((0, 0.0), (90, 90.0), (0.5, 0.5), (-1, -1.0), (-0.5, -1.0), (10**12, -1.0), ("5m", 300.0), ("1h30m", 5400.0)),
        *(("-1", -1.0), ("0", 0.0), ("300", 300.0), ("-5m", -1.0), ("1.5h", 5400.0), (".5s", 0.5), ("100ms", 0.1)),
        *(("24h", 86400.0), ("999999h", -1.0)),
    ],
)
def test_a_duration_is_a_number_of_seconds_or_gos_text(written_as: float | str, seconds: float) -> None:
    assert seconds_of(written_as) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5x", "m", "5 m", "1h 30m", "five", "1e9h", "٣s", "1s" * 200])
def test_what_is_no_duration_is_refused(server: Server, model: str, text: str) -> None:
    with pytest.raises(ValueError, match="seconds"):
        seconds_of(text)
    refused(post(server, "chat", model=model, keep_alive=text), 400, "keep_alive")


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "body", "word"),
    [
        ("generate", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
        ("generate", {"prompt": "x", "context": [1, 2]}, "context"),
        ("generate", {"prompt": "x", "images": ["aa"]}, "images"),
        ("generate", {"prompt": "x", "raw": True, "system": "y"}, "system"),
        ("generate", {"prompt": "x", "nonsense": 1}, "nonsense"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aa"]}]}, "messages.0.images"),
        ("chat", {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ("chat", {"messages": [*HI], "shift": True}, "shift"),
        ("chat", {"messages": [*HI], "top_logprobs": 3}, "top_logprobs"),
        ("chat", {"messages": "hi"}, "messages"),
        ("chat", {"messages": [*HI], "think": "very"}, "think"),
        ("embed", {"input": [1]}, "input"),
        ("embed", {"input": "x", "dimensions": 9999}, "dimensions"),
        ("show", {"model": "", "name": None}, "model"),
        ("pull", {"model": "../x"}, "model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(
    server: Server, model: str, route: str, body: dict[str, Any], word: str
) -> None:
    refused(post(server, route, **{"model": model, **body}), 400, word)


def test_what_is_empty_asks_for_nothing(server: Server, model: str) -> None:
    """Ollama's clients send every field."""
    empty = {"suffix": "", "template": "", "context": [], "images": [], "system": "", "format": "", "raw": False}
    more = {"think": None, "keep_alive": None, "logprobs": False, "top_logprobs": 0, "truncate": True, "shift": False}
    answer = post(server, "generate", model=model, prompt="x", options=GREEDY, stream=False, **empty, **more)
    assert answer.json()["eval_count"] == 12
    assert answer.headers[IGNORED] == "truncate"
    messages = [{"role": "user", "content": "x", "images": [], "tool_calls": []}]
    assert whole(server, "chat", model=model, messages=messages, tools=[], format="", options={})["done"]


@pytest.mark.parametrize("route", ["chat", "generate"])
def test_a_model_that_writes_nothing_says_so(server: Server, embedder: str, route: str) -> None:
    ask = {"messages": HI} if route == "chat" else {"prompt": "x"}
    refused(post(server, route, model=embedder, **ask), 400, embedder, "cannot")
    body = {"model": embedder, "messages": HI}
    assert requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE).status_code == 400


@pytest.mark.parametrize(
    ("data", "status", "word"),
    [
        (b"{", 400, "JSON"),
        (b"[]", 400, "object"),
        (b"", 400, "model"),
        (b"\xff", 400, "UTF-8"),
        (b"x" * 17 * 2**20, 413, ""),
    ],
    ids=["broken", "list", "nothing", "no text", "large"],
)
def test_a_body_that_is_none_has_ollamas_shape(server: Server, data: bytes, status: int, word: str) -> None:
    for route in ("chat", "generate", "pull"):
        refused(requests.post(f"{server.url}/api/{route}", data=data, timeout=PATIENCE), status, word)


def test_a_body_needs_no_media_type(server: Server, model: str) -> None:
    """Ollama's own examples send curl's default, a form's; pages of other origins are refused by their origin."""
    body = json.dumps({"model": model, "messages": HI, "stream": False, "options": GREEDY})
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    address = f"{server.url}/api/chat"
    assert requests.post(address, data=body, headers=form, timeout=PATIENCE).status_code == 200
    assert requests.post(address, data=body, headers={}, timeout=PATIENCE).status_code == 200
    foreign = {**form, "Origin": "https://elsewhere.example"}
    refused(requests.post(address, data=body, headers=foreign, timeout=PATIENCE), 403)
    assert server.call("POST", "/generate", data=body, headers=form).status_code == 415


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("POST", "create", 400), ("POST", "copy", 400), ("POST", "push", 400), ("POST", "blobs/sha256:00", 400)),
        *(("GET", "blobs/sha256:00", 400), ("POST", "nonsense", 404), ("GET", "chat", 405)),
    ],
)
def test_what_is_not_served_says_what_to_use_instead(server: Server, method: str, path: str, status: int) -> None:
    body = None if method == "GET" else b'{"model": "x"}'
    answer = requests.request(method, f"{server.url}/api/{path}", data=body, timeout=PATIENCE)
    refused(answer, status, "huggingface" if path[:4] in ("crea", "copy", "blob") else "")


def test_a_stream_that_is_given_up_ends_in_an_error(server: Server, client: ollama.Client, model: str) -> None:
    body = {
        "model": model,
        "messages": HI,
        "options": {"num_predict": 480, "temperature": 1.0, "stop": "nothing at all"},
    }
    body["options"] |= {"seed": 1}
    with requests.post(f"{server.url}/api/chat", json=body, stream=True, timeout=PATIENCE) as answer:
        lines = answer.iter_lines()
        assert "message" in json.loads(next(lines))
        gone = server.call("DELETE", f"/requests/{answer.headers['X-Local-LLM-Request-Id']}").status_code
        last = json.loads(list(lines)[-1])
    assert (gone == 200 and list(last) == ["error"]) or last["done"]  # it may have ended before
    with requests.post(f"{server.url}/api/chat", json=body, stream=True, timeout=PATIENCE) as answer:
        next(answer.iter_lines())
    until(lambda: server.call("GET", "/requests").json()["count"] == 0)
    assert client.chat(model, HI, options=GREEDY).done


# Vectors --------------------------------------------------------------------------------------------------------------


def test_vectors_have_the_length_one(client: ollama.Client, server: Server, embedder: str) -> None:
    body = {"model": embedder, "input": ["the cat", "a dog"]}
    given = requests.post(f"{server.url}/v1/embeddings", json=body, timeout=PATIENCE).json()
    answer = client.embed(embedder, ["the cat", "a dog"])
    assert answer.prompt_eval_count == given["usage"]["prompt_tokens"]
    for vector, known in zip(answer.embeddings, given["data"], strict=True):
        length = math.hypot(*known["embedding"])
        assert vector == pytest.approx([value / length for value in known["embedding"]], abs=1e-6)
    [short] = client.embed(embedder, "the cat", dimensions=4).embeddings
    assert math.hypot(*short) == pytest.approx(1)
    first = answer.embeddings[0][:4]
    assert short == pytest.approx([value / math.hypot(*first) for value in first], abs=1e-6)
    older = client.embeddings(embedder, "the cat").embedding
    assert older == pytest.approx(given["data"][0]["embedding"], abs=1e-6)


def test_texts_are_cut_unless_that_is_refused(server: Server, embedder: str) -> None:
    long = "the cat " * 2000
    assert len(post(server, "embed", model=embedder, input=long).json()["embeddings"]) == 1
    refused(post(server, "embed", model=embedder, input=long, truncate=False), 400, "input")
    refused(post(server, "embed", model=embedder, input="the cat", options={"num_ctx": 1}), 400, "options.num_ctx")
    answer = post(server, "embed", model=embedder, input="the cat", options={"num_ctx": 512, "temperature": 1})
    assert set(answer.headers[IGNORED].split(", ")) == {"options.num_ctx", "options.temperature"}
    for nothing in ("", []):
        assert post(server, "embed", model=embedder, input=nothing).json()["embeddings"] == []
    assert post(server, "embeddings", model=embedder, prompt="").json() == {"embedding": []}


# Other clients, and bringing models -----------------------------------------------------------------------------------


def test_the_asynchronous_client(server: Server, model: str, embedder: str) -> None:
    async def use() -> tuple[Any, ...]:
        async with ollama.AsyncClient(host=server.url) as client:
            return await ask(client)

    async def ask(client: ollama.AsyncClient) -> tuple[Any, ...]:
        said = await client.chat(model, HI, options=GREEDY)
        pieces = [line.message.content async for line in await client.chat(model, HI, options=GREEDY, stream=True)]
        text = await client.generate(model, HI[0]["content"], options=GREEDY)
        vectors = await client.embed(embedder, ["a", "b"])
        listed, shown, loaded = await client.list(), await client.show(model), await client.ps()
        return said, pieces, text, vectors, listed, shown, loaded

    said, pieces, text, vectors, listed, shown, loaded = asyncio.run(use())
    assert "".join(pieces) == said.message.content == text.response
    assert len(vectors.embeddings) == 2
    assert model in [each.model for each in listed.models]
    assert model in [each.model for each in loaded.models]
    assert shown.capabilities == ["completion"]


def test_the_client_raises_its_own_errors(client: ollama.Client, model: str) -> None:
    with pytest.raises(ollama.ResponseError, match="model 'nope' not found") as caught:
        client.chat("nope", HI)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match=r"options\.mirostat") as caught:
        list(client.chat(model, HI, options={"mirostat": 2}, stream=True))
    assert caught.value.status_code == 400


@pytest.fixture
def place(tmp_path: Path, models_dir: Path) -> Iterator[Place]:
    """A Hub, and servers that know it alone."""
    place = Place(tmp_path, models_dir)
    with place.hub:
        yield place
    for server in place.servers:
        server.stop()


def publish(place: Place, model_id: str, size: int = 3 * 2**20) -> Repository:
    """A tiny model with some more bytes among its weights, so that its download takes a while."""
    repository = place.publish(model_id, "llama")
    weights = repository.folder / "model.safetensors"
    noise = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    save_file({**load_file(weights), "noise": noise}, weights, metadata={"format": "pt"})
    return repository


def test_a_model_is_pulled_used_and_deleted(place: Place) -> None:
    publish(place, "org/little").rate["model.safetensors"] = 4 * 2**20
    server = place.serve()
    with ollama.Client(host=server.url) as client:
        lines = list(client.pull("hf.co/org/little", stream=True))
        told = [line.status for line in (lines[0], *lines[-2:])]
        assert told == ["pulling manifest", "writing manifest", "success"]
        moving = [line for line in lines if line.digest is not None]
        assert moving
        assert all(line.digest == moving[0].digest and line.status == f"pulling {line.digest[7:19]}" for line in moving)
        assert moving[-1].total == moving[-1].completed
        done = [line.completed or 0 for line in moving]
        assert done == sorted(done)
        record = server.call("GET", "/models/org/little").json()["model"]
        assert record["model_type"] == "conversational"
        assert record["details"]["source"] == "cache"
        assert client.chat("org/little", HI, options=GREEDY).eval_count == 12
        assert client.pull("org/little").status == "success"  # it is here
        assert len(client.list().models) == 1
        assert client.delete("hf.co/org/little:latest").status == "success"
        assert list(client.list().models) == list(client.ps().models) == []
        assert place.cached("org/little").is_dir()
        with pytest.raises(ollama.ResponseError) as caught:
            client.show("org/little")
        assert caught.value.status_code == 404


def test_a_pull_that_fails_registers_nothing(place: Place) -> None:
    place.publish("org/gated", "llama").gated = True
    place.publish("org/little", "llama")
    with ollama.Client(host=place.serve().url) as client:
        for model_id in ("org/none", "org/gated"):
            with pytest.raises(ollama.ResponseError, match=model_id):
                client.pull(model_id)
            with pytest.raises(ollama.ResponseError, match=model_id):
                list(client.pull(model_id, stream=True))
        with pytest.raises(ollama.ResponseError, match="Q4_K_M"):
            client.pull("hf.co/org/little:Q4_K_M")
        assert list(client.list().models) == []


def test_a_quantization_names_the_file_that_is_pulled(place: Place) -> None:
    """A repository of GGUF files is pulled by the tag that Ollama's names have; without one, by Ollama's default."""
    folder = place.publish("org/gguf", "llama").folder
    for path in folder.iterdir():
        path.unlink()
    for name in ("little-Q8_0.gguf", "little-Q4_K_M.gguf"):
        writer = gguf.GGUFWriter(folder / name, "llama")
        writer.add_context_length(512)
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
    server = place.serve()
    with ollama.Client(host=server.url) as client:
        with pytest.raises(ollama.ResponseError, match=r"little-Q4_K_M\.gguf, little-Q8_0\.gguf"):
            client.pull("hf.co/org/gguf:Q2_K")
        client.pull("hf.co/org/gguf:q8_0")
        assert server.call("GET", "/models/org/gguf").json()["model"]["gguf_file"] == "little-Q8_0.gguf"
        shown = client.show("hf.co/org/gguf:Q8_0")
        assert shown.details is not None
        assert shown.details.format == "gguf"
        with pytest.raises(ollama.ResponseError, match="not found"):
            client.show("hf.co/org/gguf:Q4_K_M")
        with pytest.raises(ollama.ResponseError, match=r"little-Q8_0\.gguf"):
            client.pull("hf.co/org/gguf:Q4_K_M")
        client.delete("org/gguf")
        client.pull("hf.co/org/gguf")
        assert server.call("GET", "/models/org/gguf").json()["model"]["gguf_file"] == "little-Q4_K_M.gguf"


def test_a_quantization_names_a_file_in_parts(place: Place) -> None:
    """All of its parts are pulled, and the size is that of all."""
    folder = place.publish("org/parts", "llama").folder
    for path in folder.iterdir():
        path.unlink()
    model, tokenizer = build("llama")
    write_gguf(folder / "little-Q8_0.gguf", model, tokenizer, "llama", quantize="Q8_0")
    paths = write_gguf(folder / "little-Q4_K_M.gguf", model, tokenizer, "llama", quantize="Q4_0", part=11)
    server = place.serve()
    with ollama.Client(host=server.url) as client:
        with pytest.raises(ollama.ResponseError, match=r"are little-Q4_K_M-00001-of-00002\.gguf, little-Q8_0\.gguf"):
            client.pull("hf.co/org/parts:Q2_K")
        client.pull("hf.co/org/parts:Q4_K_M")
        assert server.call("GET", "/models/org/parts").json()["model"]["gguf_file"] == paths[0].name
        [listed] = client.list().models
        assert listed.size == sum(path.stat().st_size for path in paths)
        shown = client.show("hf.co/org/parts:Q4_K_M")
        assert shown.details is not None
        assert (shown.details.format, shown.details.quantization_level) == ("gguf", "Q4_0")
        assert shown.modelinfo is not None
        assert shown.modelinfo["llama.context_length"] == 512
        assert client.generate("org/parts", "The cat", options={"num_predict": 4}).response


def test_a_client_that_leaves_ends_its_pull_and_the_next_goes_on(place: Place) -> None:
    repository = publish(place, "org/slow", 8 * 2**20)
    repository.rate["model.safetensors"] = 2**20
    server = place.serve()
    body = {"model": "org/slow"}
    with requests.post(f"{server.url}/api/pull", json=body, stream=True, timeout=PATIENCE) as answer:
        for line in answer.iter_lines():
            if json.loads(line).get("completed", 0) > 2**20:
                break
    server.add("org/slow", "conversational")  # so that its download is shown
    shown = partial(server.call, "GET", "/models/org/slow/download")
    until(lambda: shown().json().get("download", {}).get("phase") == "cancelled")
    repository.rate.clear()
    answer = requests.post(f"{server.url}/api/pull", json={**body, "stream": False}, timeout=PATIENCE)
    assert answer.json() == {"status": "success"}
    starts = [each.start for each in place.hub.bodies_of("org/slow", "model.safetensors")]
    assert starts[-1] > 0, starts
