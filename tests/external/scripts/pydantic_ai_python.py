# /// script
# requires-python = ">=3.11"
# dependencies = ["pydantic-ai-slim[openai,anthropic,huggingface]==2.68.0"]
# [tool.local-llm]
# environment = "pydantic-ai"
# ///
"""pydantic-ai's four models that reach this server: tools, tool, native and prompted output, streams, history."""

from __future__ import annotations

from typing import Any

from _features import ADDRESS, AS_JSON, HELLO, MODEL, QUESTION, REPORT, TOLD, URL, V1, feature, main, same
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.huggingface import HuggingFaceModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.huggingface import HuggingFaceProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    city: str
    cold: bool


openai = OpenAIProvider(base_url=V1, api_key="none")
MODELS: dict[str, Any] = {
    "chat": OpenAIChatModel(MODEL, provider=openai),
    "responses": OpenAIResponsesModel(MODEL, provider=openai),
    "huggingface": HuggingFaceModel(MODEL, provider=HuggingFaceProvider(api_key="hf_none", base_url=ADDRESS)),
    "anthropic": AnthropicModel(MODEL, provider=AnthropicProvider(base_url=URL, api_key="none")),
}
calls: list[str] = []


def weather(city: str) -> str:
    """The weather in a city."""
    calls.append(city)
    return f"{city}: cold"


def features(name: str, model: Any) -> None:
    @feature(f"{name} plain and history")
    def _() -> None:
        first = Agent(model).run_sync("hello")
        same(first.output, HELLO)
        same(Agent(model).run_sync("hello", message_history=first.all_messages()).output, HELLO)

    @feature(f"{name} tools")
    def _() -> None:
        calls.clear()
        same(Agent(model, tools=[weather]).run_sync(QUESTION).output, TOLD)
        same(calls, ["Oslo"])

    @feature(f"{name} tools with ToolOutput")
    def _() -> None:
        agent = Agent(model, tools=[weather], output_type=ToolOutput(Weather))
        same(agent.run_sync(QUESTION).output, Weather(**REPORT))

    native = "the library has no native output for this model" if name == "huggingface" else ""
    native = "the library offers it to the names of Anthropic's own models only" if name == "anthropic" else native

    @feature(f"{name} tools with NativeOutput", known=native)
    def _() -> None:
        agent = Agent(model, tools=[weather], output_type=NativeOutput(Weather))
        same(agent.run_sync(AS_JSON).output, Weather(**REPORT))

    @feature(f"{name} PromptedOutput")
    def _() -> None:
        same(Agent(model, output_type=PromptedOutput(Weather)).run_sync(AS_JSON).output, Weather(**REPORT))

    @feature(f"{name} stream")
    async def _() -> None:
        async with Agent(model, tools=[weather]).run_stream(QUESTION) as stream:
            same(await stream.get_output(), TOLD)


for each, one in MODELS.items():
    features(each, one)
main()
