# /// script
# requires-python = ">=3.11"
# [tool.local-llm]
# node = ["opencode-ai@1.18.33"]
# environment = "opencode"
# ///
"""opencode with the Vercel AI SDK's provider for OpenAI-compatible servers: a task with a shell call."""

from __future__ import annotations

import json
from pathlib import Path

from _features import MODEL, TOLD, V1, command, feature, main, within

settings = {
    "$schema": "https://opencode.ai/config.json",
    "autoupdate": False,
    "share": "disabled",
    "model": f"local/{MODEL}",
    "small_model": f"local/{MODEL}",
    "permission": {"bash": "allow"},
    "provider": {
        "local": {
            "npm": "@ai-sdk/openai-compatible",
            "name": "local",
            "options": {"baseURL": V1, "apiKey": "none"},
            "models": {MODEL: {"name": "agent", "tool_call": True, "limit": {"context": 200_000, "output": 1000}}},
        }
    },
}
(Path.home() / "opencode.json").write_text(json.dumps(settings))
(Path.home() / "notes.txt").write_text("Oslo is cold.\n")


@feature("run with a shell call")
def _() -> None:
    printed = command(
        ["opencode", "run", "Read notes.txt and tell me what it says."],
        OPENCODE_DISABLE_MODELS_FETCH="1",
        OPENCODE_DISABLE_AUTOUPDATE="1",
        OPENCODE_DISABLE_LSP_DOWNLOAD="1",
    )
    within(TOLD, printed)


main()
