"""Tools together with a form of the text, and each family's calls, on a live server, whole and streamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from chat_families import FAMILIES, NAMES, PLAIN, Family, build
from conftest import Server
from transformers import AutoTokenizer

HI = [{"role": "user", "content": "where is the cat?"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
NOW = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": PARAMETERS, "now": NOW}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]
FLAT: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
CAT = {
    "type": "object",
    "properties": {"name": {"enum": ["now", "Tom"]}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "cat", "schema": CAT, "strict": True}}
TEXT: Any = {"format": {"type": "json_schema", "name": "cat", "schema": CAT, "strict": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """A live server of these tests' own, for their many models."""
    server = Server(tmp_path_factory.mktemp("server"), models_dir)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """OpenAI's client on the live server."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> str:
    """A tiny model whose template knows no tools."""
    model_id = build(models_dir, tiny, PLAIN)
    server.add(model_id, "text-generation")
    return model_id


@pytest.fixture
def model_of(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> Callable[[str], str]:
    """A tiny model of a family, registered."""

    def make(name: str) -> str:
        model_id = build(models_dir, tiny, FAMILIES[NAMES.index(name)])
        server.add(model_id, "text-generation")
        return model_id

    return make


Told = tuple[str, list[tuple[str, str]], str | None]


def whole(client: openai.OpenAI, **options: Any) -> Told:
    """What is said, which calls are made, and why the answer ended."""
    [choice] = client.chat.completions.create(messages=HI, **options).choices
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    return choice.message.content or "", calls, choice.finish_reason


def streamed(client: openai.OpenAI, **options: Any) -> Told:
    """The same of a stream."""
    said, calls, reason = "", list[tuple[str, str]](), None
    for event in client.chat.completions.create(messages=HI, stream=True, **options):
        [choice] = event.choices
        said += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for delta in choice.delta.tool_calls or ():
            if delta.index == len(calls):
                calls.append((delta.function.name, ""))
            calls[delta.index] = (calls[delta.index][0], calls[delta.index][1] + (delta.function.arguments or ""))
    return said, calls, reason


def check(told: Told, parallel: bool = True) -> None:
    """See that an answer is calls that fit their tools, or a text that fits its form, and not both."""
    said, calls, reason = told
    assert bool(said) != bool(calls)
    if parallel and reason == "length":  # a random model may call for ever
        calls, reason = calls[:-1], "tool_calls" if calls else None
    assert reason == ("stop" if said else "tool_calls")
    assert parallel or len(calls) < 2
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    if said:
        jsonschema.validate(json.loads(said), CAT)


def bias(family: Family, folder: Path) -> dict[str, int]:
    """What has a random model come to the end of its thoughts."""
    if not family.harmony:
        return {}
    vocabulary = {
        each["content"]: each["id"] for each in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    return {str(vocabulary["<|end|>"]): 100}


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_each_family_makes_the_call_that_must_be_made(
    family: Family, client: openai.OpenAI, model_of: Callable[[str], str], models_dir: Path
) -> None:
    """Read as one in the family's own form, with arguments that fit; the same whole and streamed."""
    model_id = model_of(family.name)
    options: dict[str, Any] = {"model": model_id, "tools": TOOLS, "max_tokens": 300, "temperature": 1.5}
    options["logit_bias"] = bias(family, models_dir / model_id)
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice, seed in (("required", 1), (named, 2)):
        options |= {"tool_choice": choice, "parallel_tool_calls": False, "seed": seed}
        told = whole(client, **options)
        check(told, parallel=False)
        assert [name for name, _ in told[1]] in (
            [["get_weather"], ["now"]] if choice == "required" else [["get_weather"]]
        )
        assert streamed(client, **options) == told


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3.5", "gpt-oss", "llama3", "mistral-small", None])
def test_an_answer_is_a_call_or_a_text_of_the_form_as_the_model_chooses(
    name: str | None, client: openai.OpenAI, model_of: Callable[[str], str], model: str, models_dir: Path
) -> None:
    """None is a model whose template knows no tools."""
    model_id = model if name is None else model_of(name)
    options: dict[str, Any] = {"model": model_id, "tools": TOOLS, "response_format": FORM, "max_tokens": 300}
    if name is not None:
        options["logit_bias"] = bias(FAMILIES[NAMES.index(name)], models_dir / model_id)
    for seed in range(3):
        for parallel in (True, False):
            options |= {"seed": seed, "temperature": 2.0, "parallel_tool_calls": parallel}
            told = whole(client, **options)
            check(told, parallel)
            assert streamed(client, **options) == told
    called = whole(client, tool_choice="required", **options)
    assert called[1]
    check(called)
    named = whole(client, tool_choice={"type": "function", "function": {"name": "now"}}, **options)
    assert {each for each, _ in named[1]} == {"now"}
    said = whole(client, tool_choice="none", **options)
    assert said[0]
    check(said)


def test_the_model_chooses(client: openai.OpenAI, model_of: Callable[[str], str], models_dir: Path) -> None:
    """What it finds likely decides: a bias for the first token of either brings it about."""
    model_id = model_of("qwen3.5")
    tokenizer = AutoTokenizer.from_pretrained(models_dir / model_id)
    [call, text] = tokenizer.convert_tokens_to_ids(["<tool_call>", "{"])
    options: dict[str, Any] = {"model": model_id, "tools": TOOLS, "response_format": FORM, "max_tokens": 300}
    said, calls, _ = whole(client, logit_bias={str(call): 100, str(text): -100}, **options)
    assert not said
    assert calls
    said, calls, _ = whole(client, logit_bias={str(call): -100, str(text): 100}, **options)
    assert said
    assert not calls


def test_a_response_is_a_call_or_a_text_of_the_form(
    client: openai.OpenAI, model_of: Callable[[str], str], model: str
) -> None:
    for model_id in (model_of("glm4.5"), model):
        for choice in ("auto", "auto", "auto", "required", "none"):
            options: dict[str, Any] = {
                "model": model_id,
                "input": "cat?",
                "tools": FLAT,
                "text": TEXT,
                "temperature": 2.0,
            }
            options |= {"tool_choice": choice, "max_output_tokens": 300, "extra_body": {"top_k": 0}}
            response = client.responses.create(**options)
            assert response.status == "completed"
            kinds = {item.type for item in response.output}
            assert kinds in ({"function_call"}, {"message"})
            assert choice == "auto" or kinds == ({"function_call"} if choice == "required" else {"message"})
            for item in response.output:
                if item.type == "function_call":
                    jsonschema.validate(json.loads(item.arguments), SCHEMAS[item.name])
            if response.output_text:
                jsonschema.validate(json.loads(response.output_text), CAT)
            with client.responses.stream(**options) as events:
                kinds = {event.type for event in events}
                assert ("response.output_text.delta" in kinds) != ("response.function_call_arguments.delta" in kinds)
                assert "response.completed" in kinds


class Cat(pydantic.BaseModel):
    """What an answer is parsed into."""

    name: Literal["now", "Tom"]
    age: Literal[1, 2, 3]


class Weather(pydantic.BaseModel):
    """Arguments of a tool."""

    city: Literal["Oslo", "Rome"]


def test_openais_client_parses_the_one_or_the_other(client: openai.OpenAI, model: str) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    options: dict[str, Any] = {
        "model": model,
        "messages": HI,
        "tools": tools,
        "response_format": Cat,
        "temperature": 2.0,
    }
    options["parallel_tool_calls"] = False
    for seed in range(4):
        message = client.chat.completions.parse(seed=seed, max_tokens=300, **options).choices[0].message
        if message.tool_calls:
            assert isinstance(message.tool_calls[0].function.parsed_arguments, Weather)
        else:
            assert isinstance(message.parsed, Cat)
    flat = [{"type": "function", "strict": True, **tool["function"]} for tool in tools]
    response = client.responses.parse(model=model, input="cat?", tools=flat, text_format=Cat, max_output_tokens=600)
    assert isinstance(response.output_parsed, Cat) or response.output[0].type == "function_call"


def test_a_form_that_cannot_be_is_refused_beside_tools_by_its_name(server: Server, model: str) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "nonsense"}}}
    body: dict[str, Any] = {"model": model, "messages": HI, "tools": TOOLS, "response_format": bad}
    for stream in (False, True):
        answer = server.call("POST", "/../../v1/chat/completions", json={**body, "stream": stream})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


def test_arguments_that_cannot_be_held_to_their_schema_are_refused_by_name(
    server: Server, model_of: Callable[[str], str]
) -> None:
    parameters = {"type": "object", "properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {"model": model_of("qwen3.5"), "messages": HI, "tools": [tool], "tool_choice": "required"}
    answer = server.call("POST", "/../../v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    assert "anyOf" in answer.json()["error"]["message"]


class Labels(pydantic.BaseModel):
    """Arguments of a tool: sets, and unions of which one branch is beyond what texts can be held to."""

    labels: Annotated[set[Annotated[str, pydantic.Field(pattern="^[ab]$")]], pydantic.Field(min_length=2, max_length=2)]
    pairs: Annotated[list[set[Annotated[int, pydantic.Field(ge=1, le=3)]]], pydantic.Field(min_length=2, max_length=2)]
    code: Annotated[str, pydantic.Field(json_schema_extra={"pattern": "a(?!b)c"})] | Literal[7, 8]
    word: Annotated[str, pydantic.Field(json_schema_extra={"pattern": "a(?!b)c"})] | Literal["x", "yz"]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3.5", "llama4", "gpt-oss", None])
def test_arguments_are_sets_where_their_schema_says_so(
    name: str | None, client: openai.OpenAI, model_of: Callable[[str], str], model: str, models_dir: Path
) -> None:
    """As pydantic writes such a schema; of a union those branches count that a text can be held to."""
    model_id = model if name is None else model_of(name)
    schema = Labels.model_json_schema()
    schema["properties"]["pairs"]["items"] |= {"minItems": 2, "maxItems": 3}  # a random model would write the empty one
    tool: Any = {"type": "function", "function": {"name": "label", "parameters": schema}}
    options: dict[str, Any] = {"model": model_id, "tools": [tool], "max_tokens": 400, "temperature": 2.0}
    options["logit_bias"] = {} if name is None else bias(FAMILIES[NAMES.index(name)], models_dir / model_id)
    for seed in range(2):
        told = whole(client, tool_choice="required", parallel_tool_calls=False, seed=seed, **options)
        [(called, arguments)] = told[1]
        assert (called, told[2]) == ("label", "tool_calls")
        jsonschema.validate(json.loads(arguments), schema)
        labels = Labels.model_validate_json(arguments)
        assert (labels.code in (7, 8), labels.word in ("x", "yz")) == (True, True)


def test_a_history_of_calls_goes_through_each_familys_template(
    client: openai.OpenAI, model_of: Callable[[str], str]
) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "noon"}
    for family in FAMILIES:
        said = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
        answer = client.chat.completions.create(model=model_of(family.name), messages=said, tools=TOOLS, max_tokens=2)
        assert answer.usage.prompt_tokens > 20


def test_an_answer_is_read_by_what_its_tokenizer_says_of_answers(
    server: Server, client: openai.OpenAI, models_dir: Path, tiny: Callable[[str], str]
) -> None:
    """A `response_template` of a form that this server does not know; the model's own words are the call."""
    folder = models_dir / "families" / "described"
    if not folder.exists():
        shutil.copytree(models_dir / tiny("llama"), folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        call = {"type": "function", "function": {"name": "now", "arguments": {"said": "{content}"}}}
        fields = {"tool_calls": {"open_pattern": ".", "close_pattern": "(?<=..)", "repeats": True, "transform": call}}
        settings["response_template"] = {"start_anchor": "assistant:", "fields": {**fields, "content": {}}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").write_text("{{ tools }}{{ messages }}assistant:")
    server.add("families/described", "text-generation")
    options: dict[str, Any] = {"model": "families/described", "tools": TOOLS, "max_tokens": 12, "temperature": 0}
    told = whole(client, **options)
    assert told[1]
    assert streamed(client, **options)[:2] == told[:2]
