# /// script
# requires-python = ">=3.11"
# dependencies = ["crewai==1.15.30"]
# [tool.local-llm]
# environment = "crewai"
# ///
"""CrewAI: its LLM, and a crew of one agent."""

from __future__ import annotations

import os

os.environ.update(CREWAI_DISABLE_TELEMETRY="true", CREWAI_TRACING_ENABLED="false", OPENAI_API_KEY="none")

from _features import AS_JSON, HELLO, MODEL, REPORT, V1, feature, main, same
from crewai import LLM, Agent, Crew, Task
from pydantic import BaseModel


class Report(BaseModel):
    city: str
    cold: bool


llm = LLM(model=f"openai/{MODEL}", base_url=V1, api_key="none")


@feature("LLM")
def _() -> None:
    same(llm.call("hello"), HELLO)


@feature("LLM with response_format")
def _() -> None:
    made = LLM(model=f"openai/{MODEL}", base_url=V1, api_key="none", response_format=Report).call(AS_JSON)
    same(made.model_dump() if isinstance(made, BaseModel) else Report.model_validate_json(made).model_dump(), REPORT)


@feature("crew")
def _() -> None:
    agent = Agent(role="Greeter", goal="Greet", backstory="Polite", llm=llm)
    task = Task(description="Say hello", expected_output="A greeting", agent=agent)
    assert HELLO in Crew(agents=[agent], tasks=[task]).kickoff().raw


main()
