"""What OpenAI's routes have in common: ids, names, counts, log-probabilities."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import LocalLLMError
from ...records import Chunk, Token
from ..errors import openai_body, status_of

DONE = b"[DONE]"

# What OpenAI names otherwise than the engine.
NAMES: Mapping[str, str] = {"max_new_tokens": "max_tokens", "stop_strings": "stop"}


def new_id(kind: str) -> str:
    """An id as OpenAI makes them: `chatcmpl-…`."""
    return f"{kind}{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


@dataclass
class Counted:
    """Tokens read and made, over the answers to one request. Each prompt counts once, however many answers it gets."""

    answers: int  # to each prompt
    prompt_tokens: int = 0
    completion_tokens: int = 0
    _seen: set[int] = field(default_factory=set)

    def add(self, chunk: Chunk) -> None:
        """Count what the last chunk of a generation tells."""
        if chunk.usage is None:
            return
        self.completion_tokens += chunk.usage.completion_tokens
        prompt = chunk.index // self.answers
        if prompt not in self._seen:
            self._seen.add(prompt)
            self.prompt_tokens += chunk.usage.prompt_tokens

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's `usage` of chats and completions."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def within(text: str, tokens: Iterable[Token]) -> list[Token]:
    """Those of the tokens made that `text` holds: no end token, and nothing from a stop string on."""
    left = len(text.encode("utf-8", "replace"))
    kept = []
    for token in tokens:
        if token.special and token.text not in text:
            continue
        if left <= 0:
            break
        kept.append(token)
        left -= len(token.raw)
    return kept


def chat_logprobs(tokens: Iterable[Token]) -> dict[str, Any]:
    """`logprobs` of a choice of a chat."""

    def shown(token: Token) -> dict[str, Any]:
        return {"token": token_text(token), "logprob": _finite(token.logprob), "bytes": list(token.raw)}

    return {
        "content": [{**shown(token), "top_logprobs": [shown(each) for each in token.top]} for token in tokens],
        "refusal": None,
    }


def token_text(token: Token) -> str:
    """A token as text; one that is a part of a character only, as OpenAI writes it."""
    try:
        return token.raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)


def completion_logprobs(tokens: Iterable[Token], offset: int, alternatives: int) -> dict[str, Any]:
    """`logprobs` of a choice of a completion, whose first token begins at `offset` characters of the text."""
    texts, values, offsets = [], [], []
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        texts.append(token_text(token))
        values.append(None if token.logprob is None else _finite(token.logprob))
        offsets.append(offset)
        offset += len(token.text)
        if token.logprob is None:
            tops.append(None)
            continue
        top = {token_text(each): _finite(each.logprob) for each in reversed(token.top[:alternatives])}
        top.setdefault(token_text(token), _finite(token.logprob))  # OpenAI's holds the chosen one too: one more, maybe
        tops.append(dict(sorted(top.items(), key=lambda item: -item[1])))
    return {
        "tokens": texts,
        "token_logprobs": values,
        "top_logprobs": tops if alternatives else None,
        "text_offset": offsets,
    }


def failure(error: LocalLLMError) -> dict[str, Any]:
    """The event that ends a stream that failed."""
    return openai_body(str(error), status_of(error), error)


def _finite(logprob: float | None) -> float:
    """A log-probability that JSON can carry; OpenAI too has -9999 for what is impossible."""
    return -9999.0 if logprob is None or logprob < -9999.0 else logprob
