# /// script
# requires-python = ">=3.11"
# dependencies = ["strands-agents[openai,anthropic,ollama]==1.62.0"]
# [tool.local-llm]
# environment = "strands"
# ///
"""Strands Agents with its models for OpenAI's, Anthropic's and Ollama's APIs: tools, structured output."""

from __future__ import annotations

from typing import Any

from _features import AS_JSON, HELLO, MODEL, QUESTION, REPORT, TOLD, URL, V1, feature, main, same
from pydantic import BaseModel
from strands import Agent, tool
from strands.models.anthropic import AnthropicModel
from strands.models.ollama import OllamaModel
from strands.models.openai import OpenAIModel

MODELS: dict[str, Any] = {
    "openai": OpenAIModel(client_args={"base_url": V1, "api_key": "none"}, model_id=MODEL),
    "anthropic": AnthropicModel(client_args={"base_url": URL, "api_key": "none"}, model_id=MODEL, max_tokens=200),
    "ollama": OllamaModel(host=URL, model_id=MODEL),
}


class Report(BaseModel):
    """What the weather is."""

    city: str
    cold: bool


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"{city}: cold"


def text(result: Any) -> str:
    return str(result).strip()


def features(name: str, model: Any) -> None:
    @feature(f"{name} plain and turns")
    def _() -> None:
        agent = Agent(model=model, callback_handler=None)
        same([text(agent("hello")), text(agent("hello again"))], [HELLO, HELLO])

    @feature(f"{name} tools")
    def _() -> None:
        same(text(Agent(model=model, tools=[weather], callback_handler=None)(QUESTION)), TOLD)

    @feature(f"{name} structured output")
    def _() -> None:
        agent = Agent(model=model, callback_handler=None)
        same(agent(AS_JSON, structured_output_model=Report).structured_output.model_dump(), REPORT)


for each, one in MODELS.items():
    features(each, one)
main()
