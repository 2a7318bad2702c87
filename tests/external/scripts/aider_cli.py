# /// script
# requires-python = ">=3.11"
# dependencies = ["aider-chat==0.86.2"]
# [tool.local-llm]
# environment = "aider"
# ///
"""aider: a message to the model, without a repository."""

from __future__ import annotations

from _features import HELLO, MODEL, V1, command, feature, main, within

QUIET = ["--no-git", "--no-check-update", "--no-show-model-warnings", "--analytics-disable", "--no-gitignore", "--yes"]


@feature("message")
def _() -> None:
    words = ["aider", "--model", f"openai/{MODEL}", *QUIET, "--no-pretty", "--message", "hello"]
    within(HELLO, command(words, OPENAI_API_BASE=V1, OPENAI_API_KEY="none"))
    within(HELLO, command([*words, "--no-stream"], OPENAI_API_BASE=V1, OPENAI_API_KEY="none"))


main()
