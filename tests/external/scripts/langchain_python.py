# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "langchain==1.5.2",
#   "langchain-openai==1.7.4",
#   "langchain-huggingface==1.2.3",
#   "langchain-ollama==1.1.0",
#   "langchain-anthropic==1.7.10",
# ]
# [tool.local-llm]
# environment = "langchain"
# ///
"""LangChain with its four packages that reach this server: chats, streams, structured output, agents, vectors."""

from __future__ import annotations

from typing import Any

from _features import (
    AS_JSON,
    EMBEDDING_MODEL,
    HELLO,
    MODEL,
    QUESTION,
    REPORT,
    TEXT_MODEL,
    TOLD,
    URL,
    V1,
    feature,
    main,
    same,
)
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool
from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Report(BaseModel):
    """What the weather is."""

    city: str
    cold: bool


calls: list[str] = []


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    calls.append(city)
    return f"{city}: cold"


def endpoint(model: str) -> HuggingFaceEndpoint:
    address = f"{URL}/api/huggingface/models/{model}"
    return HuggingFaceEndpoint(endpoint_url=address, max_new_tokens=40, huggingfacehub_api_token="hf_none")


MODELS: dict[str, Any] = {
    "chat": ChatOpenAI(base_url=V1, api_key="none", model=MODEL),
    "responses": ChatOpenAI(base_url=V1, api_key="none", model=MODEL, use_responses_api=True),
    "anthropic": ChatAnthropic(base_url=URL, api_key="none", model=MODEL, max_tokens=200),
    "ollama": ChatOllama(base_url=URL, model=MODEL),
    "huggingface": ChatHuggingFace(llm=endpoint(MODEL), model_id=MODEL),
}


def features(name: str, model: Any) -> None:
    hugging = "the library's class for Hugging Face has no such form" if name == "huggingface" else ""

    @feature(f"{name} invoke, stream, batch")
    def _() -> None:
        same(model.invoke("hello").text, HELLO)
        same("".join(part.text for part in model.stream("hello")), HELLO)
        same([answer.text for answer in model.batch(["hello", "hello"])], [HELLO, HELLO])

    @feature(f"{name} create_agent")
    def _() -> None:
        calls.clear()
        state = create_agent(model, [weather]).invoke({"messages": [("user", QUESTION)]})
        same((state["messages"][-1].text, calls), (TOLD, ["Oslo"]))

    @feature(f"{name} agent with ProviderStrategy", known=hugging)
    def _() -> None:
        agent = create_agent(model, [weather], response_format=ProviderStrategy(Report))
        same(agent.invoke({"messages": [("user", AS_JSON)]})["structured_response"], Report(**REPORT))

    single = "the library's class takes `tool_choice` with one tool only" if name == "huggingface" else ""

    @feature(f"{name} agent with ToolStrategy", known=single)
    def _() -> None:
        agent = create_agent(model, [weather], response_format=ToolStrategy(Report))
        same(agent.invoke({"messages": [("user", QUESTION)]})["structured_response"], Report(**REPORT))

    @feature(f"{name} with_structured_output", known=hugging)
    def _() -> None:
        same(model.with_structured_output(Report).invoke(AS_JSON), Report(**REPORT))
        if name != "anthropic":
            same(model.with_structured_output(Report, method="json_schema").invoke(AS_JSON), Report(**REPORT))
        if name in ("chat", "responses"):
            chosen = model.with_structured_output(Report, method="json_schema", tools=[weather], strict=True)
            same(chosen.invoke(AS_JSON), None)  # the model calls the tool


for each, one in MODELS.items():
    features(each, one)


@feature("completions")
def _() -> None:
    assert OpenAI(base_url=V1, api_key="none", model=TEXT_MODEL, max_tokens=8).invoke("the cat") is not None
    assert OllamaLLM(base_url=URL, model=TEXT_MODEL, num_predict=8).invoke("the cat") is not None
    assert endpoint(TEXT_MODEL).invoke("the cat") is not None


@feature("embeddings")
def _() -> None:
    open_ai = OpenAIEmbeddings(base_url=V1, api_key="none", model=EMBEDDING_MODEL, check_embedding_ctx_length=False)
    same(len(open_ai.embed_documents(["the cat", "a dog"])), 2)
    same(len(OllamaEmbeddings(base_url=URL, model=EMBEDDING_MODEL).embed_documents(["the cat", "a dog"])), 2)


@feature("OpenAIEmbeddings as they come", known="the library counts tokens with tiktoken's file, which it downloads")
def _() -> None:
    OpenAIEmbeddings(base_url=V1, api_key="none", model=EMBEDDING_MODEL).embed_query("the cat")


main()
