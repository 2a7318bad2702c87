# /// script
# requires-python = ">=3.11"
# [tool.local-llm]
# node = ["@continuedev/cli@1.5.47"]
# environment = "continue"
# ///
"""Continue's command line, `cn -p`: a question, and a task with a shell call."""

from __future__ import annotations

from pathlib import Path

from _features import HELLO, MODEL, TOLD, V1, command, feature, main

(Path.home() / "config.yaml").write_text(
    f"""name: local
version: 1.0.0
schema: v1
models:
  - name: agent
    provider: openai
    model: {MODEL}
    apiBase: {V1}
    apiKey: none
    roles: [chat]
    capabilities: [tool_use]
"""
)
(Path.home() / "notes.txt").write_text("Oslo is cold.\n")


@feature("print")
def _() -> None:
    printed = command(
        [
            "cn",
            "-p",
            "Read notes.txt and tell me what it says.",
            "--config",
            str(Path.home() / "config.yaml"),
            "--auto",
        ],
        CONTINUE_TELEMETRY_ENABLED="0",
    )
    assert TOLD in printed or HELLO in printed, printed[-1000:]


main()
