# /// script
# requires-python = ">=3.11"
# dependencies = ["magentic==0.41.1"]
# [tool.local-llm]
# environment = "magentic"
# ///
"""magentic: prompt functions that give text, objects, calls, and streams."""

# No postponed annotations: magentic reads those of functions made here.
from _features import AS_JSON, HELLO, MODEL, QUESTION, REPORT, TOLD, V1, feature, main, same
from magentic import OpenaiChatModel, StreamedStr, prompt, prompt_chain
from pydantic import BaseModel

model = OpenaiChatModel(MODEL, base_url=V1, api_key="none")


class Report(BaseModel):
    city: str
    cold: bool


def weather(city: str) -> str:
    """The weather in a city."""
    return f"{city}: cold"


@feature("text and stream")
def _() -> None:
    @prompt("hello", model=model)
    def greet() -> str: ...

    @prompt("hello", model=model)
    def stream() -> StreamedStr: ...

    same(greet(), HELLO)
    same("".join(stream()), HELLO)


@feature("object")
def _() -> None:
    @prompt(AS_JSON, model=model)
    def report() -> Report: ...

    same(report().model_dump(), REPORT)


@feature("functions")
def _() -> None:
    @prompt_chain(QUESTION, functions=[weather], model=model)
    def ask() -> str: ...

    same(ask(), TOLD)


main()
