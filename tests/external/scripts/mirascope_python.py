# /// script
# requires-python = ">=3.11"
# dependencies = ["mirascope[openai,anthropic]==2.8.2"]
# [tool.local-llm]
# environment = "mirascope"
# ///
"""mirascope over OpenAI's completions: a call, a stream, a tool loop, a format."""

from __future__ import annotations

import os

from _features import AS_JSON, HELLO, MODEL, QUESTION, REPORT, TOLD, V1, feature, main, same
from mirascope import llm
from pydantic import BaseModel

llm.register_provider("openai", scope="openai/", base_url=V1, api_key="none")
ID = f"openai/{os.environ['SHORT_MODEL']}:completions"


class Report(BaseModel):
    city: str
    cold: bool


@llm.tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"{city}: cold"


@feature("call and stream")
def _() -> None:
    model = llm.Model(ID)
    same(model.call("hello").text(), HELLO)
    same("".join(model.stream("hello").text_stream()).strip(), HELLO)


@feature("tool loop")
def _() -> None:
    response = llm.Model(ID).call(QUESTION, tools=[weather])
    while response.tool_calls:
        response = response.resume(response.execute_tools())
    same(response.text(), TOLD)


@feature("format")
def _() -> None:
    same(llm.Model(ID).call(AS_JSON, format=Report).parse().model_dump(), REPORT)


@feature("ids with an organization", known="the library cuts an id at its second slash")
def _() -> None:
    same(llm.Model(f"openai/{MODEL}:completions").call("hello").text(), HELLO)


main()
