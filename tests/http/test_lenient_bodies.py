"""What a body may hold besides its protocol's words: each field is honoured, ignored and named, or refused by name.

One table of fields by routes, on a live server; what is replayed of a conversation; and what other servers say
otherwise.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from conftest import PATIENCE, Server
from embedding_models import build_embedding
from flask import Flask

from huggingface.api.http.fields import init_ignored, note_ignored

HEADER = "X-Local-LLM-Ignored"
HI = [{"role": "user", "content": "where is the cat?"}]
CAT = {"type": "object", "properties": {"cat": {"type": "boolean"}}, "required": ["cat"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "now"}}
# The least that each route needs, greedy and short.
LEAST: dict[str, dict[str, Any]] = {
    "chat": {"messages": HI, "temperature": 0, "max_tokens": 12},
    "completions": {"prompt": "the cat", "temperature": 0, "max_tokens": 12},
    "responses": {"input": "where is the cat?", "temperature": 0, "max_output_tokens": 12},
}
PATHS = {"chat": "chat/completions", "completions": "completions", "responses": "responses"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """A live server of these tests' own."""
    server = Server(tmp_path_factory.mktemp("server"), models_dir)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def model(server: Server, tiny: Callable[[str], str]) -> str:
    """A tiny model that chats."""
    model_id = tiny("llama")
    server.add(model_id, "text-generation")
    return model_id


@pytest.fixture(scope="module")
def templated(server: Server, models_dir: Path, model: str) -> Callable[[str, str], str]:
    """The same model with another chat template, by a name."""

    def make(name: str, template: str) -> str:
        folder = models_dir / "tiny" / name
        if not folder.exists():
            shutil.copytree(models_dir / model, folder)
            (folder / "chat_template.jinja").write_text(template)
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            settings.pop("chat_template", None)
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        server.add(f"tiny/{name}", "text-generation")
        return f"tiny/{name}"

    return make


PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def thinker(templated: Callable[[str, str], str]) -> str:
    """A model that thinks, whatever is asked."""
    return templated("thinker", PLAIN + "{# </think> #}")


def ask(server: Server, model: str, route: str, **fields: Any) -> requests.Response:
    """A request to one of the three routes that make text."""
    body = {"model": model, **LEAST[route], **fields}
    body = {name: value for name, value in body.items() if value is not ...}
    return requests.post(f"{server.url}/v1/{PATHS[route]}", json=body, timeout=PATIENCE)


def text_of(answer: requests.Response) -> str:
    """The text of an answer, whichever route it is of."""
    assert answer.status_code == 200, answer.text
    told = answer.json()
    if "output" in told:
        return "".join(part["text"] for item in told["output"] for part in item.get("content", ()))
    choice = told["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def made(answer: requests.Response) -> int:
    """How many tokens an answer has."""
    usage = answer.json()["usage"]
    return int(usage.get("completion_tokens", usage.get("output_tokens")))


def ignored(answer: requests.Response) -> set[str]:
    """The fields that the answer's header names."""
    return set(filter(None, answer.headers.get(HEADER, "").split(", ")))


# What makes no difference ---------------------------------------------------------------------------------------------

ALL = ("chat", "completions", "responses")
IGNORED: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    *(
        (ALL, {name: value}, name)
        for name, value in {
            "user": "me",
            "safety_identifier": "me",
            "prompt_cache_key": "k",
            "prompt_cache_retention": "24h",
            "service_tier": "flex",
            "store": True,
            "verbosity": "low",
            "client_metadata": {"a": "b"},
            "cache_prompt": True,
            "timings_per_token": True,
            "priority": 3,
            "skip_special_tokens": True,
            "use_beam_search": False,
            "prediction": {"type": "content", "content": "a"},
            "reasoning_format": "auto",
            "n_probs": 0,
            "mirostat": 0,
            "mirostat_tau": 5.0,
            "dynatemp_range": 0.0,
            "dynatemp_exponent": 1,
            "xtc_probability": 0,
            "xtc_threshold": 0.1,
            "dry_multiplier": 0.0,
            "dry_base": 1.75,
            "dry_penalty_last_n": -1,
            "top_a": 0,
            "tfs_z": 1.0,
            "id_slot": -1,
        }.items()
    ),
    (("chat", "completions"), {"metadata": {"a": "b"}}, "metadata"),
    (("chat", "completions", "responses"), {"stream_options": {"include_usage": True}}, "stream_options"),
    (("chat",), {"echo": False}, "echo"),
    (("chat",), {"best_of": 1}, "best_of"),
    (("chat",), {"modalities": ["text"]}, "modalities"),
    (("chat", "responses"), {"parallel_tool_calls": True}, "parallel_tool_calls"),
    (("chat", "responses"), {"parallel_tool_calls": False, "tools": []}, "parallel_tool_calls"),
    (("chat", "responses"), {"tool_choice": "auto", "tools": []}, "tool_choice"),
    (("chat", "responses"), {"tool_choice": "none"}, "tool_choice"),
    *((("chat",), {"reasoning_effort": effort}, "reasoning_effort") for effort in ("none", "minimal", "low", "high")),
    (("chat", "responses"), {"reasoning": {"effort": "none"}}, "reasoning.effort"),
    (("chat", "responses"), {"reasoning": {"effort": "high"}}, "reasoning.effort"),
    (("chat", "responses"), {"enable_thinking": False}, "enable_thinking"),
    (("chat",), {"think": False}, "think"),
    (("chat",), {"thinking": {"type": "disabled"}}, "thinking.type"),
    (
        ("chat", "responses"),
        {"chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs.enable_thinking",
    ),
    (ALL, {"truncation": "auto"}, "truncation"),
    (ALL, {"truncation": "disabled"}, "truncation"),
    (("chat",), {"function_call": "auto"}, "function_call"),
    (("chat",), {"function_call": "none"}, "function_call"),
    (("responses",), {"max_tool_calls": 3}, "max_tool_calls"),
    (("responses",), {"text": {"verbosity": "high"}}, "text.verbosity"),
    (("responses",), {"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    (("responses",), {"include": ["reasoning.encrypted_content"]}, "include.reasoning.encrypted_content"),
]


@pytest.mark.parametrize(("routes", "fields", "named"), IGNORED, ids=[named for _, _, named in IGNORED])
def test_what_makes_no_difference_is_taken_and_named(
    routes: tuple[str, ...], fields: dict[str, Any], named: str, server: Server, model: str
) -> None:
    for route in routes:
        plain, answer = ask(server, model, route), ask(server, model, route, **fields)
        assert text_of(answer) == text_of(plain)
        assert ignored(answer) == {named}
        assert HEADER not in plain.headers
        streamed = ask(server, model, route, **fields, stream=True)
        assert streamed.status_code == 200
        assert named in ignored(streamed) or named == "stream_options"


def test_what_is_stored_is_told_and_what_is_said_of_metadata_is_told_back(server: Server, model: str) -> None:
    told = ask(server, model, "responses", store=True, metadata={"a": "b"}, truncation="auto")
    assert (told.json()["store"], told.json()["metadata"], told.json()["truncation"]) == (False, {"a": "b"}, "disabled")
    assert ignored(told) == {"store", "truncation"}


EMPTY: dict[str, list[dict[str, Any]]] = {
    "chat": [{"stop": ""}, {"stop": []}, {"stop": [""]}, {"functions": []}, {"logit_bias": {}}, {"tools": []}],
    "completions": [{"stop": ""}, {"stop": []}, {"stop": [""]}, {"suffix": ""}, {"logit_bias": {}}],
    "responses": [{"tools": []}, {"include": []}],
}


@pytest.mark.parametrize("route", ALL)
def test_what_is_empty_is_left_out_and_so_is_what_is_null(route: str, server: Server, model: str) -> None:
    plain = text_of(ask(server, model, route))
    for fields in EMPTY[route]:
        assert text_of(ask(server, model, route, **fields)) == plain, fields
    nothing = ask(server, model, route, nonsense=None, guided_json=None, min_tokens=None, client_metadata=None)
    assert text_of(nothing) == plain
    assert not ignored(nothing)


# Said otherwise elsewhere ---------------------------------------------------------------------------------------------


def test_objects_that_are_empty_may_be_written_as_lists(server: Server, model: str) -> None:
    """PHP's clients write them so; and a chat has no suffix."""
    for fields in ({"logit_bias": []}, {"metadata": []}, {"suffix": ""}):
        assert text_of(ask(server, model, "chat", **fields)) == text_of(ask(server, model, "chat"))
    assert ask(server, model, "responses", metadata=[]).json()["metadata"] == {}


def test_limits_by_other_names(server: Server, model: str) -> None:
    for route in ALL:
        limit = "max_output_tokens" if route == "responses" else "max_tokens"
        for name in (limit, "n_predict", "num_predict"):
            assert made(ask(server, model, route, **{limit: ..., name: 3})) == 3
        for same in ({"n_predict": 3, limit: 3}, {"num_predict": 3.0, limit: ...}, {limit: 3.0}):
            assert made(ask(server, model, route, **same)) == 3
        refused = ask(server, model, route, **{limit: 3, "n_predict": 4})
        assert refused.json()["error"]["param"] == "n_predict"
        for wrong in ("3", 3.5, True, -7):
            assert ask(server, model, route, **{limit: wrong}).json()["error"]["param"] == limit


def test_minus_one_is_no_limit_even_where_one_is_registered(server: Server, model: str) -> None:
    """As many tokens as there is room for."""
    server.call("PUT", f"/models/{model}", json={"parameters": {"max_new_tokens": 2}})
    try:
        for route in ALL:
            limit = "max_output_tokens" if route == "responses" else "max_tokens"
            assert made(ask(server, model, route, **{limit: ...})) == 2
            for name in (limit, "n_predict", "num_predict"):
                answer = ask(server, model, route, **{limit: ..., name: -1}, ignore_eos=True)
                assert made(answer) > 300, (route, name)
    finally:
        server.call("PUT", f"/models/{model}", json={"parameters": {}})


def test_the_end_of_the_text_is_moved(server: Server, model: str, models_dir: Path) -> None:
    """`stop_token_ids` are ends besides the model's own, `ignore_eos` takes these away, `min_tokens` comes before."""
    ends = list(range(20, 268))
    for route in ALL:
        assert made(ask(server, model, route, stop_token_ids=ends)) < 12
        own = ask(server, model, route, eos_token_id=ends)
        assert made(ask(server, model, route, eos_token_id=ends, ignore_eos=False)) == made(own) < 12
        assert made(ask(server, model, route, eos_token_id=ends, ignore_eos=True)) == 12
        both = ask(server, model, route, eos_token_id=[5], stop_token_ids=ends, ignore_eos=True)
        assert made(both) == made(own)
        assert made(ask(server, model, route, stop_token_ids=ends, min_tokens=8)) >= 8
        refused = ask(server, model, route, stop_token_ids=[10**6])
        assert refused.json()["error"]["param"] == "stop_token_ids"
        assert ask(server, model, route, min_tokens=20).json()["error"]["param"] == "min_tokens"
    body = {"model_id": model, "prompt": "the cat", "do_sample": False, "max_new_tokens": 12, "eos_token_id": ends}
    native = server.call("POST", "/generate", json={**body, "ignore_eos": True}).json()
    assert (native["usage"]["completion_tokens"], native["finish_reason"]) == (12, "length")
    alone = server.call("POST", "/generate", json={**body, "ignore_eos": True, "num_beams": 2}).json()
    assert alone["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("route", ALL)
def test_drawing_by_other_names(route: str, server: Server, model: str) -> None:
    plain = text_of(ask(server, model, route))
    drawn: dict[str, Any] = {"temperature": 5.0, "min_new_tokens": 12}
    assert text_of(ask(server, model, route, temperature=5.0, top_p=0)) == plain, "the likeliest token alone"
    assert text_of(ask(server, model, route, temperature=5.0, top_p=0, top_k=50)) == plain
    assert text_of(ask(server, model, route, **drawn, top_k=-1)) != plain
    penalized = text_of(ask(server, model, route, repeat_penalty=5.0))
    assert penalized == text_of(ask(server, model, route, repetition_penalty=5.0)) != plain
    refused = ask(server, model, route, repeat_penalty=5.0, repetition_penalty=2.0)
    assert refused.json()["error"]["param"] == "repeat_penalty"
    assert ask(server, model, route, repeat_penalty=0).json()["error"]["param"] == "repeat_penalty"


def test_llama_cpps_word_for_typical_p_is_that(server: Server, model: str) -> None:
    drawn = {"temperature": 2.0, "seed": 7}
    named = [text_of(ask(server, model, "chat", **drawn, **{name: 0.05})) for name in ("typ_p", "typical_p")]
    assert named[0] == named[1] != text_of(ask(server, model, "chat", **drawn))
    assert ask(server, model, "chat", typ_p=0).json()["error"]["param"] == "typ_p"
    assert ask(server, model, "chat", mirostat=2).json()["error"]["param"] == "mirostat"


def test_seeds_of_any_size(server: Server, model: str) -> None:
    for route in ("chat", "completions"):
        for seed in (2**63, 2**64 - 1, -5, 10**40, 1e30):
            one = text_of(ask(server, model, route, temperature=3.0, seed=seed))
            assert one == text_of(ask(server, model, route, temperature=3.0, seed=seed))


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"guided_json": CAT}, "json"),
    ({"guided_json": json.dumps(CAT)}, "json"),
    ({"structured_outputs": {"json": CAT}}, "json"),
    ({"json_schema": CAT}, "json"),
    ({"response_format": {"type": "json_object", "schema": CAT}}, "json"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": CAT}}}, "json"),
    ({"guided_regex": "[0-9]{3}"}, "digits"),
    ({"structured_outputs": {"regex": "[0-9]{3}"}}, "digits"),
    ({"response_format": {"type": "regex", "pattern": "[0-9]{3}"}}, "digits"),
    ({"guided_choice": ["yes", "no"]}, "choice"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice"),
    ({"guided_grammar": 'root ::= "yes" | "no"'}, "choice"),
    ({"grammar": 'root ::= "yes" | "no"'}, "choice"),
    ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, "choice"),
    ({"response_format": {"type": "grammar", "grammar": 'start: "yes" | "no"'}}, "choice"),
]


@pytest.mark.parametrize(("fields", "kind"), FORMS, ids=[str(fields)[:60] for fields, _ in FORMS])
def test_forms_by_other_names(fields: dict[str, Any], kind: str, server: Server, model: str) -> None:
    for route in ALL:
        if route == "responses" and "response_format" in fields:
            continue
        limit = "max_output_tokens" if route == "responses" else "max_tokens"
        text = text_of(ask(server, model, route, **fields, **{limit: 60}))
        if kind == "json":
            assert isinstance(json.loads(text)["cat"], bool)
        else:
            assert text in ("yes", "no") if kind == "choice" else text.isdigit()


@pytest.mark.parametrize("route", ALL)
def test_forms_that_are_none_or_two_are_refused_by_the_name_sent(route: str, server: Server, model: str) -> None:
    bad = {"not": {"minLength": 2}}
    for fields, named in (
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": bad}, "guided_json"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"grammar": "root ::= ((("}, "grammar"),
        ({"guided_grammar": "nonsense"}, "guided_grammar"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"json": CAT, "nonsense": 1}}, "structured_outputs.nonsense"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"stop": {}} if route != "responses" else {"structured_outputs": []}, ...),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ):
        answer = ask(server, model, route, **fields)
        named = next(iter(fields)) if named is ... else named
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, named), (fields, answer.text)


def test_any_form_may_be_asked_of_a_model_that_thinks_first(
    server: Server, templated: Callable[[str, str], str]
) -> None:
    """GBNF too, which becomes a part of the grammar of thought and text."""
    thinks = templated("thinks-first", PLAIN + "<think>\n{# </think> #}")
    for fields in (
        {"guided_regex": "[0-9]{3}"},
        {"response_format": {"type": "regex", "pattern": "a"}},
        {"guided_grammar": 'root ::= "yes" | "no"'},
        {"guided_json": CAT},
    ):
        answer = ask(server, thinks, "chat", **fields, max_tokens=20)
        assert answer.status_code == 200, (fields, answer.text)
        assert answer.json()["choices"][0]["message"]["reasoning_content"], fields
    for grammar in ("root ::= missing", 'a ::= "b"', "root ::= (", "root ::= ["):
        for model in (thinks, templated("thinks-not", PLAIN)):
            wrong = ask(server, model, "chat", guided_grammar=grammar)
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "guided_grammar"), wrong.text


def test_counts_come_with_every_piece_where_a_benchmark_asks(server: Server, model: str) -> None:
    """The bodies of guidellm, and of `vllm bench serve`."""
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for route, fields in (
        ("chat", {"max_tokens": ..., "max_completion_tokens": 12, "ignore_eos": True}),
        ("completions", {"ignore_eos": True, "stop": None, "repetition_penalty": 1.0, "logprobs": None}),
    ):
        answer = ask(server, model, route, **options, **fields)
        assert answer.status_code == 200, answer.text
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        told = [json.loads(line)["usage"] for line in lines]
        counts = [usage["completion_tokens"] for usage in told]
        assert counts[-1] == 12
        assert counts == sorted(counts)
        assert len(set(counts)) > 4
        assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in told)
        assert len({usage["prompt_tokens"] for usage in told[1:]}) == 1
    plain = ask(server, model, "chat", stream=True, stream_options={"include_usage": True})
    assert plain.text.count('"usage":null') > 3


def test_what_follows_the_last_message_can_be_said(server: Server, templated: Callable[[str, str], str]) -> None:
    said = templated(
        "turns",
        "{% for message in messages %}{{ message.role }}: {{ message.content }}.\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: the cat is in the house{% endif %}",
    )
    begun = [*HI, {"role": "assistant", "content": "the cat"}]

    def tokens(messages: list[Any], **fields: Any) -> int:
        answer = ask(server, said, "chat", messages=messages, **fields)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    assert tokens(HI, add_generation_prompt=False) < tokens(HI) == tokens(HI, add_generation_prompt=True)
    assert tokens(begun, continue_final_message=True) == tokens(begun)
    assert tokens(begun) < tokens(begun, add_generation_prompt=False) < tokens(begun, add_generation_prompt=True)
    assert tokens(begun, continue_final_message=False) == tokens(begun, add_generation_prompt=True)
    both = ask(server, said, "chat", continue_final_message=True, add_generation_prompt=True)
    assert both.json()["error"]["param"] == "continue_final_message"


def test_thinking_is_switched_where_the_template_can(server: Server, templated: Callable[[str, str], str]) -> None:
    able = templated(
        "switched", PLAIN + "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{# </think> #}"
    )
    unsaid = ask(server, able, "chat").json()["usage"]["prompt_tokens"]
    told = set()
    for fields in (
        {"enable_thinking": False},
        {"think": False},
        {"thinking": {"type": "disabled"}},
        {"reasoning": {"enabled": False}},
        {"reasoning_effort": "none"},
        {"reasoning": {"effort": "minimal"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        answer = ask(server, able, "chat", **fields)
        assert not ignored(answer)
        told.add(answer.json()["usage"]["prompt_tokens"])
    assert len(told) == 1
    assert told != {unsaid}
    contrary = ask(server, able, "chat", think=True, enable_thinking=False)
    assert contrary.json()["error"]["param"] == "think"


def test_what_is_said_twice_of_thinking_has_to_agree(server: Server, templated: Callable[[str, str], str]) -> None:
    able = templated("switched", PLAIN + "{% if enable_thinking %}yes{% endif %}{# </think> #}")
    for fields, named in (
        ({"reasoning_effort": "none", "enable_thinking": True}, "reasoning_effort"),
        ({"reasoning_effort": "high", "think": False}, "reasoning_effort"),
        ({"reasoning": {"effort": "low", "enabled": False}}, "reasoning.effort"),
        ({"chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": True}, "enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}, "reasoning_effort"),
    ):
        answer = ask(server, able, "chat", **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, named), answer.text
    agreed = ask(server, able, "chat", reasoning_effort="high", enable_thinking=True)
    assert ignored(agreed) == {"reasoning_effort"}
    twice = ask(server, able, "chat", chat_template_kwargs={"enable_thinking": False}, enable_thinking=False)
    assert twice.status_code == 200


def test_a_model_that_always_thinks_is_not_told_in_vain_not_to(server: Server, thinker: str) -> None:
    for fields, named in (
        ({"reasoning_effort": "none"}, "reasoning_effort"),
        ({"reasoning": {"effort": "none"}}, "reasoning.effort"),
        ({"enable_thinking": False}, "enable_thinking"),
        ({"think": False}, "think"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
    ):
        answer = ask(server, thinker, "chat", **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, named), answer.text
    assert ignored(ask(server, thinker, "chat", reasoning_effort="high")) == {"reasoning_effort"}
    assert ignored(ask(server, thinker, "chat", enable_thinking=True)) == {"enable_thinking"}


KEPT: list[tuple[Any, float | None]] = [
    *(("5m", 300), ("1h30m", 5400), ("300ms", 0.3), ("0", 0), ("0s", 0), ("1.5s", 1.5), ("-1s", None), ("-1m", None)),
    *((300, 300), (300.0, 300), (-1, None), ("2562047h47m16.854775807s", None)),
]


def test_how_long_a_model_stays_may_be_said_as_ollama_says_it(server: Server, tiny: Callable[[str], str]) -> None:
    """On every route that takes it, and for what is registered."""
    other = tiny("gpt2")
    server.add(other, "text-generation")
    for value, seconds in KEPT:
        kept = server.call("PUT", f"/models/{other}", json={"keep_alive": value}).json()["model"]["keep_alive"]
        assert kept == pytest.approx(-1 if seconds is None else seconds), value
    for route in ("completions",):
        assert ask(server, other, route, keep_alive="5m").status_code == 200
    native = {"model_id": other, "prompt": "a", "max_new_tokens": 1, "keep_alive": "5m"}
    assert server.call("POST", "/generate", json=native).status_code == 200
    assert server.call("POST", f"/models/{other}/load", json={"keep_alive": "5m"}).status_code == 200
    task = {"model_id": other, "task": "text-generation", "inputs": "a", "max_new_tokens": 1, "keep_alive": "5m"}
    assert server.call("POST", "/pipeline", json=task).status_code == 200
    for wrong in ("5", "5 m", "m", "", "5x", "1h-5m", "-", "1" * 200 + "s", -2, -0.5, True, "٣s"):
        refused = ask(server, other, "completions", keep_alive=wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "keep_alive"), wrong


# Embeddings -----------------------------------------------------------------------------------------------------------


def test_what_embedding_services_say_otherwise(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> None:
    prompted, plain = build_embedding(models_dir, tiny, "prompts"), tiny("bert-embed")
    for model_id in (prompted, plain):
        server.add(model_id, "feature-extraction")

    def embed(model_id: str, **fields: Any) -> requests.Response:
        body = {"model": model_id, "input": "the cat", **fields}
        return requests.post(f"{server.url}/v1/embeddings", json=body, timeout=PATIENCE)

    def vector(answer: requests.Response) -> Any:
        assert answer.status_code == 200, answer.text
        return answer.json()["data"][0]["embedding"]

    for cut in ("END", "NONE", "end", True, False):
        assert vector(embed(plain, truncate=cut)) == vector(embed(plain))
    long = "the cat sat on the mat " * 200
    assert embed(plain, input=long, truncate="NONE").status_code == 400
    assert embed(plain, input=long, truncate="END").status_code == 200
    assert embed(plain, truncate="START").json()["error"]["param"] == "truncate"
    named = embed(prompted, input_type="query")
    assert vector(named) == pytest.approx(vector(embed(prompted, prompt_name="query")))
    assert vector(named) != pytest.approx(vector(embed(plain)))
    assert not ignored(named)
    assert ignored(embed(plain, input_type="query", user="me")) == {"input_type", "user"}
    assert embed(prompted, input_type="nonsense").json()["error"]["param"] == "input_type"


# Unknown parameters ---------------------------------------------------------------------------------------------------


def test_an_unknown_parameter_is_refused_with_the_nearest_name_unless_the_server_takes_them(
    server: Server, model: str, start_server: Callable[..., Server], tiny: Callable[[str], str]
) -> None:
    lenient = start_server(LOCAL_LLM_UNKNOWN_PARAMETERS="ignore")
    classifier = tiny("distilbert-sst2")
    for each in (server, lenient):
        each.add(model, "text-generation")
        each.add(classifier, "text-classification")
    bodies: list[tuple[str, dict[str, Any], str, str | None]] = [
        ("/v1/chat/completions", {"model": model, **LEAST["chat"], "temprature": 1}, "temprature", "temperature"),
        ("/v1/completions", {"model": model, **LEAST["completions"], "max_token": 1}, "max_token", "max_tokens"),
        ("/v1/responses", {"model": model, **LEAST["responses"], "instruction": "a"}, "instruction", "instructions"),
        ("/v1/responses", {"model": model, **LEAST["responses"], "max_tokens": 3}, "max_tokens", "max_output_tokens"),
        ("/v1/embeddings", {"model": model, "input": "a", "dimension": 3}, "dimension", "dimensions"),
        (
            "/api/huggingface/generate",
            {"model_id": model, "prompt": "a", "max_new_tokens": 1, "max_new_token": 1},
            "max_new_token",
            "max_new_tokens",
        ),
        (
            "/api/huggingface/pipeline",
            {"model_id": classifier, "task": "text-classification", "inputs": "a", "topk": 1},
            "topk",
            "top_k",
        ),
        (
            f"/api/huggingface/models/{classifier}",
            {"inputs": "a", "parameters": {"topk": 1}},
            "parameters.topk",
            "top_k",
        ),
        (f"/api/huggingface/models/{classifier}", {"inputs": "a", "nonsense": 1}, "nonsense", None),
        (
            f"/api/huggingface/models/{model}",
            {"inputs": "a", "parameters": {"max_new_tokens": 1, "nonsense": 1}},
            "parameters.nonsense",
            None,
        ),
    ]
    for path, body, named, meant in bodies:
        refused = requests.post(server.url + path, json=body, timeout=PATIENCE)
        assert refused.status_code == 400, (path, refused.text)
        assert f"Unknown field: {named}." in refused.text
        assert meant is None or f"Did you mean {meant}?" in refused.text
        taken = requests.post(lenient.url + path, json=body, timeout=PATIENCE)
        assert taken.status_code == 200 or path == "/v1/embeddings", (path, taken.text)
        assert ignored(taken) == {named}


def test_a_request_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    app = Flask(__name__)
    init_ignored(app, "refuse")

    @app.get("/")
    def view() -> str:
        note_ignored(*(f"name{number}" for number in range(100_000)))
        return ""

    with caplog.at_level("INFO", logger="huggingface.api.http.fields"):
        answer = app.test_client().get("/")
    [line] = caplog.messages
    assert len(line) < 1000
    assert len(answer.headers[HEADER]) < 1000


def test_what_is_kept_holds_no_unknown_name_however_the_server_is_set(
    start_server: Callable[..., Server], tiny: Callable[[str], str]
) -> None:
    """Nor does what acts on the server: a misspelt filter would clear everything."""
    lenient, model_id = start_server(LOCAL_LLM_UNKNOWN_PARAMETERS="ignore"), tiny("bert-mlm")
    new = {"model_id": model_id, "name": "a", "model_type": "fill-mask"}
    for body in (
        {**new, "nonsense": 1},
        {**new, "parameters": {"nonsense": 1}},
        {**new, "parameters": {"tokenizer_kwargs": {"nonsense": 1}}},
    ):
        refused = lenient.call("POST", "/models", json=body)
        assert (refused.status_code, "nonsense" in refused.text) == (400, True)
    kept = lenient.call("POST", "/models", json={**new, "parameters": {"top_k": 3.0, "targets": None}, "slots": None})
    assert kept.json()["model"]["parameters"] == {"top_k": 3}
    for method, path, arguments in (
        ("PUT", f"/models/{model_id}", {"json": {"nonsense": 1}}),
        ("PUT", f"/models/{model_id}", {"json": {"parameters": {"nonsense": 1}}}),
        ("POST", f"/models/{model_id}/load", {"json": {"nonsense": 1}}),
        ("DELETE", "/cache", {"params": {"model": model_id}}),
    ):
        assert lenient.call(method, path, **arguments).status_code == 400


def test_null_unsets_a_setting_and_leaves_other_fields_as_they_are(server: Server, tiny: Callable[[str], str]) -> None:
    model_id = tiny("distilbert-sst2")
    server.add(model_id, "text-classification", slots=3, description="kept")
    server.call("PUT", f"/models/{model_id}", json={"parameters": {"top_k": None}, "slots": 3})
    model = server.call("GET", f"/models/{model_id}").json()["model"]
    assert (model["parameters"], model["slots"]) == ({"top_k": None}, 3), "null is a value of this one: all labels"
    changed = server.call(
        "PUT", f"/models/{model_id}", json={"slots": None, "name": None, "parameters": None, "nonsense": None}
    ).json()["model"]
    assert "slots" not in changed
    assert (changed["name"], changed["parameters"]) == (model_id, {"top_k": None})
    task = {"model_id": model_id, "task": "text-classification", "inputs": "a", "function_to_apply": None, "x": None}
    assert len(server.call("POST", "/pipeline", json=task).json()["results"][0]) == 2
    server.call("PUT", f"/models/{model_id}", json={"parameters": {}})


def test_the_documented_route_takes_stop_as_well(server: Server, model: str) -> None:
    body = {"model_id": model, "prompt": "the cat", "do_sample": False, "max_new_tokens": 12}
    whole = server.call("POST", "/generate", json=body).json()["response"]
    stop = whole[4:6]
    for value in (stop, [stop], ["", stop]):
        made = server.call("POST", "/generate", json={**body, "stop": value}).json()
        assert made["response"] == whole[: whole.index(stop)]
        assert stop in made["parameters"]["stop_strings"]
    for value in ("", [], [""], None):
        assert server.call("POST", "/generate", json={**body, "stop": value}).json()["response"] == whole
    twice = server.call("POST", "/generate", json={**body, "stop": stop, "stop_strings": "x"})
    assert (twice.status_code, "'stop'" in twice.text) == (400, True)
    messages = [{**HI[0], "id": "a", "cache_control": {"type": "ephemeral"}}]
    chat = server.call("POST", "/generate", json={**body, "prompt": None, "messages": messages, "max_new_tokens": 3.0})
    assert chat.status_code == 200
    assert ignored(chat) == {"messages.id", "messages.cache_control"}


# Replayed history -----------------------------------------------------------------------------------------------------

CALL = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "noon"}
EPHEMERAL = {"type": "ephemeral"}
REPLAYED: list[tuple[list[dict[str, Any]], set[str]]] = [
    ([{**HI[0], "tool_calls": None, "tool_call_id": None, "name": None}], set()),
    ([{**HI[0], "cache_control": EPHEMERAL}], {"messages.cache_control"}),
    (
        [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": EPHEMERAL}]}],
        {"messages.cache_control"},
    ),
    ([{**HI[0], "id": "m1", "createdAt": "2026-01-01"}], {"messages.id", "messages.createdAt"}),
    ([{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], set()),
    (
        [
            *HI,
            {"role": "assistant", "content": "a", "annotations": [{"type": "url_citation"}], "audio": None},
            *HI,
        ],
        set(),
    ),
    (
        [
            *HI,
            {"role": "assistant", "content": "a", "provider_specific_fields": {}, "reasoning_details": [{}]},
            *HI,
        ],
        {"messages.provider_specific_fields", "messages.reasoning_details"},
    ),
    ([*HI, {"role": "assistant", "content": None}, *HI], set()),
    ([*HI, {"role": "assistant"}, *HI], set()),
    ([*HI, {"role": "assistant", "content": None, "tool_calls": []}, *HI], set()),
    ([*HI, {"role": "assistant", "content": "a", "tool_calls": None}, *HI], set()),
    ([*HI, {"role": "assistant", "tool_calls": [{**CALL, "extra_content": {}}]}, RESULT], {"messages.extra_content"}),
    ([*HI, {"role": "assistant", "tool_calls": [{"id": "a", "function": CALL["function"]}]}, RESULT], set()),
    (
        [*HI, {"role": "assistant", "tool_calls": [{"function": CALL["function"]}]}, {"role": "tool"}],
        set(),
    ),
    ([*HI, {"role": "assistant", "tool_calls": [CALL]}, {**RESULT, "content": None}], set()),
    (
        [
            *HI,
            {"role": "assistant", "content": None, "function_call": CALL["function"]},
            {"role": "function", "name": "now", "content": "noon"},
        ],
        set(),
    ),
    (
        [
            *HI,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "here"},
                ],
            },
            *HI,
        ],
        {"messages.signature", "messages.data"},
    ),
    ([*HI, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "n", "arguments": {}}}]}, RESULT], set()),
]


@pytest.mark.parametrize(("messages", "named"), REPLAYED, ids=range(len(REPLAYED)))
def test_replayed_history_never_ends_a_conversation(
    messages: list[Any], named: set[str], server: Server, model: str
) -> None:
    answer = ask(server, model, "chat", messages=messages)
    assert answer.status_code == 200, answer.text
    assert ignored(answer) == named


def test_pictures_stay_refused_by_name(server: Server, model: str) -> None:
    for part in ({"type": "image_url", "image_url": {"url": "data:"}}, {"type": "input_audio"}, {"type": "file"}):
        refused = ask(server, model, "chat", messages=[{"role": "user", "content": [part]}])
        assert refused.json()["error"]["param"] == "messages.0.content.0.type"
    picture = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]
    assert ask(server, model, "responses", input=picture).json()["error"]["param"] == "input.0.content.0.type"


SHOWN = (
    "{# tools #}{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}"
    "{% for call in message.tool_calls or [] %}[{% for key, value in call.function.arguments.items() %}{{ key }}"
    "{% endfor %}]{% endfor %}\n{% endfor %}assistant:"
)


def test_broken_calls_are_shown_as_the_text_that_they_are(server: Server, templated: Callable[[str, str], str]) -> None:
    """The template reads the arguments of calls as objects, and would fail over anything else."""
    shown = templated("shown", SHOWN)

    def tokens(*messages: dict[str, Any]) -> int:
        answer = ask(server, shown, "chat", messages=[*HI, *messages, *HI])
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    for written in ('{"city": "Os', "[1]", "now", '"x"', "null", "5", '{"a": NaN'):
        broken = {"id": "b", "function": {"name": "now", "arguments": written}}
        result = {"role": "tool", "tool_call_id": "b", "content": "error"}
        text = f'{{"name": "now", "arguments": {written}}}'
        same = ({"role": "assistant", "content": text}, {"role": "user", "content": "Result of now:\nerror"})
        assert tokens({"role": "assistant", "tool_calls": [broken]}, result) == tokens(*same)
        good = {"id": "g", "function": {"name": "now", "arguments": '{"city": 1}'}}
        assert tokens({"role": "assistant", "tool_calls": [broken, good]}, result) > tokens(*same)
        items = [
            *HI,
            {"type": "function_call", "call_id": "b", "name": "now", "arguments": written},
            {"type": "function_call_output", "call_id": "b", "output": "error"},
            *HI,
        ]
        answer = ask(server, shown, "responses", input=items)
        assert answer.json()["usage"]["input_tokens"] == tokens(*same)
    thought = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "here"}]
    same_thought = {"role": "assistant", "content": "here", "reasoning_content": "hm"}
    assert tokens({"role": "assistant", "content": thought}) == tokens(same_thought)


def test_what_is_nested_too_deeply_for_a_template_is_refused(
    server: Server, templated: Callable[[str, str], str]
) -> None:
    named = templated("shows-tools", "{{ tools | tojson }}" + PLAIN)
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "x": deep}}}
    answer = requests.post(
        f"{server.url}/v1/chat/completions", json={"model": named, "messages": HI, "tools": [tool]}, timeout=PATIENCE
    )
    assert answer.status_code == 400, answer.text


def test_tools_may_be_many_and_have_the_names_that_others_give_them(server: Server, model: str) -> None:
    name, long = "mcp:files/read", "x" * 128
    for route in ("chat", "responses"):
        limit = "max_output_tokens" if route == "responses" else "max_tokens"
        flat = route == "responses"

        def tool(each: str, flat: bool = flat) -> dict[str, Any]:
            inner = {"name": each}
            return {"type": "function", **(inner if flat else {"function": inner})}

        options = {limit: 300, "parallel_tool_calls": False}
        answer = ask(server, model, route, tools=[tool(name)], tool_choice=tool(name), **options)
        assert answer.status_code == 200, answer.text
        assert f'"name":"{name}"' in answer.text
        assert ask(server, model, route, tools=[tool(long)], **{limit: 1}).status_code == 200
        assert ask(server, model, route, tools=[tool(long + "x")]).status_code == 400
        many = ask(server, model, route, tools=[tool(f"f{number}") for number in range(129)], **{limit: 1})
        assert "tools" not in many.json().get("error", {"message": ""})["message"], "they are too long for it only"
        twice = ask(server, model, route, tools=[tool("now"), tool("now")])
        assert twice.json()["error"]["param"] == "tools"


def test_tools_are_functions_where_nothing_says_it_and_may_be_called_in_mistrals_word(
    server: Server, model: str
) -> None:
    tool = {"function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    for choice in ("required", "any"):
        answer = ask(server, model, "chat", tools=[tool], tool_choice=choice, max_tokens=200)
        assert answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "now", answer.text
    assert ask(server, model, "chat", tool_choice="any").json()["error"]["param"] == "tool_choice"


def test_openais_client_replays_what_it_got_with_the_notes_of_others(server: Server, model: str) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    first = client.chat.completions.create(model=model, messages=HI, max_tokens=5)  # type: ignore[arg-type]
    replayed = {**first.choices[0].message.model_dump(), "provider_specific_fields": {"x": 1}}
    raw = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[*HI, replayed, *HI],
        max_tokens=5,
        user="me",
    )
    assert raw.parse().choices
    assert raw.headers[HEADER] == "messages.provider_specific_fields, user"


# What is told ---------------------------------------------------------------------------------------------------------


def test_what_was_computed_already_is_told_and_so_is_what_was_thought(
    server: Server, model: str, templated: Callable[[str, str], str]
) -> None:
    said = [{"role": "user", "content": "a question that was never asked before, number two"}]
    first = ask(server, model, "chat", messages=said).json()["usage"]
    again = ask(server, model, "chat", messages=said).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens_details"]["cached_tokens"]
    assert again["prompt_tokens_details"]["cached_tokens"] == again["prompt_tokens"] - 1
    texts = ["another text that is new", "and a third one that is"]
    once = ask(server, model, "completions", prompt=texts, n=2, temperature=2.0).json()["usage"]
    twice = ask(server, model, "completions", prompt=texts, n=2, temperature=2.0).json()["usage"]
    assert once["prompt_tokens_details"]["cached_tokens"] < twice["prompt_tokens_details"]["cached_tokens"]
    assert twice["prompt_tokens_details"]["cached_tokens"] == twice["prompt_tokens"] - 2
    assert again["completion_tokens_details"] == {"reasoning_tokens": 0}
    thinks = templated("thinks-first", PLAIN + "<think>\n{# </think> #}")
    thought = ask(server, thinks, "chat").json()
    assert thought["choices"][0]["message"]["reasoning_content"]
    assert 0 < thought["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 12
    streamed = ask(server, thinks, "chat", stream=True, stream_options={"include_usage": True})
    last = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")][-1]
    assert last["usage"]["completion_tokens_details"] == thought["usage"]["completion_tokens_details"]


def test_models_tell_their_context_and_what_they_can(
    server: Server, model: str, tiny: Callable[[str], str], templated: Callable[[str, str], str]
) -> None:
    embedder, tooled = tiny("bert-embed"), templated("shown", SHOWN)
    server.add(embedder, "feature-extraction")
    listed = {each["id"]: each for each in requests.get(f"{server.url}/v1/models", timeout=PATIENCE).json()["data"]}
    shown = requests.get(f"{server.url}/v1/models/{model}", timeout=PATIENCE).json()
    assert shown == listed[model]
    context = server.call("GET", f"/models/{model}").json()["model"]["details"]["context_length"]
    assert shown["max_model_len"] == shown["context_length"] == shown["max_context_length"] == context == 512
    assert shown["meta"]["n_params"] > 1000
    assert (shown["type"], listed[embedder]["type"]) == ("llm", "embeddings")
    assert (shown["capabilities"]["completion_chat"], shown["capabilities"]["function_calling"]) == (True, False)
    assert listed[tooled]["capabilities"]["function_calling"] is True
    assert listed[embedder]["capabilities"]["embeddings"] is True
    assert listed[embedder]["capabilities"]["completion_chat"] is False
    server.call("PUT", f"/models/{model}", json={"max_context": 100})
    assert requests.get(f"{server.url}/v1/models/{model}", timeout=PATIENCE).json()["max_model_len"] == 100
    server.call("PUT", f"/models/{model}", json={"max_context": None})
