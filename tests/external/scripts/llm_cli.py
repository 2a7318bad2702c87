# /// script
# requires-python = ">=3.11"
# dependencies = ["llm==0.36"]
# [tool.local-llm]
# environment = "sdks"
# ///
"""The `llm` command line with a model of its own file: prompts, streams, schemas, tools, options."""

from __future__ import annotations

import json
import os
from pathlib import Path

from _features import (
    AS_JSON,
    HELLO,
    MODEL,
    QUESTION,
    REPORT,
    TEXT_MODEL,
    TOLD,
    V1,
    command,
    feature,
    main,
    same,
    within,
)

folder = Path(os.environ["HOME"]) / "llm"
folder.mkdir()
os.environ["LLM_USER_PATH"] = str(folder)
(folder / "extra-openai-models.yaml").write_text(
    f"""- model_id: chat
  model_name: {MODEL}
  api_base: {V1}
  supports_schema: true
  supports_tools: true
- model_id: text
  model_name: {TEXT_MODEL}
  api_base: {V1}
  completion: true
"""
)


def llm(*words: str) -> str:
    return command(["llm", *words, "--key", "none"]).strip()


@feature("prompt, system, no stream")
def _() -> None:
    same(llm("-m", "chat", "hello"), HELLO)
    same(llm("-m", "chat", "--no-stream", "-s", "Be brief.", "-o", "temperature", "0.5", "hello"), HELLO)


@feature("schema")
def _() -> None:
    same(json.loads(llm("-m", "chat", "--schema", "city, cold bool", AS_JSON)), REPORT)


@feature("tools")
def _() -> None:
    tool = 'def weather(city: str) -> str:\n    "The weather."\n    return city + ": cold"\n'
    within(TOLD, llm("-m", "chat", "--functions", tool, QUESTION))


@feature("completion model")
def _() -> None:
    command(["llm", "-m", "text", "-o", "max_tokens", "5", "the cat", "--key", "none"])


main()
