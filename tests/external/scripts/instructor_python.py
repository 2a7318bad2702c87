# /// script
# requires-python = ">=3.11"
# dependencies = ["instructor==1.17.0"]
# [tool.local-llm]
# environment = "instructor"
# ///
"""instructor over `openai`: its modes, partial objects, and a list of objects."""

from __future__ import annotations

from typing import Any

import instructor
import openai
from _features import AS_JSON, MODEL, REPORT, V1, feature, main, same
from pydantic import BaseModel


class Report(BaseModel):
    city: str
    cold: bool


MESSAGES: Any = [{"role": "user", "content": AS_JSON}]


def ask(mode: instructor.Mode) -> Any:
    client = instructor.from_openai(openai.OpenAI(base_url=V1, api_key="none", max_retries=0), mode=mode)
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, response_model=Report, max_retries=0)


def features(mode: instructor.Mode) -> None:
    @feature(mode.name)
    def _() -> None:
        same(ask(mode).model_dump(), REPORT)


for name in ("TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON", "RESPONSES_TOOLS"):
    features(instructor.Mode[name])


@feature("partial stream")
def _() -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=V1, api_key="none"), mode=instructor.Mode.JSON_SCHEMA)
    parts = list(client.chat.completions.create_partial(model=MODEL, messages=MESSAGES, response_model=Report))
    same(parts[-1].model_dump(), REPORT)


@feature("async")
async def _() -> None:
    client = instructor.from_openai(openai.AsyncOpenAI(base_url=V1, api_key="none"), mode=instructor.Mode.TOOLS)
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, response_model=Report)
    same(answer.model_dump(), REPORT)


main()
