# /// script
# requires-python = ">=3.11"
# dependencies = ["haystack-ai==3.4.1"]
# [tool.local-llm]
# environment = "haystack"
# ///
"""Haystack's OpenAI components: a chat generator, responses, a form, an agent with a tool, embedders."""

from __future__ import annotations

import json
from typing import Annotated

from _features import AS_JSON, EMBEDDING_MODEL, HELLO, MODEL, QUESTION, REPORT, SCHEMA, TOLD, V1, feature, main, same
from haystack.components.agents import Agent
from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import tool
from haystack.utils import Secret

KEY = Secret.from_token("none")


@tool
def weather(city: Annotated[str, "Where"]) -> str:
    """The weather in a city."""
    return f"{city}: cold"


def generator(**generation: object) -> OpenAIChatGenerator:
    return OpenAIChatGenerator(KEY, MODEL, api_base_url=V1, generation_kwargs=generation, max_retries=0)


@feature("chat and stream")
def _() -> None:
    said = [ChatMessage.from_user("hello")]
    same(generator().run(said)["replies"][0].text, HELLO)
    parts: list[str] = []
    generator().run(said, streaming_callback=lambda part: parts.append(part.content))
    same("".join(parts), HELLO)


@feature("responses")
def _() -> None:
    component = OpenAIResponsesChatGenerator(api_key=KEY, model=MODEL, api_base_url=V1)
    same(component.run([ChatMessage.from_user("hello")])["replies"][0].text, HELLO)


@feature("response_format")
def _() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "report", "schema": SCHEMA, "strict": True}}
    replies = generator(response_format=form).run([ChatMessage.from_user(AS_JSON)])["replies"]
    same(json.loads(replies[0].text), REPORT)


@feature("Agent")
def _() -> None:
    agent = Agent(chat_generator=generator(), tools=[weather])
    same(agent.run([ChatMessage.from_user(QUESTION)])["messages"][-1].text, TOLD)


@feature("embedder")
def _() -> None:
    embedder = OpenAITextEmbedder(api_key=KEY, model=EMBEDDING_MODEL, api_base_url=V1)
    assert embedder.run("the cat")["embedding"]


main()
