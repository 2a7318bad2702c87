# /// script
# requires-python = ">=3.11"
# [tool.local-llm]
# node = ["@anthropic-ai/claude-code@2.1.332"]
# environment = "claude-code"
# ///
"""Claude Code: a question, and a task for which it reads a file by the shell, as text and as a stream of JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

from _features import MODEL, TOLD, URL, command, feature, main, same, within

os.environ.update(
    ANTHROPIC_BASE_URL=URL,
    ANTHROPIC_API_KEY="none",
    ANTHROPIC_MODEL=MODEL,
    ANTHROPIC_SMALL_FAST_MODEL=MODEL,
    CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
    DISABLE_AUTOUPDATER="1",
    DISABLE_TELEMETRY="1",
    IS_SANDBOX="1",
)
(Path.home() / "notes.txt").write_text("Oslo is cold.\n")
ASK = ["claude", "-p", "Read notes.txt and tell me what it says.", "--model", MODEL, "--allowedTools", "Bash"]


@feature("print with a shell call")
def _() -> None:
    within(TOLD, command(ASK))


@feature("stream of JSON")
def _() -> None:
    printed = command([*ASK, "--output-format", "stream-json", "--verbose"])
    events = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    blocks = [block for event in events if event["type"] == "assistant" for block in event["message"]["content"]]
    within("tool_use", [block["type"] for block in blocks])
    same(events[-1]["result"], TOLD)


main()
