# /// script
# requires-python = ">=3.11"
# [tool.local-llm]
# node = ["promptfoo@0.123.1"]
# environment = "promptfoo"
# ///
"""promptfoo: an evaluation of two prompts over OpenAI's API, with assertions."""

from __future__ import annotations

import json
from pathlib import Path

from _features import HELLO, MODEL, V1, command, feature, main, same

settings = {
    "prompts": ["hello {{name}}"],
    "providers": [{"id": f"openai:chat:{MODEL}", "config": {"apiBaseUrl": V1, "apiKey": "none"}}],
    "tests": [{"vars": {"name": name}, "assert": [{"type": "equals", "value": HELLO}]} for name in ("Ann", "Bob")],
}


@feature("eval")
def _() -> None:
    Path("promptfooconfig.json").write_text(json.dumps(settings))
    command(
        ["promptfoo", "eval", "-c", "promptfooconfig.json", "-o", "out.json", "--no-cache", "--no-share"],
        PROMPTFOO_DISABLE_TELEMETRY="1", PROMPTFOO_DISABLE_UPDATE="1", PROMPTFOO_DISABLE_REMOTE_GENERATION="1",
    )
    same(json.loads(Path("out.json").read_text())["results"]["stats"]["successes"], 2)


main()
