"""The contract on `/generate` and `/pipeline` as pydantic models. See `schemas`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ...tasks import TASKS
from ..http.fields import Fields
from ..parameters.effective import GENERATE_DEFAULTS
from ..parameters.schemas import TASK_PARAMETERS, GenerationParameters, Stop, Stops
from .model_schemas import ModelInfo
from .schemas import MODEL_ID_TEXT, Answer, KeepAlive, Strict, optional, streaming


def _without_empty(stops: Any) -> Any:
    """The stop strings without empty ones."""
    return [stop for stop in stops if stop != ""] if isinstance(stops, list) else stops


def _example(**fields: Any) -> ConfigDict:
    """The body that the page at `/docs` offers to send, instead of one with every field."""
    body = {"model_id": "HuggingFaceTB/SmolLM2-135M-Instruct", **fields}
    return cast(ConfigDict, {"openapi_extra": {"example": body}})


class Message(Strict):
    """One turn of a chat. Programs send back messages that they received, so further fields are dropped."""

    drops = True
    place = "messages"

    role: Literal["system", "user", "assistant"]
    content: str


class GenerateBody(GenerationParameters):
    """Text to continue, or a chat to answer, and parameters. Give exactly one of `prompt` and `messages`.

    Missing parameters come from the model's registered parameters, then from the defaults named here.
    """

    empties = frozenset({"stop"})

    model_config = _example(prompt="What is the capital of Japan?", max_new_tokens=30)

    model_id: str = Field(description=MODEL_ID_TEXT)
    prompt: str = optional("Input text. For a conversational model it is the user's turn of a new chat.")
    messages: list[Message] = optional("A chat, oldest turn first.", min_length=1)
    stream: bool = optional("Send the text as it is generated, as server-sent events.")
    timeout: float = optional("Seconds from now, after which the request is cancelled.", gt=0, le=86400)
    keep_alive: KeepAlive = optional("Seconds that the model stays in memory after this use; -1 is for ever.")
    adapter: str = optional("Which of the model's adapters to use; without it, none.", min_length=1)
    stop: Annotated[Stop | Stops | Annotated[list[Stop], Field(max_length=0)], BeforeValidator(_without_empty)] = (
        optional("The same as `stop_strings`.")
    )
    json_schema: dict[str, Any] = optional("The text is JSON of this schema. At most one of these five.")
    json_object: Literal[True] = optional("The text is a JSON object.")
    regex: str = optional("The whole text matches this regular expression.", min_length=1)
    choice: list[str] = optional("The text is one of these.", min_length=1)
    grammar: str = optional("The text follows this grammar: llguidance's dialect of Lark, or GBNF.", min_length=1)

    @classmethod
    def model_json_schema(cls, *arguments: Any, **options: Any) -> dict[str, Any]:
        """pydantic's schema, with the defaults for models without registered parameters."""
        schema = super().model_json_schema(*arguments, **options)
        for name, value in GENERATE_DEFAULTS.items():
            schema["properties"][name]["description"] += (
                f" Default, where the model has none registered: {json.dumps(value)}."
            )
        return schema


class Usage(BaseModel):
    """Tokens, counted by the model's own tokenizer, special ones included."""

    prompt_tokens: int
    completion_tokens: int = Field(description="Of all returned texts together.")
    total_tokens: int


class Timings(BaseModel):
    """Times in seconds since the request reached the model."""

    queue: float = Field(description="Until it was admitted to the batch.")
    first_token: float = Field(description="Until its first token was generated.")
    total: float = Field(description="Until its last token was generated.")
    tokens_per_second: float = Field(description="Generated tokens, by the time after the queue.")


class GenerateAnswer(Answer):
    """The new text."""

    model_config = streaming(
        '`{"index": 0, "text": "…"}` for new text, `{"request_id": "…", "position": 3}` in the queue, and last '
        "this answer, or a failure."
    )

    response: str = Field(description="The new text only, without the prompt.")
    responses: list[str] | None = Field(None, description="All texts, where `num_return_sequences` asks for several.")
    model_used: str
    prompt: str | None = Field(None, description="The prompt as sent.")
    messages: list[Message] | None = Field(None, description="The messages as sent.")
    parameters: dict[str, Any] = Field(description="The parameters that were in effect.")
    model_info: ModelInfo
    finish_reason: Literal["stop", "length"] = Field(
        description="`stop`: an end token or a stop string came; `length`: a limit was reached."
    )
    finish_reasons: list[Literal["stop", "length"]] | None = Field(None, description="One for each of `responses`.")
    usage: Usage
    timings: Timings


class PipelineBody(Fields):
    """A task for a model. Every further field is a parameter of the task; one that it does not have is refused."""

    model_config = ConfigDict(
        **_example(task="text-generation", inputs="Once upon a time", max_new_tokens=30),
        extra="allow",
        strict=True,
        protected_namespaces=(),
    )

    model_id: str = Field(description=MODEL_ID_TEXT)
    task: str = Field(description="The task; `translation_xx_to_yy` names the languages.")
    inputs: Any = Field(description="One item or a list of them, in the form that the task takes.")
    timeout: float = optional("Seconds from now, after which the request is cancelled.", gt=0, le=86400)
    keep_alive: KeepAlive = optional("Seconds that the model stays in memory after this use; -1 is for ever.")
    adapter: str = optional("Which of the model's adapters to use; without it, none.", min_length=1)

    @classmethod
    def model_json_schema(cls, *arguments: Any, **options: Any) -> dict[str, Any]:
        """pydantic's schema, with the parameters of each task as further fields."""
        schema = super().model_json_schema(*arguments, **options)
        schema["anyOf"] = []
        for name, parameters in TASK_PARAMETERS.items():
            fields = parameters.model_json_schema(*arguments, **options)
            schema.setdefault("$defs", {}).update(fields.get("$defs", {}))
            task: dict[str, Any] = {"enum": [*TASKS[name].aliases, name]}
            if name == "translation":
                task = {"anyOf": [task, {"pattern": "^translation_[^_]+_to_[^_]+$"}]}
            branch = {"title": name, "properties": {"task": task, **fields["properties"]}}
            schema["anyOf"].append({**branch, "required": ["task", *fields.get("required", [])]})
        return schema


class PipelineAnswer(Answer):
    """The task's results in `transformers`' form."""

    model_config = ConfigDict(protected_namespaces=())

    results: Any
    model_used: str
    task: str
    inputs: Any
    model_info: ModelInfo
