# /// script
# requires-python = ">=3.11"
# dependencies = ["smolagents[openai,litellm]==1.26.0"]
# [tool.local-llm]
# environment = "litellm"
# ///
"""smolagents with three of its models: a ToolCallingAgent, a CodeAgent, streams, forms."""

from __future__ import annotations

import json
from typing import Any

from _features import ADDRESS, AS_JSON, HELLO, MODEL, QUESTION, REPORT, SCHEMA, TOLD, V1, feature, main, same
from smolagents import CodeAgent, InferenceClientModel, LiteLLMModel, OpenAIServerModel, ToolCallingAgent, tool
from smolagents.models import ChatMessage

MODELS: dict[str, Any] = {
    "OpenAIServerModel": OpenAIServerModel(MODEL, api_base=V1, api_key="none"),
    "InferenceClientModel": InferenceClientModel(ADDRESS, token="hf_none"),
    "LiteLLMModel": LiteLLMModel(f"openai/{MODEL}", api_base=V1, api_key="none"),
}
SAID = [ChatMessage(role="user", content=[{"type": "text", "text": "hello"}])]


@tool
def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: Where.
    """
    return f"{city}: cold"


def features(name: str, model: Any) -> None:
    @feature(f"{name} generate and stream")
    def _() -> None:
        same(model.generate(SAID).content, HELLO)
        same("".join(part.content or "" for part in model.generate_stream(SAID)), HELLO)

    @feature(f"{name} ToolCallingAgent")
    def _() -> None:
        told = ToolCallingAgent(tools=[weather], model=model, verbosity_level=0, max_steps=3).run(QUESTION)
        assert told  # the library asks for `required` with two tools: which of them, a tiny model cannot choose

    @feature(f"{name} CodeAgent")
    def _() -> None:
        same(CodeAgent(tools=[], model=model, verbosity_level=0, max_steps=2).run(QUESTION), TOLD)

    named = "the library allows forms for two hosted providers only" if name == "InferenceClientModel" else ""

    @feature(f"{name} response_format", known=named)
    def _() -> None:
        form = {"type": "json_schema", "json_schema": {"name": "report", "schema": SCHEMA, "strict": True}}
        asked = [ChatMessage(role="user", content=[{"type": "text", "text": AS_JSON}])]
        same(json.loads(model.generate(asked, response_format=form).content), REPORT)


for each, one in MODELS.items():
    features(each, one)
main()
