"""Chat templates that have no system role or insist on turns: what the server itself adds to a chat fits into them.

The tools that it describes, and calls' results as the user's turns, merge into what stands beside them; what the client
sent is laid out as it is, or refused in the template's words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import changed_models
import pytest
from transformers import AutoTokenizer

from huggingface.chat.formats import describe_tools

API = "/api/huggingface"
_SAY = "{{ '[' + m['role'] + ']' + m['content'] + '\\n' }}"
_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
_TURNS = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
_ALL = "{% for m in messages %}" + _SAY + "{% endfor %}"
TEMPLATES = {
    "gemma": _SYSTEM + "{% for m in messages %}" + _TURNS + _SAY + "{% endfor %}",
    "mistral": "{% for m in messages %}" + _TURNS + _SAY + "{% endfor %}",
    "deaf": "{% for m in messages %}{% if m['role'] != 'system' %}" + _SAY + "{% endif %}{% endfor %}",
    "turns": "{% for m in messages if m['role'] != 'system' %}"
    + _TURNS
    + _SAY
    + "{% endfor %}"
    + "{% set s = messages[0] %}"
    "{% if s['role'] == 'system' %}{{ s['content'] }}{% endif %}",
    "open": _ALL,
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}},
}
TOLD = describe_tools([TOOL], "auto", answers=False)
USER = {"role": "user", "content": "hi"}
AGAIN = {"role": "user", "content": "and?"}


def call(number: int, arguments: str = "{}") -> dict[str, Any]:
    return {"id": f"c{number}", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def called(*numbers: int) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [call(number) for number in numbers]}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


WRITTEN = json.dumps([{"name": "weather", "arguments": {}}])
BOTH = json.dumps([{"name": "weather", "arguments": {}}] * 2)


@pytest.fixture
def ask(client: Any, models_dir: Path) -> Any:
    """Asks a model of one of the templates; and gives what it answers to a text, as the template should lay it out."""

    def made(name: str) -> str:
        model_id = f"tiny/template-{name}"
        if not (models_dir / model_id).exists():
            folder = changed_models.copy(models_dir, "llama", model_id)
            changed_models.edit(folder, "tokenizer_config.json", chat_template=TEMPLATES[name])
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        body = {"model_id": model_id, "name": "x", "model_type": "text-generation"}
        assert client.post(f"{API}/models", json=body).status_code in (200, 409)
        return model_id

    def asked(name: str, messages: list[Any], expected: str | None = None, **fields: Any) -> Any:
        model_id = made(name)
        body = {"model": model_id, "messages": messages, "max_tokens": 3, "temperature": 0, **fields}
        answer = client.post("/v1/chat/completions", json=body)
        if expected is None:
            return answer
        assert answer.status_code == 200, answer.get_json()
        ids = AutoTokenizer.from_pretrained(models_dir / model_id)(expected, add_special_tokens=False)["input_ids"]
        body = {"model": model_id, "prompt": ids, "max_tokens": 3, "temperature": 0}
        likely = client.post("/v1/completions", json=body).get_json()
        assert answer.get_json()["usage"]["prompt_tokens"] == likely["usage"]["prompt_tokens"]
        assert answer.get_json()["choices"][0]["message"]["content"] == likely["choices"][0]["text"]
        return answer

    return asked


def test_offered_tools_stand_before_the_users_words_where_the_template_has_no_system_role(ask: Any) -> None:
    """Where it refuses one, and where it would leave it out in silence."""
    for name in ("gemma", "mistral", "deaf"):
        ask(name, [USER], f"[user]{TOLD}\n\nhi\n", tools=[TOOL])
    ask("turns", [USER], f"[user]hi\n{TOLD}", tools=[TOOL])
    ask("open", [USER], f"[system]{TOLD}\n[user]hi\n", tools=[TOOL])


def test_results_of_several_calls_are_one_turn_where_the_template_insists_on_turns(ask: Any) -> None:
    """With what the user says after them, too."""
    results = "Result of weather:\nsun\n\nResult of weather:\nrain"
    chat = [USER, called(1, 2), result(1, "sun"), result(2, "rain")]
    for name in ("gemma", "mistral", "turns"):
        ask(name, chat, f"[user]hi\n[assistant]{BOTH}\n[user]{results}\n")
        ask(name, [*chat, AGAIN], f"[user]hi\n[assistant]{BOTH}\n[user]{results}\n\nand?\n")
    ask("mistral", chat, f"[user]{TOLD}\n\nhi\n[assistant]{BOTH}\n[user]{results}\n", tools=[TOOL])
    ask("turns", chat, f"[user]hi\n[assistant]{BOTH}\n[user]{results}\n{TOLD}", tools=[TOOL])
    apart = "[user]Result of weather:\nsun\n[user]Result of weather:\nrain\n"
    ask("open", chat, f"[user]hi\n[assistant]{BOTH}\n{apart}")
    ask(
        "gemma", [USER, called(1), result(1, "sun")], f"[user]hi\n[assistant]{WRITTEN}\n[user]Result of weather:\nsun\n"
    )


def test_results_of_broken_calls_merge_as_well(ask: Any) -> None:
    broken = {"role": "assistant", "content": None, "tool_calls": [call(1, "{"), call(2, "{")]}
    told = '{"name": "weather", "arguments": {}'
    results = "Result of weather:\nsun\n\nResult of weather:\nrain"
    chat = [USER, broken, result(1, "sun"), result(2, "rain")]
    ask("gemma", chat, f"[user]hi\n[assistant]{told}\n{told}\n[user]{results}\n")


def test_what_the_client_sent_is_refused_in_the_templates_words(ask: Any) -> None:
    """A system message of its own, and two turns of the user's, with tools and without."""
    for tools in ({}, {"tools": [TOOL]}):
        for name, messages, reason in (
            ("gemma", [{"role": "system", "content": "be brief"}, USER], "no system role"),
            ("gemma", [USER, AGAIN], "roles must alternate"),
            ("mistral", [USER, AGAIN], "roles must alternate"),
        ):
            answer = ask(name, messages, **tools)
            assert answer.status_code == 400
            assert reason in answer.get_json()["error"]["message"]
            assert answer.get_json()["error"]["param"] == "messages"


@pytest.mark.parametrize("path", ["/v1/messages", "/api/chat", "/v1/responses"])
def test_every_protocol_offers_tools_to_such_a_template(path: str, ask: Any, client: Any) -> None:
    ask("gemma", [USER], f"[user]{TOLD}\n\nhi\n", tools=[TOOL])
    schema = TOOL["function"]["parameters"]
    said: dict[str, Any] = {"messages": [USER], "tools": [TOOL], "max_tokens": 3, "stream": False}
    if path == "/v1/messages":
        said["tools"] = [{"name": "weather", "input_schema": schema}]
    if path == "/api/chat":
        del said["max_tokens"]
        said["options"] = {"num_predict": 3}
    if path == "/v1/responses":
        said = {"input": "hi", "tools": [{"type": "function", "name": "weather", "parameters": schema}]}
        said["max_output_tokens"] = 16
    answer = client.post(path, json={"model": "tiny/template-gemma", **said})
    assert answer.status_code == 200, answer.get_json()
