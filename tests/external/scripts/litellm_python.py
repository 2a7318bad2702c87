# /// script
# requires-python = ">=3.11"
# dependencies = ["litellm==1.110.2"]
# [tool.local-llm]
# environment = "litellm"
# ///
"""LiteLLM by five of its providers: chats, streams, tools, forms, vectors, responses."""

from __future__ import annotations

import json
from typing import Any

import litellm
from _features import (
    ADDRESS,
    AS_JSON,
    EMBEDDING_MODEL,
    HELLO,
    MODEL,
    QUESTION,
    REPORT,
    TEXT_MODEL,
    TOLD,
    TOOL,
    URL,
    V1,
    feature,
    main,
    same,
)
from pydantic import BaseModel

litellm.telemetry = False
litellm.suppress_debug_info = True


class Report(BaseModel):
    city: str
    cold: bool


PROVIDERS: dict[str, dict[str, Any]] = {
    "openai": {"model": f"openai/{MODEL}", "api_base": V1, "api_key": "none"},
    "hosted_vllm": {"model": f"hosted_vllm/{MODEL}", "api_base": V1, "api_key": "none"},
    "huggingface": {"model": f"huggingface/{MODEL}", "api_base": ADDRESS, "api_key": "none"},
    "anthropic": {"model": f"anthropic/{MODEL}", "api_base": URL, "api_key": "none", "max_tokens": 200},
    "ollama_chat": {"model": f"ollama_chat/{MODEL}", "api_base": URL},
}
GREETING = [{"role": "user", "content": "hello"}]


def features(name: str, options: dict[str, Any]) -> None:
    @feature(f"{name} chat")
    def _() -> None:
        same(litellm.completion(messages=GREETING, **options).choices[0].message.content, HELLO)

    @feature(f"{name} stream")
    def _() -> None:
        parts = litellm.completion(messages=GREETING, stream=True, stream_options={"include_usage": True}, **options)
        same("".join(part.choices[0].delta.content or "" for part in parts if part.choices), HELLO)

    @feature(f"{name} tool loop")
    def _() -> None:
        said: list[Any] = [
            {"role": "user", "content": [{"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}]}
        ]
        first = litellm.completion(messages=said, tools=[TOOL], **options).choices[0].message
        [call] = first.tool_calls
        same(json.loads(call.function.arguments), {"city": "Oslo"})
        said += [first, {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "cold"}]
        same(litellm.completion(messages=said, tools=[TOOL], **options).choices[0].message.content, TOLD)

    @feature(f"{name} response_format")
    def _() -> None:
        said = [{"role": "user", "content": AS_JSON}]
        answer = litellm.completion(messages=said, response_format=Report, **options)
        same(json.loads(answer.choices[0].message.content), REPORT)

    thinks = "Ollama's protocol refuses `think` of a model that does not think" if name == "ollama_chat" else ""

    @feature(f"{name} reasoning_effort", known=thinks)
    def _() -> None:
        options_ = {**options, "drop_params": True}
        same(
            litellm.completion(messages=GREETING, reasoning_effort="low", **options_).choices[0].message.content, HELLO
        )


for each, some in PROVIDERS.items():
    features(each, some)


@feature("responses")
def _() -> None:
    answer = litellm.responses(input="hello", **PROVIDERS["openai"])
    same(answer.output[0].content[0].text, HELLO)


@feature("text_completion")
def _() -> None:
    options = {"api_base": V1, "api_key": "none", "max_tokens": 5}
    assert litellm.text_completion(model=f"text-completion-openai/{TEXT_MODEL}", prompt="the cat", **options).choices


@feature("embedding")
def _() -> None:
    for provider in ("openai", "hosted_vllm"):
        options = {"api_base": V1, "api_key": "none", "input": ["the cat"]}
        same(len(litellm.embedding(model=f"{provider}/{EMBEDDING_MODEL}", **options).data), 1)
    same(len(litellm.embedding(model=f"ollama/{EMBEDDING_MODEL}", api_base=URL, input=["the cat"]).data), 1)


@feature("async")
async def _() -> None:
    answer = await litellm.acompletion(messages=GREETING, **PROVIDERS["openai"])
    same(answer.choices[0].message.content, HELLO)


main()
