"""The contract on preflight as pydantic models: a model before it is loaded, and the models in the models folder."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .schemas import Answer, Strict


class PreflightQuery(Strict):
    """The revision and file to inspect; a registered model's own where they are left out."""

    revision: str | None = Field(None, description="A branch, tag or commit of the repository.", min_length=1)
    gguf_file: str | None = Field(None, description="The file that holds the weights as GGUF.", min_length=1)


class WeightFiles(BaseModel):
    """The files of the weights."""

    count: int
    names: list[str]


class Details(BaseModel):
    """Facts from config, tokenizer and the headers of the weights; unknown ones are null."""

    model_config = ConfigDict(protected_namespaces=())

    reachable: bool = Field(description="Whether its files could be read.")
    problem: str | None = Field(description="Why it cannot be inspected or loaded, and what to do; null if it can.")
    source: Literal["local", "cache", "hub"] | None = Field(description="Where: the models folder, the cache, the Hub.")
    commit: str | None = Field(description="Commit of the repository; null where there is none.")
    architecture: str | None = Field(description="Class of the model; of a GGUF file its architecture.")
    config_type: str | None = Field(description="Kind of model: `model_type` in config.json.")
    known: bool | None = Field(description="Whether the installed transformers has this kind; null without it.")
    model_type: str | None = Field(description="The type to register it as; null where that is unknown.")
    tasks: list[str] = Field(description="Tasks that it can do; none where that is unknown.")
    context_length: int | None = Field(description="Tokens that it can read.")
    parameters: int | None = Field(description="Number of parameters, by the headers of its files.")
    weights_bytes: int | None = Field(description="Size of the weights' files.")
    dtype: str | None = Field(description="Type of most of the weights.")
    dtypes: dict[str, int] = Field(description="Bytes of the weights by type, the largest first.")
    quantized: str | None = Field(description="How its maker quantized it, such as `gptq`.")
    chat_template: bool = Field(description="Whether it has a chat template.")
    tools: bool = Field(description="Whether its chat template uses tools.")
    needs_remote_code: bool = Field(description="Whether it runs only with Python code of its repository.")
    missing_packages: list[str] = Field(description="Python packages that it needs and that are not installed.")
    install: str | None = Field(description="The command that installs them.")
    embedding: bool = Field(description="Whether it is a sentence-transformers model.")
    adapter: str | None = Field(default=None, description="Base model of a LoRA adapter; absent for others.")
    adapters: dict[str, str | None] | None = Field(
        default=None, description="For each registered adapter, why it cannot be used, or null."
    )
    gguf_files: list[str] | None = Field(
        default=None, description="Its GGUF files, of one in parts the first; absent if there are none."
    )
    files: WeightFiles


class PreflightAnswer(Answer):
    """Facts about a model."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    details: Details


class AvailableQuery(Strict):
    """How much to list."""

    details: Literal["true", "false"] = Field("false", description="Whether to include each model's details.")


class AvailableModel(BaseModel):
    """A model in the models folder."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    registered: bool
    model_type: str | None = Field(description="The type to register it as; null where that is unknown.")
    name: str = Field(description="A display name to register it with.")
    bytes: int = Field(description="Size of all its files.")
    gguf_files: list[str]
    problem: str | None = Field(description="Why it cannot be loaded; null if it can.")
    adapter: str | None = Field(default=None, description="Base model of a LoRA adapter; absent for others.")
    details: Details | None = Field(default=None, description="Present if the query asks for details.")


class AvailableAnswer(Answer):
    """The models in the models folder, sorted by id."""

    models: list[AvailableModel]
    count: int
