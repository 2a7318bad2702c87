# /// script
# requires-python = ">=3.11"
# dependencies = ["semantic-kernel==1.45.0"]
# [tool.local-llm]
# environment = "semantic-kernel"
# ///
"""Semantic Kernel's OpenAI connector: chats, streams, a function that the model calls, a form, vectors."""

from __future__ import annotations

import json
from typing import Any

from _features import AS_JSON, EMBEDDING_MODEL, HELLO, MODEL, QUESTION, REPORT, TOLD, V1, feature, main, same
from openai import AsyncOpenAI
from pydantic import BaseModel
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import (
    OpenAIChatCompletion,
    OpenAIChatPromptExecutionSettings,
    OpenAITextEmbedding,
)
from semantic_kernel.contents import ChatHistory
from semantic_kernel.functions import kernel_function


class Report(BaseModel):
    city: str
    cold: bool


class Weather:
    @kernel_function(name="get", description="The weather in a city")
    def get(self, city: str) -> str:
        return f"{city}: cold"


def ask(question: str, **settings: Any) -> Any:
    client = AsyncOpenAI(base_url=V1, api_key="none", max_retries=0)
    service = OpenAIChatCompletion(ai_model_id=MODEL, async_client=client)
    kernel, history = Kernel(), ChatHistory()
    kernel.add_plugin(Weather(), "Weather")
    history.add_user_message(question)
    options = OpenAIChatPromptExecutionSettings(**settings)
    return service, kernel, history, options


@feature("chat and stream")
async def _() -> None:
    service, _, history, options = ask("hello")
    same(str(await service.get_chat_message_content(history, options)), HELLO)
    parts = [str(part) async for part in service.get_streaming_chat_message_content(history, options)]
    same("".join(parts), HELLO)


@feature("function calling")
async def _() -> None:
    service, kernel, history, options = ask(QUESTION, function_choice_behavior=FunctionChoiceBehavior.Auto())
    same(str(await service.get_chat_message_content(history, options, kernel=kernel)), TOLD)


@feature("response_format")
async def _() -> None:
    service, _, history, options = ask(AS_JSON, response_format=Report)
    same(json.loads(str(await service.get_chat_message_content(history, options))), REPORT)


@feature("embeddings")
async def _() -> None:
    client = AsyncOpenAI(base_url=V1, api_key="none")
    vectors = await OpenAITextEmbedding(ai_model_id=EMBEDDING_MODEL, async_client=client).generate_embeddings(["a cat"])
    same(len(vectors), 1)


main()
