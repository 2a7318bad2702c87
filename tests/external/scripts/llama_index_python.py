# /// script
# requires-python = ">=3.11"
# dependencies = ["llama-index-llms-openai-like==0.8.1", "llama-index-embeddings-openai-like==0.4.0"]
# [tool.local-llm]
# environment = "llama-index"
# ///
"""LlamaIndex's OpenAI-like classes: chats, completions, structured output, an agent with a tool, vectors."""

from __future__ import annotations

from _features import (
    AS_JSON,
    EMBEDDING_MODEL,
    HELLO,
    MODEL,
    QUESTION,
    REPORT,
    TEXT_MODEL,
    TOLD,
    V1,
    feature,
    main,
    same,
)
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Report(BaseModel):
    """What the weather is."""

    city: str
    cold: bool


def llm(**more: object) -> OpenAILike:
    options = {"is_chat_model": True, "is_function_calling_model": True, "max_retries": 0, **more}
    return OpenAILike(**{"model": MODEL, "api_base": V1, "api_key": "none", **options})


def weather(city: str) -> str:
    """The weather in a city."""
    return f"{city}: cold"


@feature("chat and stream")
def _() -> None:
    said = [ChatMessage(role="user", content="hello")]
    same(llm().chat(said).message.content, HELLO)
    same("".join(part.delta or "" for part in llm().stream_chat(said)), HELLO)
    same(llm().complete("hello").text, HELLO)


@feature("completion model")
def _() -> None:
    assert llm(model=TEXT_MODEL, is_chat_model=False, max_tokens=5).complete("the cat").text is not None


@feature("structured output by a tool")
def _() -> None:
    made = llm().as_structured_llm(Report).complete(AS_JSON).raw
    same(made, Report(**REPORT))


@feature("structured output by a form")
def _() -> None:
    made = llm(should_use_structured_outputs=True).as_structured_llm(Report).complete(AS_JSON).raw
    same(made, Report(**REPORT))


@feature("FunctionAgent")
async def _() -> None:
    same(str(await FunctionAgent(tools=[weather], llm=llm()).run(QUESTION)), TOLD)
    same(str(await FunctionAgent(tools=[weather], llm=llm(), streaming=False).run(QUESTION)), TOLD)


@feature("embeddings")
def _() -> None:
    embed = OpenAILikeEmbedding(model_name=EMBEDDING_MODEL, api_base=V1, api_key="none")
    same(len(embed.get_text_embedding_batch(["the cat", "a dog"])), 2)


main()
