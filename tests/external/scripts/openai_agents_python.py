# /// script
# requires-python = ">=3.11"
# dependencies = ["openai-agents==0.24.0"]
# [tool.local-llm]
# environment = "sdks"
# ///
"""OpenAI's agents SDK over chats and over responses: tools, output types, both at once, handoffs, streams, sessions."""

from __future__ import annotations

from typing import Any

from _features import AS_JSON, HELLO, MODEL, QUESTION, TOLD, V1, feature, main, same
from agents import (
    Agent,
    AsyncOpenAI,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from pydantic import BaseModel

set_tracing_disabled(True)


def models() -> list[Any]:
    """A model over chats and one over responses, with a client of this event loop."""
    client = AsyncOpenAI(base_url=V1, api_key="none", max_retries=0, timeout=60)
    return [OpenAIChatCompletionsModel(MODEL, client), OpenAIResponsesModel(MODEL, client)]


class Weather(BaseModel):
    city: str
    cold: bool


calls: list[str] = []


@function_tool
def weather(city: str) -> str:
    """The weather in a city."""
    calls.append(city)
    return f"{city}: cold"


def ask(question: str, **options: Any) -> list[Any]:
    """The final output of an agent, over chats and over responses."""
    return [
        Runner.run_sync(Agent("Ada", model=model, instructions="Be brief.", **options), question).final_output
        for model in models()
    ]


@feature("plain")
def _() -> None:
    same(ask("hello"), [HELLO, HELLO])


@feature("tools")
def _() -> None:
    calls.clear()
    same(ask(QUESTION, tools=[weather]), [TOLD, TOLD])
    same(calls, ["Oslo", "Oslo"])


@feature("output_type")
def _() -> None:
    same(ask(AS_JSON, output_type=Weather), [Weather(city="Oslo", cold=True)] * 2)


@feature("tools with output_type")
def _() -> None:
    calls.clear()
    same(ask(AS_JSON, tools=[weather], output_type=Weather), [Weather(city="Oslo", cold=True)] * 2)
    same(calls, ["Oslo", "Oslo"])


@feature("model settings")
def _() -> None:
    settings = ModelSettings(verbosity="low", store=True, parallel_tool_calls=True, temperature=0, tool_choice="auto")
    same(ask(QUESTION, tools=[weather], model_settings=settings), [TOLD, TOLD])


@feature("handoff")
def _() -> None:
    for model in models():
        other = Agent("weather agent", model=model, tools=[weather])
        result = Runner.run_sync(Agent("first", model=model, handoffs=[other]), QUESTION)
        same((result.last_agent.name, result.final_output), ("weather agent", TOLD))


@feature("stream")
async def _() -> None:
    for model in models():
        result = Runner.run_streamed(Agent("Ada", model=model, tools=[weather]), QUESTION)
        async for _event in result.stream_events():
            pass
        same(result.final_output, TOLD)


@feature("session")
def _() -> None:
    for model in models():
        session, agent = SQLiteSession("one"), Agent("Ada", model=model, tools=[weather])
        Runner.run_sync(agent, QUESTION, session=session)
        same(Runner.run_sync(agent, "And now?", session=session).final_output, TOLD)


main()
