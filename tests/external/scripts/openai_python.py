# /// script
# requires-python = ">=3.11"
# dependencies = ["openai==3.57.0"]
# [tool.local-llm]
# environment = "sdks"
# ///
"""The `openai` package: chats, tools, forms, responses, completions, embeddings, errors, and hanging up."""

from __future__ import annotations

import base64
import json
from typing import Any

import openai
from _features import (
    AS_JSON,
    EMBEDDING_MODEL,
    HELLO,
    MODEL,
    PARAMETERS,
    QUESTION,
    REPORT,
    SCHEMA,
    TEXT_MODEL,
    TOLD,
    TOOL,
    V1,
    feature,
    main,
    same,
    within,
)
from pydantic import BaseModel

client = openai.OpenAI(base_url=V1, api_key="none", max_retries=0, timeout=60)
asynchronous = openai.AsyncOpenAI(base_url=V1, api_key="none", max_retries=0, timeout=60)
GREETING: Any = [{"role": "user", "content": "hello"}]
ASKED: Any = [{"role": "user", "content": QUESTION}]
TOOLS: Any = [TOOL]
FORM: Any = {"type": "json_schema", "json_schema": {"name": "report", "schema": SCHEMA, "strict": True}}


class Report(BaseModel):
    city: str
    cold: bool


def loop(**more: Any) -> Any:
    """Two turns: the model calls the tool, and is told."""
    first = client.chat.completions.create(model=MODEL, messages=ASKED, tools=TOOLS, **more).choices[0]
    same(first.finish_reason, "tool_calls")
    [call] = first.message.tool_calls
    same((call.function.name, json.loads(call.function.arguments)), ("weather", {"city": "Oslo"}))
    told = {"role": "tool", "tool_call_id": call.id, "content": "cold"}
    messages = [*more.pop("messages", ASKED), first.message, told]
    return client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, **more).choices[0].message


@feature("models")
def _() -> None:
    within(MODEL, [model.id for model in client.models.list()])
    same(client.models.retrieve(MODEL).id, MODEL)


@feature("chat")
def _() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=GREETING)
    same((answer.choices[0].message.content, answer.choices[0].finish_reason), (HELLO, "stop"))
    assert answer.usage
    assert answer.usage.completion_tokens


@feature("stream with usage")
def _() -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=MODEL, messages=GREETING, **options))
    same("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), HELLO)
    assert chunks[-1].usage


@feature("tool loop")
def _() -> None:
    same(loop().content, TOLD)


@feature("streamed tool call")
def _() -> None:
    with client.chat.completions.stream(model=MODEL, messages=ASKED, tools=TOOLS) as stream:
        final = stream.get_final_completion()
    same(json.loads(final.choices[0].message.tool_calls[0].function.arguments), {"city": "Oslo"})


@feature("tool_choice")
def _() -> None:
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "weather"}}]
    for choice in choices:
        answer = client.chat.completions.create(model=MODEL, messages=GREETING, tools=TOOLS, tool_choice=choice)
        same(answer.choices[0].message.tool_calls[0].function.name, "weather")


@feature("parse")
def _() -> None:
    messages: Any = [{"role": "user", "content": AS_JSON}]
    parsed = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Report)
    same(parsed.choices[0].message.parsed, Report(**REPORT))


@feature("tools with response_format")
def _() -> None:
    messages: Any = [{"role": "user", "content": AS_JSON}]
    first = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, response_format=FORM).choices[0]
    [call] = first.message.tool_calls
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "cold"}]
    last = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, response_format=FORM)
    same(json.loads(last.choices[0].message.content or ""), REPORT)


@feature("json_object")
def _() -> None:
    messages: Any = [{"role": "user", "content": AS_JSON}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, response_format={"type": "json_object"})
    same(json.loads(answer.choices[0].message.content or ""), REPORT)


@feature("n and logprobs")
def _() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=GREETING, n=2, logprobs=True, top_logprobs=2)
    same([choice.message.content for choice in answer.choices], [HELLO, HELLO])
    same(len(answer.choices[0].logprobs.content[0].top_logprobs), 2)


@feature("completions")
def _() -> None:
    options: Any = {"model": TEXT_MODEL, "prompt": ["the cat", "a dog"], "max_tokens": 4, "echo": True, "logprobs": 1}
    answer = client.completions.create(**options)
    same(len(answer.choices), 2)
    assert answer.choices[0].text.startswith("the cat")
    chunks = client.completions.create(model=TEXT_MODEL, prompt="the cat", max_tokens=4, stream=True)
    assert any(chunk.choices[0].finish_reason for chunk in chunks)


@feature("responses")
def _() -> None:
    same(client.responses.create(model=MODEL, input="hello").output_text, HELLO)
    with client.responses.stream(model=MODEL, input="hello") as stream:
        same(stream.get_final_response().output_text, HELLO)
    same(client.responses.parse(model=MODEL, input=AS_JSON, text_format=Report).output_parsed, Report(**REPORT))


@feature("responses tool loop")
def _() -> None:
    tools: Any = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}]
    said: Any = [{"role": "user", "content": AS_JSON}]
    first = client.responses.parse(model=MODEL, input=said, tools=tools, text_format=Report)
    [call] = first.output
    said += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "cold"}]
    last = client.responses.parse(model=MODEL, input=said, tools=tools, text_format=Report)
    same(last.output_parsed, Report(**REPORT))


@feature("embeddings")
def _() -> None:
    default = client.embeddings.create(model=EMBEDDING_MODEL, input=["the cat", "a dog"])
    floats = client.embeddings.create(model=EMBEDDING_MODEL, input="the cat", encoding_format="float")
    same(len(default.data), 2)
    assert max(abs(a - b) for a, b in zip(default.data[0].embedding, floats.data[0].embedding, strict=True)) < 1e-6
    raw: Any = client.embeddings.create(model=EMBEDDING_MODEL, input="the cat", encoding_format="base64")
    same(len(base64.b64decode(raw.data[0].embedding)), 4 * len(floats.data[0].embedding))


@feature("errors")
def _() -> None:
    try:
        client.chat.completions.create(model="no/such", messages=GREETING)
    except openai.NotFoundError as error:
        same(error.code, "model_not_found")
    else:
        raise AssertionError("no error")


@feature("async and hanging up")
async def _() -> None:
    answer = await asynchronous.chat.completions.create(model=MODEL, messages=GREETING)
    same(answer.choices[0].message.content, HELLO)
    async with await asynchronous.chat.completions.create(model=MODEL, messages=GREETING, stream=True) as stream:
        async for _chunk in stream:
            break


@feature("responses kept by the server", known="the server keeps no responses: `previous_response_id` is refused")
def _() -> None:
    first = client.responses.create(model=MODEL, input="hello", store=True)
    client.responses.create(model=MODEL, input="hello", previous_response_id=first.id)


@feature("moderations, files, images, audio", known="no such routes: 404 in OpenAI's shape")
def _() -> None:
    client.moderations.create(input="hello")


main()
