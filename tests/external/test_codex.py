"""A whole turn of OpenAI's Codex CLI: its two requests, as it sends them, and what it reads of their answers.

The bodies are those of Codex 0.171 (`codex exec`, `wire_api = "responses"`), with shorter texts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import PATIENCE, Server

HEADER = "X-Local-LLM-Ignored"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """A live server of these tests' own."""
    server = Server(tmp_path_factory.mktemp("server"), models_dir)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def model(server: Server, models_dir: Path, tiny: Callable[[str], str]) -> str:
    """A tiny model with room for what Codex tells it."""
    folder = models_dir / "tiny/roomy"
    if not folder.exists():
        shutil.copytree(models_dir / tiny("llama"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    server.add("tiny/roomy", "text-generation")
    return "tiny/roomy"


def message(role: str, *texts: str) -> dict[str, Any]:
    """A message of a conversation, as Codex has it."""
    return {
        "type": "message",
        "id": f"msg_{role}",
        "role": role,
        "content": [{"type": "input_text", "text": text} for text in texts],
    }


SHELL = {
    "type": "function",
    "name": "exec_command",
    "description": "Runs a command.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {"cmd": {"type": "string", "maxLength": 12}},
        "required": ["cmd"],
        "additionalProperties": False,
    },
}
GOAL = {
    "type": "function",
    "name": "get_goal",
    "description": "The goal.",
    "strict": False,
    "parameters": {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
}
TOOLS: list[dict[str, Any]] = [
    SHELL,
    {"type": "namespace", "name": "multi_agent_v1", "description": "Agents.", "tools": [GOAL]},
    GOAL,
    {"type": "web_search", "external_web_access": True},
]
INPUT = [
    message("developer", "You are a coding agent."),
    message("developer", "<skills/>", "<permissions/>"),
    message("user", "<environment_context/>"),
    message("user", "say hi"),
]


def body(model: str, items: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """What Codex sends."""
    return {
        "model": model,
        "stream": True,
        "input": items,
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a229ed",
        "client_metadata": {"session_id": "01a229ed", "x-codex-turn-metadata": '{"request_kind":"turn"}'},
        **fields,
    }


def events_of(server: Server, asked: dict[str, Any]) -> tuple[list[dict[str, Any]], set[str]]:
    """The events of an answer, and what its header names."""
    answer = requests.post(f"{server.url}/v1/responses", json=asked, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines], set(answer.headers[HEADER].split(", "))


IGNORED = {
    *("client_metadata", "prompt_cache_key", "store", "reasoning.summary"),
    *("include.reasoning.encrypted_content", "tools.namespace", "tools.web_search"),
}


def test_a_turn_with_a_call_of_the_shell(server: Server, model: str) -> None:
    """The first request has a call made (Codex leaves that to the model), the second brings what it gave."""
    must = {"tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200, "temperature": 1.0}
    events, ignored = events_of(server, body(model, INPUT, **must))
    assert ignored == IGNORED
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    [done] = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert (done["type"], done["status"]) == ("function_call", "completed")
    assert isinstance(json.loads(done["arguments"]), dict)
    last = events[-1]
    assert last["type"] == "response.completed"
    assert [tool["name"] for tool in last["response"]["tools"]] == ["exec_command", "get_goal"], "those in effect"
    assert last["response"]["usage"]["total_tokens"] > 0
    call = {name: done[name] for name in ("type", "status", "id", "name", "arguments", "call_id")}
    gave = {
        "type": "function_call_output",
        "id": "fco_1",
        "call_id": done["call_id"],
        "output": "Exit 0\nOutput:\nhi\n",
    }
    second, ignored = events_of(server, body(model, [*INPUT, call, gave], max_output_tokens=8))
    assert ignored == IGNORED
    assert second[-1]["type"] in ("response.completed", "response.incomplete")
    read = [event["response"]["usage"]["input_tokens"] for event in (last, second[-1])]
    assert read[1] > read[0], "the model is shown the call and what it gave"


def test_what_other_models_left_in_a_session_does_not_end_it(server: Server, model: str) -> None:
    """A session that was begun with OpenAI's models has items of tools that there are none of here."""
    left: list[dict[str, Any]] = [
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "gAAAA"},
        {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": "*** Begin Patch"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "Done"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "a"}},
        {"type": "local_shell_call", "call_id": "c2", "status": "completed", "action": {"type": "exec"}},
        {"type": "compaction", "encrypted_content": "gAAAA"},
        {"type": "function_call", "call_id": "c3", "name": "spawn", "namespace": "agents", "arguments": '{"cut'},
        {"type": "function_call_output", "call_id": "c3", "output": "error"},
    ]
    events, ignored = events_of(server, body(model, [*INPUT, *left, message("user", "go on")], max_output_tokens=4))
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert ignored == IGNORED | {
        *("input.encrypted_content", "input.custom_tool_call", "input.custom_tool_call_output", "input.namespace"),
        *("input.web_search_call", "input.local_shell_call", "input.compaction"),
    }


def test_a_turn_without_tools_that_the_model_can_be_offered(server: Server, model: str) -> None:
    events, ignored = events_of(server, body(model, INPUT, tools=TOOLS[1::2], max_output_tokens=4))
    assert events[-1]["response"]["tools"] == []
    assert ignored == IGNORED | {"tool_choice", "parallel_tool_calls"}
    named = body(model, INPUT, tools=TOOLS, tool_choice={"type": "web_search"})
    refused = requests.post(f"{server.url}/v1/responses", json=named, timeout=PATIENCE)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice.name")
    stored = body(model, [{"type": "item_reference", "id": "msg_1"}])
    refused = requests.post(f"{server.url}/v1/responses", json=stored, timeout=PATIENCE)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input.0.type")
