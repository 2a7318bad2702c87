"""The published schemas of Hugging Face's text tasks: `PUBLISHED` has one for each, `/pipeline`'s own where they agree.

Source: the JSON schemas in `@huggingface/tasks`. A parameter that is not supported is refused by its name; unpublished
parameters of `/pipeline` work too.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from flask_openapi3 import Tag
from pydantic import BaseModel, ConfigDict, Field

from ..documented.schemas import Answer, streaming
from ..http.fields import Fields
from ..parameters.schemas import (
    TASK_PARAMETERS,
    AnyText,
    Parameters,
    Stop,
    TableQuestionAnsweringParameters,
    Text,
    TranslationParameters,
)

TAG = Tag(name="Hugging Face", description="The protocol of Hugging Face's own inference clients.")

_MAX_TOKENS = 2**31 - 1


class Grammar(Parameters):
    """The form of the text."""

    type: Literal["json", "json_schema", "regex"]
    value: Any


class HubTextGeneration(Parameters):
    """`text-generation`, as TGI has it."""

    adapter_id: Text | None = Field(None, description="Which of the model's adapters to use; without it, none.")
    best_of: int | None = Field(None, ge=1, le=64, description="Generate so many texts, and return the likeliest.")
    decoder_input_details: bool | None = Field(None, description="Show the prompt's tokens in the details.")
    details: bool | None = Field(None, description="Show the tokens.")
    do_sample: bool | None = Field(None, description="Sample each token at random by its probability.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    grammar: Grammar | None = Field(None, strict=False)
    max_new_tokens: int | None = Field(None, ge=1, le=_MAX_TOKENS, description="1024 where nothing else sets a limit.")
    repetition_penalty: float | None = Field(None, gt=0)
    return_full_text: bool | None = Field(None, description="Give the prompt before the text.")
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: list[Stop] | None = Field(None, max_length=64)
    stop_sequences: list[Stop] | None = Field(None, max_length=64, description="The same, under its older name.")
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=0, le=_MAX_TOKENS)
    top_n_tokens: int | None = Field(None, ge=1, le=20, description="Alternatives to show for each token.")
    top_p: float | None = Field(None, gt=0, le=1)
    truncate: int | None = Field(None, ge=1, le=_MAX_TOKENS, description="Read only so many of the prompt's tokens.")
    typical_p: float | None = Field(None, gt=0, le=1)
    watermark: Literal[False] | None = Field(None, description="Watermarks are not supported.")


class HubText2Text(TranslationParameters):
    """`summarization` and `translation`. Parameters of the generation stand here, or in `generate_parameters`."""

    generate_parameters: dict[str, Any] | None = Field(None, description="Parameters of the generation.")
    truncation: bool | Literal["do_not_truncate", "longest_first", "only_first", "only_second"] | None = Field(  # type: ignore[assignment]
        None, description="Whether a text is cut that is longer than the tokenizer's limit."
    )


class HubSimilarity(Parameters):
    """`sentence-similarity`, as TEI has it."""

    prompt_name: Text | None = Field(None, description="Which of a sentence-transformers model's prompts to use.")
    truncate: bool | None = Field(None, description="Cut a text that is longer than the model reads.")
    truncation_direction: Literal["right", "Right"] | None = None
    dimensions: int | None = Field(None, ge=1, description="Keep only so many numbers of each vector, from its start.")


class HubFeatures(HubSimilarity):
    """`feature-extraction`, as TEI has it; clients send these parameters beside the inputs."""

    normalize: bool | None = Field(
        None, description="Scale each vector to length 1; otherwise vectors stay as the model makes them."
    )
    encoding_format: Literal["float"] | None = None


class HubTableQuestionAnswering(TableQuestionAnsweringParameters):
    """`table-question-answering`."""

    model: Text | None = Field(None, description="The requested address, which `huggingface_hub` sends too.")
    padding: Literal["do_not_pad"] | None = Field(None, description="A table is read alone, without padding.")


PUBLISHED: Mapping[str, type[Parameters]] = MappingProxyType(
    {
        **TASK_PARAMETERS,
        "text-generation": HubTextGeneration,
        "text2text-generation": HubText2Text,
        "summarization": HubText2Text,
        "translation": HubText2Text,
        "table-question-answering": HubTableQuestionAnswering,
        "feature-extraction": HubFeatures,
        "sentence-similarity": HubSimilarity,
    }
)


class OneText(Parameters):
    """The input of text generation."""

    inputs: AnyText


class SomeTexts(Parameters):
    """The texts to compute vectors of."""

    inputs: AnyText | Annotated[list[AnyText], Field(min_length=1)]


class Compared(Parameters):
    """Texts to compare, the first with all others."""

    source_sentence: AnyText
    sentences: list[AnyText]


class ComparedTexts(Parameters):
    """A body with texts to compare."""

    inputs: Compared = Field(strict=False)


class TaskQuery(Parameters):
    """The task to run."""

    task: str | None = Field(None, description="A task that the model can do; its own task where this is left out.")


class HubOptions(Parameters):
    """Options of the hosted service; this server always waits for the model and stores no answers."""

    wait_for_model: Literal[True] | None = None
    use_cache: bool | None = None


class HubBody(Fields):
    """Inputs for a model's task."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    inputs: Any = Field(description="One input of the task, or a list of them.")
    parameters: dict[str, Any] | None = Field(
        None, description="The task's parameters, as Hugging Face publishes them."
    )
    options: HubOptions | None = Field(None, strict=False)
    stream: bool | None = Field(None, description="Text generation only: one event for each token.")


class HubAnswer(BaseModel):
    """The task's answer, in the form that Hugging Face publishes for each task."""

    model_config = {**streaming("TGI's event for each token; text generation only."), "extra": "allow"}


class EndpointHealth(Answer):
    """The model accepts requests."""

    status: Literal["ok"]


class EndpointInfo(Answer):
    """A model's facts and limits in TGI's form. Facts that need a load are null."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    model_sha: str | None = Field(description="The commit of its repository.")
    model_dtype: str | None = Field(description="Type of the weights in memory.")
    model_device_type: str
    model_pipeline_tag: str | None = Field(description="The model's own task.")
    max_concurrent_requests: int = Field(description="Requests that may run or wait; one more is refused.")
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int | None = Field(description="The same as max_input_tokens, under its older name.")
    max_input_tokens: int | None
    max_total_tokens: int | None = Field(description="Prompt and new tokens together.")
    router: str
    version: str
    sha: None
    docker_label: None
