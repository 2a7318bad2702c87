# /// script
# requires-python = ">=3.11"
# dependencies = ["guidance==0.3.1"]
# [tool.local-llm]
# environment = "outlines"
# ///
"""guidance with its OpenAI backend: a chat with roles."""

from __future__ import annotations

import guidance
from _features import HELLO, MODEL, V1, feature, main, same


@feature("gen in a chat")
def _() -> None:
    lm = guidance.models.OpenAI(MODEL, api_key="none", base_url=V1, echo=False)
    with guidance.user():
        lm += "hello"
    with guidance.assistant():
        lm += guidance.gen("answer")
    same(lm["answer"], HELLO)


main()
