# /// script
# requires-python = ">=3.11"
# dependencies = ["dspy==3.4.1"]
# [tool.local-llm]
# environment = "litellm"
# ///
"""DSPy: its LM over chats, responses and completions, Predict with two adapters."""

from __future__ import annotations

import dspy
from _features import HELLO, MODEL, REPORT, TEXT_MODEL, TOLD, V1, feature, main, same

OPTIONS = {"api_base": V1, "api_key": "none", "cache": False, "num_retries": 0}
chat = dspy.LM(f"openai/{MODEL}", **OPTIONS)


@feature("LM over chats")
def _() -> None:
    same(chat("hello"), [HELLO])


@feature("LM over responses")
def _() -> None:
    answer = dspy.LM(f"openai/{MODEL}", model_type="responses", **OPTIONS)("hello")[0]
    same(answer["text"] if isinstance(answer, dict) else answer, HELLO)


@feature("LM over completions")
def _() -> None:
    assert len(dspy.LM(f"openai/{TEXT_MODEL}", model_type="text", max_tokens=5, **OPTIONS)("the cat")) == 1


@feature("Predict with the chat adapter")
def _() -> None:
    with dspy.context(lm=chat):
        same(dspy.Predict("question -> answer")(question="How is it?").answer, TOLD)


@feature("Predict with the JSON adapter")
def _() -> None:
    with dspy.context(lm=chat, adapter=dspy.JSONAdapter()):
        made = dspy.Predict("question -> city: str, cold: bool")(question="How is it, as JSON?")
        same({"city": made.city, "cold": made.cold}, REPORT)


main()
