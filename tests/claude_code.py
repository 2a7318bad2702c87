"""The request bodies of Claude Code 2.1, written afresh and short: what it sends when asked to read a file.

Fields, their order and their kinds are its own; texts, tools and schemas are fewer and shorter. It knows no server.
"""

from __future__ import annotations

from typing import Any

QUERY = "?beta=true"
HEADERS = {
    "User-Agent": "claude-cli/2.1.197 (external, sdk-cli)",
    "X-Stainless-Lang": "js",
    "X-Stainless-Retry-Count": "0",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    "anthropic-dangerous-direct-browser-access": "true",
    "anthropic-version": "2023-06-01",
    "x-api-key": "none",
    "x-app": "cli",
}
CACHED = {"cache_control": {"type": "ephemeral"}}
BILLING = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.5b8; cc_entrypoint=sdk-cli;"}
METADATA = {"user_id": '{"device_id":"0","account_uuid":"","session_id":"1"}'}
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def _text(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def _tool(name: str, description: str, required: list[str], **properties: Any) -> dict[str, Any]:
    schema = {"$schema": DRAFT, "type": "object", "properties": properties, "required": required}
    return {"name": name, "description": description, "input_schema": {**schema, "additionalProperties": False}}


TOOLS = [
    _tool(
        "Bash",
        "Executes a command.",
        ["command"],
        command={"description": "The command", "type": "string"},
        timeout={"description": "In milliseconds", "type": "number"},
        run_in_background={"type": "boolean"},
    ),
    _tool("Read", "Reads a file.", ["file_path"], file_path={"type": "string", "enum": ["/notes.txt"]}),
    _tool(
        "TaskUpdate",
        "Changes a task.",
        ["taskId"],
        taskId={"type": "string"},
        status={
            "anyOf": [{"type": "string", "enum": ["pending", "completed"]}, {"type": "string", "const": "deleted"}]
        },
        metadata={"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}},
    ),
]


def title(model: str) -> dict[str, Any]:
    """The first request: a name for the session."""
    shape = {"type": "object", "properties": {"title": {"type": "string", "maxLength": 20}}, "required": ["title"]}
    return {
        "model": model,
        "messages": [{"role": "user", "content": [_text("<session>\nRead notes.txt\n</session>\n\nWrite the title.")]}],
        "system": [BILLING, _text("You are a Claude agent."), _text("Generate a concise title.")],
        "tools": [],
        "metadata": METADATA,
        "max_tokens": 32000,
        "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": shape}},
        "stream": True,
    }


def turn(model: str, *replayed: dict[str, Any]) -> dict[str, Any]:
    """A request of the session itself: the first one, or those after it with what has been `replayed` since."""
    asked = _text("Read notes.txt and tell me what it says", **({} if replayed else CACHED))
    reminder = _text("<system-reminder>\nToday's date is 2026-11-30.\n</system-reminder>\n")
    return {
        "model": model,
        "messages": [
            {"role": "user", "content": [reminder, asked]},
            {"role": "system", "content": "Available agent types for the Agent tool:\n- claude: any task"},
            *replayed,
        ],
        "system": [BILLING, _text("You are a Claude agent.", **CACHED), _text("\nYou help users.", **CACHED)],
        "tools": TOOLS,
        "metadata": METADATA,
        "max_tokens": 32000,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }


def result(call: dict[str, Any], text: str) -> dict[str, Any]:
    """What Claude Code sends back of a tool that it ran."""
    block = {"tool_use_id": call["id"], "type": "tool_result", "content": text, **CACHED}
    return {"role": "user", "content": [block]}
