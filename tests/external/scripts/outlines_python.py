# /// script
# requires-python = ">=3.11"
# dependencies = ["outlines[openai]==1.3.3"]
# [tool.local-llm]
# environment = "outlines"
# ///
"""outlines over this server as OpenAI and as vLLM: text, classes, choices, streams."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import outlines
from _features import AS_JSON, HELLO, MODEL, REPORT, V1, feature, main, same
from pydantic import BaseModel


class Report(BaseModel):
    city: str
    cold: bool


client = openai.OpenAI(base_url=V1, api_key="none", max_retries=0)
MODELS: dict[str, Any] = {
    "from_openai": outlines.from_openai(client, MODEL),
    "from_vllm": outlines.from_vllm(client, MODEL),
}


def features(name: str, model: Any) -> None:
    @feature(f"{name} text and stream")
    def _() -> None:
        same(model("hello"), HELLO)
        same("".join(model.stream("hello")), HELLO)

    @feature(f"{name} class")
    def _() -> None:
        same(json.loads(model(AS_JSON, Report)), REPORT)


for each, one in MODELS.items():
    features(each, one)


@feature("from_vllm choice and regex")
def _() -> None:
    same(MODELS["from_vllm"]("hello", Literal["Oslo"]), "Oslo")
    same(MODELS["from_vllm"]("hello", outlines.types.Regex("[0]{3}")), "000")


main()
