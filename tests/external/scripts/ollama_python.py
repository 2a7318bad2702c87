# /// script
# requires-python = ">=3.11"
# dependencies = ["ollama==0.6.3"]
# [tool.local-llm]
# environment = "sdks"
# ///
"""The `ollama` package: models, chats, streams, tools, forms, embeddings."""

from __future__ import annotations

import json

import ollama
from _features import (
    AS_JSON,
    EMBEDDING_MODEL,
    HELLO,
    MODEL,
    QUESTION,
    REPORT,
    SCHEMA,
    TEXT_MODEL,
    TOLD,
    URL,
    feature,
    main,
    same,
    within,
)

client = ollama.Client(host=URL)
asynchronous = ollama.AsyncClient(host=URL)
GREETING = [{"role": "user", "content": "hello"}]


def weather(city: str) -> str:
    """The weather.

    Args:
        city: Where.
    """
    return f"{city}: cold"


@feature("list and show")
def _() -> None:
    within(MODEL, [model.model for model in client.list().models])
    within("tools", client.show(MODEL).capabilities)


@feature("chat")
def _() -> None:
    same(client.chat(MODEL, GREETING, keep_alive="5m").message.content, HELLO)


@feature("stream")
def _() -> None:
    same("".join(part.message.content for part in client.chat(MODEL, GREETING, stream=True)), HELLO)


@feature("tool loop")
def _() -> None:
    said: list = [{"role": "user", "content": QUESTION}]
    first = client.chat(MODEL, said, tools=[weather]).message
    [call] = first.tool_calls
    said += [first, {"role": "tool", "tool_name": call.function.name, "content": weather(**call.function.arguments)}]
    same(client.chat(MODEL, said, tools=[weather]).message.content, TOLD)


@feature("format")
def _() -> None:
    answer = client.chat(MODEL, [{"role": "user", "content": AS_JSON}], format=SCHEMA)
    same(json.loads(answer.message.content), REPORT)


@feature("generate")
def _() -> None:
    options = {"temperature": 0, "num_predict": 5, "num_ctx": 256}
    assert client.generate(TEXT_MODEL, "the cat", options=options).eval_count == 5
    assert [part.done for part in client.generate(TEXT_MODEL, "the cat", options=options, stream=True)][-1]


@feature("embeddings")
def _() -> None:
    same(len(client.embed(EMBEDDING_MODEL, ["the cat", "a dog"]).embeddings), 2)
    assert client.embeddings(EMBEDDING_MODEL, "the cat").embedding


@feature("ps")
def _() -> None:
    within(MODEL, [model.model for model in client.ps().models])


@feature("async")
async def _() -> None:
    same((await asynchronous.chat(MODEL, GREETING)).message.content, HELLO)


main()
