# /// script
# requires-python = ">=3.11"
# dependencies = ["text-generation==0.7.0"]
# [tool.local-llm]
# environment = "text-generation"
# ///
"""TGI's own client: generate, its stream, and chats."""

from __future__ import annotations

from _features import ADDRESS, HELLO, TEXT_MODEL, URL, feature, main, same
from text_generation import AsyncClient, Client

text = f"{URL}/api/huggingface/models/{TEXT_MODEL}"


@feature("generate")
def _() -> None:
    same(Client(text).generate("the cat", max_new_tokens=5).details.generated_tokens, 5)


@feature("generate_stream")
def _() -> None:
    assert list(Client(text).generate_stream("the cat", max_new_tokens=5))[-1].generated_text is not None


@feature("chat")
def _() -> None:
    same(Client(ADDRESS).chat([{"role": "user", "content": "hello"}]).choices[0].message.content, HELLO)


@feature("async generate")
async def _() -> None:
    same((await AsyncClient(text).generate("the cat", max_new_tokens=5)).details.generated_tokens, 5)


main()
