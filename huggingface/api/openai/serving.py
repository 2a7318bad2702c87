"""Code that OpenAI's routes share: ids, names, counts, log-probabilities."""

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

# The engine's names, and OpenAI's for the same.
NAMES: Mapping[str, str] = {"max_new_tokens": "max_tokens", "stop_strings": "stop"}
# The server and its version: some clients (TGI's) accept no chat without it.
FINGERPRINT = f"local-llm-{VERSION}"


def new_id(kind: str) -> str:
    """Makes an id in OpenAI's form: `chatcmpl-…`."""
    return f"{kind}{secrets.token_hex(12)}"


def now() -> int:
    """The present time in seconds since 1970."""
    return int(time.time())


@dataclass
class Counted:
    """Counts the tokens of all answers to one request. Each prompt counts once, however many answers it gets."""

    answers: int  # to each prompt
    reasoning_tokens: int | None = 0  # None for routes without reasoning
    _latest: dict[int, Usage] = field(default_factory=dict)  # the last usage of each generation

    def add(self, chunk: Chunk) -> None:
        """Counts a chunk of a generation."""
        if (usage := chunk.usage or chunk.so_far) is not None:
            self._latest[chunk.index] = usage

    @property
    def prompt_tokens(self) -> int:
        """The tokens of the prompts."""
        return sum(usage.prompt_tokens for usage in self._of_each_prompt().values())

    @property
    def completion_tokens(self) -> int:
        """The generated tokens."""
        return sum(usage.completion_tokens for usage in self._latest.values())

    def so_far(self) -> TokenCounts:
        """The counts so far, as vLLM sends them with every piece."""
        read, made = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def to_dict(self) -> TokenCounts:
        """OpenAI's `usage` of chats and completions."""
        told = self.so_far()
        told["prompt_tokens_details"] = {
            "cached_tokens": sum(usage.cached_tokens for usage in self._of_each_prompt().values())
        }
        if self.reasoning_tokens is not None:
            thought = min(self.reasoning_tokens, self.completion_tokens)  # counted from the text, so it may be too high
            told["completion_tokens_details"] = {"reasoning_tokens": thought}
        return told

    def _of_each_prompt(self) -> dict[int, Usage]:
        """The usage of the first answer to each prompt: later ones find the prompt in the cache only because of it."""
        first: dict[int, Usage] = {}
        for index in sorted(self._latest):
            first.setdefault(index // self.answers, self._latest[index])
        return first


def within(text: str, tokens: Iterable[Token]) -> list[Token]:
    """The generated tokens that `text` holds: without an end token, and without a stop string's tokens."""
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
    """Assigns the tokens of a stream to the chunks whose text holds them, and drops all others: see `within`."""

    def __init__(self) -> None:
        self._tokens: list[Token] = []
        self._bytes = 0  # bytes of text whose tokens are not sent yet

    def of(self, chunk: Chunk) -> list[Token]:
        """The tokens to send with a chunk."""
        self._tokens += [token for token in chunk.tokens if not token.special]
        self._bytes += len(chunk.text.encode("utf-8", "replace"))
        told = []
        while self._tokens and self._bytes > 0:
            told.append(self._tokens.pop(0))
            self._bytes -= len(told[-1].raw)
        return told


def chat_logprobs(tokens: Iterable[Token]) -> ChatLogprobs:
    """The `logprobs` of a chat's choice."""

    def shown(token: Token) -> Likelihood:
        return {"token": token_text(token), "logprob": _finite(token.logprob), "bytes": list(token.raw)}

    return {
        "content": [{**shown(token), "top_logprobs": [shown(each) for each in token.top]} for token in tokens],
        "refusal": None,
    }


def token_text(token: Token) -> str:
    """A token's text; for a part of a character, its bytes in OpenAI's form."""
    try:
        return token.raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)


class Places:
    """Computes where the tokens of one completion begin in its text, in characters.

    A part of a character begins where the character does. Special tokens that the text does not show take no place.
    """

    def __init__(self, echo: str) -> None:
        """`echo` is the prompt's text at the start of the completion."""
        self.echo = echo
        self._at = len(echo)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of_prompt(self, tokens: Iterable[Token]) -> list[int]:
        """The places of the echoed prompt's tokens."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        places: list[int] = []
        at, open_since = 0, 0  # `open_since`: the first token of an incomplete character
        for token in tokens:
            places.append(at)
            if text := decoder.decode(token.raw):
                begin, at = self._found(text, at, special=token.special)
                places[open_since:] = [begin] * (len(places) - open_since)
            if text or not token.raw:
                open_since = len(places)
        return places

    def _found(self, text: str, at: int, *, special: bool) -> tuple[int, int]:
        """The start and end of a token's text in the echo, from `at`; either may lack the other's leading space."""
        for begin, shown in ((at, text), (at, text.removeprefix(" ")), (at + 1, text)):
            if self.echo.startswith(shown, begin) and (begin == at or self.echo[at : at + 1] == " "):
                return begin, begin + len(shown)
        # A special token that is not shown; else a tokenizer that changes letters.
        return at, at if special else min(at + len(text), len(self.echo))

    def of_made(self, tokens: Iterable[Token]) -> list[int]:
        """The places of the next generated tokens."""
        places = []
        for token in tokens:
            places.append(self._at)
            self._at += 0 if token.special else len(self._decoder.decode(token.raw))
        return places


def completion_logprobs(tokens: Sequence[Token], offsets: list[int], alternatives: int) -> CompletionLogprobs:
    """The `logprobs` of a completion's choice; `offsets` are its tokens' places in the text, in characters."""
    texts, values = [], []
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        texts.append(token_text(token))
        values.append(None if token.logprob is None else _finite(token.logprob))
        if token.logprob is None:
            tops.append(None)
            continue
        top = {token_text(each): _finite(each.logprob) for each in reversed(token.top[:alternatives])}
        top.setdefault(token_text(token), _finite(token.logprob))  # as OpenAI: the chosen token too, maybe one more
        tops.append(dict(sorted(top.items(), key=lambda item: -item[1])))
    return {
        "tokens": texts,
        "token_logprobs": values,
        "top_logprobs": tops if alternatives else None,
        "text_offset": offsets,
    }


def failure(error: LocalLLMError) -> OpenAIFailure:
    """The event that ends a failed stream."""
    return openai_body(str(error), status_of(error), error)


def _finite(logprob: float | None) -> float:
    """A log-probability that JSON can carry; -9999 means impossible, as in OpenAI's answers."""
    return -9999.0 if logprob is None or logprob < -9999.0 else logprob
