# /// script
# requires-python = ">=3.11"
# dependencies = ["agno==3.1.10", "openai==3.57.0"]
# [tool.local-llm]
# environment = "agno"
# ///
"""agno: agents over chats and responses, with tools, an output schema, and both."""

from __future__ import annotations

from typing import Any

from _features import AS_JSON, HELLO, MODEL, QUESTION, REPORT, TOLD, V1, feature, main, same
from agno.agent import Agent
from agno.models.openai import OpenAILike, OpenAIResponses
from pydantic import BaseModel


class Weather(BaseModel):
    city: str
    cold: bool


def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: Where.
    """
    return f"{city}: cold"


def chat() -> Any:
    return OpenAILike(id=MODEL, base_url=V1, api_key="none")


def responses() -> Any:
    return OpenAIResponses(id=MODEL, base_url=V1, api_key="none")


def features(name: str, make: Any) -> None:
    def ask(question: str, **options: Any) -> Any:
        return Agent(model=make(), telemetry=False, **options).run(question).content

    @feature(f"{name} plain")
    def _() -> None:
        same(ask("hello"), HELLO)

    @feature(f"{name} stream")
    def _() -> None:
        parts = Agent(model=make(), telemetry=False).run("hello", stream=True)
        same("".join(part.content or "" for part in parts if getattr(part, "event", "") == "RunContent"), HELLO)

    @feature(f"{name} tools")
    def _() -> None:
        same(ask(QUESTION, tools=[weather]), TOLD)

    @feature(f"{name} output_schema")
    def _() -> None:
        same(ask(AS_JSON, output_schema=Weather), Weather(**REPORT))

    @feature(f"{name} tools with output_schema")
    def _() -> None:
        same(ask(AS_JSON, tools=[weather], output_schema=Weather), Weather(**REPORT))


for each, one in {"chat": chat, "responses": responses}.items():
    features(each, one)
main()
