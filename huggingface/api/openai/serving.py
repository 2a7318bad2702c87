"""What OpenAI's routes have in common: ids, names, counts, log-probabilities."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import LocalLLMError
from ...types import Chunk, Token, Usage
from ..documented.system import VERSION
from ..http.errors import OpenAIFailure, openai_body, status_of
from .answers import ChatLogprobs, CompletionLogprobs, Likelihood, TokenCounts

DONE = b"[DONE]"

# What OpenAI names otherwise than the engine.
NAMES: Mapping[str, str] = {"max_new_tokens": "max_tokens", "stop_strings": "stop"}
# What made an answer: some clients (TGI's) read no chat without it.
FINGERPRINT = f"local-llm-{VERSION}"


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
    reasoning_tokens: int | None = 0  # None where nothing is ever thought
    _latest: dict[int, Usage] = field(default_factory=dict)  # of each generation

    def add(self, chunk: Chunk) -> None:
        """Count what a chunk of a generation tells."""
        if (usage := chunk.usage or chunk.so_far) is not None:
            self._latest[chunk.index] = usage

    @property
    def prompt_tokens(self) -> int:
        """Tokens read."""
        return sum(usage.prompt_tokens for usage in self._of_each_prompt().values())

    @property
    def completion_tokens(self) -> int:
        """Tokens made."""
        return sum(usage.completion_tokens for usage in self._latest.values())

    def so_far(self) -> TokenCounts:
        """The counts up to here, as vLLM tells them with every piece."""
        read, made = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def to_dict(self) -> TokenCounts:
        """OpenAI's `usage` of chats and completions."""
        told = self.so_far()
        told["prompt_tokens_details"] = {
            "cached_tokens": sum(usage.cached_tokens for usage in self._of_each_prompt().values())
        }
        if self.reasoning_tokens is not None:
            thought = min(self.reasoning_tokens, self.completion_tokens)  # counted by its text, which may be cut
            told["completion_tokens_details"] = {"reasoning_tokens": thought}
        return told

    def _of_each_prompt(self) -> dict[int, Usage]:
        """The count of the first answer to each: the others find the prompt in the cache because of it."""
        first: dict[int, Usage] = {}
        for index in sorted(self._latest):
            first.setdefault(index // self.answers, self._latest[index])
        return first


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


class Told:
    """The tokens of a stream, each told with the text that holds it, and none that the text does not: see `within`."""

    def __init__(self) -> None:
        self._tokens: list[Token] = []
        self._bytes = 0  # of text whose tokens are not told yet

    def of(self, chunk: Chunk) -> list[Token]:
        """The tokens to tell with a chunk."""
        self._tokens += [token for token in chunk.tokens if not token.special]
        self._bytes += len(chunk.text.encode("utf-8", "replace"))
        told = []
        while self._tokens and self._bytes > 0:
            told.append(self._tokens.pop(0))
            self._bytes -= len(told[-1].raw)
        return told


def chat_logprobs(tokens: Iterable[Token]) -> ChatLogprobs:
    """`logprobs` of a choice of a chat."""

    def shown(token: Token) -> Likelihood:
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


class Places:
    """Where the tokens of one completion begin in its text, in characters; a part of a character, where that begins.

    Special tokens that the text does not show, take no place in it.
    """

    def __init__(self, echo: str) -> None:
        """`echo` is what the text begins with, of the prompt."""
        self.echo = echo
        self._at = len(echo)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of_prompt(self, tokens: Iterable[Token]) -> list[int]:
        """The places of the echoed prompt's tokens."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        places: list[int] = []
        at, open_since = 0, 0  # the first token of a character that is not complete
        for token in tokens:
            places.append(at)
            if text := decoder.decode(token.raw):
                begin, at = self._found(text, at, special=token.special)
                places[open_since:] = [begin] * (len(places) - open_since)
            if text or not token.raw:
                open_since = len(places)
        return places

    def _found(self, text: str, at: int, *, special: bool) -> tuple[int, int]:
        """Where a token's text begins in the echo, from `at` on, and ends; either may lack the other's space."""
        for begin, shown in ((at, text), (at, text.removeprefix(" ")), (at + 1, text)):
            if self.echo.startswith(shown, begin) and (begin == at or self.echo[at : at + 1] == " "):
                return begin, begin + len(shown)
        # A special token that is not shown; else a tokenizer that reads other letters than there are.
        return at, at if special else min(at + len(text), len(self.echo))

    def of_made(self, tokens: Iterable[Token]) -> list[int]:
        """The places of the next tokens that were made."""
        places = []
        for token in tokens:
            places.append(self._at)
            self._at += 0 if token.special else len(self._decoder.decode(token.raw))
        return places


def completion_logprobs(tokens: Sequence[Token], offsets: list[int], alternatives: int) -> CompletionLogprobs:
    """`logprobs` of a choice of a completion, whose tokens begin at `offsets`, in characters of the text."""
    texts, values = [], []
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        texts.append(token_text(token))
        values.append(None if token.logprob is None else _finite(token.logprob))
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


def failure(error: LocalLLMError) -> OpenAIFailure:
    """The event that ends a stream that failed."""
    return openai_body(str(error), status_of(error), error)


def _finite(logprob: float | None) -> float:
    """A log-probability that JSON can carry; OpenAI too has -9999 for what is impossible."""
    return -9999.0 if logprob is None or logprob < -9999.0 else logprob
