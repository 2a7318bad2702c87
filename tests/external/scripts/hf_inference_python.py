# /// script
# requires-python = ">=3.11"
# dependencies = ["huggingface_hub==2.4.0", "aiohttp==3.14.5", "numpy==2.3.5"]
# [tool.local-llm]
# environment = "sdks"
# ///
"""`huggingface_hub`'s InferenceClient and AsyncInferenceClient: chats, text, and the other tasks."""

from __future__ import annotations

import json
import os
from typing import Any

from _features import ADDRESS, AS_JSON, HELLO, MODEL, QUESTION, REPORT, SCHEMA, TOOL, URL, V1, feature, main, same
from huggingface_hub import AsyncInferenceClient, InferenceClient

client = InferenceClient(model=ADDRESS, token="hf_none")
asynchronous = AsyncInferenceClient(model=ADDRESS, token="hf_none")
GREETING: Any = [{"role": "user", "content": "hello"}]
CONTEXT = "the cat sat on the mat and the dog ran to the house"


def of(variable: str) -> InferenceClient:
    """A client of one of the tiny models."""
    return InferenceClient(model=f"{URL}/api/huggingface/models/{os.environ[variable]}", token="hf_none")


@feature("chat_completion")
def _() -> None:
    same(client.chat_completion(GREETING, max_tokens=20).choices[0].message.content, HELLO)
    other = InferenceClient(base_url=V1, api_key="none")
    same(other.chat.completions.create(model=MODEL, messages=GREETING).choices[0].message.content, HELLO)


@feature("chat stream")
def _() -> None:
    same("".join(part.choices[0].delta.content or "" for part in client.chat_completion(GREETING, stream=True)), HELLO)


@feature("chat tools")
def _() -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    tools: Any = [TOOL]
    [call] = client.chat_completion(messages, tools=tools, tool_choice="auto").choices[0].message.tool_calls
    same((call.function.name, json.loads(call.function.arguments)), ("weather", {"city": "Oslo"}))


@feature("chat response_format")
def _() -> None:
    messages: Any = [{"role": "user", "content": AS_JSON}]
    forms: list[Any] = [
        {"type": "json_schema", "json_schema": {"name": "report", "schema": SCHEMA, "strict": True}},
        {"type": "json", "value": SCHEMA},
    ]
    for form in forms:
        answer = client.chat_completion(messages, response_format=form)
        same(json.loads(answer.choices[0].message.content), REPORT)


@feature("text_generation")
def _() -> None:
    text = of("TEXT_MODEL")
    told = text.text_generation("the cat", max_new_tokens=5, details=True, stop=["zzz"], top_k=5)
    same(told.details.generated_tokens, 5)
    pieces = list(text.text_generation("the cat", max_new_tokens=5, stream=True))
    assert pieces


@feature("summarization and translation")
def _() -> None:
    assert of("SUMMARY_MODEL").summarization(CONTEXT).summary_text is not None
    assert of("TRANSLATION_MODEL").translation(CONTEXT).translation_text is not None


@feature("question answering")
def _() -> None:
    assert of("QUESTION_MODEL").question_answering(question="where is the cat", context=CONTEXT)
    table = {"name": ["cat", "dog"], "age": ["1", "2"]}
    assert of("TABLE_MODEL").table_question_answering(table=table, query="cat")


@feature("classification")
def _() -> None:
    same(len(of("CLASS_MODEL").text_classification("the cat")), 2)
    assert of("ENTITY_MODEL").token_classification(CONTEXT) is not None
    same(len(of("ZERO_SHOT_MODEL").zero_shot_classification("the cat", candidate_labels=["cat", "dog"])), 2)
    assert of("MASK_MODEL").fill_mask("the [MASK] sat")


@feature("vectors")
def _() -> None:
    assert of("EMBEDDING_MODEL").feature_extraction("the cat").ndim >= 1
    same(len(of("EMBEDDING_MODEL").sentence_similarity("the cat", other_sentences=["a dog", "the cat"])), 2)


@feature("health_check and get_endpoint_info")
def _() -> None:
    deployed = InferenceClient(model=ADDRESS, token="hf_none", provider="hf-inference")
    assert deployed.health_check()
    same(deployed.get_endpoint_info()["model_id"], MODEL)


@feature("async chat and stream")
async def _() -> None:
    same((await asynchronous.chat_completion(GREETING)).choices[0].message.content, HELLO)
    parts = [
        part.choices[0].delta.content or "" async for part in await asynchronous.chat_completion(GREETING, stream=True)
    ]
    same("".join(parts), HELLO)


@feature("async text_generation")
async def _() -> None:
    other = AsyncInferenceClient(model=f"{URL}/api/huggingface/models/{os.environ['TEXT_MODEL']}", token="hf_none")
    assert (await other.text_generation("the cat", max_new_tokens=5, details=True)).details.generated_tokens == 5


main()
