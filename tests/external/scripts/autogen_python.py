# /// script
# requires-python = ">=3.11"
# dependencies = ["autogen-agentchat==0.7.5", "autogen-ext[openai,ollama]==0.7.5"]
# [tool.local-llm]
# environment = "autogen"
# ///
"""AutoGen: its client for OpenAI's API, an agent with a tool and an output type, streams; its client for Ollama's."""

from __future__ import annotations

from typing import Any

from _features import AS_JSON, HELLO, MODEL, QUESTION, REPORT, TOLD, URL, V1, feature, main, same
from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.ollama import OllamaChatCompletionClient
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel

INFO: Any = {
    "vision": False,
    "function_calling": True,
    "json_output": True,
    "family": "unknown",
    "structured_output": True,
}


class Report(BaseModel):
    city: str
    cold: bool


async def weather(city: str) -> str:
    """The weather in a city."""
    return f"{city}: cold"


def openai() -> Any:
    return OpenAIChatCompletionClient(model=MODEL, base_url=V1, api_key="none", model_info=INFO, max_retries=0)


def ollama() -> Any:
    return OllamaChatCompletionClient(model=MODEL, host=URL, model_info=INFO)


def features(name: str, make: Any) -> None:
    @feature(f"{name} create and stream")
    async def _() -> None:
        said = [UserMessage(content="hello", source="user")]
        same((await make().create(said)).content, HELLO)
        parts = [part async for part in make().create_stream(said)]
        same("".join(part for part in parts if isinstance(part, str)), HELLO)

    @feature(f"{name} agent with a tool")
    async def _() -> None:
        agent = AssistantAgent("ada", make(), tools=[weather], reflect_on_tool_use=True)
        same((await agent.run(task=QUESTION)).messages[-1].content, TOLD)

    @feature(f"{name} agent with a tool and an output type")
    async def _() -> None:
        agent = AssistantAgent(
            "ada", make(), tools=[FunctionTool(weather, "The weather", strict=True)], output_content_type=Report
        )
        same((await agent.run(task=AS_JSON)).messages[-1].content.model_dump(), REPORT)


for each, one in {"openai": openai, "ollama": ollama}.items():
    features(each, one)
main()
