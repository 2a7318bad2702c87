# /// script
# requires-python = ">=3.11"
# [tool.local-llm]
# node = ["@openai/codex@0.171.0"]
# environment = "codex"
# ///
"""OpenAI's Codex CLI: a question, and a task for which it reads a file by the shell."""

from __future__ import annotations

import os
from pathlib import Path

from _features import MODEL, TOLD, V1, command, feature, main, within

home = Path.home() / ".codex"
home.mkdir()
(home / "config.toml").write_text(
    f"""model = "{MODEL}"
model_provider = "local"
[model_providers.local]
name = "local"
base_url = "{V1}"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
[analytics]
enabled = false
"""
)
(Path.home() / "notes.txt").write_text("Oslo is cold.\n")
os.environ["CODEX_HOME"] = str(home)
EXEC = ["codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]


@feature("exec with a shell call")
def _() -> None:
    printed = command([*EXEC, "Read notes.txt and tell me what it says."])
    within("cat notes.txt", printed)
    within(TOLD, printed)


main()
