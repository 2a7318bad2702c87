# /// script
# requires-python = ">=3.11"
# [tool.local-llm]
# node = ["@qwen-code/qwen-code@0.24.4"]
# environment = "qwen-code"
# ///
"""Qwen Code over OpenAI's API: a question in print mode."""

from __future__ import annotations

from _features import HELLO, MODEL, TOLD, V1, command, feature, main


@feature("prompt")
def _() -> None:
    words = [
        "qwen",
        "-p",
        "hello",
        "--auth-type",
        "openai",
        "--openai-api-key",
        "none",
        "--openai-base-url",
        V1,
        "-m",
        MODEL,
    ]
    printed = command(words, OPENAI_API_KEY="none", OPENAI_BASE_URL=V1, OPENAI_MODEL=MODEL, QWEN_TELEMETRY_ENABLED="0")
    assert HELLO in printed or TOLD in printed, printed[-1000:]


main()
