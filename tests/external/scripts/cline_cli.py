# /// script
# requires-python = ">=3.11"
# [tool.local-llm]
# node = ["cline@3.0.65"]
# environment = "cline"
# ///
"""Cline's command line over OpenAI's API: a task with a shell call."""

from __future__ import annotations

from pathlib import Path

from _features import MODEL, TOLD, V1, command, feature, main, within

(Path.home() / "notes.txt").write_text("Oslo is cold.\n")


@feature("task")
def _() -> None:
    command(["cline", "auth", "-p", "openai", "-k", "none", "-m", MODEL, "-b", V1])
    printed = command(["cline", "-y", "--json", "Read notes.txt and tell me what it says."])
    within(TOLD, printed)


main()
