# /// script
# requires-python = ">=3.11"
# dependencies = ["anthropic==2.14.0"]
# [tool.local-llm]
# environment = "sdks"
# ///
"""The `anthropic` package: messages, streams, a tool loop, counting, models, errors."""

from __future__ import annotations

from typing import Any

import anthropic
from _features import HELLO, MODEL, PARAMETERS, QUESTION, TOLD, URL, feature, main, same, within

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0, timeout=60)
GREETING: Any = [{"role": "user", "content": "hello"}]
TOOLS: Any = [{"name": "weather", "description": "The weather", "input_schema": PARAMETERS}]


@feature("models")
def _() -> None:
    within(MODEL, [model.id for model in client.models.list()])


@feature("messages")
def _() -> None:
    answer = client.messages.create(model=MODEL, max_tokens=50, messages=GREETING, system="Be brief.")
    same((answer.content[0].text, answer.stop_reason), (HELLO, "end_turn"))


@feature("stream")
def _() -> None:
    with client.messages.stream(model=MODEL, max_tokens=50, messages=GREETING) as stream:
        same("".join(stream.text_stream), HELLO)
        same(stream.get_final_message().stop_reason, "end_turn")


@feature("tool loop")
def _() -> None:
    said: Any = [{"role": "user", "content": QUESTION}]
    first = client.messages.create(model=MODEL, max_tokens=90, messages=said, tools=TOOLS)
    same(first.stop_reason, "tool_use")
    [call] = [block for block in first.content if block.type == "tool_use"]
    same((call.name, call.input), ("weather", {"city": "Oslo"}))
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "cold", "cache_control": {"type": "ephemeral"}}
    said += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    same(client.messages.create(model=MODEL, max_tokens=90, messages=said, tools=TOOLS).content[0].text, TOLD)


@feature("streamed tool call")
def _() -> None:
    said: Any = [{"role": "user", "content": QUESTION}]
    with client.messages.stream(model=MODEL, max_tokens=90, messages=said, tools=TOOLS) as stream:
        same(stream.get_final_message().content[0].input, {"city": "Oslo"})


@feature("tool runner")
def _() -> None:
    @anthropic.beta_tool
    def weather(city: str) -> str:
        """The weather.

        Args:
            city: Where.
        """
        return f"{city}: cold"

    said: Any = [{"role": "user", "content": QUESTION}]
    runner = client.beta.messages.tool_runner(model=MODEL, max_tokens=90, messages=said, tools=[weather])
    same(runner.until_done().content[0].text, TOLD)


@feature("count_tokens")
def _() -> None:
    assert client.messages.count_tokens(model=MODEL, messages=GREETING).input_tokens > 0


@feature("errors")
def _() -> None:
    try:
        client.messages.create(model="no/such", max_tokens=5, messages=GREETING)
    except anthropic.NotFoundError:
        return
    raise AssertionError("no error")


main()
