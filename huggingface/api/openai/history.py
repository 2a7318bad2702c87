"""Prepares the messages that a program sends back for chat templates, which need calls with objects as arguments.

A small model may have written arguments that are not JSON; the model sees them as its own text, so that the
conversation can go on. Calls and results without ids are matched by their order. Pure functions on chat messages; must
not know bodies or models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def readable(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with objects as their calls' arguments, and an id for each call and result. A turn that becomes the
    user's only here is marked `made`."""
    result: list[dict[str, Any]] = []
    called: dict[str, str] = {}  # names of the functions, by the calls' ids
    unanswered: list[str] = []
    as_text: set[str] = set()
    for message in messages:
        told = dict(message)
        calls = told.pop("tool_calls", None) or []
        good, broken = [], []
        for call in calls:
            name, written = call["function"]["name"], call["function"]["arguments"]
            call_id = call.get("id") or f"call_{len(called)}"
            called[call_id] = name
            unanswered.append(call_id)
            arguments = call_arguments(written)
            if arguments is None:
                as_text.add(call_id)
                broken.append(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {written}}}')
            else:
                function = {"name": name, "arguments": arguments}
                good.append({"id": call_id, "type": "function", "function": function})
        if good:
            told["tool_calls"] = good
        if broken:
            told["content"] = "\n".join(filter(None, [told.get("content"), *broken]))
        if told["role"] == "tool":
            told["tool_call_id"] = call_id = told.get("tool_call_id") or _answered(told.get("name"), called, unanswered)
            if call_id in unanswered:
                unanswered.remove(call_id)
            if call_id in as_text:
                told = {"role": "user", "content": f"Result of {called[call_id]}:\n{told['content']}", "made": True}
        result.append(told)
    return result


def call_arguments(written: Any) -> dict[str, Any] | None:
    """The arguments of a call that a client sends back; None where they are not a JSON object."""
    if isinstance(written, dict):
        return written
    try:
        value = json.loads(written or "{}")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _answered(name: str | None, called: Mapping[str, str], unanswered: Sequence[str]) -> str:
    """The id of the call that a result without an id answers: the function's first unanswered call."""
    return next((call for call in unanswered if name in (None, "", called[call])), "")
