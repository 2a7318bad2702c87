"""`POST /api/generate`: answers a prompt, as the user's turn of a chat or raw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flask import Response

from ...chat.parser import AnswerParser, AnswerReader
from ...errors import InvalidRequest
from ...served import ServedModel
from ...types import Constraint, GenerationRequest
from ..http.fields import note_ignored
from ..openai.conversation import Conversation, Wish
from .answering import Said, Source, answer, form_of, idle
from .names import find
from .schemas import OllamaGenerateBody
from .thinking import variables


def generate(body: OllamaGenerateBody) -> dict[str, Any] | Response:
    """Answers a prompt; without one, loads or unloads the model.

    Raises: the errors of loading and generating.
    """
    record = find(body.model)
    prompt = body.prompt
    if not prompt:
        return idle(record, body, "generate", response_of(Said()))
    messages = [{"role": "system", "content": body.system}] if body.system else []
    messages.append({"role": "user", "content": prompt})

    def source(model: ServedModel) -> Source:
        traits = model.chat
        told = variables(body.think, traits, body.model)
        form = form_of(body.format)
        if body.raw or traits.template is None:
            if body.think is not None:
                note_ignored("think")  # only the chat template could pass it to the model
            if body.system:
                raise InvalidRequest(
                    f"Invalid value for field 'system': model '{record.model_id}' has no chat template, and so no "
                    "place for it",
                    "system",
                )
            return _Raw(prompt, form)
        return Conversation(traits, messages, Wish(form=form, template=told))

    return answer(record, body, "generate", source, response_of)


def response_of(said: Said) -> dict[str, Any]:
    """A text, or a piece of one."""
    return {"response": said.content, **({"thinking": said.thinking} if said.thinking else {})}


@dataclass(frozen=True, slots=True)
class _Raw:
    """A prompt without a chat template; its answer is all text."""

    prompt: str
    form: Constraint | None

    def requests(
        self,
        parameters: Mapping[str, Any],
        count: int,
        *,
        streams: bool,
        logprobs: int | None,
        adapter: str | None = None,
    ) -> list[GenerationRequest]:
        """The generations that continue the prompt."""
        request = GenerationRequest(
            parameters,
            prompt=self.prompt,
            streams=streams,
            fills=True,
            logprobs=logprobs,
            constraint=self.form,
            adapter=adapter,
        )
        return [request] * count

    def parser(self, prompt_end: str) -> AnswerReader:  # noqa: ARG002 - the answer does not depend on it
        """A reader that treats the whole answer as text."""
        return AnswerParser(None, None)
